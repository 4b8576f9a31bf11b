"""What can happen to the connections of a lane: damage, delay, ends of all kinds (A11).

What never happens: wrong data, a hang, a living host that is given up.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest

from distbp.errors import TransportError
from distbp.transports import wire
from distbp.transports.base import TransportAborted
from distbp.transports.tcp import open_lane
from tests.transports.lanes import (
    HERE,
    KEY,
    LABEL,
    PATIENCE_S,
    Proxy,
    at_once,
    bare_transport,
    open_lanes,
    outcome,
    reset,
    socket_pair,
)

FRAME_BYTES = 20 + 4
"""What a frame costs besides its bytes."""


def swap(transport, count=4):
    """Exchange `count` numbers with every host; return what came."""
    receive = [np.zeros(count, np.float32) for _ in range(transport.size)]
    transport.alltoall([np.full(count, transport.rank, np.float32)] * transport.size, receive)
    return receive


# ----- damage


def one_frame(data, flip=None):
    """Send a broadcast of `data` through the hands of this function, which flips one bit on the way.

    Returns the length of the frame, and what the receiver has at the end: its array, or an error.
    """
    (near, caught), (thrown, far) = socket_pair(), socket_pair()
    sender, receiver = bare_transport(near, 0), bare_transport(far, 1)
    with caught, thrown:
        sender.broadcast(data, 0)
        frame = bytearray()
        while len(frame) < FRAME_BYTES + data.nbytes:
            frame += caught.recv(1 << 16)
        if flip is not None:
            bit = flip(8 * len(frame))
            frame[bit // 8] ^= 1 << bit % 8
        thrown.sendall(frame)
        array = np.zeros_like(data)
        result = outcome(lambda: receiver.broadcast(array, 0))
        sender.close()
        receiver.close()
    return len(frame), array if result is None else result


@pytest.mark.slow
@pytest.mark.timeout(600)  # 20,000 connections, on a machine that may be busy.
def test_one_flipped_bit_in_each_of_10000_frames_is_found():
    """Every one of 10,000 frames with one wrong bit, anywhere in it, is refused, at once (A11)."""
    seed = int.from_bytes(os.urandom(4))
    print(f"seed {seed}")
    rng = random.Random(seed)
    found = 0
    for number in range(10_000):
        data = np.frombuffer(rng.randbytes(4 * rng.randrange(1, 65)), np.float32)
        _, result = one_frame(data, rng.randrange)
        assert isinstance(result, TransportError), f"seed {seed}, frame {number}"
        assert "host 0 sent what does not belong here" in str(result)
        found += 1
        if number % 100 == 0:
            assert one_frame(data)[1].tobytes() == data.tobytes()  # The way itself is good.
    assert found == 10_000


def test_every_bit_of_a_frame_counts():
    """There is no bit of a small frame, header and checksum included, whose change goes unnoticed."""
    data = np.array([1.5, -2.5], np.float32)
    length, _ = one_frame(data)
    for bit in range(8 * length):
        assert isinstance(one_frame(data, lambda bits, bit=bit: bit)[1], TransportError), f"bit {bit}"


@contextmanager
def lane_through(forward):
    """Two members a and b; what b says to a goes through `forward`, once they have met."""
    listeners = [wire.Listener(HERE, KEY) for _ in range(2)]
    with Proxy(listeners[0].address, forward) as proxy:
        addresses = [proxy.address, listeners[1].address]

        def join(rank):
            return open_lane(
                listeners[rank], addresses, rank, KEY, label=LABEL, names="ab", deadline_s=PATIENCE_S
            )

        members = at_once(lambda: join(0), lambda: join(1))
        proxy.active.set()
        try:
            yield members
        finally:
            for thing in (*members, *listeners):
                thing.close()


def end(data, out):
    """Pass on the first half and close the connection."""
    out.sendall(data[: len(data) // 2])
    out.close()


def cut_off(data, out):
    """Pass on the first half and forget the connection."""
    out.sendall(data[: len(data) // 2])
    reset(out)


def flip(data, out):
    """Change one bit in the middle."""
    out.sendall(data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :])


def lose(data, out):
    """Leave out one byte."""
    out.sendall(data[: len(data) // 2] + data[len(data) // 2 + 1 :])


def repeat(data, out):
    """Say everything twice."""
    out.sendall(data + data)


@pytest.mark.parametrize("fault", [end, cut_off, flip, lose, repeat])
def test_a_fault_between_two_hosts_is_named_and_applied_nowhere(fault):
    """Truncated, reset, changed, lost, repeated: the operation and the host are named, at once."""

    def work(member):
        try:
            for number in range(100):
                received = swap(member, 1000 + number)
                assert np.all(received[1 - member.rank] == 1 - member.rank)
        except TransportError as error:
            member.abort()
            member.close()  # So the other one sees its peer end, as when a process has ended.
            return str(error)
        return None

    with lane_through(fault) as members:
        said = at_once(lambda: work(members[0]), lambda: work(members[1]))
    assert "alltoall on host a, operation" in said[0]
    assert "host b" in said[0]
    assert "alltoall on host b, operation" in said[1]
    assert "host a" in said[1]
    assert "waited" not in said[0] + said[1]


def test_a_half_open_connection_ends_at_the_deadline():
    """A peer whose words are swallowed on the way is waited for until the deadline, and named."""
    with lane_through(lambda data, out: None) as members:
        members[0].deadline_s = 0.5
        answers = at_once(*(lambda member=member: outcome(member.barrier) for member in members))
    assert "waited 0.5 s for host b" in str(answers[0])
    assert answers[1] is None  # It had the word of a, and could not know.


def delay(data, out):
    """Pass on everything a little later."""
    time.sleep(0.02)
    out.sendall(data)


def trickle(data, out):
    """Pass on byte by byte."""
    for number in range(len(data)):
        out.sendall(data[number : number + 1])


@pytest.mark.parametrize("slowness", [delay, trickle])
def test_slowness_changes_nothing(slowness):
    """Bytes that come late, or one by one, are as good as any."""

    def work(member):
        for number in range(10):
            received = swap(member, 10 * number)
            assert np.all(received[1 - member.rank] == 1 - member.rank)
            member.barrier()

    with lane_through(slowness) as members:
        at_once(*(lambda member=member: work(member) for member in members))


# ----- members that do not do the same


MISTAKES = {
    "another operation": (lambda t: t.barrier(), lambda t: swap(t)),
    "another size": (lambda t: swap(t, 4), lambda t: swap(t, 5)),
    "one behind": (lambda t: t.barrier(), lambda t: [t.allgather(np.ones(0), [np.ones(0)] * 2), t.barrier()]),
    "empty for one": (lambda t: [swap(t, 0), t.barrier()], lambda t: [swap(t, 4), t.barrier()]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_members_out_of_step_are_told(lane, mistake):
    """Members that call different things learn what was expected and what came; no data are mixed up."""
    answers = at_once(
        *(
            lambda call=call, member=member: outcome(lambda: call(member))
            for call, member in zip(MISTAKES[mistake], lane, strict=True)
        )
    )
    texts = [str(answer) for answer in answers if isinstance(answer, TransportError)]
    assert any("expected" in text and "got" in text and "does not belong here" in text for text in texts)


def test_after_an_error_the_transport_is_useless(lane):
    """Nothing is sent or received any more after a failure: the connection is somewhere inside a frame."""
    lane[0].deadline_s = 0.05
    with pytest.raises(TransportError, match="waited"):
        lane[0].barrier()
    with pytest.raises(TransportError, match="earlier operation failed"):
        lane[0].barrier()
    assert not isinstance(outcome(lane[0].barrier), TransportAborted)


# ----- ends


def test_a_peer_that_ends_is_named_at_once():
    """Who waits for two hosts, of which one ends, hears of it while the other one is still awaited."""
    members = open_lanes(3)
    waiting = threading.Event()
    members[0]._check = waiting.set

    def end_later():
        waiting.wait(PATIENCE_S)
        members[2].close()

    said, _ = at_once(lambda: outcome(members[0].barrier), end_later)
    assert "barrier on host 0, operation 1: " in str(said)
    assert "host 2" in str(said)
    assert "host 1" not in str(said)
    for member in members:
        member.close()


def test_a_peer_that_has_done_its_part_may_end():
    """A host that has all it needs and leaves does not disturb an operation that no longer needs it."""
    members = open_lanes(3)
    array = np.random.default_rng(0).integers(0, 256, 30_000_000, np.uint8)
    copies = [array, np.zeros_like(array), np.zeros_like(array)]
    first_done = threading.Event()

    def receive_and_leave():
        members[1].broadcast(copies[1], 0)
        members[1].close()
        first_done.set()

    def receive_late():
        first_done.wait(PATIENCE_S)
        members[2].broadcast(copies[2], 0)

    at_once(lambda: members[0].broadcast(array, 0), receive_and_leave, receive_late)
    assert np.array_equal(copies[1], array)
    assert np.array_equal(copies[2], array)
    for member in members:
        member.close()


def test_abort_in_the_middle_of_a_large_transfer(lane):
    """A transfer that is under way ends as well, with `TransportAborted`."""
    begun = threading.Event()
    lane[0]._check = begun.set
    big = np.zeros(50_000_000, np.uint8)

    def abort_later():
        begun.wait(PATIENCE_S)
        lane[0].abort()

    said, _ = at_once(lambda: outcome(lambda: lane[0].broadcast(big, 0)), abort_later)
    assert isinstance(said, TransportAborted)


def test_close_ends_a_wait_of_another_thread_and_frees_everything():
    """Closing while another thread waits ends that wait; afterwards no descriptor is left, however often."""
    gc.collect()  # Errors of earlier tests may keep sockets alive.
    before = len(os.listdir("/proc/self/fd"))
    members = open_lanes(3)
    waiting = threading.Event()
    members[0]._check = waiting.set

    def close_later():
        waiting.wait(PATIENCE_S)
        members[0].close()
        members[0].close()

    said, _ = at_once(lambda: outcome(members[0].barrier), close_later)
    assert isinstance(said, TransportAborted)
    for member in members:
        member.close()
        member.abort()
        with pytest.raises(TransportAborted):
            member.barrier()
    assert len(os.listdir("/proc/self/fd")) == before


def test_check_is_called_and_may_end_a_wait():
    """`check` is called at least every 0.1 s while one waits; what it raises passes through."""
    looks = []

    class Parked(Exception):
        pass

    def check():
        looks.append(time.monotonic())
        if len(looks) == 10:
            raise Parked

    (near, far) = socket_pair()
    member = bare_transport(near, 0)
    member._check = check
    with far, pytest.raises(Parked):
        member.barrier()
    assert looks[-1] - looks[0] < 0.1 * len(looks) + 5.0
    member.close()


def test_deadlines_may_change(lane):
    """The deadline that counts is the one at the beginning of the operation."""
    lane[0].deadline_s = lane[1].deadline_s = 0.01
    at_once(
        lambda: setattr(lane[0], "deadline_s", PATIENCE_S), lambda: setattr(lane[1], "deadline_s", PATIENCE_S)
    )

    def late():
        time.sleep(0.2)
        lane[1].barrier()

    assert at_once(lambda: outcome(lane[0].barrier), late) == [None, None]


@pytest.mark.slow
def test_a_host_that_is_busy_for_long_is_not_given_up(lane):
    """A host that reads nothing for 13 s, with every buffer full, is alive, and is waited for."""
    array = np.random.default_rng(1).integers(0, 256, 40_000_000, np.uint8)
    copy = np.zeros_like(array)

    def receive_late():
        time.sleep(13.0)
        lane[1].broadcast(copy, 0)

    at_once(lambda: lane[0].broadcast(array, 0), receive_late)
    assert np.array_equal(copy, array)
