"""Where one listens, how one waits, and what is kept to oneself: listeners and those who connect to them."""

from __future__ import annotations

import gc
import os
import select
import socket
import subprocess
import sys
import threading
import time

import pytest

from distbp.errors import ConfigError, EnvironmentMismatch, TransportError
from distbp.transports import wire
from tests.transports.lanes import (
    HELLO,
    HERE,
    KEY,
    PATIENCE_S,
    at_once,
    is_closed,
    meet,
    stranger,
)

# ----- waiting for each other


def test_who_comes_before_the_listener_is_heard():
    """Connecting begins before anybody listens, and is tried until somebody does."""
    with socket.create_server((HERE, 0)) as free:
        port = free.getsockname()[1]

    def listen_late():
        time.sleep(0.3)
        late = wire.Listener(HERE, KEY, port=port)
        connection = late.accept(PATIENCE_S)
        late.close()
        return connection

    accepted, connected = at_once(listen_late, lambda: wire.connect((HERE, port), KEY, HELLO, PATIENCE_S))
    assert accepted.hello == connected.hello
    accepted.close()
    connected.close()


def test_a_listener_that_is_busy_keeps_nobody_out(listener):
    """Who connects while nobody accepts waits longer than a stranger may, and is let in then."""

    def accept_late():
        time.sleep(0.5)
        return listener.accept(PATIENCE_S)

    accepted, connected = at_once(accept_late, lambda: wire.connect(listener.address, KEY, HELLO, PATIENCE_S))
    assert accepted.hello == connected.hello
    accepted.close()
    connected.close()


def test_nobody_is_named_with_the_address():
    """Where nobody listens, the address and the reason are named at the deadline, and `check` is called."""
    with socket.create_server((HERE, 0)) as free:
        port = free.getsockname()[1]
    looks = []
    with pytest.raises(TransportError) as raised:
        wire.connect((HERE, port), KEY, HELLO, 0.4, lambda: looks.append(time.monotonic()))
    for part in (f"{HERE}:{port}", "0.4 s", "refused", "resuming is safe"):
        assert part in str(raised.value)
    assert len(looks) >= 4


def test_nobody_answers(listener):
    """A listener that never accepts is named at the deadline."""
    with pytest.raises(TransportError, match="said nothing"):
        wire.connect(listener.address, KEY, HELLO, 0.3)


@pytest.mark.parametrize("wait", ["accept", "connect"])
def test_check_ends_a_wait(listener, wait):
    """What `check` raises passes through whoever waits."""

    class Enough(Exception):
        pass

    def check():
        raise Enough

    waits = {
        "accept": lambda: listener.accept(PATIENCE_S, check),
        "connect": lambda: wire.connect(listener.address, KEY, HELLO, PATIENCE_S, check),
    }
    with pytest.raises(Enough):
        waits[wait]()


def test_one_event_loop_can_serve_a_listener(listener):
    """`fileno` is readable when `accept` has something to do, at every stage of a handshake."""
    assert listener.accept(0.0) is None
    poll = select.poll()
    poll.register(listener, select.POLLIN)

    def serve():
        for _ in range(100):
            assert poll.poll(1000 * PATIENCE_S)
            if connection := listener.accept(0.0):
                return connection
        return None

    accepted, connected = at_once(serve, lambda: wire.connect(listener.address, KEY, HELLO, PATIENCE_S))
    assert accepted.hello == HELLO
    accepted.close()
    connected.close()


def test_several_that_come_at_once_are_all_accepted(listener):
    """No peer is lost when several become ready in the same moment."""
    num = 20
    calls = [
        lambda rank=rank: wire.connect(listener.address, KEY, HELLO | {"rank": rank}, PATIENCE_S)
        for rank in range(num)
    ]
    accepted, *connected = at_once(lambda: [listener.accept(PATIENCE_S) for _ in range(num)], *calls)
    assert sorted(connection.hello["rank"] for connection in accepted) == list(range(num))
    for connection in (*accepted, *connected):
        connection.close()


