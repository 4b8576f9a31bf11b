"""Every layer, in shapes that a contract should hold for: a new layer adds a line here and is tested.

Legend: name -> (how to make the layer, shape of a sample).  Sizes include 1 and primes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distbp import nn
from distbp.nn import Array, Context, Layer, Parameter, Shape

CODES = 11
"""Codes that examples with an Embedding take."""


def banded(positions: int) -> list[list[bool]]:
    """Return a mask with which a position sees those at most two away, and some see the first one."""
    return [[abs(i - j) <= 2 or (j == 0 and i % 3 == 0) for j in range(positions)] for i in range(positions)]


LAYERS: dict[str, tuple[Callable[[], Layer], Shape]] = {
    "linear": (lambda: nn.Linear(5), (7,)),
    "linear without bias": (lambda: nn.Linear(3, bias=False), (4,)),
    "linear of one output": (lambda: nn.Linear(1), (17,)),
    "linear of one input": (lambda: nn.Linear(6), (1,)),
    "linear, wide": (lambda: nn.Linear(64), (130,)),
    "as image": (nn.AsImage, (3, 4)),
    "as image with channels": (nn.AsImage, (3, 4, 2)),
    "flatten": (nn.Flatten, (2, 3, 4)),
    "flatten a scalar": (nn.Flatten, ()),
    "relu": (nn.ReLU, (13,)),
    "leaky relu": (lambda: nn.LeakyReLU(0.1), (13,)),
    "tanh": (nn.Tanh, (3, 5)),
    "sigmoid": (nn.Sigmoid, (13,)),
    "gelu": (nn.GELU, (13,)),
    "silu": (nn.SiLU, (13,)),
    "softmax": (nn.Softmax, (11,)),
    "softmax of images": (nn.Softmax, (3, 4)),
    "reshape": (lambda: nn.Reshape(4, -1), (2, 3, 2)),
    "transpose": (lambda: nn.Transpose(1, 2, 0), (3, 4, 5)),
    "conv2d": (lambda: nn.Conv2d(5, 3, padding="same"), (7, 6, 3)),
    "conv2d of one number": (lambda: nn.Conv2d(1, 1), (1, 1, 1)),
    "conv2d without padding or bias": (lambda: nn.Conv2d(3, 2, bias=False), (5, 4, 2)),
    "conv2d, stride": (lambda: nn.Conv2d(4, 3, stride=2, padding=1), (8, 7, 3)),
    "conv2d, stride beyond the window": (lambda: nn.Conv2d(4, 1, stride=3), (8, 7, 3)),
    "conv2d, groups": (lambda: nn.Conv2d(6, 3, padding=1, groups=2), (6, 5, 4)),
    "conv2d, groups and stride": (lambda: nn.Conv2d(6, 3, stride=2, padding=1, groups=3), (6, 5, 3)),
    "conv2d of each channel": (lambda: nn.Conv2d(5, 3, padding=1, groups=5), (6, 5, 5)),
    "conv2d, oblong": (lambda: nn.Conv2d(3, (1, 4), stride=(2, 1), padding=(0, 2)), (5, 6, 2)),
    "conv2d, padding beyond the window": (lambda: nn.Conv2d(3, 2, padding=3), (4, 4, 2)),
    # Large enough for stacks of rows in a product and several parts in a micro-batch of 16.
    "conv2d, wide": (lambda: nn.Conv2d(16, 3, padding=1), (16, 16, 16)),
    "conv1d": (lambda: nn.Conv1d(5, 4, padding=2), (9, 3)),
    "conv1d, stride and groups": (lambda: nn.Conv1d(4, 3, stride=2, groups=2), (9, 6)),
    "max pool 2d": (lambda: nn.MaxPool2d(2), (6, 4, 3)),
    "max pool 2d, odd": (lambda: nn.MaxPool2d((2, 3)), (7, 7, 2)),
    "max pool 2d, overlapping": (lambda: nn.MaxPool2d(3, stride=2), (7, 6, 2)),
    "max pool 1d": (lambda: nn.MaxPool1d(2), (7, 3)),
    "avg pool 2d": (lambda: nn.AvgPool2d(2), (6, 5, 3)),
    "avg pool 2d, overlapping": (lambda: nn.AvgPool2d(3, stride=1), (5, 5, 2)),
    "avg pool 1d": (lambda: nn.AvgPool1d(3), (7, 3)),
    "global avg pool": (nn.GlobalAvgPool, (5, 4, 3)),
    "batch norm of images": (nn.BatchNorm, (4, 4, 3)),
    "batch norm of sequences": (nn.BatchNorm, (7, 5)),
    "batch norm of vectors": (nn.BatchNorm, (6,)),
    "dropout": (lambda: nn.Dropout(0.4), (5, 7)),
    "dropout of nothing": (lambda: nn.Dropout(0.0), (5,)),
    "sequential": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(7), nn.Tanh(), nn.Linear(3)), (2, 3)),
    "sequential of nothing": (nn.Sequential, (4,)),
    "residual": (lambda: nn.Residual(nn.Sequential(nn.Linear(6), nn.GELU(), nn.Linear(5))), (5,)),
    "residual with a shortcut": (
        lambda: nn.Residual(nn.Sequential(nn.Linear(6), nn.GELU(), nn.Linear(3)), nn.Linear(3)),
        (5,),
    ),
    "parallel": (lambda: nn.Parallel(nn.Linear(3), nn.Sequential(nn.Linear(4), nn.Tanh()), nn.ReLU()), (5,)),
    "nested": (
        lambda: nn.Sequential(
            nn.Linear(6),
            nn.Residual(nn.Parallel(nn.Linear(2), nn.Sequential(nn.Sigmoid(), nn.Linear(4)))),
            nn.LeakyReLU(),
            nn.Linear(2),
        ),
        (5,),
    ),
    "mlp": (lambda: nn.mlp(outputs=10, hidden=(64, 32)), (8, 8)),
    "linear on rows": (lambda: nn.Linear(5), (3, 7)),
    "linear on rows of images": (lambda: nn.Linear(2, bias=False), (2, 3, 5)),
    "embedding": (lambda: nn.Embedding(CODES, 5), (7,)),
    "embedding of one code": (lambda: nn.Embedding(CODES, 1), ()),
    "positional embedding": (nn.PositionalEmbedding, (3, 4)),
    "layer norm": (nn.LayerNorm, (13,)),
    "layer norm on rows": (nn.LayerNorm, (3, 64)),
    "rms norm": (nn.RMSNorm, (13,)),
    "rms norm on rows": (nn.RMSNorm, (3, 64)),
    "attention": (lambda: nn.MultiHeadAttention(2), (5, 6)),
    "attention to one position": (lambda: nn.MultiHeadAttention(1), (1, 3)),
    "causal attention": (lambda: nn.MultiHeadAttention(3, causal=True), (7, 12)),
    "causal attention in blocks": (lambda: nn.MultiHeadAttention(1, causal=True), (131, 4)),
    "masked attention in blocks": (lambda: nn.MultiHeadAttention(2, mask=banded(150)), (150, 4)),
    "masked causal attention": (lambda: nn.MultiHeadAttention(2, causal=True, mask=banded(5)), (5, 4)),
    "gru": (lambda: nn.GRU(4), (5, 3)),
    "gru of numbers": (lambda: nn.GRU(3), (4,)),
    "gru, last state": (lambda: nn.GRU(4, last=True), (5, 3)),
    "gru of one step": (lambda: nn.GRU(1), (1, 1)),
    "lstm": (lambda: nn.LSTM(4), (5, 3)),
    "lstm, last state": (lambda: nn.LSTM(4, last=True), (5, 3)),
    "lstm of one step": (lambda: nn.LSTM(1, last=True), (1, 1)),
    "recurrent layers": (
        lambda: nn.Sequential(nn.GRU(6), nn.LSTM(5), nn.LayerNorm(), nn.GRU(3, last=True), nn.Linear(2)),
        (6, 2),
    ),
    "sequences": (
        lambda: nn.Sequential(
            nn.Embedding(CODES, 8),
            nn.PositionalEmbedding(),
            nn.Residual(nn.Sequential(nn.LayerNorm(), nn.MultiHeadAttention(2, causal=True))),
            nn.Residual(nn.Sequential(nn.RMSNorm(), nn.Linear(12), nn.GELU(), nn.Linear(8))),
            nn.Linear(CODES),
        ),
        (6,),
    ),
    "pairs": (nn.FeatureCross, (6,)),
    "one pair": (nn.FeatureCross, (2,)),
    "triples": (lambda: nn.FeatureCross(3), (7,)),
    "pairs of rows": (nn.FeatureCross, (3, 5)),
    "column embedding": (lambda: nn.ColumnEmbedding([(1, 5), (3, 2)], 4), (6,)),
    "column embedding of codes alone": (lambda: nn.ColumnEmbedding([(0, 3), (1, 7)], 1), (2,)),
    "column embedding of numbers": (lambda: nn.ColumnEmbedding([], 1), (3,)),
    "log spectrogram": (lambda: nn.LogSpectrogram(16, 7, 5, lowest=0.1, cycles=2), (40,)),
    "log spectrogram of one window": (lambda: nn.LogSpectrogram(8, 8, 3, lowest=0.1), (8,)),
    "tabular": (lambda: nn.tabular(outputs=2, codes=[(0, 4), (2, 3)], hidden=(6,), width=3), (4,)),
    "tabular without products": (lambda: nn.tabular(outputs=1, cross=0, hidden=()), (4,)),
    "audio": (
        lambda: nn.audio(outputs=3, hidden=(5,), front=nn.LogSpectrogram(16, 8, 24, lowest=0.05, cycles=3)),
        (40,),
    ),
    "transformer": (lambda: nn.transformer(outputs=CODES, layers=2, heads=2, width=8), (6,)),
    "gru network": (lambda: nn.build_model("gru", outputs=2, hidden=(5, 4)), (6, 3)),
    "lstm network": (lambda: nn.build_model("lstm", outputs=1, hidden=(5,)), (6,)),
    "linear model": (lambda: nn.build_model("linear", outputs=3), (2, 3)),
    "lenet": (lambda: nn.lenet(outputs=10, hidden=(20,)), (8, 8)),
    "cnn": (lambda: nn.cnn(outputs=3, hidden=(12,)), (8, 9, 3)),
    "resnet": (lambda: nn.resnet(outputs=3, blocks=1, widths=(3, 4, 5)), (8, 8, 2)),
}

TRAINING = Context(training=True)

NEED_TWO_SAMPLES = {"batch norm of vectors"}
"""One sample has no variance, and the layer refuses it."""

KNOW_THE_MODE = {
    "audio",
    "dropout",
    "lenet",
    "resnet",
    *(name for name in LAYERS if name.startswith("batch norm")),
}
"""Evaluation is meant to give something else than training."""


def network_of(name: str) -> nn.Network:
    """Return a network of the example `name` with a loss that takes any output shape."""
    make, input_shape = LAYERS[name]
    return nn.Network(make(), input_shape, nn.MeanSquaredError())


def start(network: nn.Network, dtype: type = np.float32) -> Array:
    """Give the network parameters away from zero and return their vector."""
    vector = np.empty(network.layout.size, dtype)
    network.initialise(vector, 3)
    vector += 0.1 * np.random.default_rng(3).normal(size=vector.size)
    network.use(network.views(vector))
    averages = np.empty(network.statistics_layout.size)
    network.begin_statistics(averages)
    network.use_statistics(averages)
    return vector


def samples_for(network: nn.Network, num_micro_batches: int, micro_batch: int, seed: int = 1) -> Array:
    """Return samples that the network takes, (G, b, *input_shape): normal values, codes, or both."""
    if not network.layer.takes_codes:
        x = random_stack(num_micro_batches, micro_batch, network.input_shape, seed)
        for column, rows in columns_of_codes(network.layer):
            x[..., column] = np.random.default_rng(seed).integers(0, rows, size=x.shape[:2])
        return x
    shape = (num_micro_batches, micro_batch, *network.input_shape)
    return np.random.default_rng(seed).integers(0, CODES, size=shape)


def columns_of_codes(layer: Layer) -> tuple[tuple[int, int], ...]:
    """Return the pairs (column, rows) of the first ColumnEmbedding in a layer."""
    if isinstance(layer, nn.ColumnEmbedding):
        return layer.codes
    return next((found for _, child in layer.children() if (found := columns_of_codes(child))), ())


def random_stack(num_micro_batches: int, micro_batch: int, shape: Shape, seed: int = 1) -> Array:
    """Return float32 standard normal values of shape (G, b, *shape)."""
    values = np.random.default_rng(seed).normal(size=(num_micro_batches, micro_batch, *shape))
    return values.astype(np.float32)


class Recorder:
    """A sink that keeps what each leaf wrote, asked in one piece and micro-batch by micro-batch."""

    def __init__(self, num_micro_batches: int) -> None:
        self.num_micro_batches = num_micro_batches
        self.whole: dict[str, Array] = {}
        self.single: dict[str, Array] = {}
        self.order: list[str] = []

    def __call__(self, parameter: Parameter, leaf: nn.Leaf) -> None:
        G = self.num_micro_batches
        self.order.append(parameter.name)
        # NaN shows a leaf that does not write everything.
        whole = np.full((G, *parameter.shape), np.nan, parameter.value.dtype)
        single = np.full((G, *parameter.shape), np.nan, parameter.value.dtype)
        leaf(0, G, whole)
        for g in range(G):
            leaf(g, g + 1, single[g : g + 1])
        self.whole[parameter.name] = whole
        self.single[parameter.name] = single


def same_bits(a: Array, b: Array) -> bool:
    """Return whether two arrays have the same shape, dtype and bits."""
    word = {4: np.uint32, 8: np.uint64}[a.dtype.itemsize]
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(np.array_equal(np.ascontiguousarray(a).view(word), np.ascontiguousarray(b).view(word)))
