"""How two processes of one run get an authenticated TCP connection: a listener, and who connects to it.

`Listener.accept` and `connect` give both sides a `Connection` (`connection.py`), once each has proved to the
other that it knows the run key (`handshake.py`).  Nothing is encrypted: see there what that means.

Neither a listener nor a `Dial` ever waits for one peer alone: a handshake is a small state that goes on when
bytes come.  So a stranger who says nothing delays nobody, and a process can accept and connect at the same
time, on one thread.

This file knows nothing of gradients and nothing of jobs.  Tried and rejected: a thread for each handshake,
which strangers could start at will; TLS, which needs certificates that nobody has when a job starts.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import os
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from distbp.errors import ConfigError, EnvironmentMismatch, TransportError
from distbp.transports import handshake
from distbp.transports.connection import POLL_S, Check, Connection, InUse, prepare, shown, wait

__all__ = ["Connection", "Dial", "Listener", "connect"]

_MOST_STRANGERS, _STRANGER_S = 64, 5.0
_SYN_S = 2.0
"""After so long a new attempt: the kernel's own are seconds apart by then, and a host may have come up."""

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.2


class Listener:
    """Accepts connections at one address of this host, from those who know `key`.

    `address` is what peers connect to; port 0 lets the kernel choose.  `refused` counts those that were
    dropped: wrong key, other version, garbage, silence.  `fileno` is readable when `accept` has something to
    do.  One thread at a time may call `accept`.
    """

    def __init__(self, address: str, key: bytes, *, port: int = 0) -> None:
        self._proof = handshake.keyed(key)
        self._socket = _bind(address, port)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self.refused = 0
        self._strangers: dict[int, _Stranger] = {}  # By descriptor, the oldest first.
        self._poll = select.epoll()
        self._poll.register(self._socket, select.EPOLLIN)
        self._uses = InUse(
            self._release, lambda: None, lambda: OSError(errno.EBADF, "the listener is closed")
        )

    def fileno(self) -> int:
        """Return the descriptor to poll, -1 when closed."""
        return -1 if self._poll.closed else self._poll.fileno()

    def accept(self, deadline_s: float, check: Check = lambda: None) -> Connection | None:
        """Return the next peer that has proved who it is, None after `deadline_s`.

        Handshakes go on side by side.  At most 64 strangers are waited for, 5 s each; one more, and the
        oldest is dropped.  All of it happens inside this call, and goes on in the next one.
        """
        until = time.monotonic() + deadline_s
        with self._uses:
            while not self._uses.closed:
                check()
                left = until - time.monotonic()
                for descriptor, _ in self._poll.poll(max(0.0, min(left, POLL_S))):
                    if descriptor == self._socket.fileno():
                        self._let_in()
                    elif connection := self._hear(descriptor):
                        return connection  # Who else is ready stays so, and comes in the next call.
                self._drop_the_slow()
                if left <= 0:
                    return None
        return None

    def close(self) -> None:
        """Stop listening and drop all strangers; idempotent."""
        self._uses.close()

    def _let_in(self) -> None:
        """Take a stranger from the kernel and speak first."""
        try:
            sock, peer = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno != errno.ECONNABORTED:
                time.sleep(POLL_S)  # No descriptor or memory is left: wait for some instead of spinning.
            return
        if len(self._strangers) >= _MOST_STRANGERS:
            self._drop(next(iter(self._strangers)), counted=True)
        try:
            prepare(sock)
            stranger = _Stranger(sock, self._proof, peer[:2])
        except OSError:
            sock.close()  # It has hung up again.
            return
        self._strangers[sock.fileno()] = stranger
        self._poll.register(sock, select.EPOLLIN)

    def _hear(self, descriptor: int) -> Connection | None:
        """Go on with the handshake of a stranger; return its connection if that was all."""
        stranger = self._strangers.get(descriptor)
        if stranger is None:
            return None  # It was dropped for a newer one a moment ago.
        try:
            if not stranger.talk.advance():
                return None
        except handshake.Refused as refused:
            with contextlib.suppress(OSError):
                stranger.talk.say(refused.answer)
            self._drop(descriptor, counted=True)
            return None
        except (OSError, EOFError):
            self._drop(descriptor, counted=False)  # It gave up by itself.
            return None
        self._poll.unregister(descriptor)
        del self._strangers[descriptor]
        return Connection(stranger.talk.socket, stranger.rules.hello, stranger.peer)

    def _drop_the_slow(self) -> None:
        """Drop whoever has been a stranger for too long."""
        now = time.monotonic()
        for descriptor, stranger in list(self._strangers.items()):
            if now < stranger.until:
                break
            self._drop(descriptor, counted=True)

    def _drop(self, descriptor: int, *, counted: bool) -> None:
        self._poll.unregister(descriptor)
        self._strangers.pop(descriptor).talk.socket.close()
        self.refused += counted

    def _release(self) -> None:
        for stranger in self._strangers.values():
            stranger.talk.socket.close()
        self._strangers.clear()
        self._poll.close()
        self._socket.close()