# ----- addresses


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "0", "::ffff:0.0.0.0", "", "localhost", "no address"])
def test_only_one_address_is_listened_at(address):
    """An address that stands for all of them, or a name, is refused."""
    with pytest.raises(ConfigError):
        wire.Listener(address, KEY)


def test_a_foreign_address_is_named():
    """An address that is not this host's is an error of the environment."""
    with pytest.raises(EnvironmentMismatch, match=r"192\.0\.2\.1"):
        wire.Listener("192.0.2.1", KEY)


def test_a_taken_port_is_named():
    """A fixed port that somebody has ends with 78 and says which one (A16)."""
    with socket.create_server((HERE, 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(EnvironmentMismatch, match=f"{HERE}:{port}") as raised:
            wire.Listener(HERE, KEY, port=port)
    assert raised.value.exit_code == 78


def test_a_port_is_free_again_at_once():
    """A fixed port can be taken again as soon as its listener has closed, connections or not."""
    first = wire.Listener(HERE, KEY)
    accepted, connected = meet(first)
    accepted.close()
    connected.close()
    port = first.address[1]
    first.close()
    wire.Listener(HERE, KEY, port=port).close()


def test_ipv6_works_as_well():
    """A listener at ::1 is reached."""
    try:
        listener = wire.Listener("::1", KEY)
    except EnvironmentMismatch:
        pytest.skip("this machine has no IPv6")
    accepted, connected = meet(listener)
    assert accepted.hello == HELLO
    assert listener.address[0] == "::1"
    accepted.close()
    connected.close()
    listener.close()


SELF_CONNECT = f"""
import subprocess, sys
from distbp.errors import TransportError
from distbp.transports import wire
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
open("/proc/sys/net/ipv4/ip_local_port_range", "w").write("40000 40001")
try:
    wire.connect(("{HERE}", 40000), bytes(32), {{}}, 1.0)
except TransportError as error:
    sys.exit(0 if "refused" in error.args[0] or "nobody" in error.args[0] else 3)
sys.exit(4)
"""


def test_nobody_connects_to_itself():
    """Where the kernel gives our own end the port we look for, that is nobody, and the port is let go."""
    command = ["unshare", "--net", "--mount", sys.executable, "-c", SELF_CONNECT]
    try:
        possible = subprocess.run(["unshare", "--net", "--mount", "ip", "link"], capture_output=True)
    except OSError as error:
        pytest.skip(f"needs unshare and ip: {error}")
    if possible.returncode:
        pytest.skip(f"no network namespaces here: {possible.stderr.decode().strip()}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr


# ----- what is kept to oneself


def test_the_key_is_nowhere_to_be_seen(listener):
    """Nothing that could be printed or logged contains the key."""
    accepted, connected = meet(listener)
    dial = wire.Dial(listener.address, KEY, HELLO)
    for thing in (listener, accepted, connected, dial, *vars(listener).values(), *vars(dial).values()):
        for text in (repr(thing), str(thing), repr(getattr(thing, "__dict__", {}))):
            assert repr(KEY)[2:-1] not in text
            assert KEY.hex() not in text
    accepted.close()
    connected.close()


def test_programs_that_are_started_inherit_nothing(listener):
    """Every descriptor is closed when another program is executed."""
    accepted, connected = meet(listener)
    for thing in (listener, accepted, connected):
        assert not os.get_inheritable(thing.fileno())
    assert not os.get_inheritable(listener._socket.fileno())
    accepted.close()
    connected.close()


def test_closing_a_listener_ends_its_waits_and_frees_everything():
    """Closing is idempotent, ends an `accept` of another thread, and closes the strangers' sockets."""
    gc.collect()  # Errors of earlier tests may keep sockets alive.
    before = len(os.listdir("/proc/self/fd"))
    listener = wire.Listener(HERE, KEY)
    with stranger(listener) as sock:
        waiting = threading.Thread(target=listener.accept, args=(PATIENCE_S,))
        waiting.start()
        assert sock.recv(40)  # It has been greeted.
        listener.close()
        listener.close()
        waiting.join(PATIENCE_S / 2)
        assert not waiting.is_alive()
        assert is_closed(sock)
    assert listener.fileno() == -1
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(OSError, match="closed"):
        listener.accept(0.0)
