"""Whether every host can use the folder in which runs would lie: one writes a file, the others read it.

Who writes and who reads is for `doctor_mpi.py` and `doctor_ray.py`, and so is what follows when one cannot.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

from distbp.doctor import check_out, existing_folder

__all__ = ["look_for", "posted"]

VISIBLE_S = 5.0
"""A network file system may show a new file late."""


@contextlib.contextmanager
def posted(out: Path) -> Iterator[tuple[str, str] | None]:
    """Write a file where runs would lie; give its path and its random text, None if that fails."""
    path, text = existing_folder(out) / f".distbp-doctor-{secrets.token_hex(4)}", secrets.token_hex(16)
    try:
        path.write_text(text)
    except OSError:
        yield None
        return
    try:
        yield str(path), text
    finally:
        path.unlink(missing_ok=True)


def look_for(path: str, text: str) -> str:
    """Return why this host cannot use the folder in which another wrote `text` to `path`; "" if it can."""
    until, folder = time.monotonic() + VISIBLE_S, Path(path).parent
    while True:
        try:
            os.listdir(folder)  # Makes a network file system ask its server again.
            seen = Path(path).read_text()
            break
        except OSError as error:
            if time.monotonic() > until:
                there = "the file is not there" if folder.is_dir() else "there is no such directory"
                return there if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        time.sleep(0.1)
    if seen != text:
        return "the file has another content"
    verdict = check_out(folder)
    return "" if verdict.status != "FAIL" else verdict.finding