class Dial:
    """Tries to reach a listener and to prove who we are, again and again, without ever waiting by itself.

    Call `advance` until it returns a connection; in between, wait until `fileno` is readable (if it is not
    -1) or `pause_s` have passed.  `trouble` says why there is none yet.
    """

    def __init__(self, address: tuple[str, int], key: bytes, hello: Mapping[str, Any]) -> None:
        self._family, self._target = _resolve(*address)
        self.where = shown(address)
        self.trouble = "no answer"
        self._peer = (address[0], address[1])
        self._proof = handshake.keyed(key)
        self._said = dict(hello)
        self._hello = handshake.encode_hello(hello)
        self._talk: _Talk | None = None
        self._began = 0.0
        self._not_before = 0.0
        self._pause_s = _FIRST_PAUSE_S

    @property
    def pause_s(self) -> float:
        """How long nothing is to be done unless the socket becomes readable."""
        return POLL_S if self._talk is not None else max(0.0, self._not_before - time.monotonic())

    def fileno(self) -> int:
        """Return the descriptor to poll, -1 between two attempts."""
        return -1 if self._talk is None else self._talk.socket.fileno()

    def advance(self) -> Connection | None:
        """Go on as far as it goes at once; raise what `connect` raises, but for the deadline."""
        try:
            if self._talk is None:
                if time.monotonic() < self._not_before:
                    return None
                self._begin()
            assert self._talk is not None
            if self._talk.advance():
                sock, self._talk = self._talk.socket, None
                return Connection(sock, self._said, self._peer)
            self._give_up_if_unheard(self._talk.socket)
        except OSError as error:
            self.put_off(error.strerror or str(error))
        except EOFError:
            self.put_off("it hung up in the middle of the handshake")
        except BaseException:
            self.close()
            raise
        return None

    def close(self) -> None:
        """Hang up; idempotent."""
        if self._talk is not None:
            self._talk.socket.close()
            self._talk = None

    def _begin(self) -> None:
        """Send the first packet of a new attempt."""
        sock = socket.socket(self._family, socket.SOCK_STREAM)
        try:
            prepare(sock)
            number = sock.connect_ex(self._target)
            if number not in (0, errno.EINPROGRESS):
                raise OSError(number, os.strerror(number))
            self._talk = _Talk(sock, handshake.Connecting(self._proof, self._hello, self.where))
        except BaseException:
            sock.close()
            raise
        self._began = time.monotonic()

    def _give_up_if_unheard(self, sock: socket.socket) -> None:
        """End an attempt whose packets nobody answers, or that has reached itself."""
        try:
            same = sock.getpeername() == sock.getsockname()
        except OSError:  # Not connected yet.
            if time.monotonic() > self._began + _SYN_S:
                raise TimeoutError(errno.ETIMEDOUT, "no answer") from None
            return
        if same:
            # Where nobody listens, the kernel may choose the target's own port for our end.
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there")
        self.trouble = "it accepted the connection and said nothing"

    def put_off(self, trouble: str) -> None:
        """Note why an attempt was of no use, and make the next one a little later."""
        self.close()
        self.trouble = trouble
        self._not_before = time.monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def connect(
    address: tuple[str, int],
    key: bytes,
    hello: Mapping[str, Any],
    deadline_s: float,
    check: Check = lambda: None,
) -> Connection:
    """Reach the listener at `address` and say `hello`, a small JSON object; try for `deadline_s`.

    Raises `AuthenticationError` if keys differ, `EnvironmentMismatch` if releases of distbp do,
    `TransportError` when nobody answered in time; `ValueError` if hello is longer than 4096 bytes.
    """
    until = time.monotonic() + deadline_s
    with contextlib.closing(Dial(address, key, hello)) as dial:
        while True:
            connection = dial.advance()
            if connection is not None:
                return connection
            check()
            left = until - time.monotonic()
            if left <= 0:
                raise TransportError(
                    f"expected {dial.where} to answer within {deadline_s:g} s, got: {dial.trouble}; "
                    "look at that host, its log and its firewall, then run again: resuming is safe"
                )
            wait(dial.fileno(), select.POLLIN, min(left, POLL_S, dial.pause_s))


class _Talk:
    """One side of a handshake over a socket that does not block."""

    def __init__(self, sock: socket.socket, rules: handshake.Listening | handshake.Connecting) -> None:
        self.socket = sock
        self._rules = rules
        self._heard = b""
        self.say(rules.first_words)

    def advance(self) -> bool:
        """Go on as far as it goes at once; return whether the handshake is finished."""
        while not self._rules.finished:
            try:
                data = self.socket.recv(self._rules.needs - len(self._heard))
            except BlockingIOError:
                return False
            if not data:
                raise EOFError
            self._heard += data
            if len(self._heard) == self._rules.needs:
                heard, self._heard = self._heard, b""
                self.say(self._rules.take(heard))
        return True

    def say(self, words: bytes) -> None:
        """Send some words; the buffer of a new socket has room for them."""
        if words and self.socket.send(words) < len(words):
            raise OSError(errno.ENOBUFS, "no room for a handshake")


class _Stranger:
    """Somebody who has connected and not yet proved anything."""

    def __init__(self, sock: socket.socket, proof: hmac.HMAC, peer: tuple[str, int]) -> None:
        self.rules = handshake.Listening(proof)
        self.talk = _Talk(sock, self.rules)
        self.peer = peer
        self.until = time.monotonic() + _STRANGER_S


def _resolve(address: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """Return the family of an IP address and what the kernel wants to be given."""
    try:
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError, OverflowError) as error:
        raise ConfigError(
            f"expected an IP address and a port, got {address!r} and {port!r}: {error}"
        ) from error
    return found[0][0], found[0][4]


def _bind(address: str, port: int) -> socket.socket:
    """Return a socket that listens at exactly one address of this host."""
    family, target = _resolve(address, port)
    number = ipaddress.ip_address(target[0])
    if number.is_unspecified or (getattr(number, "ipv4_mapped", None) or number).is_unspecified:
        raise ConfigError(
            f"expected one address of this host to listen at, got {address!r}, which is open to more: give "
            "the address by which the other hosts reach this one"
        )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        # A port counts as taken while somebody listens there, not for a minute after that.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind(target)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise EnvironmentMismatch(
            f"expected to listen at {shown((address, port))}, got: {error.strerror}; end the program that "
            "has this port, or choose another one (0: any that is free)"
        ) from error
    return sock
