"""JSON messages over one connection: whole or not at all, within limits, from many threads."""

from __future__ import annotations

import gc
import json
import os
import random
import select
import signal
import socket
import struct
import threading
import time
import zlib
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbp.errors import TransportError
from distbp.transports.connection import MOST_MESSAGE_BYTES, BrokenConnection, Connection
from tests.transports.lanes import (
    PATIENCE_S,
    at_once,
    bare_connection,
    connection_pair,
    outcome,
    reset,
    socket_pair,
)


@pytest.fixture
def pair():
    """Two connections that reach each other."""
    both = connection_pair()
    yield both
    for connection in both:
        connection.close()


@pytest.fixture
def raw():
    """A connection, and the bare socket at its other end."""
    ours, theirs = socket_pair()
    connection = bare_connection(ours)
    yield connection, theirs
    connection.close()
    theirs.close()


def frame(body, length=None, crc=None):
    """Return a frame as the protocol wants it, but for what is given."""
    checked = struct.pack(
        "<II", len(body) if length is None else length, zlib.crc32(body) if crc is None else crc
    )
    return checked + struct.pack("<I", zlib.crc32(checked)) + body


def send_often(connection, message, deadline_s):
    """Send until it fails, but not for ever."""
    for _ in range(100):
        connection.send(message, deadline_s)


def nested(levels):
    """Return JSON text of an object with so many levels, itself included."""
    return '{"a":' + "[" * (levels - 1) + "]" * (levels - 1) + "}"


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=100, deadline=None)
@given(messages=st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=4))
def test_any_json_object_arrives(messages):
    """What one side sends the other receives, in order, whatever it is."""
    left, right = connection_pair()
    for message in messages:
        left.send(message)
    assert [right.receive(PATIENCE_S) for _ in messages] == messages
    left.close()
    right.close()


def test_numbers_that_json_has_not_become_null(pair):
    """NaN and the infinities arrive as null, as the documentation says, and break nothing."""
    pair[0].send({"loss": float("nan"), "limits": [float("inf"), float("-inf")]})
    assert pair[1].receive(PATIENCE_S) == {"loss": None, "limits": [None, None]}


def test_a_message_that_comes_in_pieces_is_kept(raw):
    """What has come of a message before the deadline is not lost; `None` says that there is more to come."""
    connection, theirs = raw
    data = frame(b'{"kind":"job","number":7}')
    for number in range(len(data) - 1):
        theirs.sendall(data[number : number + 1])
        assert connection.receive(0.0) is None
    theirs.sendall(data[-1:])
    assert connection.receive(PATIENCE_S) == {"kind": "job", "number": 7}


def test_nothing_is_read_ahead(pair):
    """`fileno` is readable exactly while there is something to receive, so an event loop may rely on it."""
    left, right = pair
    for number in range(3):
        left.send({"number": number})
    for number in range(3):
        assert select.select([right], [], [], PATIENCE_S)[0]
        assert right.receive(0.0) == {"number": number}
    assert select.select([right], [], [], 0)[0] == []
    assert right.receive(0.0) is None


def test_check_is_called_while_one_waits(pair):
    """`check` is called at least every 0.1 s, and what it raises passes through."""
    looks = []
    assert pair[0].receive(0.5, lambda: looks.append(time.monotonic())) is None
    assert len(looks) >= 5

    def check():
        raise KeyError("enough")

    with pytest.raises(KeyError):
        pair[0].receive(PATIENCE_S, check)
    pair[1].send({"still": "good"})
    assert pair[0].receive(PATIENCE_S) == {"still": "good"}


# ----- the peer


@pytest.mark.parametrize("end", ["close", "reset", "half a message"])
def test_a_peer_that_is_gone_is_the_end(raw, end):
    """Closed, reset, or in the middle of a message: `EOFError`, at once, each time."""
    connection, theirs = raw
    theirs.sendall(frame(b'{"last":"words"}'))
    if end == "half a message":
        theirs.sendall(frame(b'{"a":1}')[:-2])
    assert connection.receive(PATIENCE_S) == {"last": "words"}
    (reset if end == "reset" else socket.socket.close)(theirs)
    for _ in range(2):
        with pytest.raises(EOFError):
            connection.receive(PATIENCE_S)


def test_sending_to_nobody_is_an_error_of_both_kinds(raw):
    """A message to a peer that is gone raises what callers of sockets and callers of transports catch."""
    connection, theirs = raw
    reset(theirs)
    with pytest.raises(BrokenConnection) as raised:
        send_often(connection, {"anybody": "there"}, PATIENCE_S)
    assert isinstance(raised.value, OSError)
    assert isinstance(raised.value, TransportError)
    assert raised.value.exit_code == 69
    assert "127.0.0.1:" in str(raised.value)
    with pytest.raises(BrokenConnection):
        connection.send({"anybody": "there"})


