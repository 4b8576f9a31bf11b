"""`distbp/arena.py` and `distbp/barrier.py` with real processes on real shared memory."""

from __future__ import annotations

import os
import random
import select
import signal
import struct
import threading
import traceback

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbp.arena import EMPTY, Arena, ArenaLayout, Parked
from distbp.barrier import FIRST_LINE_WORD, LINE_WORDS
from distbp.errors import EnvironmentMismatch, WorkerLost

PATIENCE_S = 60.0
"""No test waits this long; it only keeps a broken barrier from hanging the suite."""

MESSAGE = struct.Struct("=iii")
PARKED, RELEASED, NOTE = range(3)


def layout_for(workers, size=1000):
    """Return a small layout; `sums` has room for one number of each worker."""
    return ArenaLayout(
        size=size,
        vectors=("parameters", "momentum"),
        blocks=(1,) * workers,
        sums=max(workers, 1),
        evaluation_rows=2,
        tail=8,
        scalars=8,
    )


class Crew:
    """Real processes that share the arena of this one, which is its keeper, and a pipe to report through."""

    def __init__(self, workers):
        self.layout = layout_for(workers)
        self.keeper = Arena.create(self.layout)
        self.read_end, self.write_end = os.pipe()
        self.pids = {}

    def start(self, rank, work):
        """Fork worker `rank`: it goes through the gate and calls `work(crew, arena, rank)`."""
        pid = os.fork()
        if pid:
            self.pids[rank] = pid
            return
        try:
            arena = Arena.attach(os.dup(self.keeper.descriptor), self.layout, rank, PATIENCE_S)
            self.gate(arena, rank)
            work(self, arena, rank)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def gate(self, arena, rank):
        """Park, report it, and report the release."""
        attempt = arena.wait_for_release(lambda attempt: self.say(PARKED, rank, attempt), PATIENCE_S)
        self.say(RELEASED, rank, attempt)

    def say(self, kind, rank, number):
        """Send one message to the keeper; it is shorter than what a pipe takes in one piece."""
        os.write(self.write_end, MESSAGE.pack(kind, rank, number))

    def hear(self, count, kind):
        """Return the next `count` messages of a kind as a set of `(rank, number)`."""
        heard = set()
        while len(heard) < count:
            ready, _, _ = select.select([self.read_end], [], [], PATIENCE_S)
            assert ready, f"heard only {heard}"
            came, rank, number = MESSAGE.unpack(os.read(self.read_end, MESSAGE.size))
            if came == kind:
                heard.add((rank, number))
        return heard

    def release(self, attempt):
        """Wait until everybody is parked in `attempt` and release them."""
        workers = self.layout.workers
        assert self.hear(workers, PARKED) == {(rank, attempt) for rank in range(workers)}
        self.keeper.release()

    def end(self, rank):
        """Wait for a worker's end and return its exit code, negative for a signal."""
        _, status = os.waitpid(self.pids.pop(rank), 0)
        return os.waitstatus_to_exitcode(status)

    def end_all(self):
        """Wait for everybody's end; all must have been content."""
        codes = {rank: self.end(rank) for rank in list(self.pids)}
        assert set(codes.values()) == {0}, f"exit codes of the workers: {codes}"

    def close(self):
        """Kill who is left."""
        for rank in list(self.pids):
            os.kill(self.pids[rank], signal.SIGKILL)
            self.end(rank)
        self.keeper.close()
        os.close(self.read_end)
        os.close(self.write_end)


@pytest.fixture
def crew(request):
    """Return a function that gathers a crew of so many workers, not yet started."""
    crews = []

    def gather(workers):
        crews.append(Crew(workers))
        return crews[-1]

    yield gather
    for each in crews:
        each.close()


