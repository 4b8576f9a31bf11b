"""One end of an authenticated TCP connection: JSON messages in both directions.

A message is a frame: length of the body, CRC-32 of the body, CRC-32 of these two; then the body, a JSON
object.  A length is compared with the limit before anything is allocated.  A frame that does not fit its
checksums makes the connection useless, because nobody knows where the next one begins.

A process that dies closes its connections, which the other side sees at once.  A link that is cut, or a host
that loses power, tells nobody; so the kernel asks when nothing has come for a while, and gives up after
`SILENCE_S`: keep-alive for an idle connection, TCP_USER_TIMEOUT for one with data on their way.  On Linux the
second also ends a connection to a peer that is well, and has not read for so long that all buffers are full.
Between a job and its workers that is megabytes of messages, so it is taken for lost; `tcp.py`, where a slow
reader is nothing unusual, uses another rule.

It does not know how the two sides found each other (`wire.py`), nor what messages mean.  It needs Linux, as
the arena does.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import msgspec

from distbp.crc import crc32
from distbp.errors import TransportError
from distbp.transports import handshake

__all__ = ["MOST_MESSAGE_BYTES", "SILENCE_S", "BrokenConnection", "Connection", "InUse"]

MOST_MESSAGE_BYTES = 16 << 20
SILENCE_S = 10.0

POLL_S = 0.05
"""The longest wait without a look at `check`, the deadline and `close`."""

_HEADER = struct.Struct("<III")
_CHECKED = _HEADER.size - 4
_LEAST_MESSAGE_BYTES = len(b"{}")
_INFO = struct.Struct("=2xBB52xI")
"""Of struct tcp_info (linux/tcp.h): tcpi_retransmits, tcpi_probes, tcpi_last_ack_recv in ms."""

_UNANSWERED = 3
_DRAIN_BYTES, _DRAIN_TIMES = 1 << 20, 16

Check = Callable[[], None]


class BrokenConnection(TransportError, ConnectionError):
    """The connection cannot be used any more: a bad frame, or a message that the peer did not take.

    It is a `TransportError` for whoever lets it pass, and an `OSError` for whoever treats every end alike.
    """


class InUse:
    """Lets one thread close what others are using: the last one that leaves gives it back.

    A descriptor that is closed under a thread that waits on it may by then be a new file of somebody else's.
    `wake` ends waits and must not give anything back; `error` is raised by a use that begins too late.
    """

    def __init__(self, release: Check, wake: Check, error: Callable[[], Exception]) -> None:
        self._release, self._wake, self._error = release, wake, error
        self._lock = threading.RLock()  # A signal handler may come in between, on the same thread.
        self._users = 0
        self.closed = False

    def __enter__(self) -> None:
        with self._lock:
            if self.closed:
                raise self._error()
            self._users += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._users -= 1
            if self.closed and self._users == 0:
                self._release()

    def close(self) -> None:
        """Let no new use begin, wake those that wait, and give back what nobody uses; idempotent."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            if self._users:
                self._wake()
            else:
                self._release()


