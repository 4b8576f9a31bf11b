"""Training on an array that is larger than the memory: `sudo python -m benchmarks.larger_than_memory FOLDER`.

Makes 2,000,000 samples of 784 float32 (6.3 GB) in FOLDER, which is on the disk that is measured, and trains
an mlp 784-1024-1024-10, batch 256, inside a control group of 2 GB (v1; that needs root): with samples in
blocks, and fully shuffled.  Beside them the same without a limit, on as many of the samples as are held in
memory easily.  Rounds alternate; before each the kernel is asked to forget the file.

What counts is `samples_per_second` of the steps.  Before the first step mean and deviation are taken of all
samples, in two passes; `start` is the time until then.  `--raw` leaves them out (data.normalize=none), which
also leaves nothing of the file in the page cache.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

GROUP = Path("/sys/fs/cgroup/memory/distbp-benchmark")
FEATURES = 784
HELD = 150_000
WAYS = {
    "in memory": ("small", False, []),
    "disk, by blocks": ("large", True, ["data.on_disk=true"]),
    "disk, full shuffle": ("large", True, ["data.on_disk=true", "data.shuffle=full"]),
}


def main() -> None:
    """Make the data, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--samples", type=int, default=2_000_000)
    parser.add_argument("--limit-gb", type=float, default=2.0)
    parser.add_argument("--nproc", type=int, default=2)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--raw", action="store_true")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    arguments = parser.parse_args()
    make(arguments.folder / "large", arguments.samples)
    make(arguments.folder / "small", HELD)
    rates: dict[str, list[float]] = {way: [] for way in arguments.ways}
    for number in range(arguments.rounds):
        for way in arguments.ways:
            rate, start = measure(way, arguments, number)
            rates[way].append(rate)
            print(f"{way:20} round {number}: {rate:9,.0f} samples/s, start {start:5.0f} s", flush=True)
    for way, found in rates.items():
        share = statistics.median(found) / statistics.median(rates[arguments.ways[0]])
        print(f"{way:20} median {statistics.median(found):9,.0f} samples/s, {share:.2f} of the first")


def make(folder: Path, samples: int) -> None:
    """Write x.npy and y.npy piece by piece, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "y.npy").exists():
        return
    generator = np.random.default_rng(0)
    header = {"descr": "<f4", "fortran_order": False, "shape": (samples, FEATURES)}
    with (folder / "x.npy").open("wb") as stream:
        np.lib.format.write_array_header_1_0(stream, header)
        for start in range(0, samples, 10_000):
            count = min(10_000, samples - start)
            stream.write(generator.standard_normal((count, FEATURES), np.float32).tobytes())
        stream.flush()
        os.fsync(stream.fileno())
    np.save(folder / "y.npy", generator.integers(0, 10, samples))


def measure(way: str, arguments: argparse.Namespace, number: int) -> tuple[float, float]:
    """Train once; return samples a second, and the seconds before the first step."""
    data, limited, settings = WAYS[way]
    folder = arguments.folder / data
    out = arguments.folder / f"run-{os.getpid()}-{way.replace(' ', '-')}-{number}"
    settings = [*settings, "model.hidden=[1024,1024]", "optimizer.lr=0.001", "train.batch_size=256"]
    settings += [f"train.max_steps={arguments.steps}", "data.validation_fraction=0"]
    settings += ["checkpoint.every_seconds=none"]
    settings += ["data.normalize=none"] * arguments.raw
    options = [word for setting in settings for word in ("-o", setting)]
    command = [sys.executable, "-m", "distbp.cli.main", "train", str(folder), *options]
    command += ["--nproc", str(arguments.nproc), "--out", str(out)]
    forget(folder / "x.npy")
    began = time.time()
    with limit(arguments.limit_gb if limited else None) as join:
        done = subprocess.run(command, preexec_fn=join, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result = json.loads((out / "result.json").read_text())
    rate = float(result["samples_per_second"])
    return rate, time.time() - began - arguments.steps * 256 / rate


def forget(path: Path) -> None:
    """Let the kernel drop what it holds of a file."""
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


@contextlib.contextmanager
def limit(gigabytes: float | None) -> Iterator[object]:
    """Make a control group of so much memory, page cache included, and yield what puts a child into it."""
    if gigabytes is None:
        yield None
        return
    GROUP.mkdir(exist_ok=True)
    try:
        (GROUP / "memory.limit_in_bytes").write_text(str(int(gigabytes * 1e9)))
        yield lambda: (GROUP / "tasks").write_text(str(os.getpid()))
        peak = int((GROUP / "memory.max_usage_in_bytes").read_text())
        print(f"{'':20} most memory, page cache included: {peak / 1e9:.2f} GB")
    finally:
        with contextlib.suppress(OSError):
            GROUP.rmdir()


if __name__ == "__main__":
    main()
