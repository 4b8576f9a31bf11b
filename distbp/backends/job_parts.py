"""What a job with a coordinator is made of: links to workers, the memory of the hosts, calls of `fit`.

A backend implements the two protocols; `job_keeper.py` drives them and knows nothing of processes or actors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from distbp.arena import Arena
from distbp.backends.base import Admission, Plan
from distbp.backends.hang_watch import Glance, Stuck
from distbp.job import PHASES, SLOW_PHASES
from distbp.run_directory import RunDirectory

__all__ = ["Call", "HostMemory", "WorkerLink", "end_stuck", "look_at"]

_STACKS_S = 0.3
"""Seconds that a stuck worker gets to write its stacks."""


class WorkerLink(Protocol):
    """A worker as the job sees it: its place, and how it is reached and ended."""

    said_goodbye: bool
    verdict: str | None
    """Why the job itself ended this worker, if it did."""

    @property
    def host(self) -> str:
        """Return the name of the host it runs on."""

    @property
    def pid(self) -> int:
        """Return its process number there."""

    def tell(self, message: Mapping[str, Any], descriptor: int | None = None) -> None:
        """Send a message; `OSError` when the worker has gone."""

    def wait(self, seconds: float) -> None:
        """Return when the worker has ended, or after `seconds`."""

    def dump_stacks(self) -> None:
        """Let the worker write the stacks of its threads into its log, if it still can."""

    def end(self) -> None:
        """Kill the worker; its end is then noted like any other."""

    def kill(self) -> None:
        """End the worker if it still runs, and give back what the link holds; idempotent."""


class HostMemory(Protocol):
    """The arenas of all hosts in one call of `fit`."""

    def seat(self, rank: int) -> tuple[dict[str, Any], int | None]:
        """Return what worker `rank` is told about its arena, and the descriptor that goes with it."""

    def park(self, attempt: int) -> None:
        """Announce `attempt` on every host."""

    def release(self, source: int) -> None:
        """Let the parked workers of every host begin."""

    def words(self) -> tuple[int, ...]:
        """Return the committed-step word of every host; all workers are parked."""

    def progress(self) -> tuple[int, int]:
        """Return the highest committed step and the newest durable checkpoint that can be seen now.

        For messages and budgets: a host that does not answer is passed over.
        """

    def glances(self) -> dict[int, Glance]:
        """Return what is seen of the workers now; those of a host that does not answer are left out."""

    def set_word(self, host: int, step: int) -> None:
        """Store the committed-step word of one host."""

    def request_stop(self) -> None:
        """Ask the workers of every host to finish the step, save and end."""

    def close(self) -> None:
        """Give back the memory; idempotent."""


@dataclass
class Call:
    """One call of `fit`: its plan, its memory, and its result once there is one."""

    plan: Plan
    run: RunDirectory
    admission: Admission
    memory: HostMemory
    began: float
    result: dict[str, Any] | None = None
    joined: set[int] = field(default_factory=set)
    released: int = 0
    lane_addresses: dict[int, Any] = field(default_factory=dict)

    def close(self) -> None:
        """Give back the memory and the run directory; idempotent."""
        self.memory.close()
        self.run.close()


def look_at(arena: Arena) -> dict[int, Glance]:
    """Return what is seen of the workers of a host, by their numbers there."""
    glances = {}
    for worker in range(arena.layout.workers):
        units, phase = arena.progress_of(worker)
        glances[worker] = Glance(units, PHASES[phase], phase in SLOW_PHASES)
    return glances


def end_stuck(worker: WorkerLink, found: Stuck, say_event: Callable[..., None]) -> None:
    """Let a stuck worker write its stacks, say so, and kill it a moment later."""
    worker.verdict = f"stuck for {found.seconds:.0f} s in {found.phase}"
    worker.dump_stacks()
    say_event(
        "E_STUCK_WORKER",
        rank=found.rank,
        host=worker.host,
        pid=worker.pid,
        phase=found.phase,
        seconds=round(found.seconds, 1),
        action="kill",
    )
    time.sleep(_STACKS_S)
    worker.end()
