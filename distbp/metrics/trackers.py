"""Records for MLflow and for Weights & Biases, if they are installed and asked for.

Both speak to servers, which may be slow or gone, so a thread of its own does it.  Training leaves records in
a queue and never waits: when the queue is full, the oldest record goes.  At the end of a run the thread gets
`GRACE_S` to hand on what it holds; what it has not done by then is given up, and said.

Where the records go is decided by what their users know: MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME,
WANDB_PROJECT, WANDB_MODE and so on.  Neither library forgets what it was told, so steps that a run makes a
second time appear twice; the second figures are the ones that count.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distbp.metrics.tensorboard import scalars_of
from distbp.terminal import say

__all__ = ["GRACE_S", "Tracker", "mlflow_tracker", "wandb_tracker"]

GRACE_S = 5.0
_MOST_WAITING = 1000

Log = Callable[[dict[str, float], int], None]
"""Takes scalars and their step."""

Connect = Callable[[], tuple[Log, Callable[[], None]]]
"""Opens the connection; returns what logs, and what ends it."""


class Tracker:
    """Hands records to a server on a thread; `connect` is called there too."""

    def __init__(self, name: str, connect: Connect, grace_s: float = GRACE_S) -> None:
        self._name = name
        self._grace_s = grace_s
        self._waiting: queue.Queue[tuple[dict[str, float], int] | None] = queue.Queue(_MOST_WAITING)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, args=(connect,), daemon=True, name=name)
        self._thread.start()

    def write(self, metric: dict[str, Any]) -> None:
        """Leave the numbers of a record for the thread; raises what ended the thread, if anything did."""
        if self._error is not None:
            raise self._error
        scalars = {tag: number for tag, number in scalars_of(metric).items() if math.isfinite(number)}
        self._put((scalars, int(metric["step"])))

    def go_back(self, step: int) -> None:
        """Do nothing: what a server was told stays."""

    def close(self) -> None:
        """Wait for the thread, but not for long; idempotent."""
        if self._thread.is_alive():
            self._put(None)
            self._thread.join(self._grace_s)
            if self._thread.is_alive():
                say(f"distbp: W_SINK_LOST {self._name}: its server is too slow; the last records are missing")
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _put(self, item: tuple[dict[str, float], int] | None) -> None:
        """Add to the queue, in place of the oldest entry if it is full."""
        while True:
            try:
                self._waiting.put_nowait(item)
                return
            except queue.Full:
                try:
                    self._waiting.get_nowait()
                except queue.Empty:
                    continue

    def _work(self, connect: Connect) -> None:
        """Log until the end is announced, or something goes wrong."""
        try:
            log, finish = connect()
            while (item := self._waiting.get()) is not None:
                log(*item)
            finish()
        except Exception as error:  # Said by whoever writes next.
            self._error = error


def mlflow_tracker(out: Path) -> Tracker:
    """Return a tracker for MLflow; its run is called like the run directory."""

    def connect() -> tuple[Log, Callable[[], None]]:
        try:
            import mlflow
        except ImportError as error:
            raise RuntimeError("it is not installed: pip install mlflow") from error
        mlflow.start_run(run_name=out.name)
        mlflow.log_params(_settings(out))
        return lambda scalars, step: mlflow.log_metrics(scalars, step=step), mlflow.end_run

    return Tracker("mlflow", connect)


def wandb_tracker(out: Path) -> Tracker:
    """Return a tracker for Weights & Biases; its run is called like the run directory."""

    def connect() -> tuple[Log, Callable[[], None]]:
        try:
            import wandb
        except ImportError as error:
            raise RuntimeError("it is not installed: pip install wandb") from error
        run = wandb.init(name=out.name, dir=str(out), config=_settings(out))
        run.define_metric("*", step_metric="step")
        return lambda scalars, step: run.log(scalars | {"step": step}), run.finish

    return Tracker("wandb", connect)


def _settings(out: Path) -> dict[str, str]:
    """Return the configuration of the run as names and texts; a script has none."""
    import tomllib

    try:
        tree = tomllib.loads((out / "config.toml").read_text())
    except (OSError, ValueError):
        return {}
    flat = {}
    for name, value in tree.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        flat.update({f"{name}.{key}".rstrip("."): json.dumps(entry) for key, entry in entries})
    return flat
