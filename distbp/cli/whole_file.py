"""A file that appears whole or not at all: what `predict` and `export` write."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from distbp.errors import CannotWrite

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one, never half of it.

    The file is 0600, as everything that distbp writes.
    """
    temporary = ""
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
        temporary = ""
    except OSError as error:
        raise CannotWrite(
            f"{path}: expected to write {len(content):,} bytes, got: {error.strerror}; make room, or choose "
            "another place with -o"
        ) from error
    finally:
        if temporary:
            with contextlib.suppress(OSError):  # The error above is the one that matters.
                os.unlink(temporary)
