"""How long a process waits for others, by its own time."""

from __future__ import annotations

import time

__all__ = ["Deadline"]

_STOPPED_S = 1.0
"""Nobody here sleeps that long between two looks; a process that did was stopped, or the machine was."""


class Deadline:
    """A deadline for a wait that looks every few milliseconds whether it is over.

    Time in which the process was stopped does not count: it saw nothing then, and whoever it finds missing
    when it goes on may have come and gone.  Without this, a stopped process that its launcher wakes to end it
    would accuse the others, who have been waiting for it.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.renew()

    def renew(self) -> None:
        """Begin again with the whole time."""
        self._looked = time.monotonic()
        self._until = self._looked + self._seconds

    def is_over(self) -> bool:
        """Return whether the time is up."""
        now = time.monotonic()
        if now - self._looked > _STOPPED_S:
            self._until += now - self._looked
        self._looked = now
        return now > self._until
