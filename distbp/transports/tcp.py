"""The transport between hosts over TCP, for clusters without MPI: one connection with each other member.

An operation posts all its sends and receives at once and moves whatever can be moved, over sockets that do
not block, until all are complete; so nobody waits for anybody in turn, and both sides may send more than fits
into buffers.  Bytes go from the caller's array to the kernel and from the kernel into the caller's array.
When nothing can be moved, one `poll` waits for all sockets and for `abort`.  A small message is sent, and
usually received, without it.

A message that is not empty is one frame (`frames.py`): what operation it belongs to, its number, its length,
the bytes, their CRC-32.  The receiver knows all of it beforehand but the bytes, so whatever differs, be it a
flipped bit or a member that is out of step, is an error that names the host, and never data.  After an error
the connections are somewhere inside a frame: the transport is useless, as after `abort`.

A peer that has closed, or died, is seen at once.  A link that is cut tells nobody.  The kernel finds out by
itself only while a connection is idle; with data on their way it retries for a quarter of an hour, and
TCP_USER_TIMEOUT, which is there for this, also ends connections with a live peer whose buffers have been full
for so long: with a host that computes slowly.  So during a wait we look ourselves (`is_silent`): a peer is
out of reach when at least 3 questions of our kernel in a row, and `SILENCE_S` seconds, have passed without
one packet from its kernel.

Tried and rejected: a thread for each peer (every wake-up competes with backprop for the interpreter),
spinning before `poll` (it holds the interpreter), socket buffers of a fixed size (the kernel's own tuning was
no slower).
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.errors import TransportError
from distbp.transports import frames, wire
from distbp.transports.base import TransportAborted
from distbp.transports.connection import POLL_S, Check, InUse, is_silent
from distbp.transports.lane import meet

__all__ = ["TCPTransport", "open_lane"]

Array = NDArray[Any]

_BROKEN = select.POLLERR | select.POLLHUP
_CURE = "look at that host's log and its link, then run again: resuming is safe"


class TCPTransport:
    """One host's end of a lane; `connections[h]` reaches host h and belongs to the transport from now on.

    `names[h]` is what messages call host h.  `check` is called every 0.05 s while an operation waits; what it
    raises ends the operation.
    """

    def __init__(
        self,
        connections: Mapping[int, wire.Connection],
        rank: int,
        size: int,
        *,
        names: Sequence[str],
        deadline_s: float,
        check: Check = lambda: None,
    ) -> None:
        assert set(connections) == set(range(size)) - {rank}, (
            "a transport has one connection with each other host"
        )
        self.rank = rank
        self.size = size
        self.deadline_s = deadline_s
        self._names = list(names)
        self._check = check
        self._sockets = {host: connection.detach() for host, connection in connections.items()}
        for sock in self._sockets.values():
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 0)
        self._operation = 0
        self._aborted = False
        self._useless = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._polled: dict[int, int] = {}
        self._uses = InUse(self._release, lambda: os.eventfd_write(self._wake, 1), self._late)

    def alltoall(self, send: Sequence[Array], receive: Sequence[Array]) -> None:
        """Swap buffers with every host."""
        self._swap("alltoall", send, receive)

    def allgather(self, send: Array, receive: Sequence[Array]) -> None:
        """Give one buffer to every host and take theirs."""
        self._swap("allgather", [send] * self.size, receive)

    def broadcast(self, array: Array, root: int) -> None:
        """Fill `array` from host `root`."""
        send = self._sockets if self.rank == root and array.size else ()
        receive = [root] if self.rank != root and array.size else ()
        data = _bytes(array)
        self._run("broadcast", dict.fromkeys(send, data), dict.fromkeys(receive, data))

    def barrier(self) -> None:
        """Wait for every host: each gives each other one a frame without bytes."""
        nothing = memoryview(bytearray())
        self._run("barrier", dict.fromkeys(self._sockets, nothing), dict.fromkeys(self._sockets, nothing))

    def abort(self) -> None:
        """End this host's waits, now and later."""
        self._aborted = True
        with contextlib.suppress(TransportAborted), self._uses:
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """Close the connections; idempotent.  A wait in another thread ends, and that thread closes them."""
        self._aborted = True
        self._uses.close()

    def _swap(self, name: str, send: Sequence[Array], receive: Sequence[Array]) -> None:
        np.copyto(receive[self.rank], send[self.rank])
        # Everybody begins with another host, so that the first one is not flooded.
        hosts = [(self.rank + step) % self.size for step in range(1, self.size)]
        self._run(
            name,
            {host: _bytes(send[host]) for host in hosts if send[host].size},
            {host: _bytes(receive[host]) for host in hosts if receive[host].size},
        )

    def _run(self, name: str, send: Mapping[int, memoryview], receive: Mapping[int, memoryview]) -> None:
        """Do one operation; whatever ends it early leaves the transport useless."""
        with self._uses:
            self._raise_if_over(name)
            self._operation += 1
            moves: list[frames.Outgoing | frames.Incoming] = [
                *(
                    frames.Outgoing(self._sockets[h], h, name, self._operation, data)
                    for h, data in send.items()
                ),
                *(
                    frames.Incoming(self._sockets[h], h, name, self._operation, data)
                    for h, data in receive.items()
                ),
            ]
            try:
                self._move(name, moves)
            except BaseException:
                self._useless = True
                raise

    def _move(self, name: str, moves: list[frames.Outgoing | frames.Incoming]) -> None:
        """Move bytes until every frame is complete."""
        now = time.monotonic()
        until, next_look = now + self.deadline_s, now + POLL_S
        while moves := [move for move in moves if not self._advance(name, move)]:
            if all(move.blocked for move in moves):
                self._wait(moves, min(until, next_look) - time.monotonic())
            self._raise_if_over(name)
            now = time.monotonic()
            if now >= next_look:
                next_look = now + POLL_S
                self._check()
                self._look_for_silence(name, moves)
            if now >= until:
                hosts = sorted({move.host for move in moves})
                missing = ", ".join(f"host {self._names[host]}" for host in hosts)
                raise self._error(name, f"waited {self.deadline_s:g} s for {missing}")

    def _advance(self, name: str, move: frames.Outgoing | frames.Incoming) -> bool:
        """Go on with one frame unless it is known to be blocked; return whether it is complete."""
        if move.blocked:
            return False
        peer = f"host {self._names[move.host]}"
        try:
            return move.advance()
        except BlockingIOError:
            move.blocked = True
            return False
        except EOFError:
            raise self._error(name, f"{peer} closed the connection") from None
        except frames.BadFrame as error:
            raise self._error(name, f"{peer} sent what does not belong here: {error}") from error
        except OSError as error:
            raise self._error(name, f"the connection with {peer} broke: {error}") from error

    def _wait(self, moves: list[frames.Outgoing | frames.Incoming], seconds: float) -> None:
        """Block until one of the sockets that are waited for is ready, or `abort` is called."""
        wanted: dict[int, int] = {}
        for move in moves:
            wanted[move.descriptor] = wanted.get(move.descriptor, 0) | move.event
        if wanted != self._polled:
            for descriptor in self._polled.keys() - wanted.keys():
                self._poll.unregister(descriptor)
            for descriptor, events in wanted.items():
                self._poll.register(descriptor, events)
            self._polled = wanted
        ready = dict(self._poll.poll(max(0.0, seconds) * 1000))
        for move in moves:
            if ready.get(move.descriptor, 0) & (move.event | _BROKEN):
                move.blocked = False

    def _look_for_silence(self, name: str, moves: list[frames.Outgoing | frames.Incoming]) -> None:
        """Raise if a host that is waited for is out of reach."""
        for host in sorted({move.host for move in moves}):
            if seconds := is_silent(self._sockets[host]):
                text = f"host {self._names[host]} has been out of reach for {seconds:.0f} s"
                raise self._error(name, text)

    def _raise_if_over(self, name: str) -> None:
        """Raise if the transport was aborted, or failed before."""
        if self._aborted:
            raise TransportAborted(f"{name} on host {self._names[self.rank]} was aborted")
        if self._useless:
            raise TransportError(
                f"{name} on host {self._names[self.rank]}: an earlier operation failed, so the connections "
                "are useless; open the transport again"
            )

    def _error(self, name: str, text: str) -> TransportError:
        """Return the error that says what happened, in which operation, and what to do."""
        where = f"{name} on host {self._names[self.rank]}, operation {self._operation}"
        return TransportError(f"{where}: {text}; {_CURE}")

    def _late(self) -> TransportAborted:
        return TransportAborted(f"the transport of host {self._names[self.rank]} was closed")

    def _release(self) -> None:
        for sock in self._sockets.values():
            sock.close()
        os.close(self._wake)


def open_lane(
    listener: wire.Listener,
    addresses: Sequence[tuple[str, int]],
    rank: int,
    key: bytes,
    *,
    label: Mapping[str, Any],
    names: Sequence[str],
    deadline_s: float,
    check: Check = lambda: None,
) -> TCPTransport:
    """Connect the members of a lane and return the transport of member `rank`; what it raises: `lane.meet`.

    Every member calls this with the same `label`, the addresses of all listeners, and its own `listener`,
    which stays the caller's.  `deadline_s` holds for the meeting and then for every operation.
    """
    connections = meet(
        listener, addresses, rank, key, label=label, names=names, deadline_s=deadline_s, check=check
    )
    return TCPTransport(connections, rank, len(addresses), names=names, deadline_s=deadline_s, check=check)


def _bytes(array: Array) -> memoryview:
    """Return the memory of an array as bytes."""
    assert array.flags.c_contiguous, "a transport moves contiguous buffers"
    return array.reshape(-1).view(np.uint8).data
