"""Where records go besides `metrics.jsonl`: TensorBoard, Prometheus, MLflow, Weights & Biases.

A sink takes the records of rank 0 as they are made, at most a few a second.  None may cost the run anything
but its own records: whatever a sink raises is said once, and from then on that sink is left alone.  Those
that speak to a server do so on a thread of their own (`trackers.py`).

Contract: `write` takes one record of `metrics.jsonl`; `go_back(step)` says that records of `step` and later
will be made again; `close` is idempotent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from distbp.metrics.prometheus import Prometheus
from distbp.metrics.tensorboard import TensorBoard
from distbp.metrics.trackers import mlflow_tracker, wandb_tracker
from distbp.terminal import say

__all__ = ["SINKS", "Sink", "Sinks"]


_MOST_OF_A_REASON = 300
"""Characters of an error that are shown; some libraries write pages."""


class Sink(Protocol):
    """Whatever takes records; see the module's docstring."""

    def write(self, metric: dict[str, Any]) -> None:
        """Take one record."""

    def go_back(self, step: int) -> None:
        """Forget the records of `step` and later: they will be made again."""

    def close(self) -> None:
        """Write what is still held; idempotent."""


SINKS: dict[str, Callable[[Path], Sink]] = {
    "tensorboard": TensorBoard,
    "prometheus": Prometheus,
    "mlflow": mlflow_tracker,
    "wandb": wandb_tracker,
}
"""Name in `run.records` -> what makes the sink for a run directory."""


class Sinks:
    """The sinks of one run; nothing here raises."""

    def __init__(self, names: Iterable[str], out: Path) -> None:
        self._sinks: dict[str, Sink] = {}
        for name in dict.fromkeys(names):
            self._guard(name, self._add, name, out)

    def write(self, metric: dict[str, Any]) -> None:
        """Give one record to every sink."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.write, metric)

    def go_back(self, step: int) -> None:
        """Say that the records of `step` and later will be made again."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.go_back, step)

    def close(self) -> None:
        """Close every sink; idempotent."""
        for name, sink in list(self._sinks.items()):
            self._guard(name, sink.close)
        self._sinks = {}

    def _add(self, name: str, out: Path) -> None:
        """Make the sink called `name`."""
        self._sinks[name] = SINKS[name](out)

    def _guard(self, name: str, call: Callable[..., object], *arguments: object) -> None:
        """Make a call; if it raises, say so and leave the sink alone from now on."""
        try:
            call(*arguments)
        except Exception as error:  # A stranger's library may raise anything, and no run ends for that.
            self._sinks.pop(name, None)
            reason = " ".join(str(error).split())[:_MOST_OF_A_REASON] or type(error).__name__
            say(f"distbp: W_SINK_LOST {name}: {reason}; training goes on without it")
