"""Signals as something that a loop can wait for, and the rule of the first and the second one."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

__all__ = ["SignalInbox"]

_SAME_SIGNAL_S = 0.3


class SignalInbox:
    """Catches SIGINT, SIGTERM and SIGUSR1 until it is closed; readable when one has come.

    `read` calls `first(number)` for the first signal and `again(number)` for a later one.  A signal to a
    whole process group also reaches every worker, which passes it on, and `timeout` sends each twice: one
    that follows within `_SAME_SIGNAL_S` does not count.
    """

    def __init__(self, first: Callable[[int], None], again: Callable[[int], None]) -> None:
        self._first = first
        self._again = again
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._since: float | None = None
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._previous = {number: signal.signal(number, self._note) for number in numbers}

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._reader.fileno()

    def read(self) -> None:
        """Hand on what has come."""
        for number in self._reader.recv(64):
            now = time.monotonic()
            if self._since is None:
                self._since = now
                self._first(number)
            elif now - self._since > _SAME_SIGNAL_S:
                self._again(number)

    def close(self) -> None:
        """Put back the handlers that stood before; idempotent."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        self._reader.close()
        self._writer.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        with suppress(OSError):  # Full, or just closed.
            self._writer.send(bytes([number]))