def make_rounds(arena, rank, rounds, first=1):
    """Pass the barrier so often; everybody's number must be there after each, none from beyond the next."""
    numbers = arena.sums
    idle = random.Random(rank)
    for number in range(first, first + rounds):
        for _ in range(idle.choice((0, 0, 0, 3, 300))):
            os.sched_yield()
        numbers[rank] = number
        arena.barrier.wait()
        assert numbers.min() >= number, f"worker {rank} passed round {number} early: {numbers}"
        assert numbers.max() <= number + 1, f"worker {rank} was left behind in round {number}: {numbers}"


# The layout.


@given(
    size=st.integers(1, 5000),
    vectors=st.integers(1, 4),
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=40),
    sums=st.integers(1, 600),
    rows=st.integers(0, 50),
    tail=st.integers(1, 16),
)
def test_places_are_aligned_and_disjoint(size, vectors, blocks, sums, rows, tail):
    """Every array starts on a cache line of its own, behind the lines of all workers, and inside the file."""
    names = tuple(f"vector{index}" for index in range(vectors))
    places, total = ArenaLayout(size, names, tuple(blocks), sums, rows, tail, 8).places()
    assert len(places) == 3 + len(blocks) + 6 + 2 * vectors + sum(blocks)
    position = 4 * (FIRST_LINE_WORD + LINE_WORDS * len(blocks))
    for offset, dtype, shape in sorted(places.values()):
        assert offset % 64 == 0
        assert offset >= position
        position = offset + int(np.prod(shape)) * np.dtype(dtype).itemsize
    assert position <= total
    assert total % 4096 == 0


@settings(max_examples=20)
@given(workers=st.integers(1, 5), size=st.integers(1, 3000))
def test_arrays_do_not_touch_each_other(workers, size):
    """What is written through one array is seen through no other, and not in the control words."""
    arena = Arena.create(layout_for(workers, size))
    arrays = [arena.sums, arena.evaluation, arena.scalars(0), arena.scalars(1)]
    arrays += [*arena.vectors(0).values(), *arena.vectors(1).values()]
    arrays += [array for group in (arena.slots, arena.tails) for blocks in group for array in blocks]
    for number, array in enumerate(arrays):
        array.fill(number + 1)
    assert all(np.all(array == number + 1) for number, array in enumerate(arrays))
    assert (arena.committed, arena.done, arena.source, arena.announced_attempt) == (EMPTY, EMPTY, EMPTY, 1)
    assert [arena.progress_of(worker) for worker in range(workers)] == [(0, 0)] * workers
    arena.close()


def test_generations_alternate():
    """Step s reads generation s & 1 and writes the other one."""
    arena = Arena.create(layout_for(1))
    for step in range(4):
        assert arena.vectors(step)["parameters"] is arena.vectors(step + 2)["parameters"]
        assert arena.vectors(step)["parameters"] is not arena.vectors(step + 1)["parameters"]
        assert arena.scalars(step) is not arena.scalars(step + 1)
    arena.close()


def test_words_are_seen_by_everybody():
    """What one process stores in a word another one reads, each in a place of its own."""
    keeper = Arena.create(layout_for(2))
    worker = Arena.attach(os.dup(keeper.descriptor), keeper.layout, 1)
    worker.committed, worker.done, worker.saved = 7, 6, 5
    worker.progress(3)
    worker.progress(4)
    worker.mark_bad(0)
    worker.digest(1)[:] = range(32)
    assert not worker.stop_requested
    keeper.request_stop()
    keeper.release(source=3)
    assert (keeper.committed, keeper.done, keeper.saved, worker.source) == (7, 6, 5, 3)
    assert (keeper.progress_of(0), keeper.progress_of(1)) == ((0, 0), (2, 4))
    assert keeper.bad_micro_batches() == [(1, 0)]
    assert bytes(keeper.digest(1)) == bytes(range(32))
    assert not keeper.digest(0).any()
    assert worker.stop_requested
    worker.close()
    keeper.close()


