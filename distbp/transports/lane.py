"""How the members of a lane find each other: one connection between any two, all of the same attempt.

Member r connects to the lower ranks and accepts the higher ones, all at the same time and on one thread, so
nobody waits for a member that itself waits for a third, and each can say who is really missing.

Attempts do not begin at the same moment everywhere.  So whoever has connected waits for a word of welcome,
which it gets only if its label (lane, attempt) is that of the other side; otherwise it is turned away and
tries again, until the other side has come to the same attempt.  A member may therefore come twice; the later
connection counts, because it has given the earlier one up.
"""

from __future__ import annotations

import select
import time
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from distbp.errors import TransportError
from distbp.transports import wire
from distbp.transports.connection import POLL_S, BrokenConnection, Check

__all__ = ["meet"]

_WELCOME = {"lane": "welcome"}


def meet(
    listener: wire.Listener,
    addresses: Sequence[tuple[str, int]],
    rank: int,
    key: bytes,
    *,
    label: Mapping[str, Any],
    names: Sequence[str],
    deadline_s: float,
    check: Check = lambda: None,
) -> dict[int, wire.Connection]:
    """Return a connection with each other member; member h listens at `addresses[h]`, is called `names[h]`.

    Raises `TransportError` after `deadline_s`, with the names of those who are missing; `AuthenticationError`
    and `EnvironmentMismatch` as `wire.connect` does; and what `check` raises, which is called every 0.05 s.
    """
    lane = _Lane(listener, addresses, rank, key, label)
    until = time.monotonic() + deadline_s
    try:
        while missing := lane.advance():
            check()
            left = until - time.monotonic()
            if left <= 0:
                listed = ", ".join(f"host {names[host]} ({lane.trouble(host)})" for host in missing)
                raise TransportError(
                    f"host {names[rank]} waited {deadline_s:g} s to open {dict(label)!r} with {listed}; "
                    "look at the log of each, then run again: resuming is safe"
                )
            lane.wait(min(left, POLL_S))
    except BaseException:
        lane.close()
        raise
    return lane.joined


class _Lane:
    """The connections of a lane while it is being opened."""

    def __init__(
        self,
        listener: wire.Listener,
        addresses: Sequence[tuple[str, int]],
        rank: int,
        key: bytes,
        label: Mapping[str, Any],
    ) -> None:
        self.joined: dict[int, wire.Connection] = {}
        self._listener = listener
        self._rank = rank
        self._size = len(addresses)
        self._label = msgspec.json.decode(msgspec.json.encode(dict(label)))  # As it comes from the others.
        self._turned_away = 0
        hello = {"role": "lane", "label": self._label, "rank": rank, "size": self._size}
        self._calls = {host: _Call(addresses[host], key, hello) for host in range(rank)}

    def advance(self) -> list[int]:
        """Go on as far as it goes at once; return the hosts that are still missing."""
        for host in [host for host in self._calls if host not in self.joined]:
            if connection := self._calls[host].advance():
                self.joined[host] = connection
        if connection := self._listener.accept(0.0):
            self._seat(connection)
        return [host for host in range(self._size) if host != self._rank and host not in self.joined]

    def wait(self, seconds: float) -> None:
        """Block until somebody who is missing says something, at most `seconds`."""
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        for host, call in self._calls.items():
            if host not in self.joined:
                seconds = min(seconds, call.pause_s)
                if call.fileno() >= 0:
                    poll.register(call, select.POLLIN)
        poll.poll(seconds * 1000)

    def trouble(self, host: int) -> str:
        """Say why a host is missing."""
        if host < self._rank:
            return self._calls[host].trouble
        others = f"; {self._turned_away} with another label were turned away" if self._turned_away else ""
        return f"did not connect{others}"

    def close(self) -> None:
        """Give everything up."""
        for call in self._calls.values():
            call.close()
        for connection in self.joined.values():
            connection.close()

    def _seat(self, connection: wire.Connection) -> None:
        """Keep a connection if it is of this lane; a member that comes twice has given the first one up."""
        said = connection.hello
        host = said.get("rank")
        belongs = said.get("label") == self._label and said.get("size") == self._size
        if not belongs or type(host) is not int or not self._rank < host < self._size:
            self._turned_away += 1
            connection.close()
            return
        try:
            connection.send(_WELCOME)
        except BrokenConnection:
            connection.close()
            return
        if host in self.joined:
            self.joined[host].close()
        self.joined[host] = connection


class _Call:
    """The way to one lower member: reach it, prove who we are, be welcome; again until that is so."""

    def __init__(self, address: tuple[str, int], key: bytes, hello: Mapping[str, Any]) -> None:
        self._dial = wire.Dial(address, key, hello)
        self._connection: wire.Connection | None = None

    @property
    def pause_s(self) -> float:
        """How long there is nothing to do unless the socket becomes readable."""
        return POLL_S if self._connection is not None else self._dial.pause_s

    @property
    def trouble(self) -> str:
        """Why there is no connection yet."""
        return self._dial.trouble

    def fileno(self) -> int:
        """Return the descriptor to poll, -1 if there is none now."""
        return (self._connection or self._dial).fileno()

    def advance(self) -> wire.Connection | None:
        """Go on as far as it goes at once; return the connection when we are welcome."""
        if self._connection is None:
            self._connection = self._dial.advance()
        if self._connection is None:
            return None
        try:
            welcome = self._connection.receive(0.0)
        except (EOFError, BrokenConnection):
            self.close()
            self._dial.put_off("it is not in this attempt, and hung up")
            return None
        if welcome is None:
            return None
        connection, self._connection = self._connection, None
        return connection

    def close(self) -> None:
        """Hang up; idempotent."""
        self._dial.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None
