"""Saves the state in the background: copy now, write later, one save at a time, gently.

A save has two parts.  The copy is made by the calling worker between two steps, so that the checkpoint of
step s is complete in memory before this worker takes part in the next step; nobody can overwrite that
generation before everybody has (`arena.py`).  It costs one pass through memory and is all that training waits
for.  Behind the last step nobody writes a generation any more, and that state is not copied.  Checking,
hashing, writing and fsync run on a thread beside the training, in blocks of 1 MiB, for which NumPy, zlib,
hashlib and the system calls let go of the interpreter.

The thread gives way.  After each block it sleeps until it has used no more than `CORE_SHARE` of one core
since the block began (`Pace`).  Without this it would take half of a core from a worker, and all the others
wait for that worker in every step.  Whoever needs the result (the last save of a run, a stop on request, a
save that is due before the last one is through) lets it hurry.

When to save (`interval_s`).  "auto" loses at most `MOST_LOST_S` of work: the time between two saves and the
time that the second one needs make one minute together.  It spends at most `MOST_SPENT` of the run: what a
save cost is measured from above, as the time that training stood still for the copy plus the processor time
of the thread, as if every worker had waited for all of it.  Where both cannot be had, because the state is
very large, the cost wins: it is paid in every run, the loss only by one that dies as a whole.  A time that is
given in seconds is kept as it is.

What goes wrong.  A disk that refuses costs a checkpoint, not the run: it is said, recorded and counted, and
`ERRORS_IN_A_ROW` of them end the run (73).  A state that is not finite is never saved (79).  A save that
makes no progress for `NO_PROGRESS_S` is named, and nobody waits for it any longer.

Not done.  A writer process of low priority that maps the memory would need no pacing, and would be one more
process to start, watch and clean up on every backend; `benchmarks/checkpoint.py` shows what the thread costs.
A low priority for the thread: it could be put aside while it holds the interpreter, and training with it.  A
copy by all workers, each its lane: one process writes it, so it would have to be part of the arena.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import checkpoint
from distbp.errors import CannotWrite, Diverged
from distbp.terminal import say

__all__ = ["AUTO", "ERRORS_IN_A_ROW", "Saver", "interval_s"]

AUTO = "auto"
MOST_LOST_S = 60.0
MOST_SPENT = 0.035
FIRST_SAVE_S = 30.0
"""When "auto" makes its first save: what one costs is not known yet, and this leaves room for a slow one."""

CORE_SHARE = 1 / 20
"""Share of one core that a save takes while training goes on."""

LONGEST_S = 20.0
"""A save is slowed down to at most about this long; a large state then takes more than its share."""

ERRORS_IN_A_ROW = 3
NO_PROGRESS_S = 240.0
"""The others hear from a worker that waits for its disk, so it is this one that gives up and names it."""

CHECK_ELEMENTS = 1 << 18


class Saver:
    """Writes checkpoints into `directory`, keeping the newest `keep`, every `every_seconds` ("auto", None).

    `report` receives one event a save, from the thread that writes.  A disk that writes nothing for
    `patience_s` is not waited for.  One worker of a run, rank 0, has a saver.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        start: int,
        every_seconds: float | str | None,
        report: Callable[[dict[str, Any]], None],
        patience_s: float = NO_PROGRESS_S,
    ) -> None:
        self.saved_step = -1
        self._directory = directory
        self._keep = keep
        self._start = start
        self._every_seconds = every_seconds
        self._report = report
        self._patience_s = patience_s
        self._begun = time.monotonic()
        self._thread: threading.Thread | None = None
        self._pace = Pace(0, 0.0)
        self._copies: dict[str, NDArray[Any]] = {}
        self._interval = interval_s(every_seconds, None)
        self._errors = 0
        self._reason = ""
        self._failure: BaseException | None = None
        self._warned = False
        # Whoever wrote these is gone: this process has just taken over.
        checkpoint.remove_leftovers(directory)

    @property
    def in_flight(self) -> bool:
        """Return whether a save is being written."""
        return self._thread is not None and self._thread.is_alive()

    def is_due(self) -> bool:
        """Return whether the time for a save has come; never while one is in flight.

        To be asked in every step: it is here that a run ends whose saves fail (`CannotWrite`, `Diverged`).
        """
        if self.in_flight:
            self._name_slow_disk()
            return False
        self._raise_failure()
        return self._interval is not None and time.monotonic() - self._begun >= self._interval

    def save(
        self,
        step: int,
        tensors: Mapping[str, NDArray[Any]],
        metadata: dict[str, Any],
        waiting: Callable[[], None] = lambda: None,
        accept: Callable[[Mapping[str, NDArray[Any]]], bool] = lambda copies: True,
        *,
        changes: bool = True,
    ) -> bool:
        """Copy the state and begin to write it; wait for a save that is still in flight (see `wait`).

        Returns False, and nothing is written, if `accept` does not take the copies.  A state that never
        `changes` any more, that of a finished run, is written as it lies there.
        """
        self.wait(waiting)
        now = time.monotonic()
        since_last, self._begun = now - self._begun, now
        state = self._copied(tensors) if changes else dict(tensors)
        if not accept(state):
            return False
        snapshot = checkpoint.Snapshot(step=step, tensors=state, metadata=metadata)
        # Checked once, written once, and the older ones that stay are read before any is removed.
        passes = 2 + max(self._keep - 1, 0)
        size = sum(tensor.nbytes for tensor in state.values()) * passes
        self._pace = Pace(size, min(LONGEST_S, since_last / 2))
        self._warned = False
        stalled = time.monotonic() - now
        # A daemon: a process must be able to end although a disk never answers.
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, stalled), name="distbp-save", daemon=True
        )
        self._thread.start()
        return True

    def _copied(self, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return copies; from the second save on they are the same memory."""
        for name, tensor in tensors.items():
            if name not in self._copies:
                self._copies[name] = np.empty_like(tensor, order="C")
            np.copyto(self._copies[name], tensor)
        return dict(self._copies)

    def wait(self, waiting: Callable[[], None] = lambda: None) -> None:
        """Return when no save is in flight; let it hurry, and call `waiting` twice a second.

        Raises `CannotWrite` after too many failures in a row, or when the disk makes no progress; `Diverged`
        if the state was not finite.
        """
        self._pace.hurry()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(0.5)
            waiting()
            if self._pace.idle_s > self._patience_s:
                raise CannotWrite(
                    f"waited for a checkpoint in {self._directory}, and nothing could be written for "
                    f"{self._pace.idle_s:.0f} s: see whether that disk still answers, or choose another --out"
                )
        self._raise_failure()

    def wait_durable(self, step: int, waiting: Callable[[], None] = lambda: None) -> None:
        """Return when the state of `step` is on the disk; raise `CannotWrite` if it could not be written."""
        self.wait(waiting)
        if self.saved_step != step:
            raise CannotWrite(f"the checkpoint of step {step} could not be written: {self._reason}")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._errors >= ERRORS_IN_A_ROW:
            raise CannotWrite(f"{self._errors} checkpoints in a row could not be written: {self._reason}")

    def _name_slow_disk(self) -> None:
        """Say once a save that nothing was written for long: the run goes on without newer checkpoints."""
        if not self._warned and self._pace.idle_s > self._patience_s:
            self._warned = True
            _say(f"W_SAVE_SLOW nothing could be written to {self._directory} for {self._pace.idle_s:.0f} s")

    # What follows runs on the thread.

    def _write(self, snapshot: checkpoint.Snapshot, stalled: float) -> None:
        """Write one checkpoint, remove what is too old, and report how it went."""
        pace, step = self._pace, snapshot.step
        pace.begin()
        record: dict[str, Any] = {"kind": "checkpoint", "step": step}
        try:
            _refuse_broken(snapshot, pace)
            path = checkpoint.save(self._directory, snapshot, keep=0, attempt=self._start, pause=pace.pause)
        except CannotWrite as error:
            self._errors += 1
            self._reason = str(error)
            record |= {"status": "failed", "reason": str(error)}
            _say(f"E_SAVE_FAILED step={step} in_a_row={self._errors}/{ERRORS_IN_A_ROW} {error}")
        except BaseException as error:
            self._failure = error
            record |= {"status": "failed", "reason": str(error)}
        else:
            self._errors = 0
            self.saved_step = step
            record |= {"status": "saved", "path": str(path), "seconds": time.monotonic() - self._begun}
            self._clean_up(path)
            # The thread has worked for this save alone, so all its processor time is what the save cost.
            spent = stalled + time.thread_time()
            self._interval = interval_s(self._every_seconds, (spent, record["seconds"]))
            record |= {"stalled_seconds": stalled, "cpu_seconds": spent - stalled}
        try:
            self._report(record)
        except Exception as error:  # Whoever keeps the job is gone; the training finds out by itself.
            _say(f"W_RECORD_LOST {record}: {error}")

    def _clean_up(self, newest: Path) -> None:
        """Remove old checkpoints; a failure costs space, and the new checkpoint is safe whatever happens."""
        try:
            checkpoint.clean_up(newest, keep=self._keep, pause=self._pace.pause)
        except CannotWrite as error:
            _say(f"W_PRUNE_FAILED {error}")


class Pace:
    """Holds a save back to `CORE_SHARE` of a core, for at most `longest_s` in all, until somebody hurries it.

    `size` is the number of bytes that will pass through `pause`.
    """

    def __init__(self, size: int, longest_s: float) -> None:
        self._longest_nap_per_byte = longest_s / max(size, 1)
        self._hurry = threading.Event()
        self._used = 0.0
        self._last = time.monotonic()

    def begin(self) -> None:
        """Begin to count; called on the thread that will pause."""
        self._used = time.thread_time()
        self._last = time.monotonic()

    def pause(self, size: int) -> None:
        """Sleep after a block of `size` bytes, for as long as the processor time since the last one asks."""
        used = time.thread_time()
        nap = (used - self._used) * (1 / CORE_SHARE - 1)
        self._used = used
        self._hurry.wait(min(nap, size * self._longest_nap_per_byte))
        self._last = time.monotonic()

    def hurry(self) -> None:
        """Do not sleep any more; from any thread."""
        self._hurry.set()

    @property
    def idle_s(self) -> float:
        """Return the seconds since the last block was done."""
        return time.monotonic() - self._last


def interval_s(every_seconds: float | str | None, last: tuple[float, float] | None) -> float | None:
    """Return the seconds from the beginning of a save to that of the next one; None: never by time.

    `last` are the seconds that the last save cost, and those until it was durable; None before the first.
    """
    if every_seconds is None or isinstance(every_seconds, int | float):
        return every_seconds
    assert every_seconds == AUTO, f'expected seconds, "auto" or None, got {every_seconds!r}'
    if last is None:
        return FIRST_SAVE_S
    cost, seconds = last
    # The next save may well take longer than the last one.
    return max(MOST_LOST_S - 1.5 * seconds - 1.0, cost / MOST_SPENT)


def _refuse_broken(snapshot: checkpoint.Snapshot, pace: Pace) -> None:
    """Raise `Diverged` for a state that no run could go on from; the checkpoints before it stay."""
    for name, tensor in snapshot.tensors.items():
        if tensor.dtype.kind != "f":
            continue
        flat = tensor.reshape(-1)
        for start in range(0, len(flat), CHECK_ELEMENTS):
            block = flat[start : start + CHECK_ELEMENTS]
            if not np.isfinite(block).all():
                raise Diverged(
                    f"{name} is not finite after step {snapshot.step}, which is not saved; lower "
                    "optimizer.lr or set optimizer.clip_norm"
                )
            pace.pause(block.nbytes)


def _say(text: str) -> None:
    """Write one line to stderr."""
    say(f"distbp: {text}")