def test_another_layout_is_refused():
    """A worker that computes other sizes must not touch the memory."""
    keeper = Arena.create(layout_for(2))
    descriptor = os.dup(keeper.descriptor)
    with pytest.raises(EnvironmentMismatch, match=r"has \d+ bytes, expected \d+"):
        Arena.attach(descriptor, layout_for(2, size=100_000), 0)
    os.close(descriptor)
    keeper.close()


def test_nothing_has_a_name_in_dev_shm():
    """An arena has no name in a file system, so that nothing can be left behind, nor space run out there."""
    before = set(os.listdir("/dev/shm"))
    keeper = Arena.create(layout_for(2, size=1 << 20))
    keeper.vectors(0)["parameters"].fill(1)
    assert set(os.listdir("/dev/shm")) == before
    assert os.fstat(keeper.descriptor).st_nlink == 0
    keeper.close()
    keeper.close()


# The barrier.


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_nobody_passes_the_barrier_early(crew, workers):
    """Through 1,000 rounds, with idle spells that push waiters into every kind of wait."""
    team = crew(workers)
    for rank in range(workers):
        team.start(rank, lambda team, arena, rank: make_rounds(arena, rank, 1000))
    team.release(1)
    team.end_all()
    assert team.keeper.sums.tolist() == [1000.0] * workers


def test_threads_may_be_workers():
    """Ray actors and tests run several workers in one process, each with an arena object of its own."""
    keeper = Arena.create(layout_for(3))
    keeper.release()
    failures = []

    def work(rank):
        try:
            arena = Arena.attach(os.dup(keeper.descriptor), keeper.layout, rank, PATIENCE_S)
            arena.wait_for_release(lambda attempt: None, PATIENCE_S)
            make_rounds(arena, rank, 200)
            arena.close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    keeper.close()


def test_the_deadline_names_the_missing_worker():
    """A wait without an end says for whom it waited and what to do."""
    keeper = Arena.create(layout_for(3))
    arenas = [Arena.attach(os.dup(keeper.descriptor), keeper.layout, rank, 0.05) for rank in range(2)]
    keeper.release()
    for arena in arenas:
        arena.wait_for_release(lambda attempt: None, PATIENCE_S)
    for arena, missing in ((arenas[0], 1), (arenas[1], 2)):
        with pytest.raises(WorkerLost, match=rf"for worker {missing} of the same host, .*resuming is safe"):
            arena.barrier.wait()
    for arena in (*arenas, keeper):
        arena.close()


def test_the_deadline_holds_in_the_parked_state():
    """A coordinator that never answers ends the wait, too."""
    arena = Arena.create(layout_for(1), rank=0)
    with pytest.raises(WorkerLost, match="parked, for the coordinator"):
        arena.wait_for_release(lambda attempt: None, 0.05)
    arena.close()


# Losses.


def work_until_lost(team, arena, rank):
    """Make rounds; worker 1 kills itself in the first attempt; who is parked goes through the gate again."""
    while True:
        try:
            if arena.barrier.attempt == 1:
                make_rounds(arena, rank, 20)
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGKILL)
                make_rounds(arena, rank, 20, first=21)
            else:
                make_rounds(arena, rank, 20, first=1000)
            return
        except Parked:
            team.gate(arena, rank)


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_a_killed_worker_is_replaced(crew, workers):
    """Its peers leave the barrier only into the parked state; with a replacement the barrier works again."""
    team = crew(workers)
    for rank in range(workers):
        team.start(rank, work_until_lost)
    team.release(1)
    assert team.end(1) == -signal.SIGKILL
    assert team.keeper.park() == 2
    team.start(1, work_until_lost)
    team.release(2)
    assert team.hear(workers, RELEASED) == {(rank, 2) for rank in range(workers)}
    team.end_all()
    assert team.keeper.sums.tolist() == [1019.0] * workers


