"""Messages between two ranks of a collective group, while the others do something else.

Inside a node every rank has an **outbox** in the shared memory, with room for two parts of a message: the
sender fills one while the receiver empties the other.  An outbox holds one message at a time, so `send`
returns when all of it has been received.

    outbox line: parts published (by the sender) | parts taken (by the receiver) | for whom | what it is

Between nodes the sender opens a connection when it first sends to a rank, and keeps it; the receiver accepts
whoever comes, and keeps those it does not wait for yet.  `send` returns when the system has taken the bytes.

A rank can send and receive at once in two threads, because the two directions share nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from distbp.backends.ray_collective.circle import Bytes, Call, Circle, describe
from distbp.backends.ray_collective.memory import OUTBOX_BYTES, NodeMemory, late
from distbp.errors import ConfigError, TransportError
from distbp.transports import wire
from distbp.transports.tcp import TCPTransport

__all__ = ["Pairs"]

_PUBLISHED, _TAKEN, _RECEIVER, _WHAT = 0, 1, 2, 4
"""Words of 32 bits in an outbox line; the last begins two of 64 bits, which are a call's."""

_ALL_BITS = 0xFFFFFFFF
_ROOMS = 2


class Pairs:
    """One rank's messages.  `listener` and `addresses` (by rank) are None in a group on one node."""

    def __init__(
        self,
        circle: Circle,
        memory: NodeMemory,
        listener: wire.Listener | None,
        addresses: Sequence[tuple[str, int]],
        key: bytes,
        deadline_s: float,
    ) -> None:
        self._circle = circle
        self._memory = memory
        self._listener = listener
        self._addresses = addresses
        self._key = key
        self._deadline_s = deadline_s
        self._outgoing: dict[int, TCPTransport] = {}
        self._incoming: dict[int, TCPTransport] = {}

    def send(self, x: Bytes, call: Call) -> None:
        """Send `x` to rank `call.root`."""
        if call.root in self._circle.mine:
            self._put(x, call)
            return
        transport = self._outgoing.get(call.root) or self._connect(call.root)
        transport.broadcast(np.array(call.words, np.int64), 0)
        transport.broadcast(x, 0)

    def receive(self, x: Bytes, source: int, call: Call) -> None:
        """Fill `x` from rank `source`, which must make the same `call`."""
        if source in self._circle.mine:
            self._take(x, source, call)
            return
        transport = self._incoming.get(source) or self._accept(source)
        words = np.empty(2, np.int64)
        transport.broadcast(words, 0)
        self._compare(source, call, (int(words[0]), int(words[1])))
        transport.broadcast(x, 0)

    def close(self) -> None:
        """Close all connections; idempotent."""
        for transport in (*self._outgoing.values(), *self._incoming.values()):
            with suppress(TransportError):
                transport.close()
        self._outgoing, self._incoming = {}, {}

    # ----- inside a node

    def _put(self, x: Bytes, call: Call) -> None:
        """Pass `x` through this rank's outbox."""
        memory, local = self._memory, self._circle.local
        words, line = memory.words, memory.outbox_words[local]
        words[line + _RECEIVER] = self._circle.mine.index(call.root) + 1
        longs, what = memory.longs, (line + _WHAT) // 2
        longs[what], longs[what + 1] = call.words

        def waiting() -> int:
            return (words[line + _PUBLISHED] - words[line + _TAKEN]) & _ALL_BITS

        for start in range(0, max(1, x.size), OUTBOX_BYTES):
            memory.await_word(line + _TAKEN, lambda: waiting() < _ROOMS, call.root)
            part, number = x[start : start + OUTBOX_BYTES], words[line + _PUBLISHED]
            memory.outboxes[local, number % _ROOMS, : part.size] = part
            memory.order()
            words[line + _PUBLISHED] = (number + 1) & _ALL_BITS
            memory.wake(line + _PUBLISHED)
        memory.await_word(line + _TAKEN, lambda: waiting() == 0, call.root)
        words[line + _RECEIVER] = 0

    def _take(self, x: Bytes, source: int, call: Call) -> None:
        """Take `x` out of the outbox of `source`."""
        memory, me = self._memory, self._circle.local + 1
        words = memory.words
        sender = self._circle.mine.index(source)
        line = memory.outbox_words[sender]

        def is_there() -> bool:
            published, taken = words[line + _PUBLISHED], words[line + _TAKEN]
            return bool(words[line + _RECEIVER] == me and published != taken)

        for start in range(0, max(1, x.size), OUTBOX_BYTES):
            memory.await_word(line + _PUBLISHED, is_there, source)
            memory.order()
            if start == 0:
                what = (line + _WHAT) // 2
                self._compare(source, call, (memory.longs[what], memory.longs[what + 1]))
            number, part = words[line + _TAKEN], x[start : start + OUTBOX_BYTES]
            part[:] = memory.outboxes[sender, number % _ROOMS, : part.size]
            memory.order()
            words[line + _TAKEN] = (number + 1) & _ALL_BITS
            memory.wake(line + _TAKEN)

    # ----- between nodes

    def _connect(self, target: int) -> TCPTransport:
        """Open the connection on which this rank sends to `target`."""
        hello = {"from": self._circle.rank, "to": target}
        connection = wire.connect(
            self._addresses[target], self._key, hello, self._deadline_s, self._memory.check
        )
        transport = self._outgoing[target] = self._pair({1: connection}, self._circle.rank, target)
        return transport

    def _accept(self, source: int) -> TCPTransport:
        """Wait for the connection on which `source` sends; others that come meanwhile are kept."""
        assert self._listener is not None, "a group on several nodes has listeners"
        until = time.monotonic() + self._deadline_s
        while source not in self._incoming:
            left = until - time.monotonic()
            connection = self._listener.accept(max(0.0, left), self._memory.check)
            if connection is None:
                raise late([source], self._deadline_s)
            rank = connection.hello.get("from")
            if connection.hello.get("to") != self._circle.rank or rank not in self._circle.order:
                connection.close()
                continue
            self._incoming[rank] = self._pair({0: connection}, rank, self._circle.rank)
        return self._incoming[source]

    def _pair(self, connections: dict[int, wire.Connection], sender: int, receiver: int) -> TCPTransport:
        """Return a transport of two members, the sender first."""
        return TCPTransport(
            connections,
            1 if 0 in connections else 0,
            2,
            names=[f"rank {sender}", f"rank {receiver}"],
            deadline_s=self._deadline_s,
            check=self._memory.check,
        )

    def _compare(self, source: int, call: Call, theirs: tuple[int, int]) -> None:
        """Raise unless the sender sends what is expected here."""
        if theirs != call.words:
            raise ConfigError(
                f"recv from rank {source} expected {describe(*call.words)}, and that rank called "
                f"{describe(*theirs)}; both sides need the same type and the same number of elements"
            )
