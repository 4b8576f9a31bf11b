"""How much `ray job submit --working-dir .` would send from here: Ray refuses more than `MOST_BYTES`.

Ray packs what is below the directory, symbolic links followed, except what .gitignore and .rayignore name and
`NEVER_SENT`; it complains only when everything is packed.  Git reads the patterns as Ray does, and is given a
repository of its own, since the directory may be in none.

Counting ends after `COUNT_S`: a home directory on a network file system may hold millions of files.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from distbp.doctor import Verdict
from distbp.doctor_ranks import say_list

__all__ = ["judge_upload", "sizes_to_send"]

MOST_BYTES = 100 << 20
"""What the dashboard of Ray 2.60 takes (`DASHBOARD_CLIENT_MAX_SIZE`); files are not compressed."""

NEVER_SENT = (".git", ".venv", "venv", "__pycache__")
"""What Ray 2.60 leaves out by itself."""

COUNT_S = 10.0
CURE = (
    "name them in .rayignore, keep data where all nodes see them, or submit with launch/ray-submit.sh, which "
    "takes --exclude"
)


def judge_upload(folder: Path) -> Verdict:
    """Compare what would be sent from `folder` with what Ray takes, and name the largest entries."""
    sizes, whole = sizes_to_send(folder, COUNT_S)
    total = sum(sizes.values())
    largest = sorted(sizes, key=lambda name: -sizes[name])
    entries = say_list([f"{name} {_mebibytes(sizes[name])}" for name in largest])
    limit = f"{MOST_BYTES >> 20} MiB"
    if total >= MOST_BYTES:
        least = "" if whole else "more than "
        finding = f"{folder} holds {least}{_mebibytes(total)}, and Ray takes {limit}; the largest: {entries}"
        return Verdict("warn", f"ray job submit --working-dir would fail: {finding}", CURE)
    if not whole:
        finding = f"{folder} was not counted within {COUNT_S:g} s; so far {_mebibytes(total)}: {entries}"
        return Verdict("warn", finding, "submit jobs from a directory of their own")
    return Verdict("ok", f"ray job submit --working-dir . would send {_mebibytes(total)} of at most {limit}")


def sizes_to_send(folder: Path, seconds: float) -> tuple[dict[str, int], bool]:
    """Return the bytes below each entry of `folder` that Ray would send, and whether all were counted."""
    until = time.monotonic() + seconds
    sizes: dict[str, int] = {}
    for name in _listed(folder, until) if shutil.which("git") else os.listdir(folder):
        if time.monotonic() > until:
            return sizes, False
        entry = name.partition("/")[0]
        if entry not in NEVER_SENT:
            sizes[entry] = sizes.get(entry, 0) + _size(folder / name, until)
    return sizes, time.monotonic() <= until


def _listed(folder: Path, until: float) -> Iterator[str]:
    """Yield the paths below `folder` that are not ignored; ends with `until`."""
    patterns = [f"--exclude={name}" for name in NEVER_SENT]
    if (folder / ".rayignore").is_file():
        patterns.append(f"--exclude-from={folder / '.rayignore'}")
    with tempfile.TemporaryDirectory(prefix="distbp-doctor-") as own:
        subprocess.run(["git", "init", "--quiet", own], check=True, capture_output=True, timeout=10)
        words = ["git", f"--git-dir={own}/.git", f"--work-tree={folder}", "-C", str(folder), "ls-files", "-z"]
        words += ["--others", "--exclude-per-directory=.gitignore", *patterns]
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as listing:
            assert listing.stdout is not None, "git speaks through a pipe"
            rest = b""
            try:
                while select.select([listing.stdout], [], [], max(0.0, until - time.monotonic()))[0]:
                    if not (data := os.read(listing.stdout.fileno(), 1 << 16)):
                        return
                    *names, rest = (rest + data).split(b"\0")
                    for name in map(os.fsdecode, names):
                        # A repository of its own, into which git does not look.
                        inside = _listed(folder / name, until) if name.endswith("/") else [""]
                        yield from (name + path for path in inside)
            finally:
                listing.kill()


def _size(path: Path, until: float) -> int:
    """Return the bytes of a file, or of all files below a directory, which git takes for a file if linked."""
    try:
        if not path.is_dir():
            return path.stat().st_size
    except OSError:
        return 0
    total = 0
    for place, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in folders if name not in NEVER_SENT]
        total += sum(_size(Path(place, name), until) for name in files)
        if time.monotonic() > until:
            break
    return total


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.0f} MiB" if size >= 10 << 20 else f"{size / 2**20:.1f} MiB"
