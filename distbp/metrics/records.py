"""Records: `metrics.jsonl`, `events.jsonl` and `samples.log`, one record a line, appended by one process.

A record is one `write` call on a descriptor opened for appending, so a killed process leaves whole lines and
a reader may follow the file.  After a loss or at resume a run goes back to an earlier step: `cut` drops what
lies behind it, because those steps will be made, and recorded, again.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distbp.errors import CannotWrite
from distbp.metrics.sinks import Sinks
from distbp.terminal import say

__all__ = ["Records", "append_record", "read_records"]


def append_record(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON record to `path`; `CannotWrite` if the system refuses."""
    _append(path, json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the records of `path`; a last line that was cut off by a crash does not count."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


class Records:
    """The record files of one run, written by rank 0.

    A disk that is full costs measurements, with one warning, and never the run.  Lines of `samples.log` are
    kept until they can be written: that file has every step.  `sinks` get every measurement too.
    """

    def __init__(self, out: Path, sinks: Iterable[str] = ()) -> None:
        self._sinks = Sinks(sinks, out)
        self._metrics = out / "metrics.jsonl"
        self._samples = out / "samples.log"
        self._waiting = ""
        self._warned = False

    def metric(self, record: dict[str, Any]) -> None:
        """Append a measurement."""
        self._try(self._metrics, json.dumps(record) + "\n")
        self._sinks.write(record)

    def samples(self, step: int, indices: Iterable[int]) -> None:
        """Append the sample numbers that step `step` consumed."""
        self._waiting += f"{step}\t" + " ".join(map(str, indices)) + "\n"
        if self._try(self._samples, self._waiting):
            self._waiting = ""

    def _try(self, path: Path, text: str) -> bool:
        """Append `text` if the system lets us; return whether it did."""
        try:
            _append(path, text)
        except CannotWrite as error:
            if not self._warned:
                say(f"distbp: W_RECORD_LOST {error}; training goes on")
                self._warned = True
            return False
        return True

    def history(self) -> list[dict[str, Any]]:
        """Return the records that end an epoch, in order."""
        return [record for record in read_records(self._metrics) if record.get("epoch_end")]

    def cut(self, step: int, done: int) -> None:
        """Drop what lies behind `step`, and the epoch's end at `step` itself unless `done` has reached it."""
        self._waiting = ""

        def keep_metric(line: str) -> bool:
            try:
                record = json.loads(line)
            except ValueError:
                return False
            finished = not record.get("epoch_end") or done >= step
            return bool(record["step"] < step or (record["step"] == step and finished))

        def keep_samples(line: str) -> bool:
            return line.endswith("\n") and int(line.split("\t")[0]) < step

        _keep_lines(self._metrics, keep_metric)
        _keep_lines(self._samples, keep_samples)
        self._sinks.go_back(step + 1 if done >= step else step)

    def close(self) -> None:
        """Let the sinks write what they hold; idempotent."""
        self._sinks.close()


def _append(path: Path, text: str) -> None:
    """Append whole lines or nothing."""
    data = text.encode()
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(path, flags, 0o600)
        try:
            before = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, data)
            except OSError:
                os.ftruncate(descriptor, before)
                raise
            if written < len(data):
                os.ftruncate(descriptor, before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}; free some space") from error


def _keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Keep the leading lines of `path` for which `keep` holds, by cutting the file where the first fails."""
    if not path.exists():
        return
    length = 0
    try:
        with open(path, "rb+", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW)) as file:
            for line in file:
                if not keep(line.decode(errors="replace")):
                    break
                length += len(line)
            file.truncate(length)
    except OSError as error:
        raise CannotWrite(
            f"cannot cut {path} to the step at which the run goes on: {error.strerror}; move that file away"
        ) from error
