"""The checkpoints of one run, side by side: their names, the newest that verifies, and removal.

A complete name, `step-%08d`, is a promise (see the package docstring); everything else that begins with
`step-` and contains `.tmp-` is ours to delete.  Only the process that holds the lock of the run directory may
remove anything.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from distbp.checkpoint.files import error_name, no_pause
from distbp.checkpoint.reading import verify
from distbp.errors import CannotWrite, CheckpointError

__all__ = [
    "discard",
    "list_checkpoints",
    "newest_verified",
    "prune",
    "remove_leftovers",
    "remove_path",
    "step_name",
]

_COMPLETE = re.compile(r"step-(\d{8,18})")
_LEFTOVER = re.compile(r"step-\d{8,18}\.tmp-.*", re.DOTALL)


def step_name(step: int) -> str:
    """Return the complete name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the paths with complete names in `directory`, newest step first; nothing is verified."""
    names = _names(directory)
    steps = [int(match[1]) for match in map(_COMPLETE.fullmatch, names) if match]
    present = set(names)
    return [
        directory / step_name(step) for step in sorted(set(steps), reverse=True) if step_name(step) in present
    ]


def newest_verified(directory: Path, report: Callable[[Path, str], None]) -> Path | None:
    """Return the newest checkpoint in `directory` whose every byte holds; None if there is none.

    `report` is called with each damaged one that was passed over, and why.
    """
    for path in list_checkpoints(directory):
        problems = verify(path)
        if not problems:
            return path
        report(path, "; ".join(problems))
    return None


def remove_leftovers(directory: Path) -> list[str]:
    """Remove what interrupted saves and removals left in `directory`, and return the names.

    CannotWrite if one cannot be removed.
    """
    leftovers = sorted(name for name in _names(directory) if _LEFTOVER.fullmatch(name))
    for name in leftovers:
        try:
            remove_path(directory / name)
        except OSError as error:
            raise CannotWrite(f"{directory / name}: cannot be removed: {error_name(error)}") from error
    return leftovers


def prune(newest: Path, *, keep: int, pause: Callable[[int], None] = no_pause) -> list[Path]:
    """Remove all checkpoints older than the `keep`-th that verifies, and return their paths.

    `newest` was verified while it was written and is durable.  Those of later steps, which exist when a run
    went back to an earlier one, are neither counted nor touched.  Damaged ones between those that are kept
    stay: they cost space and may hold evidence.  If fewer than `keep` verify, nothing is removed.  `pause` is
    called after each block that was read.  OSError if the disk refuses.
    """
    kept = 0
    removed: list[Path] = []
    present = list_checkpoints(newest.parent)
    for path in present[present.index(newest) :]:
        if kept >= keep:
            discard(path, "pruned")
            removed.append(path)
        elif path == newest or not verify(path, only_crc=True, pause=pause):
            kept += 1
    return removed


def discard(path: Path, why: str) -> None:
    """Take away the complete name at once, then the files: a kill in between leaves a leftover."""
    doomed = path.with_name(f"{path.name}.tmp-{why}")
    remove_path(doomed)
    os.rename(path, doomed)
    remove_path(doomed)


def remove_path(path: Path) -> None:
    """Remove a folder with its content, a file, or a link (not what it points to); nothing there is fine."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as error:
        if error.errno not in (
            errno.EISDIR,
            errno.EPERM,
        ):  # POSIX says EPERM for a folder, Linux says EISDIR.
            raise
        shutil.rmtree(path)


def _names(directory: Path) -> list[str]:
    """Return the names in `directory`; none if it does not exist."""
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{directory}: expected a readable folder: {error_name(error)}") from error
