"""How the members of a lane find each other: in any order, in the same attempt, or not at all."""

from __future__ import annotations

import gc
import os
import random
import threading
import time

import numpy as np
import pytest

from distbp.errors import AuthenticationError, TransportError
from distbp.transports import wire
from distbp.transports.lane import meet
from distbp.transports.tcp import open_lane
from tests.transports.lanes import HERE, KEY, LABEL, PATIENCE_S, at_once, outcome


@pytest.fixture
def listeners():
    """Listeners of four members, named a, b, c and d."""
    four = [wire.Listener(HERE, KEY) for _ in range(4)]
    yield four
    for listener in four:
        listener.close()


def join(listeners, rank, label=LABEL, deadline_s=PATIENCE_S, key=KEY, size=None, check=lambda: None):
    """Open the lane as member `rank`."""
    used = listeners[:size]
    return open_lane(
        used[rank], [listener.address for listener in used], rank, key,
        label=label, names="abcd"[: len(used)], deadline_s=deadline_s, check=check,
    )  # fmt: skip


def works(*members):
    """Return whether members of a lane can exchange something; close them."""

    def gather(member):
        receive = [np.zeros(1, np.int64) for _ in members]
        member.allgather(np.array([member.rank]), receive)
        return [int(array[0]) for array in receive]

    answers = at_once(*(lambda member=member: gather(member) for member in members))
    for member in members:
        member.close()
    return answers == [list(range(len(members)))] * len(members)


@pytest.mark.parametrize("seed", range(5))
def test_members_may_come_in_any_order(listeners, seed):
    """Whoever comes first waits for the others; nobody waits for somebody who waits for a third."""
    rng = random.Random(seed)
    delays = [rng.choice([0.0, 0.05, 0.2]) for _ in range(4)]

    def come(rank):
        time.sleep(delays[rank])
        return join(listeners, rank)

    assert works(*at_once(*(lambda rank=rank: come(rank) for rank in range(4))))


def test_attempt_after_attempt_on_the_same_listeners(listeners):
    """A listener serves many attempts, one after the other."""
    for attempt in range(10):
        label = {"lane": 0, "attempt": attempt}
        members = at_once(*(lambda rank=rank, label=label: join(listeners, rank, label) for rank in range(4)))
        assert works(*members)
    assert [listener.refused for listener in listeners] == [0] * 4


def test_the_missing_are_named(listeners):
    """Each member that came says which ones did not, and no others, though some waited for them too (A17)."""
    came = (1, 2)
    errors = at_once(
        *(lambda rank=rank: outcome(lambda: join(listeners, rank, deadline_s=0.6)) for rank in came)
    )
    for rank, error in zip(came, errors, strict=True):
        assert type(error) is TransportError
        text = str(error)
        assert f"host {'abcd'[rank]} waited 0.6 s" in text
        assert "host a (" in text
        assert "host d (" in text
        assert text.count("host b") + text.count("host c") == 1  # Only as the one who speaks.
        assert "'attempt': 1" in text


def test_a_member_of_an_older_attempt_is_turned_away(listeners):
    """Connections of another attempt are not used, and those who made them are told at their own deadline."""
    old = {"lane": 0, "attempt": 0}

    def stale():
        return outcome(lambda: join(listeners, 1, old, deadline_s=1.0, size=2))

    def fresh():
        return outcome(lambda: join(listeners, 0, LABEL, deadline_s=1.0, size=2))

    left_behind, waited = at_once(stale, fresh)
    assert "not in this attempt" in str(left_behind)
    assert "turned away" in str(waited)


def test_who_is_ahead_waits_for_who_is_behind(listeners):
    """A member that is already in the next attempt comes again until the others have left the old one."""
    parked = threading.Event()

    class Parked(Exception):
        pass

    def check():
        if parked.is_set():
            raise Parked

    def behind(rank):
        with pytest.raises(Parked):
            join(listeners, rank, {"lane": 0, "attempt": 0}, check=check)
        return join(listeners, rank)

    def ahead():
        time.sleep(0.1)
        threading.Timer(0.3, parked.set).start()
        return join(listeners, 3)

    assert works(*at_once(*(lambda rank=rank: behind(rank) for rank in range(3)), ahead))