class Connection:
    """One end of an authenticated connection, for JSON messages in both directions.

    Any number of threads may `send`, also a signal handler that interrupts a `send`; one at a time may
    `receive`.  `fileno` is readable when `receive` has something to do: nothing is read ahead.
    """

    def __init__(self, sock: socket.socket, hello: Mapping[str, Any], peer: tuple[str, int]) -> None:
        self._socket = sock
        self.hello = dict(hello)
        self.peer = peer
        self._broken = ""
        self._header = bytearray(_HEADER.size)
        self._incoming, self._received = self._header, 0
        self._outbox: deque[list[memoryview]] = deque()
        self._sending = threading.Lock()
        self._senders: list[int] = []  # Threads that are in `send`, by their identity.
        self._uses = InUse(self._hang_up, self._shut, self._closed_here)

    def __repr__(self) -> str:
        return f"<Connection with {shown(self.peer)}>"

    def fileno(self) -> int:
        """Return the descriptor to poll, -1 when closed."""
        return self._socket.fileno()

    def send(self, message: Mapping[str, Any], deadline_s: float = 10.0) -> None:
        """Send one message.

        Raises `BrokenConnection` when the peer is gone or has not taken it after `deadline_s`, `ValueError`
        before anything is sent when it is larger than `MOST_MESSAGE_BYTES` or nests too deep.  NaN and
        infinities become null, as JSON has none.
        """
        self._outbox.append([memoryview(part) for part in _frame(message)])
        me = threading.get_ident()
        with self._uses:
            # A signal handler that has interrupted a `send` of this thread leaves its message to that call,
            # which looks once more after it has taken itself off the list.
            while self._outbox and me not in self._senders:
                self._senders.append(me)
                try:
                    self._send_outbox(time.monotonic() + deadline_s, deadline_s)
                finally:
                    self._senders.remove(me)
            self._check_whole()

    def receive(self, deadline_s: float, check: Check = lambda: None) -> dict[str, Any] | None:
        """Return the next message, None when none has come in time; what has come of it is kept.

        Raises `EOFError` when the peer is gone, `BrokenConnection` after a bad frame.
        """
        until = time.monotonic() + deadline_s
        with self._uses:
            while True:
                self._check_whole()
                message = self._read()
                if message is not None:
                    return message
                check()
                left = until - time.monotonic()
                if left <= 0:
                    return None
                wait(self._socket.fileno(), select.POLLIN, min(left, POLL_S))

    def detach(self) -> socket.socket:
        """Return the socket to whoever sends something else over it; the connection is then closed."""
        self._check_whole()
        assert not self._received, "a message was half received"
        own = socket.socket(fileno=self._socket.detach())
        own.setblocking(False)
        self._uses.close()
        return own

    def close(self) -> None:
        """End the connection, and every wait on it in another thread; idempotent."""
        self._uses.close()

    def _send_outbox(self, until: float, deadline_s: float) -> None:
        """Send all that is in the outbox, also for other threads."""
        left = min(max(0.0, until - time.monotonic()), threading.TIMEOUT_MAX)
        if not self._sending.acquire(timeout=left):
            raise self._not_taken(deadline_s)
        try:
            while self._outbox:
                self._check_whole()
                if self._send_some(self._outbox[0]):
                    self._outbox.popleft()
                elif (left := until - time.monotonic()) > 0:
                    wait(self.fileno(), select.POLLOUT, min(left, POLL_S))
                else:
                    raise self._not_taken(deadline_s)
        finally:
            self._sending.release()

    def _send_some(self, parts: list[memoryview]) -> bool:
        """Send what the kernel takes of one message; return whether that was all."""
        try:
            return skip_sent(parts, self._socket.sendmsg(parts))
        except BlockingIOError:
            return False
        except OSError as error:
            raise self._break(f"the peer is gone: {error}") from error

    def _not_taken(self, deadline_s: float) -> BrokenConnection:
        """Return the error about a peer that does not read."""
        return self._break(f"the peer has not taken a message for {deadline_s:g} s")

    def _read(self) -> dict[str, Any] | None:
        """Read what has come; return a message when it is complete."""
        while True:
            try:
                count = self._socket.recv_into(memoryview(self._incoming)[self._received :])
            except BlockingIOError:
                return None
            except OSError as error:
                raise EOFError(f"the connection with {shown(self.peer)} broke: {error}") from error
            if count == 0:
                raise EOFError(f"{shown(self.peer)} closed the connection")
            self._received += count
            if self._received < len(self._incoming):
                continue
            complete, self._received = self._incoming, 0
            if complete is self._header:
                self._incoming = bytearray(self._body_length())
            else:
                self._incoming = self._header
                return self._parse(complete)

    def _body_length(self) -> int:
        """Return how long the body is that the header announces."""
        length, _, crc = _HEADER.unpack(self._header)
        if crc != crc32(memoryview(self._header)[:_CHECKED]):
            raise self._break("the header of a message is damaged")
        if not _LEAST_MESSAGE_BYTES <= length <= MOST_MESSAGE_BYTES:
            raise self._break(
                f"expected a message of {_LEAST_MESSAGE_BYTES} to {MOST_MESSAGE_BYTES} bytes, got {length!r}"
            )
        return int(length)

    def _parse(self, body: bytearray) -> dict[str, Any]:
        """Return the message in `body`."""
        if crc32(body) != _HEADER.unpack(self._header)[1]:
            raise self._break(f"a message of {len(body)} bytes is damaged")
        try:
            return handshake.decode_json(body)
        except ValueError as error:
            raise self._break(f"expected a JSON object, got {error}") from error

    def _break(self, reason: str) -> BrokenConnection:
        """Make the connection useless and return the error that says so."""
        self._broken = self._broken or (
            f"the connection with {shown(self.peer)} cannot be used any more: {reason}; look at that host "
            "and its link, then run again: resuming is safe"
        )
        return BrokenConnection(self._broken)

    def _check_whole(self) -> None:
        """Raise if the connection is useless, as often as it is tried."""
        if self._broken:
            raise BrokenConnection(self._broken)

    def _closed_here(self) -> Exception:
        return BrokenConnection(f"the connection with {shown(self.peer)} was closed on this side")

    def _shut(self) -> None:
        """Wake every thread that waits on the socket."""
        with contextlib.suppress(OSError):  # The peer may have gone first.
            self._socket.shutdown(socket.SHUT_RDWR)

    def _hang_up(self) -> None:
        """Close the socket; unread messages are read first, lest the kernel drop what we sent last."""
        self._shut()
        with contextlib.suppress(OSError):
            for _ in range(_DRAIN_TIMES):
                if not self._socket.recv(_DRAIN_BYTES):
                    break
        self._socket.close()


