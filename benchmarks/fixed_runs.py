"""The parameters that a fixed set of short runs ends in: `python -m benchmarks.fixed_runs > before.txt`.

A change that shall not touch arithmetic is proven by the same hashes before and after it:

    python -m benchmarks.fixed_runs > before.txt
    (the change)
    python -m benchmarks.fixed_runs --compare before.txt

Every run is `distbp train` with two workers.  They cover each model, each update rule, default and large
micro-batches, and the networks of the speed table.  The hashes depend on processor, NumPy and BLAS kernel,
so only those of one machine compare; the first line, which is compared too, names the last two.
Exit code 1 says that something differs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from distbp.bench.workloads import SYMBOLS, WORKLOADS, make_data, options

REPOSITORY = Path(__file__).resolve().parents[1]
RULES = ("adagrad", "adam", "adamw", "lamb", "lars", "lion", "rmsprop")


def main() -> None:
    """Run everything that was asked for, and print or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="only runs with TEXT in their names")
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--compare", metavar="FILE", help="compare with what was printed before")
    arguments = parser.parse_args()
    before = dict(map(split, Path(arguments.compare).read_text().splitlines())) if arguments.compare else None
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="distbp-fixed-") as name:
        folder = Path(name)
        for run, words in runs(folder).items():
            if arguments.only in run:
                digest, where = train(folder, run, words, arguments.nproc)
                if "environment" not in found:
                    found["environment"] = where
                    print(f"environment {where}", flush=True)
                found[run] = digest
                print(f"{run} {digest}", flush=True)
    if before is not None:
        differing = [run for run, digest in found.items() if before.get(run) != digest]
        for run in differing:
            print(f"differs: {run}: {before.get(run, 'not there')} before", file=sys.stderr)
        print(f"{len(found) - len(differing)} of {len(found)} lines are the same", file=sys.stderr)
        sys.exit(1 if differing else 0)


def split(line: str) -> tuple[str, str]:
    """Name and hash of a line."""
    name, _, rest = line.partition(" ")
    return name, rest


def runs(folder: Path) -> dict[str, list[str]]:
    """Name -> the words behind `distbp train`; their data are made in `folder`."""
    digits = ["digits", "-o", "train.max_steps=25"]
    table = {f"mlp-{rule}": [*digits, "-o", f"optimizer.name={rule}"] for rule in RULES}
    table |= {
        "mlp": digits,
        "mlp-one-micro-batch-a-worker": [*digits, "-o", "train.micro_batch=32"],
        "mlp-odd": [*digits, "-o", "train.batch_size=60", "-o", "train.micro_batch=5"],
        "mlp-nesterov": [*digits, "-o", "optimizer.nesterov=true", "-o", "optimizer.weight_decay=0.01"],
        "mlp-average": [*digits, "-o", "optimizer.average=0.99", "-o", "optimizer.clip_norm=0.5"],
        "mlp-smoothing": [*digits, "-o", "loss.label_smoothing=0.1"],
        "linear": [*digits, "-o", "model.name=linear"],
        "bells": ["bells", "-o", "data.samples=400", "-o", "train.max_steps=4"],
        "bells-cents": ["bells-cents", "-o", "data.samples=400", "-o", "train.max_steps=4"],
    }
    for activation in ("gelu", "leaky_relu", "sigmoid", "silu", "tanh"):
        table[f"mlp-{activation}"] = [*digits, "-o", f"model.activation={activation}"]
    for model in ("lenet", "cnn", "resnet20"):
        short = ["-o", "train.max_steps=6", "-o", "data.augment_crop=1", "-o", "data.augment_flip=true"]
        table[model] = ["digits", "-o", f"model.name={model}", *short]
    table |= series(folder) | text(folder) | mixed_table(folder)
    for workload in WORKLOADS.values():
        steps = 2 if workload.name in ("charlm", "resnet20", "cnn") else 5
        words = [str(make_data(workload, folder)), *options(workload, steps)]
        table[workload.name] = words
        table[f"{workload.name}-half"] = [*words, "-o", f"train.micro_batch={workload.batch // 2}"]
    return table


def series(folder: Path) -> dict[str, list[str]]:
    """Two recurrent networks on noise."""
    rng = np.random.default_rng(1)
    path = folder / "series.npz"
    np.savez(path, x=rng.standard_normal((256, 12, 5), np.float32), y=rng.integers(0, 4, 256))
    words = [str(path), "-o", "train.max_steps=8"]
    return {name: [*words, "-o", f"model.name={name}"] for name in ("gru", "lstm")}


def text(folder: Path) -> dict[str, list[str]]:
    """A small transformer on random symbols."""
    codes = np.random.default_rng(2).integers(0, 65, 8193)
    path = folder / "text.txt"
    path.write_text("".join(SYMBOLS[code] for code in codes.tolist()))
    return {"transformer": [str(path), "-o", "train.max_steps=5", "-o", "train.batch_size=16"]}


def mixed_table(folder: Path) -> dict[str, list[str]]:
    """A table with names and numbers, for classes and for numbers."""
    rng = np.random.default_rng(3)
    rows = ["colour,size,weight,price"]
    for row in range(300):
        size, weight = rng.standard_normal(2).round(3)
        price = (size * 2 - weight).round(3)
        rows.append(f"{['red', 'green', 'blue'][row % 3]},{size},{weight},{price}")
    path = folder / "table.csv"
    path.write_text("\n".join(rows) + "\n")
    words = [str(path), "--target", "price", "-o", "train.max_steps=20"]
    numbers = {f"table-{name}": [*words, "-o", f"model.name={name}"] for name in ("tabular", "mlp")}
    return numbers | {"table-classes": [str(path), "--target", "colour", "-o", "train.max_steps=20"]}


def train(folder: Path, run: str, words: list[str], nproc: int) -> tuple[str, str]:
    """Train; return the hash of the parameters, and what else it depends on."""
    out = folder / f"run-{run}"
    command = [sys.executable, "-m", "distbp.cli.main", "train", *words, "--nproc", str(nproc), "--out", out]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{run}: exit code {done.returncode}\n{done.stderr}")
    result = json.loads((out / "result.json").read_text())
    blas = result["blas"]
    where = (
        f"{platform.machine()}, NumPy {np.__version__}, {blas['name']} {blas['version']} ({blas['kernel']})"
    )
    return result["parameters_sha256"], where


if __name__ == "__main__":
    main()
