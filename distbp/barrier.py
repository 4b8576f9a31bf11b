"""A barrier between processes that share memory, which ends in a parked state when somebody is lost.

How it works: every worker has a counter in a cache line of its own.  To arrive it raises its counter to the
round's number; to wait it looks at the others' counters, first in a short spin (a few microseconds, the usual
case), then giving up the processor between looks, then asleep in the kernel on the late worker's counter
(futex).  A worker that sleeps raises a flag beside the counter it waits for, so that an arrival costs a
system call only when somebody sleeps.

What it never does: return when somebody is missing, or wait for ever.  Whoever watches the workers sets the
`PARK` word to the number of the next attempt and wakes the sleepers; every waiter then leaves with `Parked`.
Without that, a wait ends with `WorkerLost`, which names the missing worker, when that one has made no
progress for the time of the deadline.

Memory order: a worker's writes must be visible before its counter is.  x86 keeps the order of stores and of
loads, so nothing is needed there.  On other processors each arrival and each departure makes one futex call,
whose full memory barrier orders them ("kernel-ordered", about a microsecond each).  A lost wake-up is
possible in theory even on x86 (a store may wait in the store buffer); sleeps are therefore bounded by
`NAP_S`.

Measured (docs/LOG.md): about 1 us with a core for each worker, 15 us with four workers on two cores.
Rejected: `multiprocessing.Barrier` (90 to 220 us), pipes and eventfd (20 to 40 us), spinning alone (5.7 ms
when there are more workers than cores).
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading

from distbp.deadline import Deadline
from distbp.errors import WorkerLost

__all__ = [
    "ATTEMPT_WORD",
    "FIRST_LINE_WORD",
    "LINE_WORDS",
    "LOOKS_WORD",
    "PARK_WORD",
    "PROGRESS_WORD",
    "Barrier",
    "Parked",
    "nap",
    "wake",
]

PARK_WORD = 0
ATTEMPT_WORD = 1
FIRST_LINE_WORD = 1024
LINE_WORDS = 64
"""Words of 32 bits: the control words stand in the first page, then 256 bytes for each worker."""

_ARRIVED, _SLEEPERS, LOOKS_WORD, PROGRESS_WORD = 0, 1, 2, 4
"""Places in a worker's line: the round it has come to, who sleeps on that, how often it looked at others, and
the lower half of its units of progress (`arena.py`)."""
_SPINS = range(100)
_YIELDS = range(150)
NAP_S = 0.02

_FUTEX_CALL = {"x86_64": 202, "aarch64": 98, "ppc64le": 221, "riscv64": 98, "s390x": 238}
_FUTEX_WAIT, _FUTEX_WAKE, _EVERYBODY = 0, 1, 1 << 30
_STRONG_ORDER = platform.machine() in ("x86_64", "AMD64")


class Parked(Exception):
    """The wait was ended because a worker is lost; the caller must go to the parked state."""


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_NAP = _TimeSpec(0, int(NAP_S * 1e9))


def wake(address: int) -> None:
    """Wake every thread, in any process, that sleeps on the 32-bit word at `address`."""
    if _libc is not None:  # Elsewhere only the serial backend runs: nobody sleeps.
        number = _FUTEX_CALL[platform.machine()]
        _libc.syscall(number, ctypes.c_void_p(address), _FUTEX_WAKE, _EVERYBODY, None, None, 0)


def nap(address: int, seen: int) -> None:
    """Sleep until the word at `address` is woken, no longer holds `seen`, or `NAP_S` have passed."""
    assert _libc is not None, "only Linux has more than one worker on a host"
    number = _FUTEX_CALL[platform.machine()]
    word = ctypes.c_uint(seen)
    _libc.syscall(number, ctypes.c_void_p(address), _FUTEX_WAIT, word, ctypes.byref(_NAP), None, 0)


class Barrier:
    """The barrier of the `size` workers of one host, seen by worker `rank`.

    `words` is a view of the arena's first pages as 32-bit words, `address` where they begin in memory.
    `deadline_s` may be changed at any time; `first_rank` is added to local numbers in messages.
    """

    def __init__(self, words: memoryview, address: int, rank: int, size: int, deadline_s: float) -> None:
        self._words = words
        self._address = address
        self._rank = rank
        self._mine = FIRST_LINE_WORD + LINE_WORDS * rank
        self._others = [
            (other, FIRST_LINE_WORD + LINE_WORDS * other) for other in range(size) if other != rank
        ]
        self._round = 0
        self._thread = threading.get_ident()
        self.deadline_s = deadline_s
        self.first_rank = 0
        self.attempt = 0

    def wait(self) -> None:
        """Return when every worker of the host has called this; raise `Parked` when one is lost."""
        words, mine = self._words, self._mine
        self._round = number = self._round + 1
        if not _STRONG_ORDER:
            wake(self._address + 4 * mine)
        words[mine + _ARRIVED] = number
        if words[mine + _SLEEPERS]:
            words[mine + _SLEEPERS] = 0
            wake(self._address + 4 * mine)
        for other, line in self._others:
            for _ in _SPINS:
                if words[line] >= number:
                    break
            else:
                self._wait_longer(other, line, number)
        if not _STRONG_ORDER:
            wake(self._address + 4 * mine)

    def _wait_longer(self, other: int, line: int, number: int) -> None:
        """Give up the processor between looks, then sleep in the kernel."""
        words = self._words
        for _ in _YIELDS:
            os.sched_yield()
            if words[line] >= number:
                return
        deadline, progress = Deadline(self.deadline_s), self._progress_of(line)
        while True:
            words[line + _SLEEPERS] = 1
            seen = words[line]
            if seen >= number:
                return
            self.look()
            nap(self._address + 4 * line, seen)
            if words[line] < number and deadline.is_over():
                before, progress = progress, self._progress_of(line)
                if progress != before:
                    deadline.renew()
                    continue
                raise WorkerLost(
                    f"waited {self.deadline_s:g} s for worker {self.first_rank + other} of the same host, "
                    "which made no progress; look at its log, then run again: resuming is safe"
                )

    def _progress_of(self, line: int) -> tuple[int, int]:
        """Return what changes as long as a worker is alive."""
        return self._words[line + PROGRESS_WORD], self._words[line + LOOKS_WORD]

    def order_stores(self) -> None:
        """Make this worker's writes visible before what it writes next; nothing to do on x86."""
        if not _STRONG_ORDER:
            wake(self._address + 4 * self._mine)

    def look(self) -> None:
        """Say that this worker waits and is not stuck; raise `Parked` if a new attempt was announced.

        Only the thread that trains may say so: whoever waits beside it proves nothing.
        """
        if threading.get_ident() == self._thread:
            looks = self._mine + LOOKS_WORD
            self._words[looks] = (self._words[looks] + 1) & 0xFFFFFFFF
        self.check_parked()

    def check_parked(self) -> None:
        """Raise `Parked` if a new attempt was announced."""
        if self._words[PARK_WORD] > self.attempt:
            raise Parked

    def begin_attempt(self, attempt: int) -> None:
        """Start counting rounds anew; the one who releases the workers has set the counters to zero."""
        self.attempt = attempt
        self._round = 0