def test_a_peer_that_does_not_read_is_named(raw):
    """A message that is not taken in time makes the connection useless, and says whose peer that is."""
    connection, theirs = raw
    with pytest.raises(BrokenConnection, match=r"for 0\.3 s") as raised:
        send_often(connection, {"x": "y" * 4_000_000}, 0.3)
    assert f"{theirs.getsockname()[0]}:{theirs.getsockname()[1]}" in str(raised.value)
    with pytest.raises(BrokenConnection):
        connection.send({})
    with pytest.raises(BrokenConnection):
        connection.receive(0.0)


def test_the_last_message_arrives_though_we_have_not_read_all(pair):
    """What was sent before `close` is received, even if the sender had messages that it never read."""
    left, right = pair
    for _ in range(20):
        right.send({"unread": "x" * 1000})
    last = {"kind": "left", "text": "x" * 1_000_000}  # More than the peer's buffer takes before it reads.
    left.send(last)
    left.close()
    assert right.receive(PATIENCE_S) == last
    with pytest.raises(EOFError):
        right.receive(PATIENCE_S)


def test_closing_ends_a_wait_of_another_thread(pair):
    """Closing is idempotent, ends a `receive` that waits elsewhere, and frees the descriptor."""
    left, _ = pair
    begun = threading.Event()
    results = []
    waiting = threading.Thread(
        target=lambda: results.append(outcome(lambda: left.receive(PATIENCE_S, begun.set)))
    )
    waiting.start()
    begun.wait()
    left.close()
    left.close()
    waiting.join(PATIENCE_S / 2)
    assert not waiting.is_alive()
    assert isinstance(results[0], EOFError)
    assert left.fileno() == -1
    for use in (lambda: left.receive(0.0), lambda: left.send({})):
        with pytest.raises(BrokenConnection, match="closed on this side"):
            use()


# ----- limits


def test_a_message_may_have_16_mib(pair):
    """A message at the limit arrives; one byte more is refused before anything is sent."""
    left, right = pair
    text = "y" * (MOST_MESSAGE_BYTES - len('{"x":""}'))
    _, received = at_once(lambda: left.send({"x": text}, PATIENCE_S), lambda: right.receive(PATIENCE_S))
    assert received == {"x": text}
    with pytest.raises(ValueError, match=str(MOST_MESSAGE_BYTES)):
        left.send({"x": text + "y"})
    left.send({"still": "good"})
    assert right.receive(PATIENCE_S) == {"still": "good"}


@pytest.mark.parametrize("length", [0, 1, MOST_MESSAGE_BYTES + 1, 2**32 - 1])
def test_a_length_out_of_range_is_refused_before_anything_is_allocated(raw, length):
    """The announcement alone ends the connection: nobody waits for the rest, or makes room for it."""
    connection, theirs = raw
    theirs.sendall(frame(b"", length=length, crc=0))
    with pytest.raises(BrokenConnection, match=f"got {length}"):
        connection.receive(PATIENCE_S)
    assert len(connection._incoming) < 100


def test_a_length_at_the_limit_is_believed(raw):
    """The announcement of 16 MiB, and of the shortest object, is not refused."""
    connection, theirs = raw
    theirs.sendall(frame(b"{}"))
    assert connection.receive(PATIENCE_S) == {}
    theirs.sendall(frame(b"", length=MOST_MESSAGE_BYTES, crc=0))
    assert connection.receive(0.1) is None


def test_json_may_be_16_levels_deep(pair, raw):
    """16 levels arrive; 17 are refused by the sender, and by the receiver of a sender that does not look."""
    pair[0].send(json.loads(nested(16)))
    assert pair[1].receive(PATIENCE_S) == json.loads(nested(16))
    with pytest.raises(ValueError, match="16"):
        pair[0].send(json.loads(nested(17)))
    connection, theirs = raw
    theirs.sendall(frame(nested(16).encode()) + frame(nested(17).encode()))
    assert connection.receive(PATIENCE_S) == json.loads(nested(16))
    with pytest.raises(BrokenConnection, match="16 levels"):
        connection.receive(PATIENCE_S)


