"""One process of `together`: `python -m distbp.bench.probe DESCRIPTOR QUESTION`, started by it alone.

It limits BLAS to one thread, meets the others at distbp's own barrier before each item, and prints a JSON
list with one answer for each.

The time of one call is the lower quartile of many: the machine may be busy with other things, and a bound
is about what it can do.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from distbp.barrier import FIRST_LINE_WORD, LINE_WORDS, Barrier
from distbp.environment import limit_threads
from distbp.optim import SGD, Update
from distbp.optim.chunks import new_scratch
from distbp.partition import split_range
from distbp.reduce import LaneReduction

__all__ = ["CONTROL_BYTES", "MEASURES", "lower_quartile_of_calls"]

MOST_PROCESSES = 64
CONTROL_BYTES = 4 * (FIRST_LINE_WORD + LINE_WORDS * MOST_PROCESSES)
"""Pages of the barrier at the beginning of the shared memory."""

LEAST_S, LEAST_CALLS, MOST_CALLS = 0.08, 5, 2000
DEADLINE_S = 300.0
WARM_UP = 20
LOOKS_BEFORE_YIELD = 1000


@dataclass(frozen=True)
class Place:
    """Which of the processes this is, their barrier, and the memory that they share behind it."""

    rank: int
    size: int
    barrier: Barrier
    memory: memoryview


def main() -> None:
    """Answer the question on the command line."""
    descriptor, question = int(sys.argv[1]), json.loads(sys.argv[2])
    limit_threads(1)
    memory = mmap.mmap(descriptor, 0)
    os.close(descriptor)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    view = memoryview(memory)
    rank, size = question["rank"], question["size"]
    barrier = Barrier(view[:CONTROL_BYTES].cast("I"), address, rank, size, DEADLINE_S)
    place = Place(rank, size, barrier, view[CONTROL_BYTES:])
    found = []
    for item in question["items"]:
        barrier.wait()
        found.append(MEASURES[question["measure"]](item, place))
    print(json.dumps(found))


def lower_quartile_of_calls(call: Callable[[], object]) -> float:
    """Return the seconds of one call: the lower quartile of as many as fit in a short while."""
    call()
    times: list[float] = []
    until = time.perf_counter() + LEAST_S
    while len(times) < LEAST_CALLS or (time.perf_counter() < until and len(times) < MOST_CALLS):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return float(np.quantile(times, 0.25))


def product(item: tuple[list[int], list[int], list[bool]], place: Place) -> float:
    """Return the seconds of `np.matmul` on float32 stacks of two shapes, the marked ones transposed.

    The arrays are allocated once, as in training; what fits into the cache stays there between two calls.
    """
    left, right, transposed = item
    rng = np.random.default_rng(0)
    a, b = (_operand(rng, shape, turned) for shape, turned in zip((left, right), transposed, strict=True))
    out = np.matmul(a, b)
    return lower_quartile_of_calls(lambda: np.matmul(a, b, out=out))


def _operand(rng: np.random.Generator, shape: list[int], turned: bool) -> Any:
    """Return noise of `shape`, lying in memory as its transpose does if it is turned."""
    if turned:
        return rng.standard_normal((*shape[:-2], shape[-1], shape[-2]), np.float32).mT
    return rng.standard_normal(shape, np.float32)


def copy(size_bytes: int, place: Place) -> float:
    """Return the seconds of copying between two arrays that together have `size_bytes` bytes."""
    source = np.ones(max(64, size_bytes // 8), np.float32)
    target = np.zeros_like(source)
    return lower_quartile_of_calls(lambda: np.copyto(target, source))


def update(size_bytes: int, place: Place) -> float:
    """Return the seconds of an update by distbp's SGD whose five arrays together have `size_bytes` bytes."""
    count = max(64, size_bytes // 20)
    arrays = [np.ones(count, np.float32) for _ in range(5)]
    optimizer = SGD(momentum=0.9)
    names = ("parameters", *optimizer.vectors)
    given = Update(
        gradient=arrays[0],
        scale=0.5,
        lr=0.0,
        number=2,
        current=dict(zip(names, arrays[1:3], strict=True)),
        following=dict(zip(names, arrays[3:5], strict=True)),
        scratch=new_scratch(optimizer.scratch_rows),
    )
    return lower_quartile_of_calls(lambda: optimizer.apply(given))


def wait(rounds: int, place: Place) -> float:
    """Return the seconds of one barrier, the median of `rounds`."""
    times = []
    for _ in range(rounds + WARM_UP):
        begun = time.perf_counter()
        place.barrier.wait()
        times.append(time.perf_counter() - begun)
    return float(np.median(times[WARM_UP:]))


def word(rounds: int, place: Place) -> float:
    """Return the seconds in which a word goes from one of two processes to the other, at its best."""
    words = place.memory.cast("q")
    mine, other = (0, 64) if place.rank == 0 else (64, 0)
    times = []
    for number in range(1, rounds + WARM_UP + 1):
        begun = time.perf_counter()
        if place.rank == 0:
            words[mine] = number
        looks = 0
        while words[other] < number:
            looks += 1
            if looks > LOOKS_BEFORE_YIELD:
                os.sched_yield()
        if place.rank != 0:
            words[mine] = number
        times.append(time.perf_counter() - begun)
    return float(np.quantile(times[WARM_UP:], 0.05)) / 2


def reduce(item: tuple[int, int], place: Place) -> float:
    """Return the seconds in which all add their lanes of all gradients, as a step does it."""
    size_bytes, rounds = item
    count = size_bytes // 4
    whole = np.frombuffer(place.memory, np.float32)
    slots = [whole[worker * count : (worker + 1) * count] for worker in range(place.size)]
    low, high = split_range(count, place.size, place.rank)
    ranges = [(worker, worker + 1) for worker in range(place.size)]
    lane = LaneReduction([[slot[low:high]] for slot in slots], ranges, [(0, place.size)], None)
    times = []
    for _ in range(rounds):
        slots[place.rank].fill(1)
        place.barrier.wait()
        begun = time.perf_counter()
        lane.run()
        place.barrier.wait()
        times.append(time.perf_counter() - begun)
        assert whole[low] == place.size, "the lane was not added"
        place.barrier.wait()
    return float(np.median(times))


MEASURES: dict[str, Callable[[Any, Place], float]] = {
    "copy": copy,
    "product": product,
    "reduce": reduce,
    "update": update,
    "wait": wait,
    "word": word,
}
"""Name -> what a process measures for an item; each is called by all processes at the same time."""


if __name__ == "__main__":
    main()
