"""Who holds the others up: names workers that compute much longer than the others, and what that costs.

Every worker leaves the seconds that it computed in the arena before it waits for the others, and the first
worker of each host adds them up.  Every `WINDOW` steps hosts swap the medians of that many steps, and rank 0
judges (`Stragglers.judge`).

A worker is a straggler if its median is `FACTOR` times the median of the others', and so is its median for
one micro-batch: a worker that has more of them than others is not slow, and one that has fewer spreads what
a step costs anyway over fewer.  It is named once it has cost a second, and again with every further minute.

Nobody is ended for being slow; this only speaks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["FACTOR", "WINDOW", "Straggler", "Stragglers"]

WINDOW = 20
FACTOR = 1.5

_NAMED_S, _AGAIN_S = 1.0, 60.0
"""What a straggler has cost when it is named first, and how much more until the next time."""

Medians = NDArray[np.float64]


@dataclass(frozen=True)
class Straggler:
    """A worker that holds the others up: medians in seconds a step, and its cost since training began."""

    rank: int
    seconds: float
    others: float
    cost: float


class Stragglers:
    """Watches `micro_batches[r]`, the micro-batches of each worker r of all hosts."""

    def __init__(self, micro_batches: Sequence[int]) -> None:
        self._shares = np.array(micro_batches, np.float64)
        self._rows: list[Sequence[float]] = []
        self._cost = np.zeros(len(micro_batches))
        self._named_at = np.full(len(micro_batches), _NAMED_S)

    def add(self, seconds: Sequence[float]) -> None:
        """Note how long the workers of this host computed in a step."""
        self._rows.append(seconds)

    @property
    def steps(self) -> int:
        """How many steps were noted."""
        return len(self._rows)

    def take_medians(self) -> Medians:
        """Return the median of each worker of this host over the steps noted, at least one; forget those."""
        medians: Medians = np.median(np.array(self._rows), axis=0)
        self._rows = []
        return medians

    def forget(self) -> None:
        """Forget the steps noted: an attempt was given up."""
        self._rows = []

    def judge(self, medians: Medians) -> list[Straggler]:
        """Return the stragglers among all workers that have not been named lately."""
        found = []
        for rank, seconds in enumerate(medians):
            others = np.delete(medians, rank)
            if not len(others):
                continue
            usual = float(np.median(others))
            each = float(np.median(others / np.delete(self._shares, rank)))
            slow = seconds > FACTOR * usual and seconds / self._shares[rank] > FACTOR * each
            if not slow:
                continue
            self._cost[rank] += max(0.0, float(seconds - others.max())) * WINDOW
            if self._cost[rank] >= self._named_at[rank]:
                self._named_at[rank] = self._cost[rank] + _AGAIN_S
                found.append(Straggler(rank, float(seconds), usual, float(self._cost[rank])))
        return found
