"""`distbp ls`: the runs below a directory, the newest first."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from distbp.metrics.run_files import Run

__all__ = ["command"]

_DEEPEST = 3


@click.command(help="List the runs below DIR, the newest first: state, data, model, results.")
@click.argument("directory", metavar="[DIR]", default="runs")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def command(directory: str, as_json: bool) -> None:
    """Print one line for each run."""
    from distbp.errors import InputMissing
    from distbp.metrics.run_files import read_run

    top = Path(directory)
    if not top.is_dir():
        found = "a file" if top.exists() else "nothing"
        raise InputMissing(
            f"{directory!r}: expected a directory with runs, found {found}; name one: distbp ls DIR"
        )
    runs = [read_run(path) for path in _runs_below(top, _DEEPEST)]
    runs.sort(key=lambda run: run.changed or 0.0, reverse=True)
    rows = [_row(run) for run in runs]
    if as_json:
        print(json.dumps(rows, indent=2))
    elif not rows:
        print(f"no run below {directory}; distbp train digits makes one")
    else:
        print("\n".join(_table(rows)))


def _runs_below(folder: Path, deepest: int) -> Iterator[Path]:
    """Yield the run directories at `folder` and below; a run holds no others."""
    from distbp.metrics.run_files import is_run

    if is_run(folder):
        yield folder
        return
    try:
        inner = sorted(entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:  # Somebody else's directory.
        return
    for path in inner if deepest else ():
        yield from _runs_below(Path(path), deepest - 1)


def _row(run: Run) -> dict[str, Any]:
    """Return what is said of a run."""
    validation = run.metrics.validation.newest or {}
    train = run.metrics.epochs.newest or run.metrics.train.newest or {}
    data = run.table("data").get("path")
    return {
        "run": os.path.relpath(run.path),
        "state": run.state,
        "data": Path(str(data)).name if data else None,
        "model": run.table("model").get("name"),
        "step": run.step,
        "total_steps": run.total_steps,
        "train_loss": train.get("loss"),
        "validation_loss": validation.get("loss"),
        "validation_accuracy": validation.get("accuracy"),
        "parameters_sha256": run.result.get("parameters_sha256"),
        "began": run.began,
        "changed": run.changed,
    }


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield lines with aligned columns."""
    from distbp.metrics.words import figure, share

    header = ("run", "state", "data", "model", "steps", "val. accuracy", "val. loss", "last change")
    cells: list[tuple[str, ...]] = [header]
    for row in rows:
        accuracy = row["validation_accuracy"]
        total = f"/{row['total_steps']}" if row["total_steps"] else ""
        stamp = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["changed"] or 0))
        named = (
            "".join(c if c.isprintable() else "?" for c in str(row[key] or "-"))
            for key in ("run", "state", "data", "model")
        )
        cells.append(
            (
                *named,
                f"{row['step']}{total}",
                "-" if accuracy is None else share(accuracy),
                figure(row["validation_loss"]),
                stamp,
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
