"""`distbp bench`: what this machine can do, and what distbp reaches on it.

Every measurement prints a table with a column `ratio`: the best over what was reached, 1 is the machine's
limit.  What the best is, and why it is one, stands in the docstrings of `distbp/bench/`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

__all__ = ["MEASUREMENTS", "command"]

MEASUREMENTS = {
    "gemm": "products of some rows with a matrix, beside the machine's best product",
    "memory": "bandwidth of an update, beside a copy",
    "barrier": "the barrier of 2, 4, 8 workers, beside a word passed between two processes",
    "allreduce": "adding gradients in shared memory, beside the bytes that must move",
    "step": "a step of distbp train, beside its products and its bytes at measured rates",
    "scaling": "1, 2, 4, 8 workers, strong and weak, beside the rates of one core and of two",
    "checkpoint": "saving and loading a state, beside a plain file",
    "startup": "from the command to help, and to the first step, beside the interpreter",
}
"""Name -> what is measured, and beside what."""

_LIST = "\n".join(f"  {name:11} {what}" for name, what in MEASUREMENTS.items())


@click.command(
    help="Measure what this machine can do and what distbp reaches; NAME is one of\n\n\b\n"
    + _LIST
    + "\n\nThe machine should be idle.  Nothing is downloaded; data are made up in a temporary directory."
)
@click.argument("name", type=click.Choice(list(MEASUREMENTS)))
@click.option("--workloads", default="all", help="step, scaling: names with commas.  [default: all six]")
@click.option("--micro-batches", type=click.IntRange(min=2), help="step: micro-batches of a batch.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, help="step, scaling: trainings of each.")
@click.option("--on", default=".", type=click.Path(file_okay=False), help="checkpoint: a folder on the disk.")
@click.option("--quick", is_flag=True, help="Fewer sizes and steps: rough figures in seconds.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    name: str, workloads: str, micro_batches: int | None, rounds: int, on: str, quick: bool, as_json: bool
) -> int:
    """Measure, and print a table or JSON."""
    from distbp.environment import available_cores, describe_environment, limit_threads

    if micro_batches is not None and micro_batches & (micro_batches - 1):
        raise click.UsageError(f"--micro-batches: expected a power of two, got {micro_batches}")
    found, lines = _measure(name, workloads, micro_batches, rounds, Path(on), quick)
    limit_threads(1)
    environment = describe_environment()
    blas = environment["blas"]
    machine = {
        "cpu": _processor(),
        "cores": available_cores(),
        "load": round(os.getloadavg()[0], 1),
        "numpy": environment["numpy"],
        "blas": f"{blas['name']} {blas['version']} ({blas['kernel']})",
    }
    if as_json:
        print(json.dumps({"measurement": name, "machine": machine, "results": found}, indent=1))
        return 0
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print("\n".join(lines))
    return 0


def _measure(
    name: str, workloads: str, micro_batches: int | None, rounds: int, on: Path, quick: bool
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what one measurement found, as records and as lines of a table."""
    if name in ("step", "scaling"):
        from distbp.bench import step
        from distbp.bench.workloads import chosen

        if name == "step":
            found = step.measure_steps(
                chosen(workloads), micro_batches=micro_batches, rounds=rounds, quick=quick
            )
            return found, step.step_table(found)
        found = step.measure_scaling(chosen(workloads), rounds=rounds, quick=quick)
        return found, step.scaling_table(found)
    if name in ("checkpoint", "startup"):
        from distbp.bench import whole

        found = (whole.measure_checkpoint if name == "checkpoint" else whole.measure_startup)(on, quick)
        return found, _table(found)
    from distbp.bench import parts

    measure = {
        "gemm": parts.measure_gemm,
        "memory": parts.measure_memory,
        "barrier": parts.measure_barrier,
        "allreduce": parts.measure_allreduce,
    }[name]
    found = measure(quick)
    return found, _table(found)


def _table(found: list[dict[str, Any]]) -> list[str]:
    """Return records as a table: one column for each key, wide enough for its values."""
    rows = [list(found[0]), *([_shown(value) for value in entry.values()] for entry in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]


def _shown(value: Any) -> str:
    """Return a number with the digits that mean something."""
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _processor() -> str:
    """Return what the system calls the processor."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"
