"""Start `distbp train` as users do, and read how long its steps took from its own records."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbp.bench.workloads import Workload, make_data, options
from distbp.errors import UserCodeError

__all__ = ["Run", "command", "describe", "first_step_s", "train"]

RUN_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Run:
    """One training: times of a step in ms, phases of rank 0 in ms, and the parameters it ended in."""

    least: float
    median: float
    phases: dict[str, float]
    page_faults: float
    """Of a step of rank 0, median of the records but the first."""
    sha256: str


def train(
    workload: Workload,
    folder: Path,
    *,
    workers: int,
    micro_batch: int | None,
    steps: int,
    batch: int | None = None,
) -> Run:
    """Train `steps` steps with `workers` workers; the first quarter, at most 20, does not count."""
    data = make_data(workload, folder)
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words = [*command(), "train", str(data), *options(workload, steps, micro_batch)]
        if batch is not None:
            words += ["-o", f"train.batch_size={batch}"]
        words += ["--nproc", str(workers), "--out", f"{out}/run"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)
        if done.returncode:
            raise UserCodeError(f"{' '.join(words)} ended with {done.returncode}: {done.stderr.strip()}")
        result = json.loads(Path(out, "run/result.json").read_text())
        lines = Path(out, "run/metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "step_ms" in record]
    least, _, median, _ = result["step_ms_quartiles"]
    faults = statistics.median(record["page_faults"] for record in records[1:] or records)
    return Run(least, median, median_phases(records), faults, result["parameters_sha256"])


def describe(workload: Workload, bucket_kib: int) -> tuple[int, int]:
    """Return the bytes of a workload's gradients, and how many buckets of this size they are cut into."""
    from distbp.exchange import bucket_starts
    from distbp.nn import Network, build_loss, build_model

    options = {key: value for key, value in workload.model.items() if key != "name"}
    model = build_model(workload.model["name"], outputs=workload.outputs, **options)
    layout = Network(model, workload.shape, build_loss("cross_entropy")).layout
    return layout.size * 4, len(bucket_starts(layout.borders(), bucket_kib * 1024 // 4))


def command() -> list[str]:
    """Return how to start this distbp, also where its script is not on the PATH."""
    return [sys.executable, "-m", "distbp.cli.main"]


def median_phases(records: list[dict[str, Any]]) -> dict[str, float]:
    """Return the median over the records, but the first, of the mean time of each phase."""
    steady = [record["step_ms"] for record in records][1:] or [records[0]["step_ms"]]
    return {name: statistics.median(entry[name] for entry in steady) for name in steady[0]}


def first_step_s(words: list[str], folder: Path) -> float:
    """Return the seconds from the start of `distbp train` to the record of its first step."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        records = Path(out, "run/metrics.jsonl")
        begun = time.monotonic()
        process = subprocess.Popen(
            [*command(), "train", *words, "--out", f"{out}/run"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while not (records.exists() and records.stat().st_size):
                if process.poll() is not None or time.monotonic() - begun > RUN_TIMEOUT_S:
                    raise UserCodeError(f"distbp train {' '.join(words)} made no step")
                time.sleep(0.002)
            return time.monotonic() - begun
        finally:
            process.wait(RUN_TIMEOUT_S)
