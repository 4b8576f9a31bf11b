"""`RUN/metrics.prom`: the newest figures of a run in the text format of Prometheus, version 0.0.4.

The node exporter's textfile collector, or any web server, hands the file on.  It is replaced by a rename, so
a reader sees whole files only, and at most every `EVERY_S` seconds: Prometheus asks every 15 seconds or less
often.  It is not forced to the disk, because a figure that was lost with the power is of no use.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

__all__ = ["EVERY_S", "Prometheus"]

EVERY_S = 2.0

_PHASES = ("compute", "wait", "reduce", "update")

_HELP = {
    "distbp_step": ("gauge", "Steps that the run has made."),
    "distbp_epoch": ("gauge", "Passes over the training samples."),
    "distbp_samples_total": ("counter", "Samples trained on, repetitions included."),
    "distbp_loss": ("gauge", "Mean loss: of the last steps, or of the last validation."),
    "distbp_accuracy": ("gauge", "Share of right answers in the last epoch."),
    "distbp_entropy_nats": ("gauge", "Mean entropy of the predictions."),
    "distbp_learning_rate": ("gauge", "Learning rate of the last step."),
    "distbp_samples_per_second": ("gauge", "Samples trained on a second."),
    "distbp_step_seconds": ("gauge", "Mean time of a step on rank 0, by phase."),
    "distbp_worker_seconds": ("gauge", "Mean time of a step on each worker, by phase."),
    "distbp_gradient_noise_scale": ("gauge", "Batch size, in samples, that the gradient's noise suggests."),
    "distbp_last_record_timestamp_seconds": ("gauge", "When the last figure was recorded, Unix time."),
}
"""Metric -> its type and what it is."""


class Prometheus:
    """Keeps the newest value of every metric, and the file that shows them."""

    def __init__(self, out: Path) -> None:
        self._path = out / "metrics.prom"
        self._run = out.name
        self._values: dict[tuple[str, str], float] = {}
        self._written = -math.inf

    def write(self, metric: dict[str, Any]) -> None:
        """Take over the figures of a record, and show them if it is time."""
        self._take(metric)
        now = time.monotonic()
        if metric.get("epoch_end") or now - self._written >= EVERY_S:
            self._written = now
            self._replace()

    def go_back(self, step: int) -> None:
        """Do nothing: the next record overwrites what was shown."""

    def close(self) -> None:
        """Show the last figures; idempotent."""
        if self._values:
            self._replace()

    def _take(self, metric: dict[str, Any]) -> None:
        """Take over what a record has."""
        part = f'part="{metric["kind"]}"'
        for name, field, labels in (
            ("distbp_step", "step", ""),
            ("distbp_epoch", "epoch", ""),
            ("distbp_samples_total", "samples", ""),
            ("distbp_loss", "loss", part),
            ("distbp_accuracy", "accuracy", part),
            ("distbp_entropy_nats", "entropy", part),
            ("distbp_learning_rate", "lr", ""),
            ("distbp_samples_per_second", "samples_per_second", ""),
            ("distbp_gradient_noise_scale", "noise_scale", ""),
        ):
            if not labels or metric["kind"] in ("train", "validation"):
                self._set(name, labels, metric.get(field))
        for phase, milliseconds in (metric.get("step_ms") or {}).items():
            self._set("distbp_step_seconds", f'phase="{phase}"', milliseconds, 1e-3)
        for phase in _PHASES[:2]:
            for rank, milliseconds in enumerate(metric.get(f"{phase}_ms") or []):
                labels = f'phase="{phase}",rank="{rank}"'
                self._set("distbp_worker_seconds", labels, milliseconds, 1e-3)
        self._values["distbp_last_record_timestamp_seconds", ""] = time.time()

    def _set(self, name: str, labels: str, value: Any, factor: float = 1.0) -> None:
        """Set one value; what is no number is passed over."""
        if isinstance(value, int | float | str):
            try:
                self._values[name, labels] = float(value) * factor
            except ValueError:
                return

    def _replace(self) -> None:
        """Write the file anew."""
        temporary = self._path.with_name(self._path.name + ".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(temporary, flags, 0o600), "w") as file:
            file.write(self.text())
        os.replace(temporary, self._path)

    def text(self) -> str:
        """Return the content of the file."""
        run = self._run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        lines = []
        for name, (kind, meaning) in _HELP.items():
            found = [(labels, value) for (known, labels), value in self._values.items() if known == name]
            if found:
                lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]
            for labels, value in found:
                joined = ",".join(filter(None, (f'run="{run}"', labels)))
                lines.append(f"{name}{{{joined}}} {_number(value)}")
        return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    """Return a number as Prometheus writes it."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