@pytest.mark.parametrize(
    "body",
    [
        b"[]",
        b"1x",
        b'"text"',
        b"null",
        b"{} ",
        b'{"a":NaN}',
        b'{"a":\xff}',
        b'{"a":' + b"[" * 1_000_000,
        b"\0\0",
    ],
    ids=["list", "no JSON", "text", "null", "blank", "NaN", "no UTF-8", "very deep", "zeros"],
)
def test_what_is_no_object_is_a_bad_frame(raw, body):
    """Whatever is not one JSON object ends the connection, though its checksum is right."""
    connection, theirs = raw
    at_once(lambda: theirs.sendall(frame(body)), lambda: None)
    if body == b"{} ":
        assert connection.receive(PATIENCE_S) == {}  # White space is part of JSON.
        return
    for _ in range(2):
        with pytest.raises(BrokenConnection):
            connection.receive(PATIENCE_S)


def test_every_flipped_bit_is_found(raw):
    """Whichever bit of a message changes on the way, the message is refused at once, in header and body."""
    body = b'{"kind":"parked","attempt":3,"rank":1}'
    data = frame(body)
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        ours, theirs = socket_pair()
        with theirs:
            connection = bare_connection(ours)
            theirs.sendall(changed)
            with pytest.raises(BrokenConnection, match="damaged"):
                connection.receive(PATIENCE_S)
            connection.close()


def test_random_bytes_are_never_a_message():
    """Noise ends a connection, or is waited for; it is never received."""
    rng = random.Random(20250101)
    for _ in range(300):
        ours, theirs = socket_pair()
        with theirs:
            connection = bare_connection(ours)
            theirs.sendall(rng.randbytes(rng.randrange(1, 200)))
            assert isinstance(outcome(partial(connection.receive, 0.0)), BrokenConnection | None)
            connection.close()


# ----- many senders


def test_messages_of_many_threads_stay_whole(pair):
    """Threads that send at the same time never mix their messages, large ones included."""
    left, right = pair
    num_threads, num_messages = 8, 12

    def send(thread):
        for number in range(num_messages):
            left.send({"thread": thread, "number": number, "text": "x" * (number * 40_000)}, PATIENCE_S)

    def receive():
        return [right.receive(PATIENCE_S) for _ in range(num_threads * num_messages)]

    messages, *_ = at_once(receive, *(lambda thread=thread: send(thread) for thread in range(num_threads)))
    for thread in range(num_threads):
        mine = [message for message in messages if message["thread"] == thread]
        assert [message["number"] for message in mine] == list(range(num_messages))
        assert all(len(message["text"]) == message["number"] * 40_000 for message in mine)


def test_a_signal_handler_may_send(pair):
    """A handler that interrupts a `send` of its own thread sends too: nothing is lost, mixed, or stuck."""
    left, right = pair
    assert threading.current_thread() is threading.main_thread()
    main, num_signals = threading.get_ident(), 200
    handled = []

    def handle(number, frame):
        left.send({"kind": "signal", "number": len(handled)}, PATIENCE_S)
        handled.append(number)

    def disturb():
        for number in range(num_signals):
            while len(handled) < number:
                time.sleep(0.0001)
            signal.pthread_kill(main, signal.SIGUSR2)
            time.sleep(0.0005)

    def receive():
        while (message := right.receive(PATIENCE_S)) != {"kind": "end"}:
            assert message is not None
            received.append(message)

    received = []
    before = signal.signal(signal.SIGUSR2, handle)
    threads = [threading.Thread(target=disturb), threading.Thread(target=receive)]
    try:
        for thread in threads:
            thread.start()
        sent = 0
        while threads[0].is_alive():
            left.send({"kind": "main", "number": sent, "text": "x" * 300_000}, PATIENCE_S)
            sent += 1
        threads[0].join()
        while len(handled) < num_signals:
            time.sleep(0.001)
        left.send({"kind": "end"})
        threads[1].join(PATIENCE_S)
        assert not threads[1].is_alive()
    finally:
        signal.signal(signal.SIGUSR2, before)
    numbers = {kind: [m["number"] for m in received if m["kind"] == kind] for kind in ("main", "signal")}
    assert numbers == {"main": list(range(sent)), "signal": list(range(num_signals))}


# ----- from messages to something else


def test_the_socket_can_be_handed_over(pair):
    """`detach` gives the socket away in the middle of the stream; the connection is then closed."""
    left, right = pair
    right.send({"one": 1})
    right.send({"two": 2})
    assert left.receive(PATIENCE_S) == {"one": 1}
    with left.detach() as sock:
        assert left.fileno() == -1
        left.close()
        with pytest.raises(BrokenConnection):
            left.receive(0.0)
        again = Connection(sock, {}, ("127.0.0.1", 0))
        assert again.receive(PATIENCE_S) == {"two": 2}


def test_nothing_is_left_open():
    """Connections that are closed give every descriptor back."""
    gc.collect()  # Errors of earlier tests may keep sockets alive.
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        for connection in connection_pair():
            connection.close()
    assert len(os.listdir("/proc/self/fd")) == before
