"""Faults on purpose: what `DISTBP_FAULT` asks for happens to one worker, at a named point of one step.

    DISTBP_FAULT=57:exchange:1:kill               worker 1 dies in step 57, before its first exchange
    DISTBP_FAULT=57:forward:1:kill,57:start:2:exit    and worker 2 when everybody begins again at step 57

A fault is STEP:PHASE:RANK:KIND; several are separated by commas.  Steps count from 0.  It happens once, and
only in the first process that holds the rank: whoever starts a replacement hides the variable from it.

It is there for tests of recovery, of this package and of whatever stands around a job.  Without the variable
a point costs a call of a function that does nothing.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass

from distbp.errors import ConfigError

__all__ = ["KINDS", "PHASES", "VARIABLE", "Fault", "FaultPoints", "parse_faults"]

VARIABLE = "DISTBP_FAULT"

PHASES = (
    "start",  # at the beginning of an attempt, when all agreed on the step, before the first one
    "read",  # before samples are read
    "forward",  # before the forward pass
    "backward",  # when the first tensor's gradient is there
    "publish",  # when all gradients are in the slot, before the others hear of it
    "reduce",  # after the first barrier
    "exchange",  # before an exchange with other hosts; never with one host
    "measure",  # when the lane is reduced, before norms are summed
    "apply",  # after the second barrier, before the next generation is written
    "commit",  # after the third barrier, before the step is committed
    "save",  # on rank 0, when a save has begun in the background
)

EXIT_CODE = 7


def _raise() -> None:
    raise RuntimeError(f"{VARIABLE} asked for this")


KINDS: dict[str, Callable[[], object]] = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "exit": lambda: os._exit(EXIT_CODE),
    "raise": _raise,
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segfault": lambda: ctypes.string_at(0),
}


@dataclass(frozen=True)
class Fault:
    """One fault: the step and phase in which it happens, to whom, and what."""

    step: int
    phase: str
    rank: int
    kind: str


def parse_faults(text: str) -> list[Fault]:
    """Return the faults that a value of the variable describes; raises `ConfigError`."""
    faults = []
    for part in filter(None, text.split(",")):
        words = part.split(":")
        numbers = [word for word in words[::2] if word.isdecimal()]
        if len(words) != 4 or len(numbers) != 2 or words[1] not in PHASES or words[3] not in KINDS:
            raise ConfigError(
                f"{VARIABLE}: expected STEP:PHASE:RANK:KIND, with PHASE one of {', '.join(PHASES)} and KIND "
                f"one of {', '.join(KINDS)}; got {part!r}"
            )
        faults.append(Fault(int(words[0]), words[1], int(words[2]), words[3]))
    return faults


class FaultPoints:
    """The points of one worker; `reach(step, phase)` is called at each of them."""

    def __init__(self, rank: int) -> None:
        self._faults = [fault for fault in parse_faults(os.environ.get(VARIABLE, "")) if fault.rank == rank]
        self.reach: Callable[[int, str], None] = self._reach if self._faults else lambda step, phase: None

    def _reach(self, step: int, phase: str) -> None:
        for fault in self._faults:
            if (fault.step, fault.phase) == (step, phase):
                self._faults.remove(fault)
                KINDS[fault.kind]()
                return
