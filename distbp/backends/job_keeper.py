"""The launching side of a job that has a coordinator of its own: what local workers and Ray actors share.

The launching process holds the lock of the run directory and decides; it computes nothing itself.  One loop
waits for three kinds of things: messages from workers, the end of a worker, and signals.  Each becomes an
event for `coordinator.decide`, and what that answers is carried out here.

A worker that ends without saying goodbye is lost, whatever its exit code: `os._exit(0)` in the middle of a
step is a loss like any other.  Its last messages are read first, so an error that it reported wins.

What a backend adds, by deriving from `JobKeeper`: how workers are started, watched and reached
(`WorkerLink`), and where the memory of the hosts is kept (`HostMemory`).
"""

from __future__ import annotations

import os
import selectors
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from math import inf
from typing import Any

import msgspec

from distbp import coordinator
from distbp.arena import EMPTY
from distbp.backends.base import Admission, Plan, compare_plans, describe_difference, host_ranks
from distbp.backends.corruption import describe_corruption
from distbp.backends.hang_watch import HangWatch
from distbp.backends.job_parts import Call, HostMemory, WorkerLink, end_stuck
from distbp.backends.patience import Patience
from distbp.backends.signal_inbox import SignalInbox
from distbp.coordinator import decide
from distbp.errors import DistbpError
from distbp.fault_points import VARIABLE, parse_faults
from distbp.run_directory import RunDirectory
from distbp.terminal import say

__all__ = ["JobKeeper"]

_GRACE_S = 2.0
"""Seconds that workers get to end by themselves after the last one said goodbye."""

_FAILED_GRACE_S = 0.2
"""Seconds that the others get to write what they have to say after one has failed."""

_SCRIPT_S = 1800.0
"""Seconds that workers of a script wait in `fit` for one that does something else before."""

_TICK_S = 0.5
_KINDS = {
    "E_LOST_WORKER": "lost",
    "E_LOST_KEEPER": "lost",
    "E_STUCK_WORKER": "stuck",
    "I_RESUMED": "restart",
}
"""What events are called in `events.jsonl`."""


