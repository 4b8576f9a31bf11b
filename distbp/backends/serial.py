"""One worker, in the process that called `fit`: needs nothing but NumPy, on any system.

There is nobody to lose and nobody to wait for, so the gate opens at once; only a corrupted state makes the
worker come back to it.  SIGUSR1, SIGTERM and Ctrl-C ask
the running call to stop after its step; the handlers stand only while `fit` runs.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from distbp import coordinator
from distbp.arena import Arena
from distbp.backends.base import Plan, Seat, host_layout
from distbp.backends.corruption import describe_corruption
from distbp.coordinator import decide
from distbp.errors import DistbpError, error_for_code
from distbp.run_directory import RunDirectory
from distbp.terminal import say

__all__ = ["SerialMembership"]


class SerialMembership:
    """The membership of the only worker."""

    backend = "serial"
    rank = 0
    size = 1

    def __init__(self) -> None:
        """Let a script that ends with one of our errors end with its exit code, as `distbp run` would."""
        self._excepthook = sys.excepthook
        sys.excepthook = self._end
        self.stop_signal = 0
        self._run: RunDirectory | None = None
        self._previous: dict[int, Any] = {}
        self._began = 0.0

    def join(self, plan: Plan) -> Seat | dict[str, Any]:
        """Open the run directory and take the only seat."""
        self._began = time.monotonic()
        self._run = RunDirectory.open(plan.out, plan.name)
        admission = self._run.admit(plan)
        if admission.result is not None:
            self.close()
            return admission.result
        self._arena = arena = Arena.create(host_layout(plan, (1,), 0), rank=0)
        self._state = coordinator.State(hosts=(0,), max_restarts=plan.max_restarts)
        self._steps_redone = 0

        def gate() -> int:
            self._handle(coordinator.Parked(0, self._state.attempt))
            return arena.wait_for_release(lambda attempt: None, deadline_s=10.0)

        self._listen(arena)
        return Seat(
            0,
            (1,),
            arena,
            admission,
            gate,
            lambda attempt: None,
            self._report,
            corrupted=self._note_corruption,
        )

    def finish(self, seat: Seat, result: dict[str, Any] | None) -> dict[str, Any]:
        """Write the result down and give it back."""
        assert result is not None, "the only worker has the result"
        assert self._run is not None, "finish follows join"
        result |= {
            "wall_seconds": time.monotonic() - self._began,
            "restarts": self._state.restarts,
            "steps_redone": self._steps_redone,
        }
        result["exit_code"] = self.exit_code(result["exit_code"])
        self._run.write_result(result)
        self.close()
        return result

    def _report(self, record: dict[str, Any]) -> None:
        """Write an event."""
        assert self._run is not None, "events come while the run is open"
        self._steps_redone += record.get("steps_redone", 0)
        self._run.event(record)

    def _note_corruption(self, attempt: int, finding: dict[str, Any]) -> None:
        """Give up the state and go back to the newest checkpoint, or end with 70."""
        assert self._run is not None, "events come while the run is open"
        event = describe_corruption(finding, [socket.gethostname()])
        step, saved = self._arena.committed, self._arena.saved
        self._handle(coordinator.Corrupted(0, attempt, event.text, step, saved))
        action = f"reload({self._state.restarts_without_progress}/{self._state.max_restarts})"
        say(f"distbp: {event.text} action={action}")
        self._run.event(event.record | {"action": action})

    def _handle(self, event: coordinator.Event) -> None:
        """Let the coordinator decide, and carry out what it says."""
        self._state, actions = decide(self._state, event)
        for action in actions:
            if isinstance(action, coordinator.Park):
                self._arena.park()
            elif isinstance(action, coordinator.ReadWords):
                self._handle(coordinator.Words(action.attempt, (self._arena.committed,)))
            elif isinstance(action, coordinator.SetWord):
                self._arena.committed = action.step
            elif isinstance(action, coordinator.Release):
                self._arena.release(action.source)
            else:
                assert isinstance(action, coordinator.End), f"the only worker is never lost, got {action}"
                raise error_for_code(action.exit_code, action.message)

    def exit_code(self, code: int) -> int:
        """Return 130 instead of 75 if it was Ctrl-C that stopped the run."""
        return 130 if code == 75 and self.stop_signal == signal.SIGINT else code

    def note_failure(self, error: DistbpError) -> None:
        """Write the failure where the result would be."""
        if self._run is not None:
            with contextlib.suppress(DistbpError):
                self._run.write_result(
                    {"status": "failed", "exit_code": error.exit_code, "message": str(error)}
                )

    def close(self) -> None:
        """Give back the signals and the run directory; idempotent."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
        if self._run is not None:
            self._run.close()
            self._run = None

    def _end(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print an error of ours as a message and end with its code; leave others to Python."""
        if not isinstance(error, DistbpError):
            self._excepthook(kind, error, trace)
            return
        say(f"distbp: {error}")
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(error.exit_code)

    def _listen(self, arena: Arena) -> None:
        """Turn the first stop signal into a request; a second one acts as it did before `fit`."""
        if threading.current_thread() is not threading.main_thread():
            return

        def stop(number: int, frame: FrameType | None) -> None:
            self.stop_signal = number
            arena.request_stop()
            for other, handler in self._previous.items():
                signal.signal(other, signal.SIG_DFL if handler is None else handler)

        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, stop)
