"""The host's shared memory: state in two generations, gradient slots, the committed-step word, the barrier.

Theory of operation
-------------------
The workers of one host map one anonymous file (memfd).  State exists once per host, not once per worker:

    control words | a line for each worker | sums, looks, tails, evaluation rows | 2 generations | slots

* **Generations.**  The state after c steps (c is "the committed step") lies in generation `c & 1`.  Step c
  reads it and writes generation `(c + 1) & 1`, each lane by its owner.  Whoever dies, at whatever instant,
  generation `c & 1` is whole: nobody writes it before every worker has passed the commit barrier of step c.
* **Slots.**  Backprop writes a worker's gradients straight into its slot, one flat vector for each aligned
  block of its micro-batches; lane owners add them in place (`reduce.py`).  Slots carry nothing across a step.
* **Words.**  After the commit barrier one writer, the host's first worker, stores `committed = c + 1`.
  `done` follows when all that belongs to that step (evaluation, save, records) is finished.  `EMPTY` means
  that no state is held.
* **Checks.**  Beside each generation lie checksums of its blocks; the word `checked` of a generation names
  the step whose state they belong to (`verify.py`).
* **Attempts.**  A loss is announced by raising the `PARK` word (`park`).  Workers leave the barrier with
  `Parked` and wait in `wait_for_release` until `release` sets the counters to zero and `ATTEMPT` to `PARK`.
  A worker that starts, the very first time or as a replacement, goes through the same gate.

Who may write what: control words only the keeper (the process that created the arena), except `committed`
and `done` (the host's first worker) and each worker's own line.  The file has a name nowhere, needs no space
in /dev/shm, and is gone with its last process.

Needs Linux (memfd, futex); elsewhere an arena of one worker, the serial backend's, is an anonymous mapping.
Memory order is the barrier's matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.barrier import (
    ATTEMPT_WORD,
    FIRST_LINE_WORD,
    LINE_WORDS,
    LOOKS_WORD,
    PARK_WORD,
    PROGRESS_WORD,
    Barrier,
    Parked,
    nap,
    wake,
)
from distbp.errors import EnvironmentMismatch, WorkerLost
from distbp.partition import round_up

__all__ = ["EMPTY", "RELOAD", "WATCHED", "Arena", "ArenaLayout", "Parked"]

Array = NDArray[Any]

EMPTY = -1
"""The committed-step word of an arena that holds no state."""

RELOAD = -2
"""Stands for the `source` of an attempt that begins from the newest checkpoint: the state was corrupted."""

_PAGE = 4096
_EVALUATION_COLUMNS = 8
"""A row of sums is a cache line."""

WATCHED = 8
"""Numbers beside the state that only records and diagnoses read, in two generations (`closer_look.py`)."""

_DIGEST_BYTES = 32
_COMMITTED, _DONE, _STOP, _SOURCE, _SAVED, _BUCKET, _CHECKED = range(8, 15)
"""Places of the 64-bit control words, behind the 32-bit words that the barrier uses; `_CHECKED` are two."""

_LINE_BYTES = 4 * LINE_WORDS
_LINE_PROGRESS = PROGRESS_WORD // 2
_LINE_PHASE, _LINE_BAD, _LINE_READY, _LINE_COMPUTE, _LINE_COMPUTED, _LINE_WAITED = range(
    _LINE_PROGRESS + 1, _LINE_PROGRESS + 7
)
"""Places of the 64-bit words in a worker's line; the first 16 bytes of it belong to the barrier."""
_LINE_DIGEST = 128
_LINE_NOTE = 24
NOTE_WORDS = 6
"""Words of the note in which a worker says what it found out about the state; zeros: nothing."""


