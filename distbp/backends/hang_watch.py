"""Who is stuck: finds workers that have stopped making progress.  Pure: counts and times in, ranks out.

A heartbeat of its own would not do: a process can be alive and its training stuck, in an endless loop or
with the interpreter held.  So the arena counts *units*: tensors of backprop, parts of a step, evaluated
batches, and looks while waiting for others.  A worker that waits for a stuck one goes on counting, so only
the stuck one is found.

The limit is 10 s, or five times the longest time that this worker needed for one unit lately, whichever is
longer; a worker that has just begun (imports are over, but memory is touched for the first time, and a
checkpoint may be read from a slow disk) and one that waits for the disk have a limit of their own.  When the
observer itself was not scheduled for a second, because the machine was paused or the job stopped by Ctrl-Z,
all countdowns begin anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Glance", "HangWatch", "Stuck"]

LEAST_S = 10.0
FACTOR = 5.0
SLOW_S = 300.0
_RECENT = 64
_OBSERVER_S = 1.0


@dataclass(frozen=True)
class Glance:
    """What is seen of a worker: its units so far, the phase it is in, and whether that phase may be slow."""

    units: int
    phase: str
    slow: bool


@dataclass(frozen=True)
class Stuck:
    """A worker that is stuck, since when, and in which phase."""

    rank: int
    seconds: float
    phase: str


@dataclass
class _Seen:
    """The last glance at a worker, when it changed, and how long its recent units took."""

    glance: Glance
    since: float
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))


class HangWatch:
    """Watches the workers of a job; `period_s` is how often `observe` is meant to be called."""

    def __init__(self, period_s: float) -> None:
        self._period_s = period_s
        self._seen: dict[int, _Seen] = {}
        self._last: float | None = None

    def observe(self, now: float, glances: Mapping[int, Glance]) -> list[Stuck]:
        """Note what is seen at `now` of the workers that take part; return those that are stuck.

        A worker that is not among `glances` is not watched, and begins anew when it is again.
        """
        asleep = self._last is not None and now - self._last > self._period_s + _OBSERVER_S
        self._last = now
        self._seen = {rank: seen for rank, seen in self._seen.items() if rank in glances}
        stuck = []
        for rank, glance in glances.items():
            seen = self._seen.get(rank)
            if seen is None or glance.units < seen.glance.units:
                self._seen[rank] = _Seen(glance, now)
            elif glance.units != seen.glance.units or glance.phase != seen.glance.phase:
                if not asleep:
                    seen.gaps.append(now - seen.since)
                seen.glance, seen.since = glance, now
            elif asleep:
                seen.since = now
            elif now - seen.since > self._limit(seen):
                stuck.append(Stuck(rank, now - seen.since, glance.phase))
        return stuck

    def forget(self, rank: int) -> None:
        """Begin anew with `rank`, whose process has ended.

        Its replacement may be among the next glances already, with the counts that the lost one left.
        """
        self._seen.pop(rank, None)

    def _limit(self, seen: _Seen) -> float:
        """Return how long this worker may go without progress."""
        limit = max(LEAST_S, FACTOR * max(seen.gaps, default=0.0))
        return max(limit, SLOW_S) if seen.glance.slow else limit
