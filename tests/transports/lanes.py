"""What tests of the tcp transport share: lanes, bare connections, and a proxy that does what a test wants."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from concurrent.futures import ThreadPoolExecutor

from distbp.transports import wire
from distbp.transports.connection import Connection, prepare
from distbp.transports.tcp import TCPTransport, open_lane

KEY = bytes(range(32))
HERE = "127.0.0.1"
PATIENCE_S = 60.0
LABEL = {"lane": 0, "attempt": 1}
HELLO = {"role": "lane", "rank": 1, "attempt": 3, "lane": 0}


def at_once(*calls):
    """Make calls at the same time, each on a thread; return their results, or raise what the first raised."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def outcome(call):
    """Return what a call returns or raises."""
    try:
        return call()
    except Exception as error:
        return error


def meet(listener, address=None, key=KEY, hello=HELLO, deadline_s=PATIENCE_S):
    """Connect to a listener while it accepts; return what came of it on both sides."""
    done = threading.Event()

    def stop_waiting():
        if done.is_set():
            raise InterruptedError

    def call():
        try:
            return outcome(lambda: wire.connect(address or listener.address, key, hello, deadline_s))
        finally:
            done.set()

    accepted, connected = at_once(lambda: outcome(lambda: listener.accept(PATIENCE_S, stop_waiting)), call)
    return (None if isinstance(accepted, InterruptedError) else accepted), connected


def stranger(listener, *words):
    """Connect without the protocol and say something."""
    sock = socket.create_connection(listener.address)
    for part in words:
        sock.sendall(part)
    return sock


def is_closed(sock):
    """Return whether the other side closes a connection soon; what it says before is thrown away."""
    sock.settimeout(PATIENCE_S)
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


def open_lanes(size, deadline_s=PATIENCE_S, through=None, check=lambda: None):
    """Return the transports of a lane of `size` members; `through[h]` is where others look for member h."""
    listeners = [wire.Listener(HERE, KEY) for _ in range(size)]
    addresses = [(through or {}).get(h, listener.address) for h, listener in enumerate(listeners)]
    names = [str(rank) for rank in range(size)]

    def join(rank):
        transport = open_lane(
            listeners[rank],
            addresses,
            rank,
            KEY,
            label=LABEL,
            names=names,
            deadline_s=PATIENCE_S,
            check=check,
        )
        transport.deadline_s = deadline_s
        return transport

    try:
        return at_once(*(lambda rank=rank: join(rank) for rank in range(size)))
    finally:
        for listener in listeners:
            listener.close()


def socket_pair():
    """Return both ends of a TCP connection over loopback."""
    with socket.create_server((HERE, 0)) as server:
        left = socket.create_connection(server.getsockname())
        right, _ = server.accept()
    return left, right


def bare_connection(sock):
    """Return a connection over a socket, as after a handshake."""
    prepare(sock)
    return Connection(sock, {}, sock.getpeername()[:2])


def connection_pair():
    """Return two connections that reach each other."""
    return tuple(map(bare_connection, socket_pair()))


def bare_transport(sock, rank, size=2, deadline_s=PATIENCE_S):
    """Return a member of a lane of two over a socket, as after a meeting."""
    other = 1 - rank
    names = [str(host) for host in range(size)]
    return TCPTransport({other: bare_connection(sock)}, rank, size, names=names, deadline_s=deadline_s)


def reset(sock):
    """Close a connection as a host does that knows nothing of it any more."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


class Proxy:
    """Stands between those who connect to `address` and `target`; ends with the `with` statement.

    Bytes from the connecting side go through `forward(data, out)`, which may send to the socket `out`, or
    close it; those that come back are passed on as they are.  Until `active` is set everything is passed on.
    """

    def __init__(self, target, forward):
        self._target = target
        self._forward = forward
        self._server = socket.create_server((HERE, 0))
        self._stop, self._stopped = socket.socketpair()
        self._thread = threading.Thread(target=self._run)
        self.address = self._server.getsockname()
        self.active = threading.Event()

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.close()
        self._thread.join()
        self._server.close()
        self._stopped.close()

    def _run(self):
        with contextlib.ExitStack() as stack:
            ways = {}
            while True:
                ready, _, _ = select.select([self._server, self._stopped, *ways], [], [])
                if self._stopped in ready:
                    return
                for sock in ready:
                    if sock is self._server:
                        near = stack.enter_context(sock.accept()[0])
                        far = stack.enter_context(socket.create_connection(self._target))
                        for end in (near, far):
                            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        ways |= {near: (far, True), far: (near, False)}
                    elif sock in ways and not self._pass_on(sock, *ways[sock]):
                        out = ways[sock][0]
                        for end in (sock, out):
                            ways.pop(end)
                            end.close()

    def _pass_on(self, sock, out, outwards):
        """Pass on what has come; return whether the connection is still open."""
        with contextlib.suppress(OSError):
            data = sock.recv(1 << 16)
            if data and outwards and self.active.is_set():
                self._forward(data, out)
            elif data:
                out.sendall(data)
            return bool(data) and out.fileno() >= 0
        return False
