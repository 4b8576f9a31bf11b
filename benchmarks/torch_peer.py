"""One process of a PyTorch training that does what `distbp train` does: run by `benchmarks.peers`.

    PYTHON torch_peer.py SPECIFICATION.json

with RANK and WORLD_SIZE in the environment.  It needs torch and NumPy and nothing of distbp.  Samples lie in
memory, are shuffled each epoch, and every step counts its loss and its right answers.  Rank 0 writes the
milliseconds of every step, and when the first one was done, into the file that the specification names.
"""

from __future__ import annotations

import json
import os
import sys
import time
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn import functional


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm beside a shortcut."""

    def __init__(self, before, width, stride):
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(before, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or before != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, x):
        """The sum of both ways, rectified."""
        return functional.relu(self.inner(x) + self.shortcut(x), inplace=True)


class TransformerBlock(nn.Module):
    """Attention and a two-layer network, each behind a norm and beside a shortcut."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x):
        """Causal attention by torch's own fused function, then the network."""
        batch, length, width = x.shape
        parts = self.into(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """The decoder-only language model."""

    def __init__(self, outputs, length, layers, heads, width):
        super().__init__()
        self.embedding = nn.Embedding(outputs, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*[TransformerBlock(width, heads) for _ in range(layers)])
        self.norm, self.last = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x):
        """Scores of the symbol behind each position, one row for each."""
        return self.last(self.norm(self.blocks(self.embedding(x) + self.positions))).flatten(0, 1)


def build(shape, outputs, model):
    """The network that distbp builds of the same options."""
    options = {key: value for key, value in model.items() if key != "name"}
    if model["name"] == "mlp":
        widths = [int(np.prod(shape)), *options["hidden"]]
        layers = [nn.Flatten()]
        for before, width in pairwise(widths):
            layers += [nn.Linear(before, width), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.Linear(widths[-1], outputs))
    if model["name"] == "cnn":
        side, hidden = shape[0] // 4, options["hidden"][0]
        return nn.Sequential(
            *[nn.Conv2d(1, 32, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(inplace=True)],
            *[nn.Conv2d(32, 64, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(inplace=True)],
            *[nn.Flatten(), nn.Linear(64 * side * side, hidden), nn.ReLU(inplace=True)],
            nn.Linear(hidden, outputs),
        )
    if model["name"] == "resnet20":
        layers, before = (
            [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)],
            16,
        )
        for width in (16, 32, 64):
            for _ in range(3):
                layers.append(Block(before, width, 1 if width == before else 2))
                before = width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, outputs))
    return Transformer(outputs, shape[0], **options)


def load(path, shape):
    """Samples and labels as tensors; images are (N, C, H, W) with the channels last in memory."""
    if path.endswith(".txt"):
        with open(path) as file:
            characters = np.array(list(file.read()))
        codes = np.unique(characters, return_inverse=True)[1]
        rows = (len(codes) - 1) // shape[0]
        x, y = (codes[low : low + rows * shape[0]].reshape(rows, -1) for low in (0, 1))
        return torch.from_numpy(x.copy()), torch.from_numpy(y.copy())
    with np.load(path) as file:
        x, y = file["x"].astype(np.float32), file["y"].astype(np.int64)
    x = torch.from_numpy((x - x.mean()) / x.std())
    if len(shape) == 2:
        x = x.unsqueeze(1)
    elif len(shape) == 3:
        x = x.permute(0, 3, 1, 2)
    return x, torch.from_numpy(y)


def train(specification, rank, world):
    """Train; return wall and processor seconds of every step, when the first was done, and the size."""
    x, y = load(specification["data"], specification["shape"])
    torch.manual_seed(0)
    network = build(specification["shape"], specification["outputs"], specification["model"])
    if x.dim() == 4:
        network = network.to(memory_format=torch.channels_last)
    count = sum(parameter.numel() for parameter in network.parameters())
    optimizer = torch.optim.SGD(
        network.parameters(), lr=0.01, momentum=0.9, fused=specification.get("fused") or None
    )
    forward = network
    if world > 1:
        forward = nn.parallel.DistributedDataParallel(
            network, static_graph=True, gradient_as_bucket_view=True
        )
    if specification.get("compile"):
        forward = torch.compile(forward)
    share = specification["batch"] // world
    order, at, loss_sum, correct = None, len(x), 0.0, 0
    times, cpu, first = [], [], None
    for step in range(specification["steps"]):
        begun, cpu_begun = time.perf_counter(), time.process_time()
        if at + specification["batch"] > len(x):
            order, at = torch.randperm(len(x), generator=torch.Generator().manual_seed(step)), 0
        mine = order[at + rank * share : at + (rank + 1) * share]
        at += specification["batch"]
        samples, labels = x[mine], y[mine].flatten()
        optimizer.zero_grad()
        scores = forward(samples)
        loss = functional.cross_entropy(scores, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item()
        correct += (scores.argmax(1) == labels).sum().item()
        times.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - cpu_begun)
        first = first or time.time()
    return times, cpu, first, count


def main():
    """Join the others, train, and let rank 0 write what it found."""
    with open(sys.argv[1]) as file:
        specification = json.load(file)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(specification["threads"])
    if world > 1:
        store = "file://" + specification["out"] + ".meeting"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    times, cpu, first, count = train(specification, rank, world)
    if world > 1:
        torch.distributed.destroy_process_group()
    if rank == 0:
        capability = torch.backends.cpu.get_cpu_capability()
        words = torch.__config__.show().splitlines()
        mkl = ", ".join(
            line.strip(" -").split(" for ")[0].split(" (Git")[0]
            for line in words
            if "Math Kernel" in line or "MKL-DNN" in line[:40]
        )
        found = {
            "step_s": times,
            "cpu_s": cpu,
            "threads": specification["threads"],
            "first_step_at": first,
            "num_parameters": count,
        }
        found |= {"torch": torch.__version__, "blas": f"{mkl}, {capability}"}
        with open(specification["out"], "w") as file:
            json.dump(found, file)


if __name__ == "__main__":
    main()
