"""Records: `metrics.jsonl`, `events.jsonl` and `samples.log`, one record a line, appended by one process.

A record is one `write` call on a descriptor opened for appending, so a killed process leaves whole lines and
a reader may follow the file.  After a loss or at resume a run goes back to an earlier step: `cut` drops what
lies behind it, because those steps will be made, and recorded, again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from distbp.errors import CannotWrite

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
    """The record files of one run, written by rank 0."""

    def __init__(self, out: Path) -> None:
        self._metrics = out / "metrics.jsonl"
        self._events = out / "events.jsonl"
        self._samples = out / "samples.log"

    def metric(self, record: dict[str, Any]) -> None:
        """Append a measurement."""
        append_record(self._metrics, record)

    def event(self, record: dict[str, Any]) -> None:
        """Append an event."""
        append_record(self._events, record)

    def samples(self, step: int, indices: Iterable[int]) -> None:
        """Append the sample numbers that step `step` consumed."""
        _append(self._samples, f"{step}\t" + " ".join(map(str, indices)) + "\n")

    def history(self) -> list[dict[str, Any]]:
        """Return the records that end an epoch, in order."""
        return [record for record in read_records(self._metrics) if record.get("epoch_end")]

    def cut(self, step: int, done: int) -> None:
        """Drop what lies behind `step`, and the epoch's end at `step` itself unless `done` has reached it."""

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


def _append(path: Path, text: str) -> None:
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o600)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from error


def _keep_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Keep the leading lines of `path` for which `keep` holds, by cutting the file where the first fails."""
    if not path.exists():
        return
    length = 0
    with path.open("rb+") as file:
        for line in file:
            if not keep(line.decode(errors="replace")):
                break
            length += len(line)
        file.truncate(length)
