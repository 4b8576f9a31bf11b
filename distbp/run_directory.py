"""The run directory: one place for everything that a run leaves, and for one job at a time.

    config.toml  environment.json  result.json        what was asked, where it ran, how it ended
    metrics.jsonl  events.jsonl  samples.log           records, one a line
    logs/rank-00000.log                                what each worker had to say
    checkpoints/step-00001000/                         see `distbp/checkpoint/`
    report.html                                        all of it on one page, written when a run ends
    lock                                               held by the job that writes here

The keeper of a job (the launching process; the only worker of a serial run) opens it, holds a lock on it
until it ends, and decides what a run begins from: a finished run answers at once, a checkpoint of another
model is refused, a damaged checkpoint is passed over in favour of the one before and named.

Directories are 0700 and files 0600.  The lock is `flock`, which the kernel drops with its last holder,
so a killed job leaves no stale lock; `lock` also says who holds it, and how many starts in a row ended
without a word and without a new checkpoint: something that starts a job again and again is told so with 70.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import msgspec

from distbp import checkpoint
from distbp.backends.base import Admission, Plan, differences
from distbp.errors import (
    CannotWrite,
    CheckpointError,
    ConfigError,
    InputMissing,
    RestartsUsedUp,
    WorkerLost,
)
from distbp.metrics.records import append_record
from distbp.metrics.report import try_to_report
from distbp.terminal import say

_HASH_DIGITS = 64
"""Hexadecimal digits of a SHA-256."""

__all__ = ["RunDirectory", "default_name"]


def default_name(name: str, now: float | None = None) -> str:
    """Return `runs/<name>-<date>-<time>` in local time."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
    return f"runs/{name}-{stamp}"