def prepare(sock: socket.socket) -> None:
    """Set what every connection has: no waiting, no delay, an end after `SILENCE_S` without a sign of life.

    Keep-alive alone: 4 s of silence, then a question every 2 s, the third without an answer ends it.
    """
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_NODELAY, 1),
        (socket.TCP_KEEPIDLE, 4),
        (socket.TCP_KEEPINTVL, 2),
        (socket.TCP_KEEPCNT, 3),
        (socket.TCP_USER_TIMEOUT, int(SILENCE_S * 1000)),
    ):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def is_silent(sock: socket.socket) -> float:
    """Return for how many seconds a peer has been out of reach, 0.0 if it is not known to be.

    It is when 3 packets in a row that its kernel should have answered, and `SILENCE_S`, have passed without
    one from there.  A peer that is well and does not read still answers.
    """
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO.size)
    retransmits, probes, silent_ms = _INFO.unpack(info)
    if retransmits + probes < _UNANSWERED or silent_ms < SILENCE_S * 1000:
        return 0.0
    return float(silent_ms / 1000)


def skip_sent(parts: list[memoryview], sent: int) -> bool:
    """Remove the first `sent` bytes from `parts`; return whether nothing is left."""
    while parts and sent >= len(parts[0]):
        sent -= len(parts.pop(0))
    if parts:
        parts[0] = parts[0][sent:]
    return not parts


def _frame(message: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """Return header and body of a message."""
    body = msgspec.json.encode(dict(message))
    if len(body) > MOST_MESSAGE_BYTES:
        raise ValueError(
            f"expected a message of at most {MOST_MESSAGE_BYTES} bytes, got {len(body)}: send parts"
        )
    if not handshake.is_shallow(message):
        raise ValueError(
            f"expected a message that nests at most {handshake.MOST_DEPTH} deep, got a deeper one"
        )
    checked = _HEADER.pack(len(body), crc32(body), 0)[:_CHECKED]
    return checked + crc32(checked).to_bytes(4, "little"), body


def wait(descriptor: int, events: int, seconds: float) -> None:
    """Block until one of `events` happens or `seconds` have passed; with descriptor -1 just sleep."""
    poll = select.poll()
    if descriptor >= 0:
        poll.register(descriptor, events)
    poll.poll(seconds * 1000)


def shown(address: tuple[str, int]) -> str:
    """Return an address as one writes it."""
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
