"""Diagnosis while a run goes on: rank 0 gathers the history, asks the rules, and says what they find, once.

The rules are in `metrics/diagnosis.py`.  Here is what has to do with a run: facts from the job, the loss of
each step, what earlier calls of `fit` wrote down and said.  A rule is asked when there is a new look or
epoch, so a finding depends on steps, never on the clock.
"""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distbp.job import LOSS, WEIGHT, Job
from distbp.metrics.diagnosis import Finding, diagnose
from distbp.metrics.history import Facts, History, Spike
from distbp.metrics.records import read_records
from distbp.nn.network import walk

__all__ = ["Diagnostician"]

_RECENT = 5
"""Steps whose mean loss is compared with what was usual before."""

_USUAL_AFTER = 50
"""Steps before anything is usual."""

_USUAL_RATE = 0.05
_SPIKE = 3.0
_SPIKE_SHARE = 0.25
"""A spike is this multiple of the usual loss, and higher by this share of the reference: where the loss is
nearly 0, one odd sample is a multiple of it."""


class Diagnostician:
    """Rank 0's diagnosis of one call of `fit`; `out` is the run directory."""

    def __init__(self, job: Job, out: Path) -> None:
        self._job = job
        self._out = out
        self._facts = facts_of(job)
        self._said: set[str] = set()
        self.begin(0)

    def begin(self, step: int) -> None:
        """Take up the history that is written down; what lies behind `step` has been cut off."""
        self.history = History(self._facts)
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._usual = 0.0
        self._steps = 0
        if step:
            self.history.read(read_records(self._out / "metrics.jsonl"))
            events = read_records(self._out / "events.jsonl")
            self._said |= {event["name"] for event in events if event.get("kind") == "diagnosis"}

    def step(self, step: int, tail: NDArray[np.float64], *, accepted: bool) -> list[Finding]:
        """Note a step; return what is to be said if it was refused or is part of a spike."""
        if not accepted:
            self.history.skipped.append(step)
            return self.judge()
        loss = tail[LOSS].item() / tail[WEIGHT].item()
        if self.history.spike is None and self._is_spike(loss):
            self.history.spike = Spike(step, sum(self._recent) / _RECENT, self._usual)
            return self.judge()
        return []

    def judge(self) -> list[Finding]:
        """Return what is to be said now, and never again."""
        try:
            found = diagnose(self.history, self._said)
        except (ArithmeticError, ValueError):
            return []  # Numbers at the end of their range say nothing, and must not end the run.
        self._said |= {finding.name for finding in found}
        return found

    def _is_spike(self, loss: float) -> bool:
        """Move the usual loss by one that has left the recent ones; return whether these stand out."""
        recent = self._recent
        if len(recent) == _RECENT:
            rate = max(_USUAL_RATE, 1 / (self._steps + 1))
            self._usual += rate * (recent[0] - self._usual)
            self._steps += 1
        recent.append(loss)
        if self._steps < _USUAL_AFTER:
            return False
        mean, reference = sum(recent) / _RECENT, self.history.reference
        return mean > _SPIKE * self._usual and mean - self._usual > _SPIKE_SHARE * reference


def facts_of(job: Job) -> Facts:
    """Return what is known of a run before it begins."""
    network = job.network
    outputs = network.output_shape[-1] if network.output_shape else 1
    layout = network.layout
    last = max(job.total_steps - 1, 0)
    rates = [job.schedule(step * last // 200) for step in range(201)]
    return Facts(
        total_steps=job.total_steps,
        batch_size=job.batch_size,
        samples=len(job.train),
        classes=max(outputs, 2) if network.loss.kind == "classification" else None,
        weights=tuple(
            name for name, shape in zip(layout.names, layout.shapes, strict=True) if len(shape) > 1
        ),
        kinds=frozenset(type(layer).__name__ for _, layer in walk(network.layer)),
        answers=0 if job.validation is None else len(job.validation) * network.loss.answers,
        peak_lr=max(filter(math.isfinite, rates), default=0.0),
    )