def test_a_member_that_comes_twice_is_taken_at_its_second_word(listeners):
    """A member that was started again, with the same label, takes the place of its dead predecessor."""

    three = listeners[:3]

    def third():
        time.sleep(0.3)
        return join(three, 2)

    def second():
        hello = {"role": "lane", "label": LABEL, "rank": 1, "size": 3}
        first = wire.connect(listeners[0].address, KEY, hello, PATIENCE_S)
        assert first.receive(PATIENCE_S) == {"lane": "welcome"}
        first.close()
        return join(three, 1)

    assert works(*at_once(lambda: join(three, 0), second, third))


@pytest.mark.parametrize(
    "hello",
    [
        {},
        {"role": "lane", "label": LABEL, "rank": 0, "size": 2},
        {"role": "lane", "label": LABEL, "rank": 2, "size": 2},
        {"role": "lane", "label": LABEL, "rank": True, "size": 2},
        {"role": "lane", "label": LABEL, "rank": "1", "size": 2},
        {"role": "lane", "label": LABEL, "rank": 1, "size": 3},
        {"role": "lane", "label": {"lane": 1, "attempt": 1}, "rank": 1, "size": 2},
        {"role": "lane", "label": None, "rank": 1, "size": 2},
        {"role": "worker", "rank": 1},
    ],
    ids=str,
)
def test_who_does_not_belong_is_turned_away(listeners, hello):
    """Another rank, size, lane or role has no place here, key or not; the right one still gets its own."""

    def intrude_then_join():
        intruder = wire.connect(listeners[0].address, KEY, hello, PATIENCE_S)
        with pytest.raises(EOFError):
            intruder.receive(PATIENCE_S)
        return join(listeners, 1, size=2)

    assert works(*at_once(lambda: join(listeners, 0, size=2), intrude_then_join))


def test_labels_are_compared_as_they_travel(listeners):
    """A label with a tuple in it equals itself, though JSON knows only lists."""
    label = {"bucket": (1, 2), "attempt": 7}
    assert works(*at_once(*(lambda rank=rank: join(listeners, rank, label, size=2) for rank in range(2))))


def test_a_wrong_key_ends_the_meeting(listeners):
    """Who has another key is told so at once, and not that somebody is missing."""

    def host():
        return outcome(lambda: join(listeners, 0, deadline_s=1.0, size=2))

    waited, refused = at_once(host, lambda: outcome(lambda: join(listeners, 1, key=bytes(32), size=2)))
    assert isinstance(refused, AuthenticationError)
    assert "host b (did not connect)" in str(waited)
    assert listeners[0].refused == 1


def test_check_is_called_and_what_it_raises_leaves_nothing_open(listeners):
    """`check` is called at least every 0.1 s; when it raises, connections that were made are closed."""
    looks = []

    def check():
        looks.append(time.monotonic())
        if len(looks) == 20:
            raise KeyError("enough")

    gc.collect()  # Errors of earlier tests may keep sockets alive.
    before = len(os.listdir("/proc/self/fd"))
    errors = at_once(
        lambda: outcome(lambda: join(listeners, 0, check=check, size=3)),
        lambda: outcome(lambda: join(listeners, 1, deadline_s=1.0, size=3)),
    )
    assert isinstance(errors[0], KeyError)
    assert isinstance(errors[1], TransportError)
    assert looks[-1] - looks[0] < 0.1 * len(looks) + 5.0
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_lane_of_one_needs_nobody(listeners):
    """A member that is alone has a lane at once."""
    assert meet(listeners[0], [listeners[0].address], 0, KEY, label=LABEL, names="a", deadline_s=0.0) == {}
    assert works(join(listeners, 0, size=1))
