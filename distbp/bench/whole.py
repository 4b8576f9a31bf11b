"""`distbp bench checkpoint` and `startup`: what happens around steps, beside disk and interpreter."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from distbp.bench.training import command, first_step_s

__all__ = ["measure_checkpoint", "measure_startup"]

STATE_BYTES = (1 << 20, 16 << 20, 160 << 20)
PASS = "pass"
NUMPY = "import numpy"


def measure_checkpoint(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Return the ms of saving and of loading a state, durable and verified, in `folder`.

    The bound is writing the same bytes to a file there and waiting until they are on the disk, or reading
    them back: no hashes, one file.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="distbp-bench-", dir=folder) as name:
        for size in STATE_BYTES[: 1 if quick else None]:
            found.append(_checkpoint(Path(name), size, 3 if quick else 5))
    return found


def _checkpoint(folder: Path, size: int, rounds: int) -> dict[str, Any]:
    """Measure one size; what distbp does and the bare file alternate."""
    from distbp import checkpoint

    state = np.random.default_rng(0).standard_normal(size // 4, np.float32)
    plain = folder / "plain"
    times: dict[str, list[float]] = {"save": [], "write": [], "load": [], "read": []}
    for number in range(rounds):
        snapshot = checkpoint.Snapshot(number + 1, {"parameters/w": state}, {})
        times["write"].append(_seconds(_write, plain, state))
        begun = time.perf_counter()
        saved = checkpoint.save(folder, snapshot, keep=2)
        times["save"].append(time.perf_counter() - begun)
        times["read"].append(_seconds(plain.read_bytes))
        times["load"].append(_seconds(checkpoint.load, saved))
        plain.unlink()
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    entry = {"bytes": size} | {f"{name}_ms": value for name, value in medians.items()}
    return entry | {
        "save_ratio": medians["write"] / medians["save"],
        "load_ratio": medians["read"] / medians["load"],
    }


def _write(path: Path, array: Any) -> None:
    """Write the bytes of an array, and wait until they are on the disk."""
    with open(path, "wb") as file:
        file.write(memoryview(array).cast("B"))
        file.flush()
        os.fsync(file.fileno())


def measure_startup(folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Return the seconds from a command to its answer; the bound is a bare interpreter, or one with NumPy.

    `distbp train digits` counts until its first step is recorded: data read, workers started and compared.
    """
    rounds = 2 if quick else 7
    times: dict[str, list[float]] = {PASS: [], NUMPY: [], "--help": [], "train digits": []}
    with tempfile.TemporaryDirectory(prefix="distbp-bench-", dir=folder) as name:
        for _ in range(rounds):
            for code in (PASS, NUMPY):
                times[code].append(_seconds(_quiet, [sys.executable, "-c", code]))
            times["--help"].append(_seconds(_quiet, [*command(), "--help"]))
            times["train digits"].append(first_step_s(["digits", "-o", "train.max_steps=20"], Path(name)))
    medians = {what: statistics.median(values) for what, values in times.items()}
    return [
        {"command": f"distbp {what}", "s": medians[what], "least_s": min(times[what])}
        | {"bound_s": medians[bound], "ratio": medians[bound] / medians[what]}
        for what, bound in (("--help", PASS), ("train digits", NUMPY))
    ]


def _quiet(words: list[str]) -> None:
    """Run a command that must succeed, without its output."""
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    """Return how long a call takes."""
    begun = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - begun
