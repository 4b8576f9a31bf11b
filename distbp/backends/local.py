"""The launching side of the local backend: starts workers as child processes and keeps the arena.

The launching process is the coordinator (`job_keeper.py`).  It holds the arena's memory, so a worker's death
loses nothing.  A worker's end is seen through its pidfd, within a scheduler tick, also for SIGKILL.

Needs Linux (pidfd, memfd); elsewhere there is the serial backend.
"""

from __future__ import annotations

import selectors
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from distbp.arena import Arena
from distbp.backends.base import Admission, Plan, host_layout
from distbp.backends.hang_watch import Glance
from distbp.backends.job_keeper import JobKeeper
from distbp.backends.job_parts import Call, WorkerLink, look_at
from distbp.backends.local_process import WorkerProcess
from distbp.cgroups import oom_kills
from distbp.coordinator import OUT_OF_MEMORY
from distbp.errors import EnvironmentMismatch
from distbp.run_directory import RunDirectory

__all__ = ["LocalJob"]


class LocalJob(JobKeeper):
    """A job of `nproc` workers on this machine that all run `arguments`; `run` returns the exit code.

    `job` is sent to every worker together with `descriptor`; the other options are those of `JobKeeper`.
    """

    backend = "local"

    def __init__(
        self,
        arguments: Sequence[str],
        nproc: int,
        *,
        threads: int = 1,
        max_restarts: int = 10,
        join_timeout_s: float = 30.0,
        job: dict[str, Any] | None = None,
        descriptor: int | None = None,
        admitted: tuple[RunDirectory, Admission] | None = None,
    ) -> None:
        if sys.platform != "linux":
            raise EnvironmentMismatch("the local backend needs Linux; use --backend serial here")
        super().__init__(
            (nproc,), max_restarts=max_restarts, join_timeout_s=join_timeout_s, job=job, admitted=admitted
        )
        self._arguments = list(arguments)
        self._threads = threads
        self._descriptor = descriptor
        self._oom_kills = oom_kills()

    def start_worker(self, rank: int) -> WorkerLink:
        """Start worker `rank` as a child process."""
        process = WorkerProcess.start(
            rank, self.host_sizes[0], self._threads, self._arguments, self.faults_for(rank)
        )
        self.selector.register(
            process.channel, selectors.EVENT_READ, lambda: self._read_message(rank, process)
        )
        self.selector.register(process.pidfd, selectors.EVENT_READ, lambda: self._note_end(rank, process))
        process.unwatch = self.unwatch
        if self.first_message is not None:
            self.tell(process, self.first_message, self._descriptor)
        return process

    def open_memory(self, plan: Plan) -> LocalMemory:
        """Make the arena of a new call."""
        return LocalMemory(plan, self.host_sizes[0], self.state.attempt)

    def check_run_directory(self, call: Call, rank: int) -> None:
        """Pass: workers of this machine see what the launching process sees."""

    def _note_end(self, rank: int, process: WorkerProcess) -> None:
        """Read what a worker said before it ended."""
        while process.channel.fileno() >= 0 and self._read_message(rank, process):
            pass
        process.popen.wait()
        process.close()
        cause, kills = process.cause(), oom_kills()
        if cause == "SIGKILL" and kills > self._oom_kills:
            cause = OUT_OF_MEMORY
        self._oom_kills = kills
        self.note_end(rank, process, cause)

    def _read_message(self, rank: int, process: WorkerProcess) -> bool:
        """Handle one message of a worker; return False when there is none left."""
        try:
            received = process.channel.receive(0.0)
        except EOFError:
            self.unwatch(process.channel)
            return False
        if received is not None:
            self.note_message(rank, process, received[0])
        return received is not None


class LocalMemory:
    """The one arena of a local call; it has seen `attempt` announced and holds nothing."""

    def __init__(self, plan: Plan, workers: int, attempt: int) -> None:
        self._arena = Arena.create(host_layout(plan, (workers,), 0))
        self.park(attempt)

    def seat(self, rank: int) -> tuple[dict[str, Any], int | None]:
        """Return the layout, and the arena's descriptor."""
        layout = msgspec.to_builtins(self._arena.layout)
        return {"layout": layout, "local_rank": rank}, self._arena.descriptor

    def park(self, attempt: int) -> None:
        """Announce `attempt`."""
        while self._arena.announced_attempt < attempt:
            self._arena.park()
        announced = self._arena.announced_attempt
        assert announced == attempt, f"the arena announced {announced}, expected {attempt}"

    def release(self, source: int) -> None:
        """Let the parked workers begin."""
        self._arena.release(source)

    def words(self) -> tuple[int, ...]:
        """Return the committed-step word."""
        return (self._arena.committed,)

    def progress(self) -> tuple[int, int]:
        """Return the committed step and the newest durable checkpoint."""
        return self._arena.committed, self._arena.saved

    def glances(self) -> dict[int, Glance]:
        """Return what is seen of the workers."""
        return look_at(self._arena)

    def set_word(self, host: int, step: int) -> None:
        """Store the committed-step word of the only host."""
        assert host == 0, f"there is one host, got {host}"
        self._arena.committed = step

    def request_stop(self) -> None:
        """Ask the workers to finish the step, save and end."""
        self._arena.request_stop()

    def close(self) -> None:
        """Give back the memory; idempotent."""
        self._arena.close()
