"""What the files of a run say, for whoever looks at it from outside: `watch`, `report`, `compare`, `ls`.

Nothing here writes, waits or locks, so looking at a run cannot disturb it.  Whether a job works in the
directory is read from the list of locks that the kernel holds (/proc/locks), never by trying the lock: a job
that starts in that instant would be refused.  Where the lock is another host's, the age of the newest record
decides.

`metrics.jsonl` of a long run has a hundred megabytes and more.  `Series` keeps every n-th record of a kind
and doubles n whenever it holds too many; lines that it passes over are not parsed.  `Metrics` follows the
file: it reads on where it stopped, and begins anew if what it has read was cut off meanwhile.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from distbp.errors import InputMissing
from distbp.metrics.records import read_records

__all__ = ["DONE", "FAILED", "LOST", "RUNNING", "STOPPED", "Metrics", "Run", "Series", "is_run", "read_run"]

Record = dict[str, Any]

RUNNING, DONE, STOPPED, FAILED, LOST = "running", "done", "stopped", "failed", "lost"
"""States of a run; a lost one ended without a word."""

MOST_RECORDS = 4000
_FRESH_S = 60.0
"""Age of the newest record up to which a job on another host counts as running."""

_RECENT = 25
"""Records, five a second at most, by which the rate and the time left are told."""

_KEPT = 64
"""Bytes before the place where reading stopped, by which a file that was cut is recognised."""


class Series:
    """Records of one kind, at most `most` of them, evenly thinned, and the newest one."""

    def __init__(self, most: int = MOST_RECORDS) -> None:
        self.items: list[Record] = []
        self.every = 1
        self.count = 0
        self._most = most
        self._newest = b""

    def add(self, line: bytes) -> None:
        """Count a line, and keep its record if it is its turn."""
        self._newest = line
        if self.count % self.every == 0:
            found = _parse(line)
            if found is None:
                return
            self.items.append(found)
            if len(self.items) >= self._most:
                self.items = self.items[::2]
                self.every *= 2
        self.count += 1

    def all(self) -> list[Record]:
        """Return the records that were kept, the newest of all included."""
        newest = self.newest
        if newest is None or (self.items and self.items[-1] == newest):
            return self.items
        return [*self.items, newest]

    @property
    def newest(self) -> Record | None:
        """Return the last record."""
        return _parse(self._newest) if self._newest else None


class Metrics:
    """The records of a `metrics.jsonl` that may still grow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._forget()

    def _forget(self) -> None:
        """Begin anew."""
        self.train, self.epochs, self.validation = Series(), Series(), Series()
        self.layers, self.workers = Series(400), Series()
        self._offset, self._before = 0, b""

    def update(self) -> bool:
        """Read what was written since the last call; return whether there was anything."""
        try:
            file = open(self._path, "rb")  # noqa: SIM115  Closed below.
        except FileNotFoundError:
            return False
        with file:
            file.seek(max(0, self._offset - _KEPT))
            if file.read(len(self._before)) != self._before:
                self._forget()
            file.seek(self._offset)
            begun = self._offset
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._series_of(line).add(line)
            file.seek(max(0, self._offset - _KEPT))
            self._before = file.read(self._offset - max(0, self._offset - _KEPT))
        return self._offset != begun

    def _series_of(self, line: bytes) -> Series:
        """Return where a line belongs; one that is not known goes where nobody looks."""
        kind = line[: line.find(b",")]
        if b'"train"' in kind:
            return self.epochs if b'"epoch_end"' in line else self.train
        if b'"validation"' in kind:
            return self.validation
        if b'"layers"' in kind:
            return self.layers
        return self.workers if b'"workers"' in kind else Series(1)


