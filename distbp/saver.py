"""Saves the state in the background: copy now, write later, one save at a time.

The copy is taken while the calling worker holds up the next barrier, so nobody can overwrite the generation.
Hashing, writing and fsync then run on a thread beside the training; all three release the interpreter.  A
save that fails removes its own temporary and training goes on; `ERRORS_IN_A_ROW` failures end the run (73).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import checkpoint
from distbp.errors import CannotWrite, Diverged

__all__ = ["ERRORS_IN_A_ROW", "Saver"]

ERRORS_IN_A_ROW = 3


class Saver:
    """Writes checkpoints into `directory`, keeping the newest `keep`; `report` receives one event a save."""

    def __init__(
        self, directory: Path, *, keep: int, start: int, report: Callable[[dict[str, Any]], None]
    ) -> None:
        self.last_begun = time.monotonic()
        self.saved_step = -1
        self._directory = directory
        self._keep = keep
        self._start = start
        self._report = report
        self._thread: threading.Thread | None = None
        self._copies: dict[str, NDArray[Any]] = {}
        self._errors = 0
        self._reason = ""
        self._failure: BaseException | None = None
        # Whoever wrote these is gone: this process has just taken over.
        checkpoint.remove_leftovers(directory)

    def save(self, step: int, tensors: Mapping[str, NDArray[Any]], metadata: dict[str, Any]) -> None:
        """Copy the state and begin to write it; waits for a save that is still in flight."""
        self.wait()
        self.last_begun = time.monotonic()
        for name, tensor in tensors.items():
            copy = self._copies.setdefault(name, np.empty_like(tensor, order="C"))
            np.copyto(copy, tensor)
        snapshot = checkpoint.Snapshot(step=step, tensors=dict(self._copies), metadata=metadata)
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="distbp-save")
        self._thread.start()

    def wait(self) -> None:
        """Return when no save is in flight; raise `CannotWrite` after too many failures in a row."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failure is not None:
            raise self._failure
        if self._errors >= ERRORS_IN_A_ROW:
            raise CannotWrite(f"{self._errors} checkpoints in a row could not be written: {self._reason}")

    def wait_durable(self, step: int) -> None:
        """Return when the state of `step` is on the disk; raise `CannotWrite` if it could not be written."""
        self.wait()
        if self.saved_step != step:
            raise CannotWrite(f"the checkpoint of step {step} could not be written: {self._reason}")

    def _write(self, snapshot: checkpoint.Snapshot) -> None:
        begun = time.monotonic()
        record: dict[str, Any] = {"kind": "checkpoint", "step": snapshot.step}
        try:
            _refuse_broken(snapshot)
            path = checkpoint.save(self._directory, snapshot, keep=self._keep, attempt=self._start)
        except CannotWrite as error:
            self._errors += 1
            self._reason = str(error)
            record |= {"status": "failed", "reason": str(error)}
            print(f"distbp: E_SAVE_FAILED step={snapshot.step} {error}", file=sys.stderr, flush=True)
        except BaseException as error:
            self._failure = error
            record |= {"status": "failed", "reason": str(error)}
        else:
            self._errors = 0
            self.saved_step = snapshot.step
            record |= {"status": "saved", "path": str(path), "seconds": time.monotonic() - begun}
        self._report(record)


def _refuse_broken(snapshot: checkpoint.Snapshot) -> None:
    """Raise `Diverged` for a state that no run could go on from; the checkpoints before it stay."""
    for name, tensor in snapshot.tensors.items():
        if tensor.dtype.kind == "f" and not np.isfinite(tensor).all():
            raise Diverged(
                f"{name} is not finite after step {snapshot.step}, which is not saved; lower optimizer.lr or "
                "set optimizer.clip_norm"
            )