class RunDirectory:
    """An open run directory, locked for this job; `close` is idempotent."""

    def __init__(self, path: Path, lock: int, before: _LockNote) -> None:
        self.path = path
        self.start = before.start + 1
        self._lock = lock
        self._ended = False
        newest = _newest_step(path)
        me = (os.getpid(), socket.gethostname())
        fruitless = 0 if newest > before.newest else before.fruitless
        if me != (before.pid, before.host):  # A command may open it twice: to look, and to train.
            fruitless += 1
        self._note = _LockNote(*me, self.start, fruitless, newest)

    @classmethod
    def open(cls, out: str | None, name: str) -> RunDirectory:
        """Create the directory if needed and lock it; `CannotWrite` names who holds it.

        Without `out` the directory is a new one, never one that somebody made in the same second.
        """
        path = _new_directory(name) if out is None else Path(out).absolute()
        try:
            for folder in (path, path / "logs", path / "checkpoints"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise CannotWrite(
                f"cannot create the run directory {path}: {error.strerror}; choose another with --out"
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(lock, 4096).decode(errors="replace").strip() or "{}"
            os.close(lock)
            raise CannotWrite(
                f"the run directory {path} is in use by {_describe_holder(holder)}; "
                "wait for that job, or choose another directory with --out"
            ) from error
        run = cls(path, lock, _read_note(os.read(lock, 4096)))
        try:
            run._write_note()
        except OSError as error:
            run.close()
            raise CannotWrite(f"cannot write {path / 'lock'}: {error.strerror}; free some space") from error
        return run

    def admit(self, plan: Plan) -> Admission:
        """Decide what the run begins from, and write down what it is."""
        folder = self.path / "checkpoints"
        checkpoint.remove_leftovers(folder)
        if (fruitless := self._note.fruitless - 1) > plan.max_restarts:
            self._forget_fruitless()
            raise RestartsUsedUp(
                f"{fruitless} starts in a row ended without a word and without a new checkpoint in "
                f"{self.path}; look for the cause in its logs, then run again"
            )
        if plan.resume == "never":
            if checkpoint.list_checkpoints(folder) or (self.path / "result.json").exists():
                raise CannotWrite(
                    f"{self.path} already holds a run and --resume never was given; choose another "
                    "directory with --out, or leave --resume away to go on with that run"
                )
            restore = None
        elif plan.resume == "auto":
            restore = self.newest_checkpoint()
        else:
            restore = Path(plan.resume)
            if not restore.is_dir():
                raise InputMissing(f"--resume {plan.resume}: no such checkpoint directory")
            problems = checkpoint.verify(restore)
            if problems:
                raise CheckpointError(
                    f"{restore} is damaged: {problems[0]}; name another checkpoint, or use --resume auto "
                    "to take the newest one that verifies"
                )
        step = 0
        if restore is not None:
            held = checkpoint.describe(restore)
            step = held["step"]
            compare_identity(plan, held["metadata"], restore)
            finished = self._finished_result(plan, step)
            if finished is not None:
                return Admission(self.path, restore, self.start, finished)
            self._set_aside_later(step)
        self._describe_run(plan, step)
        return Admission(self.path, restore, self.start)

    def newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that verifies; earlier ones of this start included."""
        return checkpoint.newest_verified(self.path / "checkpoints", self._report_damaged)

    def event(self, record: dict[str, Any]) -> None:
        """Append one record to `events.jsonl`; a disk that is full costs the record, not the run."""
        try:
            append_record(self.path / "events.jsonl", {"time": time.time()} | record)
        except CannotWrite as error:
            say(f"distbp: W_RECORD_LOST {error}")

    def write_result(self, result: dict[str, Any]) -> None:
        """Replace `result.json` as a whole; a job that says how it ended counts as a fruitful start."""
        if result["exit_code"] != WorkerLost.exit_code:
            self._forget_fruitless()
        write_file(self.path / "result.json", json.dumps(result, indent=2) + "\n")
        self._ended = True

    def close(self) -> None:
        """Drop the lock, and write the report of a run that said how it ended; idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        if self._ended:
            self._ended = False
            try_to_report(self.path)

    def _forget_fruitless(self) -> None:
        """Begin to count starts without a new checkpoint anew."""
        self._note = msgspec.structs.replace(self._note, fruitless=0)
        with contextlib.suppress(OSError):  # The disk is full: the count only errs on the safe side.
            self._write_note()

    def _write_note(self) -> None:
        """Write into the lock file who holds it."""
        content = msgspec.json.encode(self._note) + b"\n"
        os.pwrite(self._lock, content, 0)
        os.ftruncate(self._lock, len(content))

    def _finished_result(self, plan: Plan, step: int) -> dict[str, Any] | None:
        """Return the result of a run that has already made all its steps."""
        try:
            result: dict[str, Any] = json.loads((self.path / "result.json").read_text())
        except (OSError, ValueError):  # Missing, or cut off by a power cut: the run is not known as finished.
            return None
        finished = result.get("status") == "done" and result.get("steps") == step >= plan.total_steps
        return result | {"out": str(self.path)} if finished else None

    def _set_aside_later(self, step: int) -> None:
        """Rename checkpoints of later steps: this run will make those steps again, perhaps differently."""
        for path in checkpoint.list_checkpoints(self.path / "checkpoints"):
            if int(path.name.removeprefix("step-")) > step:
                path.rename(path.with_name(f"{path.name}.superseded-{self.start}"))
                self.event({"kind": "checkpoint", "status": "superseded", "path": str(path)})

    def _describe_run(self, plan: Plan, step: int) -> None:
        """Write what repeats the run, where it runs, and that it begins at `step`."""
        (self.path / "result.json").unlink(missing_ok=True)
        write_file(self.path / "environment.json", json.dumps(plan.environment, indent=2) + "\n")
        if plan.config_toml:
            write_file(self.path / "config.toml", plan.config_toml)
        self.event(
            {
                "kind": "start",
                "start": self.start,
                "step": step,
                "total_steps": plan.total_steps,
                "host": socket.gethostname(),
            }
        )

    def _report_damaged(self, path: Path, reason: str) -> None:
        """Say that a checkpoint was passed over."""
        say(
            f"distbp: W_CHECKPOINT_DAMAGED {path.name}: {reason}; falling back to the one before",
        )
        self.event({"kind": "checkpoint", "status": "damaged", "path": str(path), "reason": reason})


def compare_identity(plan: Plan, metadata: dict[str, Any], path: Path) -> None:
    """Refuse a checkpoint of another run, naming every key that differs; warn if the software differs."""
    held = metadata.get("identity", {})
    wanted = json.loads(json.dumps(plan.identity))
    differing = [
        f"  {key}: the checkpoint has {_shorten(one)}, this run {_shorten(two)}"
        for key, one, two in differences(held, wanted)
    ]
    if differing:
        raise ConfigError(
            f"{path} belongs to another run:\n" + "\n".join(differing) + "\n"
            "give the same options, or choose another directory: --out, in a script fit(..., out=...)"
        )
    before, now = metadata.get("environment", {}), plan.environment
    changed = [
        f"{key} was {before[key]!r}, is {now.get(key)!r}" for key in before if before[key] != now.get(key)
    ]
    if changed:
        say(
            "distbp: W_ENVIRONMENT_CHANGED since the checkpoint: " + "; ".join(changed) + "; bits may differ",
        )


def _shorten(value: Any) -> str:
    """Return a value as a message shows it: of a hash the first digits do."""
    is_hash = isinstance(value, str) and len(value) == _HASH_DIGITS
    return f"{value[:16]}..." if is_hash else repr(value)


def write_file(path: Path, text: str) -> None:
    """Write a small file so that readers see the old content or the new one, never half of it."""
    temporary = path.with_name(path.name + ".new")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(temporary, flags, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}; free some space") from error


def _new_directory(name: str) -> Path:
    """Make a directory with the default name; a number is added when that name is taken."""
    base = Path(default_name(name)).absolute()
    for number in range(1, 1000):
        path = base if number == 1 else base.with_name(f"{base.name}-{number}")
        try:
            path.mkdir(mode=0o700, parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise CannotWrite(
                f"cannot create the run directory {path}: {error.strerror}; choose another with --out"
            ) from error
        return path
    raise CannotWrite(f"{base} and 999 names after it are taken; choose a directory with --out")


class _LockNote(msgspec.Struct, frozen=True):
    """What the lock file says: its holder, and how often a job has begun here.

    `fruitless` counts the last starts that neither said how they ended nor made a checkpoint newer than that
    of step `newest`.
    """

    pid: int = -1
    host: str = ""
    start: int = 0
    fruitless: int = 0
    newest: int = -1


def _read_note(content: bytes) -> _LockNote:
    """Return what the lock file says; one that is empty or cut off says nothing."""
    try:
        return msgspec.json.decode(content, type=_LockNote)
    except msgspec.DecodeError:
        return _LockNote()


def _newest_step(path: Path) -> int:
    """Return the step of the newest checkpoint, or -1."""
    names = [found.name for found in checkpoint.list_checkpoints(path / "checkpoints")]
    return int(names[0].removeprefix("step-")) if names else -1


def _describe_holder(content: str) -> str:
    """Return 'process 12 on host a' from the lock file of the job that is running."""
    try:
        note = json.loads(content)
        return f"process {note['pid']} on host {note['host']}"
    except (ValueError, KeyError, TypeError):
        return "another job"
