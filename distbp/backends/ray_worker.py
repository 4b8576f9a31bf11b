"""What runs on the nodes of a Ray cluster: the workers' side, and the keeper actor of each host.

A **worker** is an actor (`cli/ray_worker.py`) that runs the whole training in one call.  It talks to the
driver over an authenticated connection of our own (`transports/wire.py`): Ray's calls go from the driver to
an actor only.  What it prints goes the same way, and appears on the driver's terminal as it is.

A **keeper** needs no processor.  It holds the memory of its host: the data, and the arena of a call of `fit`.
Processes of one user on one node open each other's memory files through /proc, so a worker is told a process
number and a descriptor, and a new keeper takes the arena over from a worker when the old one has died.

Ray pickles what it is given; these classes are named by their module, and get numbers, texts and arrays.
"""

from __future__ import annotations

import contextlib
import io
import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbp.arena import Arena, ArenaLayout
from distbp.backends.base import Seat
from distbp.backends.job_parts import look_at
from distbp.backends.member import JobMembership
from distbp.data import pack
from distbp.errors import EnvironmentMismatch
from distbp.transports import wire
from distbp.transports.base import Transport
from distbp.transports.tcp import open_lane

__all__ = ["HostKeeper", "RayMembership", "joined_job"]

_CONNECT_S = 30.0
_LONG_S = 3600.0
_LANE_S = 60.0
_MOST_SAID = 1 << 20
"""Characters in a message; as JSON each is six bytes at most, and a message has a limit."""

_ARENA_NAME = "/memfd:distbp-arena"


def open_memory(pid: int, descriptor: int) -> int:
    """Open memory that another process of this host holds; the caller owns the descriptor."""
    try:
        return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except PermissionError:  # Sealed: it can only be read.
        return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)


class RayMembership:
    """The membership of this process, which holds one worker; made before its program runs."""

    current: ClassVar[JobMembership | None] = None


@contextlib.contextmanager
def joined_job(
    driver: tuple[str, int], key: bytes, rank: int, size: int, start: int
) -> Iterator[JobMembership]:
    """Connect this actor with the driver as worker `rank` of `size`; what it prints appears there.

    `start` is the number of this start of a worker, by which the driver knows the connection.
    """
    me = {"role": "worker", "rank": rank, "start": start, "host": socket.gethostname(), "pid": os.getpid()}
    connection = wire.connect(driver, key, me, _CONNECT_S)
    listener = wire.Listener(connection_address(connection), key)

    def connect(peers: Mapping[str, Any], seat: Seat) -> Transport:
        return join_lane(listener, key, peers, seat)

    channel = RayChannel(connection)
    members = JobMembership("ray", channel, rank, size, lane_address=listener.address, connect=connect)
    RayMembership.current = members
    os.environ |= {"DISTBP_RANK": str(rank), "DISTBP_SIZE": str(size), "DISTBP_HOST": "ray"}
    try:
        with speaking_through(connection):
            yield members
    finally:
        listener.close()
        connection.close()


def connection_address(connection: wire.Connection) -> str:
    """Return the address of this host that the connection to the driver uses."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        address: str = same.getsockname()[0]
    return address


def join_lane(listener: wire.Listener, key: bytes, peers: Mapping[str, Any], seat: Seat) -> Transport:
    """Open the transport of this worker's lane: with the owners of the same lane on the other hosts."""
    firsts = [sum(seat.host_sizes[:host]) for host in range(len(seat.host_sizes))]
    owners = [first + seat.local_rank for first in firsts]
    return open_lane(
        listener,
        [(peers["addresses"][rank][0], peers["addresses"][rank][1]) for rank in owners],
        seat.host,
        key,
        label={"lane": seat.local_rank, "attempt": peers["attempt"]},
        names=[peers["names"][rank] for rank in owners],
        deadline_s=_LANE_S,
        check=seat.arena.barrier.look,
    )


class RayChannel:
    """A worker's messages to and from the driver; memory is named by process and descriptor number."""

    def __init__(self, connection: wire.Connection) -> None:
        self._connection = connection

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        self._connection.send(message)

    def receive(self, wait_s: float | None) -> tuple[dict[str, Any], int | None] | None:
        """Return the next message and the memory that it names, None after `wait_s`."""
        message = self._connection.receive(_LONG_S if wait_s is None else wait_s)
        while message is None and wait_s is None:
            message = self._connection.receive(_LONG_S)
        if message is None:
            return None
        place = message.pop("memory", None)
        return message, None if place is None else open_memory(*place)


