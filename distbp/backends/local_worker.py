"""The worker's side of the local backend: a process that the launching process started.

The environment says who it is (`DISTBP_RANK`, `DISTBP_SIZE`) and how it reaches the keeper of its host
(`DISTBP_HOST=fd:N`, an inherited socket).  Messages are JSON, one a packet; the arena's descriptor comes as
ancillary data.  The kernel kills the worker when its parent dies, so nothing is left behind.
"""

from __future__ import annotations

import array
import contextlib
import math
import os
import select
import socket
from pathlib import Path
from typing import Any

import msgspec

from distbp.arena import Arena, ArenaLayout, Parked
from distbp.backends.base import Admission, CallFinished, Plan, Seat
from distbp.errors import WorkerLost
from distbp.worker_log import WorkerLog

__all__ = ["MESSAGE_LIMIT", "LocalMembership", "receive", "send"]

MESSAGE_LIMIT = 150_000
"""Bytes of one message; the kernel's default socket buffer takes 212,992."""


def send(channel: socket.socket, message: dict[str, Any], descriptor: int | None = None) -> None:
    """Send one message, with a descriptor if one is given."""
    data = msgspec.json.encode(message)
    assert len(data) <= MESSAGE_LIMIT, f"a message of {len(data)} bytes does not fit a packet"
    ancillary = []
    if descriptor is not None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
    channel.sendmsg([data], ancillary)


def receive(channel: socket.socket, flags: int = 0) -> tuple[dict[str, Any], int | None]:
    """Return the next message and the descriptor that came with it; `EOFError` when the peer is gone."""
    room = socket.CMSG_SPACE(array.array("i", [0]).itemsize)
    try:
        data, ancillary, _, _ = channel.recvmsg(MESSAGE_LIMIT, room, flags | socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError as error:
        raise EOFError from error
    if not data:
        raise EOFError
    descriptor = None
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            descriptor = array.array("i", content)[0]
    message: dict[str, Any] = msgspec.json.decode(data)
    return message, descriptor


class LocalMembership:
    """The membership of one local worker; calls of `fit` are numbered, so a replacement can skip old ones."""

    backend = "local"

    def __init__(self, channel: socket.socket, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._channel = channel
        self._call = 0
        self._log: WorkerLog | None = None

    @classmethod
    def from_environment(cls) -> LocalMembership:
        """Take the place that the launching process prepared."""
        descriptor = int(os.environ["DISTBP_HOST"].removeprefix("fd:"))
        channel = socket.socket(fileno=descriptor)
        channel.set_inheritable(False)
        return cls(channel, int(os.environ["DISTBP_RANK"]), int(os.environ["DISTBP_SIZE"]))

    def receive_job(self) -> tuple[dict[str, Any], int | None]:
        """Wait for what the launching process wants done."""
        return receive(self._channel)

    def join(self, plan: Plan) -> Seat | dict[str, Any]:
        """Meet the others; return the seat, or the result of a call that is already finished."""
        self._call += 1
        call = self._call
        self._send({"kind": "join", "call": call, "plan": msgspec.to_builtins(plan)})
        message, descriptor = self._answer(call)
        if message["kind"] == "result":
            return dict(message["result"])
        assert descriptor is not None, "a seat comes with the arena"
        layout = msgspec.convert(message["layout"], ArenaLayout)
        arena = Arena.attach(descriptor, layout, self.rank)
        restore = message["restore"]
        admission = Admission(Path(message["out"]), Path(restore) if restore else None, message["start"])
        self._log = WorkerLog(admission.out, self.rank, self.size)

        def gate() -> int:
            return arena.wait_for_release(
                lambda attempt: self._send({"kind": "parked", "call": call, "attempt": attempt}),
                deadline_s=math.inf,  # The launching process watches everybody, and its end is seen here.
                check=lambda: self._check_finished(call),
            )

        return Seat(
            self.rank,
            (self.size,),
            arena,
            admission,
            gate,
            lambda attempt: None,
            lambda record: self._send({"kind": "event", "record": record}),
        )

    def finish(self, seat: Seat, result: dict[str, Any] | None) -> dict[str, Any]:
        """Hand in the result (rank 0) and wait for the recorded one; `Parked` when somebody is lost."""
        if result is not None:
            self._send({"kind": "finished", "call": self._call, "result": result})
        while True:
            try:
                self._check_finished(self._call, wait_s=0.02)
            except CallFinished as finished:
                return finished.result
            if seat.arena.announced_attempt > seat.arena.barrier.attempt:
                raise Parked

    def report_failure(self, exit_code: int, message: str) -> None:
        """Tell the launching process why this worker ends, and write it into its log; never raises."""
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

    def _answer(self, call: int) -> tuple[dict[str, Any], int | None]:
        """Return the answer to this call's `join`; the result of an earlier call may still be on its way."""
        while True:
            try:
                message, descriptor = receive(self._channel)
            except EOFError as error:
                raise WorkerLost("the launching process is gone; run again: resuming is safe") from error
            if message["kind"] != "result" or message["call"] == call:
                return message, descriptor

    def _send(self, message: dict[str, Any]) -> None:
        try:
            send(self._channel, message)
        except OSError as error:
            raise WorkerLost("the launching process is gone; run again: resuming is safe") from error

    def _check_finished(self, call: int, wait_s: float = 0.0) -> None:
        """Raise `CallFinished` if the result of `call` has come."""
        ready, _, _ = select.select([self._channel], [], [], wait_s)
        if not ready:
            return
        try:
            message, _ = receive(self._channel)
        except EOFError as error:
            raise WorkerLost("the launching process is gone; run again: resuming is safe") from error
        if message["kind"] == "result" and message["call"] == call:
            raise CallFinished(message["result"])
