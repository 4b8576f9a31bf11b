"""Hosts and workers as threads of one process: the shipped fake, for tests of everything that spans hosts.

Each host has an arena of its own and nothing else in common with the others but a `Hub` for each lane; the
workers' loop, the reduction, the coordinator and the rule of recovery are the real ones.  A worker that
raises `Vanish` is lost without a word, as a killed process would be, and a new thread takes its place.

It is no way to train: the workers share one interpreter.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distbp import coordinator
from distbp.arena import Arena
from distbp.backends.base import Admission, CallFinished, Plan, Seat, host_layout, host_ranks
from distbp.coordinator import decide
from distbp.run_directory import RunDirectory
from distbp.transports.base import Transport
from distbp.transports.threads import Hub

__all__ = ["ThreadsJob", "ThreadsMembership", "Vanish", "VanishHost"]

_GATE_DEADLINE_S = 60.0


class Vanish(BaseException):
    """Raised by a test inside a worker: it is gone, and nobody cleans up after it."""


class VanishHost(Vanish):
    """Raised by a test inside the only worker of a host: the host is gone, and its memory with it."""


@dataclass
class ThreadsJob:
    """A job of `host_sizes[h]` workers on host h that all execute `program(membership)`; use `run` once."""

    program: Callable[[ThreadsMembership], Any]
    host_sizes: tuple[int, ...]
    deadline_s: float = 60.0
    results: dict[int, Any] = field(default_factory=dict)
    errors: dict[int, BaseException] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    """What every worker said about a corrupted state."""

    def __post_init__(self) -> None:
        hosts = tuple(host for host, size in enumerate(self.host_sizes) for _ in range(size))
        self.state = coordinator.State(hosts=hosts)
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._hubs: dict[tuple[int, int], Hub] = {}
        self._arenas: list[Arena] = []
        self._run: RunDirectory | None = None
        self._admission: Admission | None = None
        self.result: dict[str, Any] | None = None

    def run(self) -> dict[int, Any]:
        """Run every worker to its end; return what the programs returned, or raise the first error."""
        for rank in range(len(self.state.hosts)):
            self._start(rank)
        while any(thread.is_alive() for thread in self._threads):
            for thread in list(self._threads):
                thread.join(0.05)
        for arena in self._arenas:
            arena.close()
        if self._run is not None:
            self._run.close()
        if self.errors:
            raise next(iter(self.errors.values()))
        return self.results

    def join(self, plan: Plan) -> tuple[list[Arena], Admission]:
        """Return the arenas of all hosts and the admission; the first worker to ask makes them."""
        with self._lock:
            if not self._arenas:
                self._run = RunDirectory.open(plan.out, plan.name)
                self._admission = self._run.admit(plan)
                self._plan = plan
                self._arenas = [self._new_arena(host) for host in range(len(self.host_sizes))]
            assert self._admission is not None, "the first worker was admitted"
            return self._arenas, self._admission

    def _new_arena(self, host: int) -> Arena:
        """Return an arena that holds nothing and has seen the present attempt announced."""
        arena = Arena.create(host_layout(self._plan, self.host_sizes, host))
        while arena.announced_attempt < self.state.attempt:
            arena.park()
        return arena

    def hub(self, attempt: int, lane: int) -> Hub:
        """Return the network of one lane in one attempt."""
        with self._lock:
            return self._hubs.setdefault((attempt, lane), Hub(len(self.host_sizes), self.deadline_s))

    def handle(self, event: coordinator.Event) -> None:
        """Let the coordinator decide, and carry out what it says."""
        with self._lock:
            self.state, actions = decide(self.state, event)
            for action in actions:
                self._carry_out(action)

    def record(self, record: dict[str, Any]) -> None:
        """Write an event of rank 0 into the run directory."""
        assert self._run is not None, "events come after the run was opened"
        self._run.event(record)

    def finish(self, result: dict[str, Any]) -> None:
        """Record the result of the call."""
        assert self._run is not None, "a result comes after the run was opened"
        with self._lock:
            extra = {"backend": "threads", "restarts": self.state.restarts, "steps_redone": 0}
            self.result = result | extra | {"wall_seconds": 0.0}
            self._run.write_result(self.result)

    def _start(self, rank: int) -> None:
        """Start the thread of a worker."""
        thread = threading.Thread(target=self._work, args=(rank,), name=f"worker-{rank}")
        self._threads.append(thread)
        thread.start()

    def _work(self, rank: int) -> None:
        """Execute the program as worker `rank`."""
        try:
            self.results[rank] = self.program(ThreadsMembership(self, rank))
        except Vanish as vanished:
            with self._lock:
                if isinstance(vanished, VanishHost):
                    host = self.state.hosts[rank]
                    self._arenas[host] = self._new_arena(host)
                self.handle(coordinator.Lost(rank, "vanished"))
        except BaseException as error:
            self.errors[rank] = error
            self.handle(coordinator.Failed(rank, 1, str(error)))

    def _carry_out(self, action: coordinator.Action) -> None:
        """Carry out one action of the coordinator."""
        if isinstance(action, coordinator.Park | coordinator.End):
            for arena in self._arenas:
                arena.park()
            for hub in self._hubs.values():
                hub.abort_all()
        elif isinstance(action, coordinator.Start):
            self._start(action.rank)
        elif isinstance(action, coordinator.ReadWords):
            words = tuple(arena.committed for arena in self._arenas)
            self.handle(coordinator.Words(action.attempt, words))
        elif isinstance(action, coordinator.SetWord):
            self._arenas[action.host].committed = action.step
        else:
            for arena in self._arenas:
                arena.release(action.source)


class ThreadsMembership:
    """The membership of one thread."""

    backend = "threads"

    def __init__(self, job: ThreadsJob, rank: int) -> None:
        self.rank = rank
        self.size = len(job.state.hosts)
        self._job = job

    def join(self, plan: Plan) -> Seat | dict[str, Any]:
        """Take a seat on this worker's host."""
        job, sizes = self._job, self._job.host_sizes
        arenas, admission = job.join(plan)
        if admission.result is not None:
            return admission.result
        host = job.state.hosts[self.rank]
        local_rank = self.rank - host_ranks(sizes, host).start
        keeper = arenas[host]
        arena = Arena.attach(os.dup(keeper.descriptor), keeper.layout, local_rank, job.deadline_s)

        def check() -> None:
            if job.errors:
                raise SystemExit
            if job.result is not None:
                raise CallFinished(job.result)

        def gate() -> int:
            def parked(attempt: int) -> None:
                job.handle(coordinator.Parked(self.rank, attempt))

            check()
            return arena.wait_for_release(parked, _GATE_DEADLINE_S, check)

        def connect(attempt: int) -> Transport | None:
            if len(sizes) == 1 or local_rank >= min(sizes):
                return None
            return job.hub(attempt, local_rank).connect(host)

        def broken(attempt: int) -> None:
            job.handle(coordinator.Broken(self.rank, attempt))

        def corrupted(attempt: int, finding: dict[str, Any]) -> None:
            job.handle(coordinator.Corrupted(self.rank, attempt, str(finding)))
            job.findings.append(finding)

        return Seat(self.rank, sizes, arena, admission, gate, connect, job.record, broken, corrupted)

    def finish(self, seat: Seat, result: dict[str, Any] | None) -> dict[str, Any]:
        """Hand in the result, or wait for it."""
        if result is not None:
            self._job.finish(result)
        while self._job.result is None:
            if seat.arena.announced_attempt > seat.arena.barrier.attempt:
                seat.arena.barrier.check_parked()
            time.sleep(0.001)
        return dict(self._job.result)
