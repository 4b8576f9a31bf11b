"""The launching side of the local backend: starts workers as child processes and keeps the arena.

The launching process is the coordinator.  It holds the lock of the run directory and the arena's memory, so a
worker's death loses nothing; it computes nothing itself.  One loop waits for three kinds of things: messages
from workers, the end of a worker (pidfd, seen within a scheduler tick, also for SIGKILL), and signals.  Each
becomes an event for `coordinator.decide`, and what that answers is carried out here.

A worker that ends without saying goodbye is lost, whatever its exit code: `os._exit(0)` in the middle of a
step is a loss like any other.  Its last messages are read first, so an error that it reported wins.

Needs Linux (pidfd, memfd); elsewhere there is the serial backend.
"""

from __future__ import annotations

import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import msgspec

from distbp import coordinator
from distbp.arena import EMPTY, Arena
from distbp.backends.base import Admission, Plan, compare_plans, host_layout
from distbp.backends.local_process import WorkerProcess
from distbp.backends.local_worker import receive, send
from distbp.coordinator import decide
from distbp.errors import DistbpError, EnvironmentMismatch
from distbp.run_directory import RunDirectory

__all__ = ["LocalJob"]

_GRACE_S = 2.0
"""Seconds that workers get to end by themselves after the last one said goodbye."""

_FAILED_GRACE_S = 0.2
"""Seconds that the others get to write what they have to say after one has failed."""

_SAME_SIGNAL_S = 0.3
_TICK_S = 5.0


@dataclass
class _Call:
    """One call of `fit`: its plan, its arena, and its result once there is one."""

    plan: Plan
    run: RunDirectory
    admission: Admission
    arena: Arena
    began: float
    result: dict[str, Any] | None = None
    joined: set[int] = field(default_factory=set)
    released: int = 0

    def close(self) -> None:
        """Give back the memory and the run directory; idempotent."""
        self.arena.close()
        self.run.close()