class JobKeeper(ABC):
    """A job whose workers, `host_sizes[h]` on host h, all run the same program; `run` returns the exit code.

    `job` is sent to every worker as its first message, for programs that ask for it.  `admitted` is the run
    directory of the first call of `fit`, if it was already opened and locked.  Workers that the others have
    waited for in `fit` for `join_timeout_s` are named, and given up after `give_up_s`.
    """

    backend: str

    def __init__(
        self,
        host_sizes: tuple[int, ...],
        *,
        max_restarts: int,
        join_timeout_s: float,
        job: dict[str, Any] | None,
        admitted: tuple[RunDirectory, Admission] | None,
    ) -> None:
        parse_faults(os.environ.get(VARIABLE, ""))  # A wrong one is refused before anything starts.
        hosts = tuple(host for host, size in enumerate(host_sizes) for _ in range(size))
        self.host_sizes = host_sizes
        self.state = coordinator.State(hosts=hosts, max_restarts=max_restarts)
        self.selector = selectors.DefaultSelector()
        self.first_message = job
        self._workers: dict[int, WorkerLink] = {}
        self._patience = Patience(join_timeout_s, self.give_up_s(join_timeout_s))
        self._pending_starts: list[tuple[float, int]] = []
        self._admitted = admitted
        self._calls: list[Call] = []
        self._stop_signal = 0
        self._watch = HangWatch(_TICK_S)
        self._watched_at = 0.0
        self._message = ""
        self._steps_redone = 0

    # What a backend adds.

    @abstractmethod
    def start_worker(self, rank: int) -> WorkerLink:
        """Start worker `rank` and let the loop hear of its messages and its end."""

    @abstractmethod
    def open_memory(self, plan: Plan) -> HostMemory:
        """Make the arenas of a new call; they hold nothing."""

    def give_up_s(self, join_timeout_s: float) -> float:
        """Return for how many seconds the others wait for a worker before the job ends with 69.

        Workers of a `distbp train` all do the same before; of a script, one may prepare data for all.
        """
        return join_timeout_s if self.first_message is not None else max(join_timeout_s, _SCRIPT_S)

    @abstractmethod
    def check_run_directory(self, call: Call, rank: int) -> None:
        """Raise if worker `rank` cannot do its part in the run directory; called when it joins."""

    def faults_for(self, rank: int) -> str:
        """Return the faults on purpose that worker `rank` may hear of: a replacement has none."""
        return "" if rank in self._workers else os.environ.get(VARIABLE, "")

    # The loop.

    def run(self) -> int:
        """Run the job to its end; nothing is left behind when this returns."""
        inbox = SignalInbox(self._request_stop, self._stop_at_once)
        self.selector.register(inbox, selectors.EVENT_READ, inbox.read)
        try:
            for rank in range(len(self.state.hosts)):
                self._workers[rank] = self.start_worker(rank)
            while not self.state.ended:
                soonest = min((at for at, _ in self._pending_starts), default=inf) - time.monotonic()
                for key, _ in self.selector.select(min(_TICK_S, max(0.0, soonest))):
                    key.data()
                self._start_due()
                self._name_missing()
                self._end_stuck()
            return self._end()
        finally:
            for worker in self._workers.values():
                worker.kill()
            inbox.close()
            for call in self._calls:
                call.close()
            self.selector.close()

    def unwatch(self, *watched: Any) -> None:
        """Take descriptors out of the loop; those that are not in it are passed over."""
        for descriptor in watched:
            with suppress(KeyError, ValueError):
                self.selector.unregister(descriptor)

    def _start_due(self) -> None:
        """Start the replacements whose time has come."""
        now = time.monotonic()
        due = [rank for at, rank in self._pending_starts if at <= now]
        self._pending_starts = [(at, rank) for at, rank in self._pending_starts if at > now]
        for rank in due:
            self._workers[rank] = self.start_worker(rank)

    def _name_missing(self) -> None:
        """Say whom the others wait for, in `fit` or for a replacement, when that takes long."""
        call, now = self._current_call(), time.monotonic()
        missing = set(range(len(self.state.hosts))) - call.joined if call is not None else set()
        if call is None or not missing:
            self._patience.nobody_is_missing(now)
            return
        doing = "be replaced" if call.released else "call fit"
        if (found := self._patience.look(now, call.began, missing, doing)) is None:
            return
        if found.over:
            self.handle(coordinator.Failed(-1, 69, found.text))
        else:
            say(f"distbp: {found.text}")

    def _end_stuck(self) -> None:
        """End workers that make no progress: ask for their stacks first, and kill them a moment later."""
        call, now = self._current_call(), time.monotonic()
        if call is None or now - self._watched_at < _TICK_S:
            return
        self._watched_at = now
        seen = call.memory.glances()
        stuck = self._watch.observe(now, {rank: seen[rank] for rank in call.joined if rank in seen})
        for found in stuck:
            worker = self._workers[found.rank]
            if worker.verdict is None:
                end_stuck(worker, found, self.event)

    def _stop_at_once(self, number: int) -> None:
        """End the job without another step."""
        self.handle(coordinator.Failed(-1, 128 + number, "stopped at once, by a second signal"))

    def _request_stop(self, number: int) -> None:
        """Let every worker finish its step, save and leave."""
        self._stop_signal = self._stop_signal or number
        call = self._current_call()
        if call is not None:
            call.memory.request_stop()

    # Messages.

    def note_end(self, rank: int, worker: WorkerLink, cause: str) -> None:
        """Note that a worker's process is dead; without a goodbye it is lost.  Read its messages before."""
        if worker.said_goodbye or self.state.ended or self._workers.get(rank) is not worker:
            return
        call = self._current_call()
        step, saved = EMPTY, EMPTY
        if call is not None:
            call.joined.discard(rank)
            self._watch.forget(rank)
            step, saved = call.memory.progress()
        cause = worker.verdict or cause
        self.handle(coordinator.Lost(rank, cause, step, saved))
        if not self.state.ended:
            action = f"respawn({self.state.restarts_without_progress}/{self.state.max_restarts})"
            self.event(
                "E_LOST_WORKER",
                rank=rank,
                host=worker.host,
                pid=worker.pid,
                step=step,
                cause=cause,
                action=action,
                resume_step=step,
            )

    def note_message(self, rank: int, worker: WorkerLink, message: dict[str, Any]) -> None:
        """Handle one message of a worker."""
        kind = message["kind"]
        if kind == "join":
            self._join(rank, worker, message)
        elif kind in ("parked", "broken", "corrupt"):
            self._note_attempt(rank, worker, message)
        elif kind == "finished":
            self._finish(message["call"], message["result"])
        elif kind == "event":
            self._steps_redone += message["record"].get("steps_redone", 0)
            self._calls[-1].run.event(message["record"])
        elif kind == "stop":
            self._request_stop(message["signal"])
        elif kind == "failed":
            worker.said_goodbye = True
            self.handle(coordinator.Failed(rank, message["exit_code"], message["message"]))
        else:
            assert kind == "left", f"unknown message {kind!r}"
            worker.said_goodbye = True
            call = self._current_call()
            if call is not None and message["exit_code"] == 0:
                self._refuse_unequal(rank)
            self.handle(coordinator.Left(rank, message["exit_code"]))

    def tell(self, worker: WorkerLink, message: Mapping[str, Any], descriptor: int | None = None) -> None:
        """Send a message; a worker that has died meanwhile is noticed by whoever watches it."""
        with suppress(OSError):
            worker.tell(message, descriptor)

    def _tell_result(self, worker: WorkerLink, number: int) -> None:
        """Send the result of a call that is over."""
        self.tell(worker, {"kind": "result", "call": number, "result": self._calls[number - 1].result})

    def _join(self, rank: int, worker: WorkerLink, message: dict[str, Any]) -> None:
        """Give a worker its seat in a call of `fit`, or the result if that call is over."""
        number, plan = message["call"], msgspec.convert(message["plan"], Plan)
        try:
            if number > len(self._calls):
                assert number == len(self._calls) + 1, f"call {number} comes after {len(self._calls)}"
                self._calls.append(self._open_call(plan))
            call = self._calls[number - 1]
            if call.result is not None:
                self._tell_result(worker, number)
                return
            self.check_run_directory(call, rank)
            if call.released and call.memory.progress()[0] == EMPTY:
                # Every host was lost since the call began, and newer checkpoints may have been made by then.
                newest = call.run.newest_checkpoint() or call.admission.restore
                call.admission = replace(call.admission, restore=newest)
        except DistbpError as error:
            self.handle(coordinator.Failed(rank, error.exit_code, str(error)))
            return
        if self.state.left:
            self._refuse_unequal(sorted(self.state.left)[0])
            return
        if differing := compare_plans(call.plan, plan):
            text = describe_difference(rank, differing)
            self.handle(coordinator.Failed(rank, 78, text))
            return
        call.joined.add(rank)
        call.lane_addresses[rank] = message["lane_address"]
        fields, descriptor = call.memory.seat(rank)
        restore = call.admission.restore
        seat = fields | {
            "kind": "seat",
            "host_sizes": self.host_sizes,
            "out": str(call.admission.out),
            "restore": str(restore) if restore else None,
            "start": call.admission.start,
        }
        self.tell(worker, seat, descriptor)

    def _refuse_unequal(self, rank: int) -> None:
        """End a job in which one worker has left while others wait for it in `fit`."""
        message = (
            f"worker {rank} ended without the call of fit in which the others wait for it; every worker must "
            "make the same calls"
        )
        self.handle(coordinator.Failed(rank, 1, message))

    def _open_call(self, plan: Plan) -> Call:
        """Open the run directory and make the arenas for a new call of `fit`."""
        if self._calls:  # A script may catch the error of one call and make another.
            self._calls[-1].close()
        if self._admitted is not None and not self._calls:
            run, admission = self._admitted
        else:
            run = RunDirectory.open(plan.out, plan.name)
            admission = run.admit(plan)
        memory = self.open_memory(plan)
        if self._stop_signal:
            memory.request_stop()
        return Call(plan, run, admission, memory, time.monotonic(), result=admission.result)

    def _note_attempt(self, rank: int, worker: WorkerLink, message: dict[str, Any]) -> None:
        """Pass on that a worker is parked, or lost a peer; or tell it that there is nothing to wait for."""
        call = self._calls[message["call"] - 1]
        if call.result is not None:
            self._tell_result(worker, message["call"])
        elif message["kind"] == "parked":
            self.handle(coordinator.Parked(rank, message["attempt"]))
        elif message["kind"] == "corrupt":
            self._note_corruption(call, rank, message)
        else:
            self.handle(coordinator.Broken(rank, message["attempt"], *call.memory.progress()))

    def _note_corruption(self, call: Call, rank: int, message: dict[str, Any]) -> None:
        """Let everybody go back to the newest checkpoint; all ask for it, and the first one counts."""
        firsts = [host_ranks(self.host_sizes, host).start for host in range(len(self.host_sizes))]
        event = describe_corruption(message["finding"], [self._workers[first].host for first in firsts])
        before = self.state.attempt
        self.handle(coordinator.Corrupted(rank, message["attempt"], event.text, *call.memory.progress()))
        if self.state.attempt != before:
            action = f"reload({self.state.restarts_without_progress}/{self.state.max_restarts})"
            say(f"distbp: {event.text} action={action}")
            call.run.event(event.record | {"action": action})

    def _finish(self, number: int, result: dict[str, Any]) -> None:
        """Record the result of a call and hand it to every worker that took part."""
        call = self._calls[number - 1]
        if call.result is not None:
            return
        if result["exit_code"] == 75 and self._stop_signal == signal.SIGINT:
            result["exit_code"] = 130
        call.result = result | {
            "backend": self.backend,
            "wall_seconds": time.monotonic() - call.began,
            "restarts": self.state.restarts,
            "steps_redone": self._steps_redone,
        }
        call.run.write_result(call.result)
        for rank in call.joined:
            self._tell_result(self._workers[rank], number)
        call.close()

    # Decisions.

    def _current_call(self) -> Call | None:
        """Return the call that is running, if one is."""
        return self._calls[-1] if self._calls and self._calls[-1].result is None else None

    def handle(self, event: coordinator.Event) -> None:
        """Let the coordinator decide, and carry out what it says."""
        self.state, actions = decide(self.state, event)
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: coordinator.Action) -> None:
        """Carry out one action."""
        call = self._current_call()
        if isinstance(action, coordinator.Park):
            if call is not None:
                call.memory.park(action.attempt)
        elif isinstance(action, coordinator.Start):
            self._pending_starts.append((time.monotonic() + action.after_s, action.rank))
        elif isinstance(action, coordinator.End):
            self._message = action.message
        else:
            assert call is not None, f"{action} outside of a call"
            if isinstance(action, coordinator.ReadWords):
                self.handle(coordinator.Words(action.attempt, call.memory.words()))
            elif isinstance(action, coordinator.SetWord):
                call.memory.set_word(action.host, action.step)
            else:
                self._release(call, action)

    def _release(self, call: Call, action: coordinator.Release) -> None:
        """Say where the peers are, and let everybody begin."""
        step = max(call.memory.words())
        if call.released and step != EMPTY:
            self._steps_redone += 1
            self.event("I_RESUMED", step=step, attempt=action.attempt)
        call.released += 1
        if len(self.host_sizes) > 1:
            ranks = range(len(self.state.hosts))
            addresses = [call.lane_addresses[rank] for rank in ranks]
            names = [self._workers[rank].host for rank in ranks]
            peers = {"kind": "peers", "attempt": action.attempt, "addresses": addresses, "names": names}
            for worker in self._workers.values():
                self.tell(worker, peers)
        call.memory.release(action.source)

    def event(self, name: str, **fields: Any) -> None:
        """Say one event on stderr and record it."""
        text = " ".join(f"{key}={value}" for key, value in fields.items())
        say(f"distbp: {name} {text}")
        if self._calls:
            self._calls[-1].run.event({"kind": _KINDS[name]} | fields)

    def _end(self) -> int:
        """Let workers leave, print why the job ended as the last thing, and return the exit code."""
        until = time.monotonic() + (_FAILED_GRACE_S if self._message else _GRACE_S)
        for worker in self._workers.values():
            worker.wait(max(0.0, until - time.monotonic()))
        for worker in self._workers.values():
            worker.kill()
        code = self.state.exit_code
        if code in (75, 130):
            code = 130 if self._stop_signal == signal.SIGINT else 75
            last = self._calls[-1] if self._calls else None
            self._message = (
                "stopped on request before training began; run again"
                if last is None or last.result is None
                else f"stopped on request after step {last.result['steps']}; the checkpoint is safe in "
                f"{last.admission.out}; run the same command again to go on"
            )
        elif self._message:
            self._note_failure(code)
        if self._message:
            say(f"distbp: {self._message}")
        return code

    def _note_failure(self, code: int) -> None:
        """Write the failure where the result would be."""
        call = self._current_call()
        if call is not None:
            with suppress(DistbpError):
                call.run.write_result({"status": "failed", "exit_code": code, "message": self._message})
