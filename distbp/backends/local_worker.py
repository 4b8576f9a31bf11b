"""The worker's side of the local backend: a process that the launching process started.

The environment says who it is (`DISTBP_RANK`, `DISTBP_SIZE`) and how it reaches the keeper of its host
(`DISTBP_HOST=fd:N`, an inherited socket).  Messages are JSON, one a packet; the arena's descriptor comes as
ancillary data.  The kernel kills the worker when its parent dies, so nothing is left behind.
"""

from __future__ import annotations

import array
import os
import select
import socket
from collections.abc import Mapping
from typing import Any

import msgspec

from distbp.backends.member import MESSAGE_LIMIT, JobMembership

__all__ = ["PacketChannel", "join_local_job"]


def join_local_job() -> JobMembership:
    """Take the place that the launching process prepared."""
    descriptor = int(os.environ["DISTBP_HOST"].removeprefix("fd:"))
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    rank, size = int(os.environ["DISTBP_RANK"]), int(os.environ["DISTBP_SIZE"])
    return JobMembership("local", PacketChannel(channel), rank, size)


class PacketChannel:
    """Messages over a unix socket that keeps packets apart; either side of it."""

    def __init__(self, packets: socket.socket) -> None:
        self._packets = packets
        self._poll = select.poll()
        self._poll.register(packets, select.POLLIN)

    def fileno(self) -> int:
        """Return the descriptor to poll, -1 when closed."""
        return self._packets.fileno()

    def send(self, message: Mapping[str, Any], descriptor: int | None = None) -> None:
        """Send one message, with a descriptor if one is given."""
        data = msgspec.json.encode(message)
        assert len(data) <= MESSAGE_LIMIT, f"a message of {len(data)} bytes does not fit a packet"
        ancillary = []
        if descriptor is not None:
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [descriptor]))]
        self._packets.sendmsg([data], ancillary)

    def receive(self, wait_s: float | None) -> tuple[dict[str, Any], int | None] | None:
        """Return the next message and its descriptor, None after `wait_s`; `EOFError` without a peer."""
        if not self._poll.poll(None if wait_s is None else wait_s * 1e3):
            return None
        room = socket.CMSG_SPACE(array.array("i", [0]).itemsize)
        try:
            data, ancillary, _, _ = self._packets.recvmsg(MESSAGE_LIMIT, room, socket.MSG_CMSG_CLOEXEC)
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

    def close(self) -> None:
        """Give back the socket; idempotent."""
        self._packets.close()
