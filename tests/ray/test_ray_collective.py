"""The collective backend under real Ray actors, on one node, on pretended nodes, and on two emulated ones.

A *layout* lists the ranks of each node.  On one machine actors pretend to be on several nodes by not looking
for each other's memory, as in two containers: everything else, connections included, is real.
"""

from __future__ import annotations

import subprocess

import pytest

from tests.ray.conftest import ray_prefix

pytestmark = [pytest.mark.ray, pytest.mark.timeout(150)]

SMALL_SHAPES = [[], [0], [1], [7], [3, 0, 2], [5, 13], [1000]]
LARGE_SHAPES = [[16_385], [147_457], [600_011], [3, 100_003]]
DTYPES = ["f4", "f8", "f2", "i1", "u2", "i4", "i8", "?", "c8"]
MEMORY = ["plain", "strided", "reversed", "fortran"]

LAYOUTS = {
    "1": [[0]],
    "2": [[0, 1]],
    "3": [[0, 1, 2]],
    "4": [[0, 1, 2, 3]],
    "1+1": [[0], [1]],
    "1+1+1": [[0], [1], [2]],
    "2+1": [[0, 1], [2]],
    "2+2": [[0, 1], [2, 3]],
    "1+3": [[0], [1, 2, 3]],
    "interleaved": [[0, 2], [1, 3]],
    "split": [[0, 3], [1, 2]],
}
ACROSS = [name for name, layout in LAYOUTS.items() if len(layout) > 1]
NEIGHBOURS = ("1", "4", "1+1+1", "1+3", "split")
"""Layouts whose large arrays take the ways that those of other layouts take."""


@pytest.fixture(scope="module")
def found():
    """What ranks found in each layout, for comparison between layouts."""
    return {}


def check(results):
    """Fail unless every rank found every result equal to NumPy's; return the number of comparisons."""
    assert [wrong for _, wrong, _ in results] == [[]] * len(results)
    return sum(count for count, _, _ in results)


# ----- the right numbers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_operation_on_small_arrays(driver, found, layout):
    """Every operation gives NumPy's bits for all types, odd shapes, on 1 to 4 ranks and 1 to 3 nodes."""
    memory = MEMORY if layout in ("2", "1+1") else ["plain"]
    results = driver.do("matrix", layout=LAYOUTS[layout], dtypes=DTYPES, shapes=SMALL_SHAPES, layouts=memory)
    assert check(results) > 500
    if memory == ["plain"]:
        found[layout] = [digest for _, _, digest in results]


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.slow) if name in NEIGHBOURS else name for name in LAYOUTS],
)
def test_every_operation_on_large_arrays(driver, found, layout):
    """The same for arrays that pass through memory in several pieces, and over several lanes."""
    dtypes = ["f4", "i1"] if layout in ("2", "2+2") else ["f4"]
    shapes = LARGE_SHAPES if layout in ("2", "3", "1+1", "2+1") else LARGE_SHAPES[1:3]
    results = driver.do("matrix", layout=LAYOUTS[layout], dtypes=dtypes, shapes=shapes, layouts=["plain"])
    assert check(results) > 20


def test_nodes_do_not_change_the_bits(driver, found):
    """Four ranks give the same bits on one node, on two, and whichever of them share one."""
    names = [name for name, layout in LAYOUTS.items() if sum(map(len, layout)) == 4]
    for name in names:
        if name not in found:
            results = driver.do(
                "matrix", layout=LAYOUTS[name], dtypes=DTYPES, shapes=SMALL_SHAPES, layouts=["plain"]
            )
            found[name] = [digest for _, _, digest in results]
    assert all(found[name] == found[names[0]] for name in names)


@pytest.mark.parametrize("layout", ["3", "2+1", "interleaved"])
@pytest.mark.parametrize("size", [100, 300_000])
def test_repetitions_give_the_same_bits(driver, layout, size):
    """The same sum of floats gives the same bits every time, on every rank."""
    hashes = driver.do("repetitions", layout=LAYOUTS[layout], times=30, size=size)
    assert len({each for of_rank in hashes for each in of_rank}) == 1


@pytest.mark.parametrize("layout", ["3", "2+1"])
def test_barriers_are_counted_anew(driver, layout):
    """A group that has used up its counters goes on with the same sums."""
    results = driver.do("counting_anew", layout=LAYOUTS[layout])
    assert all(of_rank == results[0] and len(of_rank) == 2 for of_rank in results)


@pytest.mark.parametrize("layout", ["2", "1+1"])
def test_two_ranks_send_to_each_other_at_once(driver, layout):
    """A rank can send in one thread and receive in another, from the same peer."""
    assert driver.do("both_directions", layout=LAYOUTS[layout], size=700_000) == [True, True]