class _Speaker(io.TextIOBase):
    """A text stream whose lines appear on the driver's stream of the same name."""

    def __init__(self, connection: wire.Connection, stream: str) -> None:
        self._connection = connection
        self._stream = stream
        self._line = ""

    def writable(self) -> bool:
        """Return that one may write."""
        return True

    def write(self, text: str) -> int:
        """Send what ends with the last line feed; the rest waits."""
        whole, feed, rest = (self._line + text).rpartition("\n")
        self._line = rest
        self._send(whole + feed)
        return len(text)

    def flush(self) -> None:
        """Send the unfinished line too."""
        text, self._line = self._line, ""
        self._send(text)

    def _send(self, text: str) -> None:
        with contextlib.suppress(OSError):  # Nobody is left to read it.
            for start in range(0, len(text), _MOST_SAID):
                part = text[start : start + _MOST_SAID]
                self._connection.send({"kind": "said", "stream": self._stream, "text": part})


@contextlib.contextmanager
def speaking_through(connection: wire.Connection) -> Iterator[None]:
    """Let what Python code prints appear on the driver's terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _Speaker(connection, "stdout"), _Speaker(connection, "stderr")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


class HostKeeper:
    """Holds the memory of one host.  Calls are served one after the other, in the order of the driver."""

    def __init__(self) -> None:
        self._arena: Arena | None = None
        self._data = -1

    def ping(self) -> None:
        """Answer, which a dead keeper does not."""

    def hold(self, content: NDArray[np.uint8]) -> tuple[int, int]:
        """Hold the packed data of the job; return where workers open them."""
        if self._data < 0:
            self._data, _ = pack({"packed": content})
        return os.getpid(), self._data

    def open(self, layout: dict[str, Any], attempt: int, stop: bool) -> tuple[int, int]:
        """Make an arena that holds nothing and has seen `attempt`; return where workers open it."""
        self.close()
        self._arena = Arena.create(msgspec.convert(layout, ArenaLayout))
        self.park(attempt)
        if stop:
            self._arena.request_stop()
        return os.getpid(), self._arena.descriptor

    def adopt(self, layout: dict[str, Any], pids: Sequence[int]) -> tuple[int, int] | None:
        """Take over the arena that workers `pids` of this host have mapped; None if none has it."""
        for pid in pids:
            for link in sorted(Path(f"/proc/{pid}/fd").glob("*")):
                with contextlib.suppress(OSError, EnvironmentMismatch):
                    if os.readlink(link).startswith(_ARENA_NAME):
                        descriptor = os.open(link, os.O_RDWR | os.O_CLOEXEC)
                        self._arena = Arena.adopt(descriptor, msgspec.convert(layout, ArenaLayout))
                        return os.getpid(), self._arena.descriptor
        return None

    def park(self, attempt: int) -> None:
        """Announce `attempt`, if it is not yet announced."""
        arena = self._held()
        while arena.announced_attempt < attempt:
            arena.park()

    def release(self, source: int) -> None:
        """Let the parked workers begin."""
        self._held().release(source)

    def words(self) -> tuple[int, int]:
        """Return the committed-step word, and the step of the newest durable checkpoint."""
        arena = self._held()
        return arena.committed, arena.saved

    def glances(self) -> dict[int, tuple[int, str, bool]]:
        """Return units, phase and slowness of each worker of this host, by its number here."""
        glances = look_at(self._held()) if self._arena is not None else {}
        return {worker: (seen.units, seen.phase, seen.slow) for worker, seen in glances.items()}

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to a worker of this host."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def set_word(self, step: int) -> None:
        """Store the committed-step word."""
        self._held().committed = step

    def request_stop(self) -> None:
        """Ask the workers to finish the step, save and end."""
        self._held().request_stop()

    def sees(self, path: str, content: bytes) -> bool:
        """Return whether this host can read and write the run directory that the driver has locked."""
        try:
            return Path(path, "lock").read_bytes() == content and os.access(path, os.W_OK)
        except OSError:
            return False

    def close(self) -> None:
        """Give back the arena; idempotent."""
        if self._arena is not None:
            self._arena.close()
            self._arena = None

    def _held(self) -> Arena:
        """Return the arena."""
        assert self._arena is not None, "the keeper was asked about an arena that it does not hold"
        return self._arena