@dataclass(frozen=True)
class ArenaLayout:
    """What an arena must hold; every process computes the same places from it.

    `size` is the length of one flat vector in float32 elements, `vectors` names those that make the state,
    "parameters" first; `blocks[w]` counts the gradient vectors of local worker w.
    """

    size: int
    vectors: tuple[str, ...]
    blocks: tuple[int, ...]
    sums: int
    evaluation_rows: int
    tail: int
    scalars: int

    @property
    def workers(self) -> int:
        """Return the number of workers on the host."""
        return len(self.blocks)

    def places(self) -> tuple[dict[str, tuple[int, str, tuple[int, ...]]], int]:
        """Return `{name: (byte offset, dtype, shape)}` of every array, and the bytes of the whole."""
        position = round_up(4 * (FIRST_LINE_WORD + LINE_WORDS * self.workers), _PAGE)
        places: dict[str, tuple[int, str, tuple[int, ...]]] = {}

        def add(name: str, dtype: str, *shape: int) -> None:
            nonlocal position
            places[name] = (position, dtype, shape)
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            position = round_up(position + size, 64 if size < _PAGE else _PAGE)

        add("sums", "f8", self.sums)
        add("looks", "f8", 2, self.sums)
        add("evaluation", "f8", self.evaluation_rows, _EVALUATION_COLUMNS)
        for worker, count in enumerate(self.blocks):
            add(f"tails/{worker}", "f8", count, self.tail)
        for generation in (0, 1):
            add(f"scalars/{generation}", "f8", self.scalars)
            add(f"checks/{generation}", "u8", len(self.vectors) + 1, self.sums)
            add(f"watched/{generation}", "f8", WATCHED)
        position = round_up(position, _PAGE)
        for generation in (0, 1):
            for name in self.vectors:
                add(f"{name}/{generation}", "f4", self.size)
        for worker, count in enumerate(self.blocks):
            for block in range(count):
                add(f"slot/{worker}/{block}", "f4", self.size)
        return places, round_up(position, _PAGE)