def test_two_groups_at_once(driver):
    """One actor is in two groups with different ranks; both names can be used again for other groups."""
    results = driver.do("two_groups")
    assert [len(ranks) for ranks in results] == [3, 3, 3, 2, 2, 2]
    for ranks in results:
        assert len({tuple(hashes) for hashes in ranks}) == 1


# ----- nothing needed, nothing left


def test_neither_torch_nor_pyarrow_is_imported(driver):
    """Actors that have used every operation have loaded neither torch nor pyarrow."""
    driver.do("matrix", layout=LAYOUTS["2"], dtypes=["f4"], shapes=[[3]], layouts=["plain"])
    assert driver.do("imported") == [[], []]


def test_registering_needs_ray():
    """Without Ray, `register` says what to install, and importing the module works."""
    prefix = ray_prefix()
    program = (
        "import sys; sys.modules['ray'] = None\n"
        "from distbp.backends.ray_collective import register\n"
        "from distbp.errors import EnvironmentMismatch\n"
        "try: register()\n"
        "except EnvironmentMismatch as error: print(error)\n"
    )
    ended = subprocess.run(
        [prefix / "bin" / "python", "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert "pip install -U 'ray[default]>=2.54'" in ended.stdout


@pytest.mark.parametrize("layout", ["3", "1+1", "2+1"])
def test_a_destroyed_group_leaves_nothing(driver, layout):
    """Destroying gives back memory, descriptors, sockets and notes; /dev/shm was not used."""
    before, during, after, notes = driver.do("left_over", layout=LAYOUTS[layout])
    for traces, keys in zip(during[::2], during[1::2], strict=True):
        assert keys == []
        for held, named, _ in traces:
            assert named == []
            assert held or layout != "3", "ranks of a node map its memory"
    assert [(held, named) for held, named, _ in after] == [([], []) for _ in before]
    assert [count for *_, count in after] <= [count for *_, count in before]
    assert notes == []


# ----- what goes wrong


MISTAKES = {
    "type": ([["allreduce", "f4", 1000], ["allreduce", "i4", 1000]], ["float32", "int32"]),
    "size": ([["allreduce", "f4", 1000], ["allreduce", "f4", 1001]], ["1000", "1001"]),
    "large": ([["allreduce", "f4", 100_000], ["allreduce", "f4", 100_001]], ["100000", "100001"]),
    "small and large": ([["allreduce", "f4", 10], ["allreduce", "f4", 100_000]], ["10", "100000"]),
    "reduction": ([["allreduce", "f4", 9, "SUM"], ["allreduce", "f4", 9, "MAX"]], ["SUM", "MAX"]),
    "operation": ([["allreduce", "f4", 9], ["broadcast", "f4", 9, 0]], ["allreduce", "broadcast"]),
    "root": ([["broadcast", "f4", 9, 0], ["broadcast", "f4", 9, 1]], ["rank 0", "rank 1"]),
    "barrier": ([["barrier"], ["allreduce", "f4", 9]], ["barrier", "allreduce"]),
    "received type": ([["send", "f4", 9, 1], ["recv", "i4", 9, 0]], ["float32", "int32"]),
    "received size": ([["send", "f4", 9, 1], ["recv", "f4", 8, 0]], ["9", "8"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_ranks_in_different_operations_are_told(driver, mistake):
    """Ranks of a node that do not call the same thing both get an error that names both, and no numbers."""
    calls, words = MISTAKES[mistake]
    errors, again = driver.do("differing", layout=LAYOUTS["2"], calls=calls)
    for kind, text, _ in errors:
        assert "ConfigError" in kind, text
        assert all(word in text for word in words), text
    assert all("broken" in text or "destroyed" in text for _, text, _ in again), again


@pytest.mark.parametrize("mistake", MISTAKES)
def test_ranks_of_two_nodes_in_different_operations_are_told(driver, mistake):
    """Between nodes too no rank gets numbers; the transport or the comparison says what differs."""
    calls, _ = MISTAKES[mistake]
    errors, _ = driver.do("differing", layout=LAYOUTS["1+1"], calls=calls)
    sender_may_be_content = mistake.startswith("received")
    for rank, (kind, text, seconds) in enumerate(errors):
        if sender_may_be_content and rank == 0:
            continue
        assert kind is not None, f"rank {rank} was given numbers"
        assert "rank" in text or "expected" in text, text
        assert seconds < 20


def test_what_cannot_be_used_is_refused(driver):
    """What is no usable array is refused with the reason and the cure, and the group can still be used."""
    errors, total = driver.do("refused")
    words = {
        "no array": "tensor.numpy()",
        "two arrays": "one entry",
        "masked": "mask",
        "read-only": "copy",
        "objects": "fixed size",
        "byte order": "byte order",
        "texts": "numpy.add",
        "dates": "numpy.add",
        "another shape": "for rank 0",
        "another type": "for rank 0",
    }
    assert {what for what in words if not (
        "ConfigError" in errors[what] and words[what] in errors[what])} == set(), errors  # fmt: skip
    assert total == [0.0, 1.0, 2.0]


def test_a_missing_rank_is_named(driver):
    """A group whose rank 2 never comes is given up by those who came, who name it; no note is left."""
    errors, notes = driver.do("absent", world=3, ranks=[0, 1], meeting_s=2.0)
    for kind, text, seconds in errors:
        assert "WorkerLost" in kind, text
        assert "rank 2" in text, text
        assert seconds < 20
    assert notes == []


def test_other_group_sizes_are_told(driver):
    """Ranks that name different group sizes both learn it, long before the deadline."""
    errors, notes = driver.do("disagreeing")
    for kind, text, seconds in errors:
        assert "ConfigError" in kind, text
        assert "world_size" in text, text
        assert seconds < 8
    assert notes == []


def test_a_rank_that_dies_in_the_meeting_can_be_replaced(driver):
    """What a killed actor left on the board does not confuse the group that its substitute joins."""
    nodes, sums = driver.do("replaced_while_meeting")
    assert nodes == [[[0, 1, 2]]] * 3
    assert sums[0] == sums[1] == sums[2]
    assert driver.do("notes") == []


@pytest.mark.parametrize(("layout", "victim"), [("3", 1), ("3", 0), ("1+1", 1), ("2+1", 2), ("2+1", 1)])
@pytest.mark.parametrize("size", [1000, 3_000_000])
def test_a_killed_rank_is_named_at_once(driver, layout, victim, size):
    """Every other rank leaves its sum long before the deadline and names the killed one, or its node's."""
    errors, notes = driver.do("killed", layout=LAYOUTS[layout], victim=victim, size=size)
    for kind, text, seconds in errors:
        assert "WorkerLost" in kind or "TransportError" in kind, text
        assert f"rank {victim}" in text or f"ranks 0, {victim}" in text, text
        assert seconds < 5, f"{seconds} s: {text}"
    assert notes == []


@pytest.mark.parametrize("what", ["leaves", "is stopped", "does nothing"])
@pytest.mark.parametrize("layout", ["2", "3", "1+1", "2+1"])
def test_a_rank_that_does_not_come_is_named(driver, layout, what):
    """A rank that left, hangs, or does something else ends the wait of all others, at latest in time."""
    ranks = LAYOUTS[layout]
    last = ranks[-1][-1]
    for kind, text, seconds in driver.do("waiting_for", layout=ranks, what=what):
        assert "WorkerLost" in kind or "TransportError" in kind, text
        assert f"rank {last}" in text, text
        assert seconds < 15


@pytest.mark.parametrize("layout", ["2", "1+1"])
def test_nobody_receives_from_the_dead(driver, layout):
    """A receiver whose sender is killed is told who it was."""
    kind, text, seconds = driver.do("receiving_from_the_dead", layout=LAYOUTS[layout])
    assert "WorkerLost" in kind or "TransportError" in kind, text
    assert "rank 1" in text
    assert seconds < 20


# ----- two nodes


def test_two_nodes_of_ray(two_nodes, driver, found):
    """Two ranks on one Ray node and one on another do every operation, with the bits of other layouts."""
    layout = LAYOUTS["2+1"]
    results = two_nodes.do("matrix", layout=layout, dtypes=DTYPES, shapes=SMALL_SHAPES, layouts=["plain"])
    assert check(results) > 500
    if "2+1" in found:
        assert [digest for _, _, digest in results] == found["2+1"]
    check(two_nodes.do("matrix", layout=layout, dtypes=["f4"], shapes=LARGE_SHAPES, layouts=["plain"]))


def test_every_byte_crosses_once(two_nodes):
    """A sum over two nodes sends the array once from each, though one of them has two ranks."""
    size, times = 1_000_000, 5
    two_nodes.do("repetitions", layout=LAYOUTS["2+1"], times=1, size=size)
    before = [two_nodes.hosts.bytes_sent(host) for host in two_nodes.hosts.hosts]
    two_nodes.do("repetitions", layout=LAYOUTS["2+1"], times=times, size=size)
    for host, sent in zip(two_nodes.hosts.hosts, before, strict=True):
        array_bytes = times * 4 * size
        assert 0.95 * array_bytes < two_nodes.hosts.bytes_sent(host) - sent < 1.2 * array_bytes, host


def test_a_killed_rank_of_another_node_is_named(two_nodes):
    """The ranks of one node leave their sum at once when the actor on the other is killed, and name it."""
    errors, _ = two_nodes.do("killed", layout=LAYOUTS["2+1"], victim=2, size=1000)
    for _, text, seconds in errors:
        assert "rank 2" in text, text
        assert seconds < 8, f"{seconds} s: {text}"