def test_a_second_loss_while_everybody_is_parked(crew):
    """An attempt announced in the parked state is told again, and the one before is never released."""
    team = crew(3)
    for rank in range(3):
        team.start(rank, work_until_lost)
    team.release(1)
    team.hear(3, RELEASED)
    team.end(1)
    assert team.keeper.park() == 2
    assert team.hear(2, PARKED) == {(0, 2), (2, 2)}
    os.kill(team.pids[2], signal.SIGKILL)
    team.end(2)
    assert team.keeper.park() == 3
    for rank in (1, 2):
        team.start(rank, work_until_lost)
    team.release(3)
    assert team.hear(3, RELEASED) == {(0, 3), (1, 3), (2, 3)}
    team.end_all()


def test_a_replacement_that_is_lost_at_the_gate(crew):
    """The replacement dies parked; the next one takes its place and the barrier works again."""
    team = crew(2)
    for rank in range(2):
        team.start(rank, work_until_lost)
    team.release(1)
    team.end(1)
    team.keeper.park()
    team.start(1, work_until_lost)
    assert team.hear(2, PARKED) == {(0, 2), (1, 2)}
    os.kill(team.pids[1], signal.SIGKILL)
    team.end(1)
    team.keeper.park()
    team.start(1, work_until_lost)
    team.release(3)
    team.end_all()


def test_who_finds_everybody_there_passes():
    """A barrier that is full is passed even when a loss is announced: the step is known to be complete."""
    keeper = Arena.create(layout_for(2))
    arenas = [Arena.attach(os.dup(keeper.descriptor), keeper.layout, rank, PATIENCE_S) for rank in range(2)]
    keeper.release()
    for arena in arenas:
        arena.wait_for_release(lambda attempt: None, PATIENCE_S)
    keeper.park()
    with pytest.raises(Parked):
        arenas[0].barrier.wait()
    arenas[1].barrier.wait()
    with pytest.raises(Parked):
        arenas[1].barrier.wait()
    for arena in (*arenas, keeper):
        arena.close()


def test_nobody_is_released_into_an_old_attempt():
    """Who comes to the gate after a newer attempt was announced waits for that one."""
    keeper = Arena.create(layout_for(1))
    keeper.release()
    keeper.park()
    arena = Arena.attach(os.dup(keeper.descriptor), keeper.layout, 0)
    told = []

    def release_late(attempt):
        told.append(attempt)
        keeper.release()

    assert arena.wait_for_release(release_late, PATIENCE_S) == 2
    assert told == [2]
    arena.close()
    keeper.close()


def write_and_die(team, arena, rank):
    """Commit step 1 as a job would, then die in the middle of step 1's writes."""
    low, high = rank * 500, (rank + 1) * 500
    bits = np.random.default_rng(rank).standard_normal(500).astype(np.float32)
    arena.vectors(1)["parameters"][low:high] = bits
    arena.barrier.wait()
    if rank == 0:
        arena.committed = 1
    arena.vectors(2)["parameters"][low : high - 250] = np.nan
    os.kill(os.getpid(), signal.SIGKILL)


def compare_state(team, arena, rank):
    """Report whether a worker that was started later finds the bits that were committed."""
    parts = [np.random.default_rng(part).standard_normal(500).astype(np.float32) for part in range(2)]
    held = arena.vectors(arena.committed)["parameters"]
    same = np.array_equal(held.view(np.uint32), np.concatenate(parts).view(np.uint32))
    team.say(NOTE, rank, arena.committed if same else EMPTY)


def test_the_state_survives_the_death_of_all_workers(crew):
    """The keeper holds the memory: new workers find the committed generation bit for bit."""
    team = crew(2)
    for rank in range(2):
        team.start(rank, write_and_die)
    team.release(1)
    assert {team.end(0), team.end(1)} == {-signal.SIGKILL}
    team.keeper.park()
    for rank in range(2):
        team.start(rank, compare_state)
    team.release(2)
    assert team.hear(2, NOTE) == {(0, 1), (1, 1)}
    team.end_all()
