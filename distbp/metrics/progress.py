"""How a run speaks while it trains: records five times a second, a bar on a terminal, plain lines elsewhere.

Rank 0 owns the one `Progress`.  Between two records it only adds up numbers, so the step is not held up.  The
bar is rich's, imported and drawn only if stderr is a terminal, and only when a record is written: its own
refreshing thread would take the interpreter from the training.  Elsewhere one whole line appears every ten
seconds, which a job log can bear.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distbp.job import ENTROPY, EPOCH_CORRECT, EPOCH_LOSS, EPOCH_WEIGHT, LOSS, WEIGHT
from distbp.metrics.words import duration
from distbp.terminal import say

if TYPE_CHECKING:
    from distbp.backends.base import Seat
    from distbp.job import Job
    from distbp.metrics.records import Records

__all__ = ["Progress"]

RECORD_EVERY_S = 0.2
LINE_EVERY_S = 10.0


class Progress:
    """Turns steps into records and lines; `close` leaves the terminal as it was."""

    def __init__(self, job: Job, seat: Seat) -> None:
        self._job = job
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._next_line = time.monotonic() + LINE_EVERY_S
        self._next_record = 0.0
        self._sums = np.zeros(ENTROPY + 1)
        self._classes = job.network.loss.kind == "classification"
        self._phases = np.zeros(4)
        self._steps = 0
        self._first = True
        self._text = job.banner(job, seat)
        self._rate = 0.0
        self._bar: Any = None

    def begin(self, step: int) -> None:
        """Note that training (re)starts after `step` steps."""
        if self._text:
            self.say(self._text)
            self._text = ""
        self.begin_interval(time.perf_counter())

    def step(self, step: int, tail: NDArray[np.float64], times: list[float], records: Records) -> None:
        """Count a step; write a record if the last one is old enough, or if it is the first."""
        self._steps += 1
        self._sums += tail[: ENTROPY + 1]
        for phase in range(4):
            self._phases[phase] += times[phase + 1] - times[phase]
        if times[-1] >= self._next_record:
            self._next_record = times[-1] + RECORD_EVERY_S
            self._record(step, times[-1], records)

    def epoch(
        self,
        step: int,
        scalars: NDArray[np.float64],
        watched: dict[str, float | None],
        validation: dict[str, float | None] | None,
    ) -> list[dict[str, Any]]:
        """Return the records of an epoch that ended: training with what was `watched`, validation."""
        job = self._job
        common = self.position(step) | {"epoch_end": True}
        weight = scalars[EPOCH_WEIGHT]
        train: dict[str, Any] = {"loss": float(scalars[EPOCH_LOSS] / weight) if weight else None}
        if self._classes:
            seen = max(1.0, self._epoch_samples(step) * job.network.loss.answers)
            train["accuracy"] = float(scalars[EPOCH_CORRECT] / seen)
        self._draw(step, train["loss"])
        records = [{"kind": "train"} | common | train | watched]
        if validation is not None:
            records.append({"kind": "validation"} | common | validation)
        return records

    def close(self) -> None:
        """Leave the terminal as it was; idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def position(self, step: int) -> dict[str, Any]:
        """Return the fields that every measurement has: step, epoch and samples."""
        samples = step * self._job.batch_size
        return {"step": step, "epoch": samples / len(self._job.train), "samples": samples}

    def _epoch_samples(self, step: int) -> float:
        """Return how many samples the epoch sums at `step` cover."""
        batch, samples = self._job.batch_size, len(self._job.train)
        epochs_before = (step - 1) * batch // samples
        begin = -(-epochs_before * samples // batch)
        return float((step - begin) * batch)

    def _record(self, step: int, now: float, records: Records) -> None:
        """Write the means since the last record, and show them."""
        steps, weight = self._steps, self._sums[WEIGHT]
        loss = float(self._sums[LOSS] / weight) if weight else None
        self._rate = steps * self._job.batch_size / max(now - self._since, 1e-9)
        names = ("compute", "wait", "reduce", "update")
        record = {"kind": "train"} | self.position(step)
        record |= {"loss": loss if loss is None or np.isfinite(loss) else repr(loss)}
        if self._classes:
            answers = steps * self._job.batch_size * self._job.network.loss.answers
            record["entropy"] = float(self._sums[ENTROPY] / answers)
        record |= {
            "lr": self._job.schedule(step - 1),
            "samples_per_second": self._rate,
            "step_ms": {
                name: round(float(total) / steps * 1e3, 4)
                for name, total in zip(names, self._phases, strict=True)
            },
            # Processor time of this worker: less than the sum of the phases where others ran on its core.
            "cpu_ms": round((time.process_time() - self._cpu_since) / steps * 1e3, 4),
            # Pages that were touched for the first time: a step that reuses its memory has next to none.
            "page_faults": round((_page_faults() - self._faults_since) / steps, 2),
        }
        records.metric(record)
        self.begin_interval(now)
        if self._terminal:
            self._draw(step, loss)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + LINE_EVERY_S
            self.say(self._line(step, loss))

    def begin_interval(self, now: float) -> None:
        """Start the sums of the next record."""
        self._since = now
        self._cpu_since = time.process_time()
        self._faults_since = _page_faults()
        self._steps = 0
        self._sums[:] = 0
        self._phases[:] = 0

    def _line(self, step: int, loss: float | None) -> str:
        """Return 'step 120/500, epoch 4.3, loss 0.123, 51,000 samples/s, 12 s left'."""
        job = self._job
        left = (job.total_steps - step) * job.batch_size / self._rate if self._rate else 0.0
        shown = "-" if loss is None else f"{loss:.4f}"
        return (
            f"step {step}/{job.total_steps}, epoch {step * job.batch_size / len(job.train):.1f}, "
            f"loss {shown}, {self._rate:,.0f} samples/s, {duration(left)} left"
        )

    def _draw(self, step: int, loss: float | None) -> None:
        """Redraw the bar, if there is a terminal to draw on."""
        if not self._terminal:
            return
        if self._bar is None:
            self._bar = _new_bar()
            self._task = self._bar.add_task("", total=self._job.total_steps)
            self._bar.start()
        self._bar.update(self._task, completed=step, description=self._line(step, loss))
        self._bar.refresh()

    def say(self, text: str) -> None:
        """Write whole lines to stderr, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
            return
        with contextlib.suppress(OSError, ValueError):  # Nobody listens any more; training goes on.
            say(text)


def _page_faults() -> int:
    """Return how many pages the system has given to this process without reading a disk."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _new_bar() -> Any:
    """Return rich's progress bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (BarColumn(bar_width=24), TextColumn("{task.description}", markup=False))
    return Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True)
