"""The worker's side of a job that has a coordinator of its own: the same for local workers and Ray actors.

A worker and the job that started it exchange messages over a `Channel`: JSON values, one at a time, in
order, some of which come with the descriptor of shared memory.  What a channel is made of is the backend's
matter.

    from the worker   join, parked, broken, corrupt, finished, event, stop, failed, left
    to the worker     job, seat, result, peers

Calls of `fit` are numbered, so that a replaced worker, which runs its program from the start, can be told the
result of a call that is over.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import msgspec

from distbp.arena import Arena, ArenaLayout
from distbp.backends.base import Admission, CallFinished, Plan, Seat
from distbp.errors import WorkerLost
from distbp.transports.base import Transport
from distbp.worker_log import WorkerLog

__all__ = ["MESSAGE_LIMIT", "Channel", "JobMembership"]

MESSAGE_LIMIT = 150_000
"""Bytes of one message; the kernel's default socket buffer takes 212,992."""

_POLL_S = 0.02


class Channel(Protocol):
    """A worker's connection to its job."""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; `OSError` when the job is gone."""

    def receive(self, wait_s: float | None) -> tuple[dict[str, Any], int | None] | None:
        """Return the next message and the descriptor that came with it, None after `wait_s`.

        `EOFError` or `OSError` when the job is gone; the caller owns the descriptor.
        """


Connect = Callable[[Mapping[str, Any], Seat], Transport | None]
"""Opens a worker's lane between hosts: from what the job said about the peers of an attempt."""


class JobMembership:
    """The membership of worker `rank`, which a job started and reaches through `channel`.

    Where there can be several hosts, `lane_address` is where other hosts reach this worker, and `connect`
    opens its lane.
    """

    def __init__(
        self,
        backend: str,
        channel: Channel,
        rank: int,
        size: int,
        *,
        lane_address: tuple[str, int] | None = None,
        connect: Connect | None = None,
    ) -> None:
        self.backend = backend
        self.rank = rank
        self.size = size
        self._channel = channel
        self._lane_address = lane_address
        self._open_lane = connect
        self._call = 0
        self._seat: Seat | None = None
        self._peers: dict[str, Any] = {"attempt": 0}
        self._log: WorkerLog | None = None

    def receive_job(self) -> tuple[dict[str, Any], int]:
        """Wait for what the job wants done: a message, and the descriptor of its data."""
        message, descriptor = self._receive(None) or ({}, None)
        assert message["kind"] == "job", f"expected a job, got {message['kind']!r}"
        assert descriptor is not None, "a training job comes with its data"
        return message, descriptor

    def join(self, plan: Plan) -> Seat | dict[str, Any]:
        """Meet the others; return the seat, or the result of a call that is already finished."""
        self._call += 1
        self._send(
            {
                "kind": "join",
                "call": self._call,
                "plan": msgspec.to_builtins(plan),
                "lane_address": self._lane_address,
            }
        )
        message, descriptor = self._answer()
        if message["kind"] == "result":
            return dict(message["result"])
        assert descriptor is not None, "a seat comes with the arena"
        layout = msgspec.convert(message["layout"], ArenaLayout)
        arena = Arena.attach(descriptor, layout, message["local_rank"])
        restore = message["restore"]
        admission = Admission(Path(message["out"]), Path(restore) if restore else None, message["start"])
        if (
            admission.out.is_dir()
        ):  # On another host, or on rank 0's alone, the job has said that it is enough.
            self._log = WorkerLog(admission.out, self.rank, self.size)
        self._seat = Seat(
            self.rank,
            tuple(message["host_sizes"]),
            arena,
            admission,
            lambda: self._wait_at_gate(arena),
            self._connect,
            lambda record: self._send({"kind": "event", "record": record}),
            lambda attempt: self._send_about("broken", attempt),
            lambda attempt, finding: self._send_about("corrupt", attempt, finding=finding),
        )
        return self._seat

    def finish(self, seat: Seat, result: dict[str, Any] | None) -> dict[str, Any]:
        """Hand in the result (rank 0) and wait for the recorded one; `Parked` when somebody is lost."""
        if result is not None:
            self._send({"kind": "finished", "call": self._call, "result": result})
        while True:
            try:
                self._read_news(_POLL_S)
            except CallFinished as finished:
                return finished.result
            seat.arena.barrier.look()

    def report_failure(self, exit_code: int, message: str) -> None:
        """Tell the job why this worker ends, and write it into its log; never raises."""
        text = message
        while len(msgspec.json.encode(text)) > MESSAGE_LIMIT - 1000:
            text = text[len(text) // 4 :]  # The end of a traceback says most.
        with contextlib.suppress(WorkerLost):
            self._send({"kind": "failed", "exit_code": exit_code, "message": text})
        if self._log is not None:
            self._log.write(f"failed with {exit_code}: {message}")

    def report_stop(self, number: int) -> None:
        """Pass on a signal that was sent to this worker alone."""
        self._send({"kind": "stop", "signal": number})

    def say_goodbye(self, exit_code: int) -> None:
        """Say that the program has come to its end."""
        self._send({"kind": "left", "exit_code": exit_code})

    def _wait_at_gate(self, arena: Arena) -> int:
        """Wait, parked, until the job lets everybody begin; whoever started this worker watches it."""
        return arena.wait_for_release(
            lambda attempt: self._send_about("parked", attempt),
            deadline_s=math.inf,  # The job watches everybody, and its own end is seen on the channel.
            check=lambda: self._read_news(0.0),
        )

    def _connect(self, attempt: int) -> Transport | None:
        """Open this worker's lane of `attempt`, as soon as the job has said where the peers are."""
        seat = self._seat
        assert seat is not None, "a lane is opened after the seat was taken"
        if len(seat.host_sizes) == 1 or seat.local_rank >= seat.lanes:
            return None
        assert self._open_lane is not None, "this backend has one host"
        while self._peers["attempt"] < attempt:
            self._read_news(_POLL_S)
            seat.arena.barrier.look()
        return self._open_lane(self._peers, seat)

    def _answer(self) -> tuple[dict[str, Any], int | None]:
        """Return the answer to this call's `join`; the result of an earlier call may still be on its way."""
        while True:
            message, descriptor = self._receive(None) or ({"kind": "nothing"}, None)
            if message["kind"] == "seat" or (message["kind"] == "result" and message["call"] == self._call):
                return message, descriptor

    def _read_news(self, wait_s: float) -> None:
        """Take note of what the job says; raise `CallFinished` if this call's result has come."""
        received = self._receive(wait_s)
        while received is not None:
            message, descriptor = received
            if descriptor is not None:
                raise AssertionError(f"{message['kind']!r} came with memory in the middle of a call")
            if message["kind"] == "result" and message["call"] == self._call:
                raise CallFinished(message["result"])
            if message["kind"] == "peers":
                self._peers = message
            received = self._receive(0.0)

    def _receive(self, wait_s: float | None) -> tuple[dict[str, Any], int | None] | None:
        try:
            return self._channel.receive(wait_s)
        except (EOFError, OSError) as error:
            raise WorkerLost("the launching process is gone; run again: resuming is safe") from error

    def _send_about(self, kind: str, attempt: int, **more: Any) -> None:
        """Send a message about an attempt of this call."""
        self._send({"kind": kind, "call": self._call, "attempt": attempt} | more)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.send(message)
        except OSError as error:
            raise WorkerLost("the launching process is gone; run again: resuming is safe") from error
