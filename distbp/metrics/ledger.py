"""The straggler ledger: how long each worker computed and waited, and who cost how much of the run.

Every worker adds its seconds up in the arena.  Hosts swap the sums every `stragglers.WINDOW` steps, with the
medians that stragglers are told by, and rank 0 writes them down here.

A worker waits at the barriers of its host.  Between hosts the waiting for a slower one is part of the
exchange, which nobody can tell from the moving of bytes, so it is told from the computing: in each step a
host waits as long as the slowest worker of all computed longer, in the median, than its own slowest one.
What a window cost is the time by which its slowest worker computed longer than the next one, in the median
and for each step: that much shorter it would have been without that worker's lag.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Ledger"]

_RECORD_EVERY_S = 1.0


class Ledger:
    """The accounts of all workers in one call of `fit`; `hosts[r]` is the host of worker r."""

    def __init__(self, hosts: Sequence[int]) -> None:
        self._hosts = tuple(hosts)
        self._spent = np.zeros((2, len(hosts)))
        self._cost = np.zeros(len(hosts))
        self._host_wait = np.zeros(len(hosts))
        self._recorded = np.zeros((2, len(hosts)))
        self._steps = 0
        self._next_record = 0.0

    def add(self, medians: NDArray[np.float64], spent: NDArray[np.float64], steps: int) -> None:
        """Take a window of `steps`: the median compute of each worker, and its sums of compute and wait."""
        self._spent[:] = spent
        self._steps += steps
        if len(medians) > 1 and steps:
            order = np.argsort(medians)
            self._cost[order[-1]] += float(medians[order[-1]] - medians[order[-2]]) * steps
            for host in set(self._hosts):
                own = np.equal(self._hosts, host)
                self._host_wait[own] += float(medians.max() - medians[own].max()) * steps

    def record(self, now: float) -> dict[str, Any] | None:
        """Return the means of a step since the last record, in ms, or None if that is too short ago."""
        if now < self._next_record or not self._steps:
            return None
        self._next_record = now + _RECORD_EVERY_S
        # An arena that a lost host takes with it begins at 0 again.
        means = np.maximum(self._spent - self._recorded, 0) / self._steps * 1e3
        self._recorded[:] = self._spent
        self._steps = 0
        compute, wait = (np.round(row, 4).tolist() for row in means)
        return {"compute_ms": compute, "wait_ms": wait}

    def accounts(self) -> list[dict[str, Any]]:
        """Return what `result.json` says of each worker."""
        names = ("host", "compute_s", "wait_s", "host_wait_s", "cost_s")
        figures = (*self._spent.tolist(), self._host_wait.tolist(), self._cost.tolist())
        rows = zip(self._hosts, *figures, strict=True)
        return [{"rank": rank} | dict(zip(names, row, strict=True)) for rank, row in enumerate(rows)]
