"""What `distbp train` says in the end: the plan of a dry run, or how the run went and what to do next."""

from __future__ import annotations

import json
import math
import os
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distbp.config import Config
    from distbp.data import Dataset

__all__ = ["describe_plan", "report"]

_CONFUSION_S = 0.1
"""Seconds that counting right and wrong answers may take at the end of a run."""


def describe_plan(config: Config, backend: str, nproc: int, plan: Any) -> None:
    """Print what would be done."""
    from distbp.config import to_toml

    print(to_toml(config), end="")
    print(
        f"# {nproc} worker{'s' if nproc > 1 else ''}, backend {backend}, {plan.micro_batches} micro-batches, "
        f"{plan.total_steps} steps, {plan.size:,} parameters with padding; nothing was started"
    )


def report(out: Path, validation: Dataset | None = None) -> int:
    """Say how the run ended, where it lies, and what to do next; `validation` are its samples, if known."""
    from distbp.metrics.records import read_records

    result = json.loads((out / "result.json").read_text())
    figures = result["validation"] or {}
    parts = [f"{result['epochs']} epochs, {result['steps']} steps in {result['wall_seconds']:.1f} s"]
    if result["samples_per_second"]:
        parts.append(f"{result['samples_per_second']:,.0f} samples/s")
    if result["train_loss"] is not None:
        parts.append(f"training loss {result['train_loss']:.4f}")
    if figures.get("loss") is not None:
        parts.append(f"validation loss {figures['loss']:.4f}")
    if figures.get("accuracy") is not None:
        parts.append(f"validation accuracy {figures['accuracy']:.4f}")
    if result["restarts"]:
        parts.append(f"{result['restarts']} lost workers replaced")
    diagnosed = any(event.get("kind") == "diagnosis" for event in read_records(out / "events.jsonl"))
    if _is_guessing(result) and not diagnosed:
        print(
            "distbp: W_NOT_LEARNING the training loss is that of guessing; try a lower learning rate "
            "(-o optimizer.lr=0.01) or a larger --batch-size",
            file=sys.stderr,
        )
    shown = os.path.relpath(out)
    lines = (
        ", ".join(parts),
        f"run {shown}   parameters {result['parameters_sha256'][:16]}",
        f"page {Path(shown) / 'report.html'}",
        f"next: {_next_command(out, shown)}",
    )
    try:
        print("\n".join(lines), flush=True)
    except OSError:  # Nobody reads it (a pipe that was closed): the run is done all the same.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _complete_page(out, validation)
    return int(result["exit_code"])


def _complete_page(out: Path, validation: Dataset | None) -> None:
    """Add to the report of the run which classes it takes for which; what goes wrong costs that part only."""
    if validation is None:
        return
    try:
        from distbp.cli.confusion import add_confusion
        from distbp.metrics.report import write_report

        if not add_confusion(out, validation, budget_s=_CONFUSION_S, hurry=True):
            write_report(out)
    except Exception as error:
        print(f"distbp: W_REPORT_LOST no confusion matrix: {error}; the run is not harmed", file=sys.stderr)


def _next_command(out: Path, shown: str) -> str:
    """Return what somebody would do with the model now."""
    if tomllib.loads((out / "config.toml").read_text())["model"]["name"] == "transformer":
        return f"distbp generate {shown}"
    return f"distbp predict {shown} DATA -o predictions.csv"


def _is_guessing(result: dict[str, Any]) -> bool:
    """Return whether a classification ended no better than the same guess for every sample."""
    loss, outputs = result["train_loss"], result.get("num_outputs", 0)
    guessing = outputs > 1 and (result["validation"] or {}).get("accuracy") is not None
    return bool(guessing and loss is not None and loss > 0.98 * math.log(outputs))
