"""`distbp bench step` and `scaling`: a step of `distbp train` beside the least time that this machine needs.

Where the rest goes: `compute` without its products and bytes, what rank 0 waited for the others, `reduce` and
`update` without their bytes.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

from distbp.bench.bound import Bandwidth, bound, demand, measure_bandwidth, measure_products
from distbp.bench.training import Run, train
from distbp.bench.workloads import Workload
from distbp.environment import available_cores
from distbp.partition import default_micro_batch

__all__ = ["measure_scaling", "measure_steps", "scaling_table", "step_table"]

IN_COMPUTE = ("activations", "samples", "micro-batches")
QUICK = 4


def measure_steps(
    workloads: list[Workload], *, micro_batches: int | None, rounds: int, quick: bool
) -> list[dict[str, Any]]:
    """Measure each workload with a worker on each core, at most two; `micro_batches` None is the default."""
    workers = min(2, available_cores())
    bandwidth = measure_bandwidth(workers)
    found = []
    with tempfile.TemporaryDirectory(prefix="distbp-bench-") as folder:
        for workload in workloads:
            micro_batch = _micro_batch(workload, micro_batches)
            least = bound_of(workload, micro_batch, workers, bandwidth)
            steps = _steps(workload, quick)
            runs = [
                train(workload, Path(folder), workers=workers, micro_batch=micro_batch, steps=steps)
                for _ in range(rounds)
            ]
            found.append(
                {"workload": workload.name, "workers": workers, "batch": workload.batch}
                | {"micro_batch": micro_batch}
                | least
                | reached(runs, least)
            )
    return found


def bound_of(
    workload: Workload, micro_batch: int, workers: int, bandwidth: Bandwidth, batch: int | None = None
) -> dict[str, Any]:
    """Return the bound of a step and its parts; `workers` beyond the cores take turns."""
    needed = demand(workload, micro_batch, workers, batch)
    processes = min(workers, available_cores())
    seconds = measure_products(list(needed.products), processes)
    products, memory = bound(needed, seconds, bandwidth)
    turns = workers / processes
    memory = {what: turns * ms for what, ms in memory.items()}
    return {
        "flops": needed.flops * workers,
        "gflops": needed.flops / products / 1e6,
        "products_ms": turns * products,
        "memory_ms": memory,
        "bound_ms": turns * products + sum(memory.values()),
    }


def reached(runs: list[Run], least: dict[str, Any]) -> dict[str, Any]:
    """Return the medians over the runs, the ratio to the bound, and where the rest went."""
    phases = {name: statistics.median(run.phases[name] for run in runs) for name in runs[0].phases}
    median = statistics.median(run.median for run in runs)
    memory = least["memory_ms"]
    rest = {
        "compute": phases["compute"] - least["products_ms"] - sum(memory[what] for what in IN_COMPUTE),
        "wait": phases["wait"],
        "reduce": phases["reduce"] - memory["reduce"],
        "update": phases["update"] - memory["update"],
    }
    return {
        "median_ms": median,
        "least_ms": min(run.least for run in runs),
        "phases_ms": phases,
        "page_faults": statistics.median(run.page_faults for run in runs),
        "rest_ms": rest,
        "ratio": least["bound_ms"] / median,
    }


def measure_scaling(workloads: list[Workload], *, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """Measure 1, 2, 4 and 8 workers with one batch (strong) and with a share of it for each (weak).

    The bound of a speed-up is that of the step with one worker, measured alone, over that with more, measured
    beside each other: memory is shared, and a core may slow down when the other works.
    """
    bandwidths = {count: measure_bandwidth(count) for count in range(1, min(2, available_cores()) + 1)}
    found = []
    with tempfile.TemporaryDirectory(prefix="distbp-bench-") as folder:
        for workload in workloads:
            for kind in ("strong", "weak"):
                found += _scale(workload, kind, bandwidths, Path(folder), rounds, quick)
    return found


def _scale(
    workload: Workload, kind: str, bandwidths: dict[int, Bandwidth], folder: Path, rounds: int, quick: bool
) -> list[dict[str, Any]]:
    """Measure one workload in one way; runs of different worker counts alternate."""
    micro_batch = workload.batch // 8
    counts, steps = (1, 2, 4, 8), _steps(workload, quick)
    batches = {n: workload.batch if kind == "strong" else workload.batch // 8 * n for n in counts}
    runs: dict[int, list[Run]] = {n: [] for n in counts}
    for _ in range(rounds):
        for n in counts:
            run = train(workload, folder, workers=n, micro_batch=micro_batch, steps=steps, batch=batches[n])
            runs[n].append(run)
    found: list[dict[str, Any]] = []
    for n in counts:
        bandwidth = bandwidths[min(n, max(bandwidths))]
        entry: dict[str, Any] = {"workload": workload.name, "kind": kind, "workers": n, "batch": batches[n]}
        entry["bound_ms"] = bound_of(workload, micro_batch, n, bandwidth, batches[n])["bound_ms"]
        entry["median_ms"] = statistics.median(run.median for run in runs[n])
        one = found[0] if found else entry
        work = batches[n] / batches[1]
        entry["speed_up"] = work * one["median_ms"] / entry["median_ms"]
        entry["speed_up_bound"] = work * one["bound_ms"] / entry["bound_ms"]
        entry["ratio"] = entry["speed_up"] / entry["speed_up_bound"]
        entry["same_bits"] = runs[n][0].sha256 == runs[1][0].sha256 if kind == "strong" else None
        found.append(entry)
    return found


def _micro_batch(workload: Workload, micro_batches: int | None) -> int:
    """Return the size of a micro-batch where there are to be `micro_batches` of them."""
    if micro_batches is None:
        return default_micro_batch(workload.batch)
    return max(1, workload.batch // micro_batches)


def _steps(workload: Workload, quick: bool) -> int:
    """Return how many steps are made."""
    return max(6, workload.steps // (QUICK if quick else 1))


def step_table(found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of `measure_steps`."""
    lines = [
        f"{'workload':9} {'micro':>5} {'GFLOP':>7} {'GFLOP/s':>8} {'products':>9} {'memory':>8} "
        f"{'bound ms':>9} {'step ms':>9} {'ratio':>6} {'faults':>7}   the rest: compute, wait, reduce, update"
    ]
    for row in found:
        rest = ", ".join(f"{ms:.2f}" for ms in row["rest_ms"].values())
        lines.append(
            f"{row['workload']:9} {row['micro_batch']:5} {row['flops'] / 1e9:7.2f} {row['gflops']:8.0f} "
            f"{row['products_ms']:9.2f} {sum(row['memory_ms'].values()):8.2f} {row['bound_ms']:9.2f} "
            f"{row['median_ms']:9.2f} {row['ratio']:6.2f} "
            f"{row['page_faults']:7.1f}   {rest}"
        )
    return lines


def scaling_table(found: list[dict[str, Any]]) -> list[str]:
    """Return the lines of the table of `measure_scaling`."""
    lines = [
        f"{'workload':9} {'kind':6} {'workers':>7} {'batch':>6} {'step ms':>9} {'speed-up':>9} {'bound':>6} "
        f"{'ratio':>6}  same bits"
    ]
    for row in found:
        same = {None: "", True: "yes", False: "NO"}[row["same_bits"]]
        lines.append(
            f"{row['workload']:9} {row['kind']:6} {row['workers']:7} {row['batch']:6} "
            f"{row['median_ms']:9.2f} {row['speed_up']:9.2f} {row['speed_up_bound']:6.2f} "
            f"{row['ratio']:6.2f}  {same}"
        )
    return lines
