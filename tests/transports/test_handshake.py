"""Who gets a connection and who does not: wrong keys, garbage, replays, crowds of strangers, limits."""

from __future__ import annotations

import os
import select
import socket
import time

import pytest

from distbp.errors import AuthenticationError, EnvironmentMismatch, TransportError
from distbp.transports import handshake, wire
from tests.transports.lanes import (
    HELLO,
    HERE,
    KEY,
    PATIENCE_S,
    Proxy,
    at_once,
    is_closed,
    meet,
    outcome,
    reset,
    stranger,
)

OTHER_KEY = bytes(32)


# ----- those who know the key


def test_both_sides_know_what_was_said(listener):
    """Both ends of a connection have the hello and each other's address, and can talk."""
    accepted, connected = meet(listener)
    assert accepted.hello == connected.hello == HELLO
    assert connected.peer == listener.address
    accepted.send({"to": "connecting"})
    connected.send({"to": "listening"})
    assert connected.receive(PATIENCE_S) == {"to": "connecting"}
    assert accepted.receive(PATIENCE_S) == {"to": "listening"}
    assert listener.refused == 0
    connected.close()
    accepted.close()


# ----- those who do not


def test_a_wrong_key_is_refused(listener):
    """Who has another key learns so at once, and the listener counts it."""
    accepted, refused = meet(listener, key=OTHER_KEY)
    assert accepted is None
    assert listener.refused == 1
    assert isinstance(refused, AuthenticationError)
    assert refused.exit_code == 77
    assert f"{HERE}:{listener.address[1]}" in str(refused)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_key_has_32_bytes(length):
    """Nobody works with a key that is too short by mistake; one with none has none."""
    with pytest.raises(AuthenticationError, match="32 bytes"):
        wire.Listener(HERE, bytes(length))
    with pytest.raises(AuthenticationError, match="32 bytes"):
        wire.connect((HERE, 1), bytes(length), HELLO, 1.0)


@pytest.mark.parametrize(
    "words",
    [
        [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + bytes(64)],
        [os.urandom(4096)],
        [bytes(200)],
        [b"distbp"[i : i + 1] for i in range(6)] + [bytes(100)],
    ],
    ids=["http", "random", "zeros", "half right"],
)
def test_garbage_is_dropped(listener, words):
    """Whoever does not speak the protocol is dropped and counted; the next honest peer is accepted."""
    with stranger(listener, *words) as sock:
        assert listener.accept(0.2) is None
        assert listener.refused == 1
        assert is_closed(sock)
    accepted, connected = meet(listener)
    assert accepted.hello == HELLO
    accepted.close()
    connected.close()


def test_a_port_scanner_is_not_counted(listener):
    """Who connects and hangs up, politely or not, is no attack."""
    stranger(listener).close()
    reset(stranger(listener))
    assert listener.accept(0.2) is None
    assert listener.refused == 0


def test_silent_strangers_delay_nobody(listener):
    """70 who say nothing keep no honest peer waiting; no more than 64 are kept, the oldest go first."""
    crowd = [stranger(listener, b"dist") for _ in range(70)]
    accepted, connected = meet(listener)
    assert accepted.hello == HELLO
    assert listener.refused == 7  # There is room for 64, and the honest one was number 71.
    assert all(is_closed(sock) for sock in crowd[:7])
    for sock in crowd[7:]:
        assert len(sock.recv(100)) == 40  # It has been greeted,
    assert select.select(crowd[7:], [], [], 0)[0] == []  # and is still there.
    for sock in crowd:
        sock.close()
    accepted.close()
    connected.close()


def test_a_silent_stranger_has_five_seconds(listener):
    """Who says nothing is dropped after 5 s, and counted."""
    with stranger(listener) as sock:
        begun = time.monotonic()
        while not listener.refused and time.monotonic() < begun + PATIENCE_S:
            assert listener.accept(0.1) is None
        assert time.monotonic() - begun >= 4.9
        assert is_closed(sock)


def test_a_slow_honest_peer_is_let_in(listener):
    """A handshake that arrives byte by byte is as good as any."""

    def trickle(data, out):
        for number in range(len(data)):
            out.sendall(data[number : number + 1])
            time.sleep(0.001)

    with Proxy(listener.address, trickle) as proxy:
        proxy.active.set()
        accepted, connected = meet(listener, proxy.address)
    assert accepted.hello == HELLO
    accepted.close()
    connected.close()


def test_a_recorded_handshake_is_worth_nothing(listener):
    """Who sends again what an honest peer has sent is refused: the listener's number is new each time."""
    recorded = []

    def record(data, out):
        recorded.append(data)
        out.sendall(data)

    with Proxy(listener.address, record) as proxy:
        proxy.active.set()
        accepted, connected = meet(listener, proxy.address)
        accepted.close()
        connected.close()
    with stranger(listener, *recorded) as sock:
        assert listener.accept(0.2) is None
        assert listener.refused == 1
        assert is_closed(sock)


def shake(listening, connecting, change=lambda direction, data: data):
    """Let both sides of a handshake talk, without sockets; `change` may alter what is said."""
    to_connecting, to_listening = change("listening", listening.first_words), b""
    for _ in range(10):
        while not connecting.finished and len(to_connecting) >= connecting.needs:
            data, to_connecting = to_connecting[: connecting.needs], to_connecting[connecting.needs :]
            to_listening += change("connecting", connecting.take(data))
        while not listening.finished and len(to_listening) >= listening.needs:
            data, to_listening = to_listening[: listening.needs], to_listening[listening.needs :]
            to_connecting += change("listening", listening.take(data))
    return listening.finished, connecting.finished