class LocalJob:
    """A job of `nproc` workers that all run `arguments`; `run` returns the exit code.

    `job` is sent to every worker as its first message together with `descriptor`, for programs that ask for
    it.  `admitted` is the run directory of the first call of `fit`, if it was already opened and locked.
    Workers that the others have waited for in `fit` for `join_timeout_s` are named.
    """

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
        self._arguments = list(arguments)
        self._nproc = nproc
        self._threads = threads
        self._join_timeout_s = join_timeout_s
        self._first_message = job
        self._descriptor = descriptor
        self._admitted = admitted
        self._state = coordinator.State(hosts=(0,) * nproc, max_restarts=max_restarts)
        self._processes: dict[int, WorkerProcess] = {}
        self._calls: list[_Call] = []
        self._selector = selectors.DefaultSelector()
        self._stop_signal = 0
        self._own_signal_at: float | None = None
        self._warned_at = time.monotonic()
        self._message = ""
        self._steps_redone = 0

    def run(self) -> int:
        """Run the job to its end; nothing is left behind when this returns."""
        previous = self._listen_to_signals()
        try:
            for rank in range(self._nproc):
                self._start(rank)
            while not self._state.ended:
                for key, _ in self._selector.select(_TICK_S):
                    key.data()
                self._name_missing()
            return self._end()
        finally:
            for process in self._processes.values():
                self._kill(process)
            for number, handler in previous.items():
                signal.signal(number, handler)
            for call in self._calls:
                call.close()
            self._selector.close()

    def _name_missing(self) -> None:
        """Say whom the others wait for when some have come to `fit` and some have not for a long time."""
        call = self._current_call()
        if call is None or call.released or len(call.joined) == self._nproc:
            return
        waited = time.monotonic() - max(call.began, self._warned_at)
        if waited > self._join_timeout_s:
            self._warned_at = time.monotonic()
            missing = sorted(set(range(self._nproc)) - call.joined)
            seconds = time.monotonic() - call.began
            print(
                f"distbp: W_WAITING for worker {missing} to call fit, {seconds:.0f} s so far",
                file=sys.stderr,
                flush=True,
            )

    # Signals.

    def _listen_to_signals(self) -> dict[int, Any]:
        """Let signals wake the loop; return the handlers that stood before."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        self._wakeup = (reader, writer)

        def handle(number: int, frame: FrameType | None) -> None:
            with suppress(BlockingIOError):
                writer.send(bytes([number]))

        self._selector.register(reader, selectors.EVENT_READ, lambda: self._read_signals(reader))
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        return {number: signal.signal(number, handle) for number in numbers}

    def _read_signals(self, reader: socket.socket) -> None:
        """Ask for a stop at the first signal; end at once at the second.

        A signal to the whole process group arrives here, and from every worker; `timeout` sends each twice.
        So workers' signals do not count here, nor does one that follows within `_SAME_SIGNAL_S`.
        """
        for number in reader.recv(64):
            now = time.monotonic()
            if self._own_signal_at is None:
                self._own_signal_at = now
                self._request_stop(number)
            elif now - self._own_signal_at > _SAME_SIGNAL_S:
                self._handle(coordinator.Failed(-1, 128 + number, "stopped at once, by a second signal"))

    def _request_stop(self, number: int) -> None:
        """Let every worker finish its step, save and leave."""
        self._stop_signal = self._stop_signal or number
        call = self._current_call()
        if call is not None:
            call.arena.request_stop()

    # Processes.

    def _start(self, rank: int) -> None:
        """Start the worker `rank`."""
        process = WorkerProcess.start(rank, self._nproc, self._threads, self._arguments)
        self._processes[rank] = process
        self._selector.register(
            process.channel, selectors.EVENT_READ, lambda: self._read_message(rank, process)
        )
        self._selector.register(process.pidfd, selectors.EVENT_READ, lambda: self._note_end(rank, process))
        if self._first_message is not None:
            self._tell(process, self._first_message, self._descriptor)

    def _note_end(self, rank: int, process: WorkerProcess) -> None:
        """Read what a worker said before it ended; without a goodbye it is lost."""
        while process.channel.fileno() >= 0 and self._read_message(rank, process):
            pass
        process.popen.wait()
        self._forget(process)
        if process.said_goodbye or self._state.ended:
            return
        call = self._current_call()
        if call is not None:
            call.joined.discard(rank)
        step, saved = (EMPTY, EMPTY) if call is None else (call.arena.committed, call.arena.saved)
        cause = process.cause()
        self._handle(coordinator.Lost(rank, cause, step, saved))
        if not self._state.ended:
            action = f"respawn({self._state.restarts_without_progress}/{self._state.max_restarts})"
            self._event(
                "E_LOST_WORKER",
                rank=rank,
                host=socket.gethostname(),
                pid=process.popen.pid,
                step=step,
                cause=cause,
                action=action,
                resume_step=step,
            )

    def _forget(self, process: WorkerProcess) -> None:
        """Stop watching a process that has ended."""
        for watched in (process.channel, process.pidfd):
            with suppress(KeyError, ValueError):
                self._selector.unregister(watched)
        process.close()

    def _kill(self, process: WorkerProcess) -> None:
        """End a process if it still runs, and wait for it."""
        process.kill()
        self._forget(process)

    # Messages.

    def _read_message(self, rank: int, process: WorkerProcess) -> bool:
        """Handle one message of a worker; return False when there is none left."""
        try:
            message, _ = receive(process.channel, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except EOFError:
            with suppress(KeyError, ValueError):
                self._selector.unregister(process.channel)
            return False
        if message["kind"] == "join":
            self._join(rank, process, message["call"], msgspec.convert(message["plan"], Plan))
        elif message["kind"] == "parked":
            self._note_parked(rank, process, message["call"], message["attempt"])
        elif message["kind"] == "finished":
            self._finish(message["call"], message["result"])
        elif message["kind"] == "event":
            self._calls[-1].run.event(message["record"])
        elif message["kind"] == "stop":
            self._request_stop(message["signal"])
        elif message["kind"] == "failed":
            process.said_goodbye = True
            self._handle(coordinator.Failed(rank, message["exit_code"], message["message"]))
        else:
            assert message["kind"] == "left", f"unknown message {message['kind']!r}"
            process.said_goodbye = True
            call = self._current_call()
            if call is not None and message["exit_code"] == 0:
                self._refuse_unequal(rank)
            self._handle(coordinator.Left(rank, message["exit_code"]))
        return True

    def _tell(self, process: WorkerProcess, message: dict[str, Any], descriptor: int | None = None) -> None:
        """Send a message; a worker that has died meanwhile is reported by its pidfd."""
        with suppress(OSError):
            send(process.channel, message, descriptor)

    def _tell_result(self, process: WorkerProcess, number: int) -> None:
        """Send the result of a call that is over."""
        self._tell(process, {"kind": "result", "call": number, "result": self._calls[number - 1].result})

    def _join(self, rank: int, process: WorkerProcess, number: int, plan: Plan) -> None:
        """Give a worker its seat in call `number`, or the result if that call is over."""
        if number > len(self._calls):
            assert number == len(self._calls) + 1, f"call {number} comes after {len(self._calls)}"
            try:
                self._calls.append(self._open_call(plan))
            except DistbpError as error:
                self._handle(coordinator.Failed(rank, error.exit_code, str(error)))
                return
        call = self._calls[number - 1]
        if call.result is not None:
            self._tell_result(process, number)
            return
        if self._state.left:
            self._refuse_unequal(sorted(self._state.left)[0])
            return
        if differing := compare_plans(call.plan, plan):
            message = (
                f"worker {rank} brought another plan than the first worker: {differing}; "
                "every worker must run the same script with the same options, data, NumPy, BLAS kernel "
                "(OPENBLAS_CORETYPE) and CPU features (NPY_DISABLE_CPU_FEATURES)"
            )
            self._handle(coordinator.Failed(rank, 78, message))
            return
        call.joined.add(rank)
        restore = call.admission.restore
        seat = {
            "kind": "seat",
            "layout": msgspec.to_builtins(call.arena.layout),
            "out": str(call.admission.out),
            "restore": str(restore) if restore else None,
            "start": call.admission.start,
        }
        self._tell(process, seat, call.arena.descriptor)

    def _refuse_unequal(self, rank: int) -> None:
        """End a job in which one worker has left while others wait for it in `fit`."""
        message = (
            f"worker {rank} ended without the call of fit in which the others wait for it; every worker must "
            "make the same calls"
        )
        self._handle(coordinator.Failed(rank, 1, message))

    def _open_call(self, plan: Plan) -> _Call:
        """Open the run directory and make the arena for a new call of `fit`."""
        if self._calls:  # A script may catch the error of one call and make another.
            self._calls[-1].close()
        if self._admitted is not None and not self._calls:
            run, admission = self._admitted
        else:
            run = RunDirectory.open(plan.out, plan.name)
            admission = run.admit(plan)
        arena = Arena.create(host_layout(plan, (self._nproc,), 0))
        while arena.announced_attempt < self._state.attempt:
            arena.park()
        if self._stop_signal:
            arena.request_stop()
        return _Call(plan, run, admission, arena, time.monotonic(), result=admission.result)

    def _note_parked(self, rank: int, process: WorkerProcess, number: int, attempt: int) -> None:
        """Pass on that a worker is parked, or tell it that there is nothing left to wait for."""
        call = self._calls[number - 1]
        if call.result is not None:
            self._tell_result(process, number)
        else:
            self._handle(coordinator.Parked(rank, attempt))

    def _finish(self, number: int, result: dict[str, Any]) -> None:
        """Record the result of a call and hand it to every worker that took part."""
        call = self._calls[number - 1]
        if call.result is not None:
            return
        if result["exit_code"] == 75 and self._stop_signal == signal.SIGINT:
            result["exit_code"] = 130
        call.result = result | {
            "backend": "local",
            "wall_seconds": time.monotonic() - call.began,
            "restarts": self._state.restarts,
            "steps_redone": self._steps_redone,
        }
        call.run.write_result(call.result)
        for rank in call.joined:
            self._tell_result(self._processes[rank], number)
        call.close()

    # Decisions.

    def _current_call(self) -> _Call | None:
        """Return the call that is running, if one is."""
        return self._calls[-1] if self._calls and self._calls[-1].result is None else None

    def _handle(self, event: coordinator.Event) -> None:
        """Let the coordinator decide, and carry out what it says."""
        self._state, actions = decide(self._state, event)
        for action in actions:
            self._carry_out(action)

    def _carry_out(self, action: coordinator.Action) -> None:
        """Carry out one action."""
        call = self._current_call()
        if isinstance(action, coordinator.Park):
            if call is not None:
                attempt = call.arena.park()
                assert attempt == action.attempt, f"arena announced {attempt}, expected {action.attempt}"
        elif isinstance(action, coordinator.Start):
            self._start(action.rank)
        elif isinstance(action, coordinator.ReadWords):
            assert call is not None, "workers are parked outside of a call"
            self._handle(coordinator.Words(action.attempt, (call.arena.committed,)))
        elif isinstance(action, coordinator.Release):
            assert call is not None, "workers are released outside of a call"
            if call.released and call.arena.committed != EMPTY:
                self._steps_redone += 1
                self._event("I_RESUMED", step=call.arena.committed, attempt=action.attempt)
            call.released += 1
            call.arena.release(action.source)
        elif isinstance(action, coordinator.End):
            self._message = action.message
        else:
            raise AssertionError(f"one host never needs {action}")

    def _event(self, name: str, **fields: Any) -> None:
        """Say one event on stderr and record it."""
        text = " ".join(f"{key}={value}" for key, value in fields.items())
        print(f"distbp: {name} {text}", file=sys.stderr, flush=True)
        if self._calls:
            kind = {"E_LOST_WORKER": "lost", "I_RESUMED": "restart"}[name]
            self._calls[-1].run.event({"kind": kind} | fields)

    def _end(self) -> int:
        """Let workers leave, print why the job ended as the last thing, and return the exit code."""
        until = time.monotonic() + (_FAILED_GRACE_S if self._message else _GRACE_S)
        for process in self._processes.values():
            with suppress(subprocess.TimeoutExpired):
                process.popen.wait(max(0.0, until - time.monotonic()))
        for process in self._processes.values():
            self._kill(process)
        code = self._state.exit_code
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
            print(f"distbp: {self._message}", file=sys.stderr, flush=True)
        return code

    def _note_failure(self, code: int) -> None:
        """Write the failure where the result would be."""
        call = self._current_call()
        if call is not None:
            with suppress(DistbpError):
                call.run.write_result({"status": "failed", "exit_code": code, "message": self._message})