class Arena:
    """One process's view of the arena; `create` makes a new one, `attach` joins through its descriptor.

    `rank` is the worker's number on this host, or None for the keeper, who may not use the barrier.
    Closing is idempotent; arrays taken from the arena keep the memory alive.
    """

    def __init__(self, descriptor: int, layout: ArenaLayout, rank: int | None, deadline_s: float) -> None:
        places, size = layout.places()
        held = os.fstat(descriptor).st_size if descriptor >= 0 else size
        if held != size:
            raise EnvironmentMismatch(
                f"the arena has {held} bytes, expected {size}: the workers of this host do not run the same "
                "version of distbp on the same model; start the job again"
            )
        self.layout = layout
        self.rank = rank
        self.descriptor = descriptor
        self._map = mmap.mmap(descriptor, size)
        self._words = memoryview(self._map)[: places["sums"][0]].cast("I")
        self._longs = memoryview(self._map)[: places["sums"][0]].cast("q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        arrays = {
            name: np.frombuffer(self._map, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)
            for name, (offset, dtype, shape) in places.items()
        }
        self.sums: NDArray[np.float64] = arrays["sums"]
        self.looks: NDArray[np.float64] = arrays["looks"]
        self.evaluation: NDArray[np.float64] = arrays["evaluation"]
        self.tails = [list(arrays[f"tails/{worker}"]) for worker in range(layout.workers)]
        self.slots = [
            [arrays[f"slot/{worker}/{block}"] for block in range(count)]
            for worker, count in enumerate(layout.blocks)
        ]
        self._scalars = [arrays[f"scalars/{generation}"] for generation in (0, 1)]
        self._checks = [arrays[f"checks/{generation}"] for generation in (0, 1)]
        self._watched = [arrays[f"watched/{generation}"] for generation in (0, 1)]
        self._vectors = [
            {name: arrays[f"{name}/{generation}"] for name in layout.vectors} for generation in (0, 1)
        ]
        if rank is not None:
            self._my_progress = self._line(rank) + _LINE_PROGRESS
            self.barrier = Barrier(self._words, self._address, rank, layout.workers, deadline_s)

    @classmethod
    def create(cls, layout: ArenaLayout, rank: int | None = None, deadline_s: float = 300.0) -> Arena:
        """Make a new arena that holds nothing; the caller is its keeper."""
        _, size = layout.places()
        descriptor = -1
        try:
            if sys.platform == "linux":
                descriptor = os.memfd_create("distbp-arena", os.MFD_CLOEXEC)
                os.ftruncate(descriptor, size)
            arena = cls(descriptor, layout, rank, deadline_s)
        except OSError as error:
            if descriptor >= 0:
                os.close(descriptor)
            raise EnvironmentMismatch(
                f"the arena needs {size / 2**20:.0f} MiB of memory and the system gave none ({error}); "
                "take a smaller model or a machine with more memory"
            ) from error
        for word in (_COMMITTED, _DONE, _SOURCE, _CHECKED, _CHECKED + 1):
            arena._longs[word] = EMPTY
        arena._words[PARK_WORD] = 1
        return arena

    @classmethod
    def attach(cls, descriptor: int, layout: ArenaLayout, rank: int, deadline_s: float = 300.0) -> Arena:
        """Join an arena that another process created, as local worker `rank`; takes over `descriptor`."""
        return cls(descriptor, layout, rank, deadline_s)

    @classmethod
    def adopt(cls, descriptor: int, layout: ArenaLayout) -> Arena:
        """Become the keeper of an arena whose keeper is gone, as it is; takes over `descriptor`."""
        return cls(descriptor, layout, None, 0.0)

    def vectors(self, step: int) -> dict[str, NDArray[np.float32]]:
        """Return the state vectors of the generation that holds the state after `step` steps."""
        return self._vectors[step & 1]

    def scalars(self, step: int) -> NDArray[np.float64]:
        """Return the scalar state of that generation."""
        return self._scalars[step & 1]

    def watched(self, step: int) -> NDArray[np.float64]:
        """Return the numbers that were watched up to `step`: no part of the state, and in no hash of it."""
        return self._watched[step & 1]

    def checks(self, step: int) -> NDArray[np.uint64]:
        """Return the checksums of that generation: a row of blocks for each vector, one for the scalars."""
        return self._checks[step & 1]

    def checked(self, step: int) -> bool:
        """Return whether `checks(step)` belong to the state after `step` steps."""
        return self._longs[_CHECKED + (step & 1)] == step

    def set_checked(self, step: int, *, valid: bool) -> None:
        """Say whether `checks(step)` belong to the state after `step` steps; the host's first worker does."""
        self._longs[_CHECKED + (step & 1)] = step if valid else EMPTY

    @property
    def committed(self) -> int:
        """Return the number of steps whose state is held, or `EMPTY`."""
        return self._longs[_COMMITTED]

    @committed.setter
    def committed(self, step: int) -> None:
        self._longs[_COMMITTED] = step

    @property
    def done(self) -> int:
        """Return the last step whose evaluation, save and records are finished."""
        return self._longs[_DONE]

    @done.setter
    def done(self, step: int) -> None:
        self._longs[_DONE] = step

    @property
    def saved(self) -> int:
        """Return the step of the newest durable checkpoint that the workers reported."""
        return self._longs[_SAVED]

    @saved.setter
    def saved(self, step: int) -> None:
        self._longs[_SAVED] = step

    @property
    def stop_requested(self) -> bool:
        """Return whether the job was asked to save and end; set by whoever received the signal."""
        return bool(self._longs[_STOP])

    def request_stop(self) -> None:
        """Ask the workers to finish the step, save and end."""
        self._longs[_STOP] = 1

    @property
    def source(self) -> int:
        """Return the host that gives its state to those without one in this attempt, `EMPTY` or `RELOAD`."""
        return self._longs[_SOURCE]

    @property
    def bucket_bytes(self) -> int:
        """Return the bucket size that the host's first worker measured, 0 before that."""
        return self._longs[_BUCKET]

    @bucket_bytes.setter
    def bucket_bytes(self, size: int) -> None:
        self._longs[_BUCKET] = size

    def _line(self, worker: int) -> int:
        """Return the place of a worker's line among the 64-bit words."""
        return FIRST_LINE_WORD // 2 + worker * LINE_WORDS // 2

    def progress(self, phase: int) -> None:
        """Count one unit of progress of this worker and name the phase that begins."""
        assert self.rank is not None, "the keeper makes no progress"
        self._longs[self._my_progress] += 1
        self._longs[self._my_progress - _LINE_PROGRESS + _LINE_PHASE] = phase

    def count_unit(self) -> None:
        """Count one unit of progress of this worker."""
        self._longs[self._my_progress] += 1

    def progress_of(self, worker: int) -> tuple[int, int]:
        """Return `(units of progress, phase)` of a worker; looks at others while it waits count as units."""
        line = self._line(worker)
        looks = self._words[2 * line + LOOKS_WORD]
        return self._longs[line + _LINE_PROGRESS] + looks, self._longs[line + _LINE_PHASE]

    def note_compute(self, seconds: float) -> None:
        """Say for how long this worker has computed in this step."""
        assert self.rank is not None, "the keeper computes nothing"
        line, nanoseconds = self._line(self.rank), int(seconds * 1e9)
        self._longs[line + _LINE_COMPUTE] = nanoseconds
        self._longs[line + _LINE_COMPUTED] += nanoseconds

    def note_wait(self, seconds: float) -> None:
        """Say for how long this worker has waited for the others of its host in this step."""
        assert self.rank is not None, "the keeper waits for nobody"
        self._longs[self._line(self.rank) + _LINE_WAITED] += int(seconds * 1e9)

    def computed(self) -> list[float]:
        """Return for how many seconds each worker of the host computed, as it last said."""
        return [self._longs[self._line(w) + _LINE_COMPUTE] * 1e-9 for w in range(self.layout.workers)]

    def spent(self) -> list[tuple[float, float]]:
        """Return the seconds that each worker of the host has computed and waited in all steps so far."""
        lines = [self._line(worker) for worker in range(self.layout.workers)]
        return [(self._longs[n + _LINE_COMPUTED] * 1e-9, self._longs[n + _LINE_WAITED] * 1e-9) for n in lines]

    def mark_ready(self, step: int, buckets: int) -> None:
        """Say that this worker has finished the gradients of the first `buckets` buckets of `step`."""
        assert self.rank is not None, "the keeper computes nothing"
        self.barrier.order_stores()
        self._longs[self._line(self.rank) + _LINE_READY] = (step << 20) + buckets

    def is_ready(self, step: int, bucket: int) -> bool:
        """Return whether every worker of the host has finished `bucket` of `step`."""
        wanted = (step << 20) + bucket + 1
        return all(
            self._longs[self._line(worker) + _LINE_READY] >= wanted for worker in range(self.layout.workers)
        )

    def forget_ready(self) -> None:
        """Take back what this worker marked in an attempt that was given up."""
        assert self.rank is not None, "the keeper computes nothing"
        self._longs[self._line(self.rank) + _LINE_READY] = 0

    def mark_bad(self, micro_batch: int) -> None:
        """Note that this worker's `micro_batch` gave a loss that is not finite, or -1 for none."""
        assert self.rank is not None, "the keeper computes no micro-batches"
        self._longs[self._line(self.rank) + _LINE_BAD] = micro_batch + 1

    def bad_micro_batches(self) -> list[tuple[int, int]]:
        """Return `(local worker, micro-batch)` of every micro-batch noted by `mark_bad` in this step."""
        notes = [self._longs[self._line(worker) + _LINE_BAD] - 1 for worker in range(self.layout.workers)]
        return [(worker, note) for worker, note in enumerate(notes) if note >= 0]

    def note(self, worker: int) -> NDArray[np.int64]:
        """Return the words in which a worker says what it found out about the state."""
        offset = 8 * (self._line(worker) + _LINE_NOTE)
        return np.frombuffer(self._map, np.int64, NOTE_WORDS, offset)

    def digest(self, worker: int) -> NDArray[np.uint8]:
        """Return the 32 bytes in which a worker publishes the hash of its trial gradient."""
        offset = 4 * FIRST_LINE_WORD + _LINE_BYTES * worker + _LINE_DIGEST
        return np.frombuffer(self._map, np.uint8, _DIGEST_BYTES, offset)

    def park(self) -> int:
        """Announce the next attempt: every worker leaves its wait with `Parked`.  Return its number."""
        self._words[PARK_WORD] += 1
        for worker in range(self.layout.workers):
            wake(self._address + 4 * (FIRST_LINE_WORD + LINE_WORDS * worker))
        return self._words[PARK_WORD]

    @property
    def announced_attempt(self) -> int:
        """Return the number of the attempt that was last announced."""
        return self._words[PARK_WORD]

    def release(self, source: int = EMPTY) -> None:
        """Let the parked workers begin the announced attempt; all of them must be parked."""
        self._longs[_SOURCE] = source
        for worker in range(self.layout.workers):
            line = FIRST_LINE_WORD + LINE_WORDS * worker
            self._words[line] = self._words[line + 1] = 0
        self._words[ATTEMPT_WORD] = self._words[PARK_WORD]
        wake(self._address + 4 * ATTEMPT_WORD)

    def wait_for_release(
        self, parked: Callable[[int], None], deadline_s: float, check: Callable[[], None] = lambda: None
    ) -> int:
        """Stay parked until `release`; return the attempt.

        `parked(attempt)` tells the keeper, once for each attempt that is announced meanwhile; `check` is
        called between naps and may raise.
        """
        told, until = -1, time.monotonic() + deadline_s
        while True:
            attempt, announced = self._words[ATTEMPT_WORD], self._words[PARK_WORD]
            if attempt == announced and attempt > self.barrier.attempt:
                self.barrier.begin_attempt(attempt)
                return attempt
            if announced != told and announced > self.barrier.attempt:
                told, until = announced, time.monotonic() + deadline_s
                parked(announced)
            nap(self._address + 4 * ATTEMPT_WORD, attempt)
            self.count_unit()
            check()
            if time.monotonic() > until:
                raise WorkerLost(
                    f"waited {deadline_s:g} s, parked, for the coordinator to replace a lost worker; "
                    "run again: resuming is safe"
                )

    def close(self) -> None:
        """Give back descriptor and memory; arrays that somebody still holds keep the memory alive."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1
        self.slots, self.tails, self._scalars, self._vectors, self._checks = [], [], [], [], []
        self._watched = []
        self.sums = self.evaluation = self.looks = np.empty(0)
        self._words.release()
        self._longs.release()
        with contextlib.suppress(BufferError):
            self._map.close()