def sides(hello=b'{"rank":1}'):
    """Return both sides of a handshake."""
    proof = handshake.keyed(KEY)
    return handshake.Listening(proof), handshake.Connecting(proof, hello, "somewhere")


FAILURES = (handshake.Refused, AuthenticationError, EnvironmentMismatch, TransportError)


@pytest.mark.parametrize("direction", ["listening", "connecting"])
def test_every_flipped_bit_of_a_handshake_is_found(direction):
    """Whichever bit is changed on the way, the side that hears it never accepts the other."""
    assert shake(*sides()) == (True, True)
    said = bytearray()

    def record(towards, data):
        if towards == direction:
            said.extend(data)
        return data

    shake(*sides(), record)
    assert len(said) == {"listening": 40 + 33, "connecting": 42 + 10 + 32}[direction]
    for bit in range(8 * len(said)):
        begun = 0

        def flip(towards, data, bit=bit):
            nonlocal begun
            if towards != direction:
                return data
            changed = bytearray(data)
            if 0 <= bit // 8 - begun < len(data):
                changed[bit // 8 - begun] ^= 1 << bit % 8
            begun += len(data)
            return bytes(changed)

        try:
            heard = shake(*sides(), flip)
        except FAILURES:
            continue
        # A length that was made larger: the listener waits for the rest, and gives up after 5 s.
        assert heard == (False, False), f"bit {bit}"


def test_a_proof_cannot_be_sent_back_to_its_maker():
    """A listener that does not know the key cannot use the other's own proof as its answer."""
    _, connecting = sides()
    nonce = os.urandom(32)
    opening = connecting.take(b"distbp" + (1).to_bytes(2, "big") + nonce)
    with pytest.raises(AuthenticationError, match="its proof is wrong"):
        connecting.take(b"\x01" + opening[-32:])


def test_a_listener_with_another_key_is_found_out():
    """A listener that accepts everybody must still prove that it knows the key."""
    listening, connecting = sides()
    connecting.take(listening.first_words)
    with pytest.raises(AuthenticationError, match="its proof is wrong"):
        connecting.take(b"\x01" + os.urandom(32))


def test_another_release_is_named(listener):
    """Another protocol version is told apart from another key, on both sides."""
    with socket.create_server((HERE, 0)) as other:

        def greet():
            sock, _ = other.accept()
            with sock:
                sock.sendall(b"distbp" + (2).to_bytes(2, "big") + bytes(32))
                return is_closed(sock)

        _, raised = at_once(
            greet, lambda: outcome(lambda: wire.connect(other.getsockname(), KEY, HELLO, PATIENCE_S))
        )
    assert isinstance(raised, EnvironmentMismatch)
    assert raised.exit_code == 78
    assert "version 1" in str(raised)
    assert "got 2" in str(raised)
    with stranger(listener, b"distbp" + (2).to_bytes(2, "big") + bytes(34)) as sock:
        assert listener.accept(0.2) is None
        assert listener.refused == 1
        assert is_closed(sock)


def test_another_program_is_named():
    """A port that belongs to another program is named, with what it said."""
    with socket.create_server((HERE, 0)) as other:

        def greet():
            sock, _ = other.accept()
            with sock:
                sock.sendall(b"SSH-2.0-OpenSSH_9.9 and so on, for more than forty bytes\r\n")
                return is_closed(sock)

        _, raised = at_once(
            greet, lambda: outcome(lambda: wire.connect(other.getsockname(), KEY, HELLO, PATIENCE_S))
        )
    assert isinstance(raised, TransportError)
    assert "SSH-2." in str(raised)
    assert f"{HERE}:" in str(raised)


# ----- limits


def test_hello_may_have_4096_bytes(listener):
    """A hello at the limit arrives; one byte more is refused before anything is sent."""
    at_limit = {"x": "y" * (4096 - len('{"x":""}'))}
    accepted, connected = meet(listener, hello=at_limit)
    assert accepted.hello == at_limit
    accepted.close()
    connected.close()
    with pytest.raises(ValueError, match="4096"):
        wire.connect(listener.address, KEY, {"x": at_limit["x"] + "y"}, PATIENCE_S)


def test_a_longer_hello_is_dropped_before_it_is_read(listener):
    """A listener refuses the announcement of more than 4096 bytes, and waits for what is announced below."""
    header = b"distbp" + (1).to_bytes(2, "big") + bytes(32)
    with stranger(listener, header + (4096).to_bytes(2, "big")):
        assert listener.accept(0.2) is None
        assert listener.refused == 0
    with stranger(listener, header + (4097).to_bytes(2, "big")) as sock:
        assert listener.accept(0.2) is None
        assert listener.refused == 1
        assert is_closed(sock)


def test_what_is_no_json_object_is_refused_though_the_key_is_right(listener):
    """A hello with a proof is still parsed with care."""
    for hello in (b"[1]", b"{", b"\xff\xfe", b'{"a":' + b"[" * 16 + b"]" * 16 + b"}"):
        listening, connecting = sides(hello)
        with pytest.raises(handshake.Refused, match="JSON"):
            shake(listening, connecting)