@dataclass
class Run:
    """A run as its files describe it at one moment."""

    path: Path
    state: str
    metrics: Metrics
    config: Record = field(default_factory=dict)
    environment: Record = field(default_factory=dict)
    result: Record = field(default_factory=dict)
    events: list[Record] = field(default_factory=list)
    confusion: Record = field(default_factory=dict)
    holder: Record = field(default_factory=dict)
    began: float | None = None
    changed: float | None = None

    @property
    def step(self) -> int:
        """Return the last step that is recorded."""
        if self.result.get("steps"):
            return int(self.result["steps"])
        newest = [series.newest for series in (self.metrics.train, self.metrics.epochs, self.metrics.layers)]
        # A run that ends within a moment has told of later steps than it has recorded.
        told = [event["step"] for event in self.of_kind("diagnosis") if isinstance(event.get("step"), int)]
        return max([int(record["step"]) for record in newest if record] + told, default=0)

    @property
    def total_steps(self) -> int | None:
        """Return how many steps the run shall have; None if no start said so."""
        totals = [event["total_steps"] for event in self.events if event.get("total_steps")]
        return totals[-1] if totals else None

    @property
    def samples_per_second(self) -> float | None:
        """Return the rate of the result, or the usual one of the last records: one alone jumps about."""
        if self.result.get("samples_per_second"):
            return float(self.result["samples_per_second"])
        last = [record.get("samples_per_second") for record in self.metrics.train.all()[-_RECENT:]]
        known = [float(rate) for rate in last if rate]
        return statistics.median(known) if known else None

    @property
    def batch_size(self) -> int | None:
        """Return the samples of a step."""
        newest = self.metrics.train.newest or self.metrics.epochs.newest
        if newest and newest["step"]:
            return int(newest["samples"] // newest["step"])
        return self.result.get("batch_size")

    @property
    def seconds_left(self) -> float | None:
        """Return how long a run that goes on will take at its last rate."""
        if self.state != RUNNING or not (self.total_steps and self.batch_size and self.samples_per_second):
            return None
        return max(0.0, (self.total_steps - self.step) * self.batch_size / self.samples_per_second)

    def table(self, name: str) -> Record:
        """Return a table of the configuration, empty if there is none."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def of_kind(self, *kinds: str) -> list[Record]:
        """Return the events of these kinds."""
        return [event for event in self.events if event.get("kind") in kinds]


def is_run(path: Path) -> bool:
    """Return whether a directory holds a run."""
    return any((path / name).is_file() for name in ("metrics.jsonl", "result.json", "config.toml", "lock"))


def read_run(path: str | Path, metrics: Metrics | None = None) -> Run:
    """Return the run in `path`; `metrics` of an earlier call are read on.  InputMissing if there is none."""
    given = Path(path)
    if not is_run(given):
        found = "a directory without one" if given.is_dir() else "a file" if given.exists() else "nothing"
        raise InputMissing(
            f"{str(path)!r}: expected the directory of a run, found {found}; distbp ls names the runs "
            "below a directory"
        )
    given = given.absolute()
    metrics = Metrics(given / "metrics.jsonl") if metrics is None else metrics
    metrics.update()
    events = _without_repetition(_records(given / "events.jsonl"))
    result, holder = _json(given / "result.json"), _json(given / "lock")
    times = [event["time"] for event in events if isinstance(event.get("time"), int | float)]
    times += [time for name in ("metrics.jsonl", "result.json") if (time := _changed(given / name))]
    began = min(times, default=_changed(given / "lock"))
    return Run(
        given,
        _state(given, result, holder, max(times, default=0.0)),
        metrics,
        config=_toml(given / "config.toml"),
        environment=_json(given / "environment.json"),
        result=result,
        events=events,
        confusion=_json(given / "confusion.json"),
        holder=holder,
        began=began,
        changed=max(times, default=began),
    )


def _state(path: Path, result: Record, holder: Record, changed: float) -> str:
    """Return how it stands with a run."""
    status = result.get("status")
    if status in (DONE, STOPPED, FAILED):
        return str(status)
    held = _is_locked(path / "lock")
    if held is None or (not held and holder.get("host") not in (None, socket.gethostname())):
        held = time.time() - changed < _FRESH_S
    return RUNNING if held else LOST


def _is_locked(path: Path) -> bool | None:
    """Return whether some process of this machine holds the lock; None if that cannot be known."""
    try:
        inode = str(path.stat().st_ino)
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None if path.exists() else False
    places = [words[5] for words in map(str.split, lines) if len(words) > 5 and words[1] == "FLOCK"]
    return any(place.rsplit(":", 1)[-1] == inode for place in places)


def _without_repetition(events: list[Record]) -> list[Record]:
    """Leave out a start that looked only: the same command says it again when it trains."""
    kept: list[Record] = []
    for event in events:
        if kept and event.get("kind") == kept[-1].get("kind") == "start":
            before = kept[-1]
            same = before.get("host") == event.get("host") and before.get("step") == event.get("step")
            if same and event.get("time", 0) - before.get("time", 0) < 10:
                kept.pop()
        kept.append(event)
    return kept


def _records(path: Path) -> list[Record]:
    """Return the records of a file; none if it cannot be read."""
    try:
        return [record for record in read_records(path) if isinstance(record, dict)]
    except (OSError, ValueError):
        return []


def _parse(line: bytes) -> Record | None:
    """Return the record of a line, None if it is none; Python writes NaN, which msgspec does not read."""
    try:
        found = msgspec.json.decode(line)
    except msgspec.DecodeError:
        try:
            found = json.loads(line)
        except ValueError:
            return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def _json(path: Path) -> Record:
    """Return the object in a JSON file; empty if there is none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _toml(path: Path) -> Record:
    """Return the tables of a TOML file; empty if there is none that can be read."""
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _changed(path: Path) -> float | None:
    """Return when a file was changed last; None if there is none."""
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None
