"""Files that are durable when written and checked when read: the only place that opens a descriptor.

Writing creates new files only (`O_EXCL`), readable by the owner alone, and ends with fsync.  Reading refuses
symbolic links, pipes and devices, and computes both checksums over the bytes on their way into the caller's
buffer.  Names are relative to an open folder, so that nobody can exchange a path component in between.

It knows nothing of what is in the files.  mmap was rejected: a mapped file that shrinks is SIGBUS.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from distbp.checkpoint.manifest import FileRecord
from distbp.crc import crc32
from distbp.errors import CheckpointError, InputMissing

__all__ = [
    "BLOCK_BYTES",
    "CheckedFile",
    "Checksums",
    "error_name",
    "no_pause",
    "open_folder",
    "sync_folder",
    "write_file",
]

BLOCK_BYTES = 1 << 20
"""Large enough that system calls cost nothing, small enough that both checksums and the copy into the page
cache find it in the processor's cache, and that one block never holds up the training beside it for long."""
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK the open of a named pipe would wait for a writer for ever.
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Checksums:
    """The running size, CRC-32 and (unless `only_crc`) SHA-256 of a stream of bytes."""

    def __init__(self, *, only_crc: bool = False) -> None:
        self._size = 0
        self._crc32 = 0
        self._sha256 = None if only_crc else hashlib.sha256()

    def update(self, block: memoryview | bytes) -> None:
        """Take in the next bytes; both functions release the interpreter for large blocks."""
        self._size += len(block)
        self._crc32 = crc32(block, self._crc32)
        if self._sha256 is not None:
            self._sha256.update(block)

    def record(self) -> FileRecord:
        """Return what was seen so far; only with both checksums."""
        assert self._sha256 is not None, "a record needs the SHA-256, which was not computed"
        return FileRecord(self._size, self._crc32, self._sha256.hexdigest())

    def problem(self, expected: FileRecord) -> str:
        """Return which checksum differs from `expected`; "" if none does."""
        if self._size != expected.size:
            return f"expected {expected.size} bytes, found {self._size}"
        if self._crc32 != expected.crc32:
            return f"expected CRC-32 {expected.crc32:08x}, found {self._crc32:08x}: the content was damaged"
        if self._sha256 is not None and self._sha256.hexdigest() != expected.sha256:
            return f"expected SHA-256 {expected.sha256}, found {self._sha256.hexdigest()}: it was changed"
        return ""


def error_name(error: OSError) -> str:
    """Return an operating system error as "ENOSPC (No space left on device)"."""
    number = error.errno or 0
    return f"{errno.errorcode.get(number, f'errno {number}')} ({os.strerror(number)})"


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
    """Open the folder `path`, itself not a symbolic link, for use as `folder`."""
    try:
        folder = os.open(path, _FOLDER_FLAGS)
    except FileNotFoundError as error:
        raise InputMissing(f"{path}: expected a checkpoint folder, found nothing: check the path") from error
    except OSError as error:
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a symbolic link: name the folder it points to") from error
        raise CheckpointError(f"{path}: expected a readable folder: {error_name(error)}") from error
    try:
        yield folder
    finally:
        os.close(folder)


def sync_folder(path: Path) -> None:
    """Make the names in the folder `path` durable; OSError if the disk refuses.

    Here a symbolic link is followed: a run directory that points to a scratch disk is common, and nothing is
    read.
    """
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_file(
    folder: Path, name: str, pieces: Iterable[memoryview | bytes], pause: Callable[[int], None]
) -> FileRecord:
    """Write `pieces` to the new file `name`, make it durable, and return its record.

    `pause` is called after each block with its number of bytes.  The disk begins to write while the file
    grows, so that the fsync at the end has little left to wait for.  On OSError the file is half written and
    the descriptor closed: it must be removed, never synced again.
    """
    checksums = Checksums()
    descriptor = os.open(folder / name, _WRITE_FLAGS, 0o600)
    try:
        begun = position = 0
        for piece in pieces:
            view = memoryview(piece)
            for start in range(0, len(view), BLOCK_BYTES):
                block = view[start : start + BLOCK_BYTES]
                checksums.update(block)
                _write_all(descriptor, block)
                position += len(block)
                if position - begun >= BLOCK_BYTES:
                    _not_needed(descriptor, begun, position - begun)
                    begun = position
                pause(len(block))
        os.fsync(descriptor)
        _not_needed(descriptor, 0, 0)
    finally:
        os.close(descriptor)
    return checksums.record()


def no_pause(size: int) -> None:
    """Take note of a block and do nothing: for whoever is in a hurry."""


def _not_needed(descriptor: int, start: int, length: int) -> None:
    """Let the system write a range to the disk now and keep none of it in memory (length 0: to the end).

    For Linux this advice begins the writing of dirty pages, and drops clean ones; the data of the user stay
    in the page cache instead of checkpoints that are hardly ever read.  Elsewhere nothing is lost without it.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, length, os.POSIX_FADV_DONTNEED)


def _write_all(descriptor: int, block: memoryview) -> None:
    """Write the whole block; the system may take less than it was given at a time."""
    while block:
        block = block[os.write(descriptor, block) :]


class CheckedFile:
    """A regular file that is read once, from front to back, under running checksums; a context manager.

    Every OSError and every short read becomes a CheckpointError that begins with the name.  `pause` is called
    after each block with its number of bytes.
    """

    def __init__(
        self, folder: int, name: str, *, only_crc: bool = False, pause: Callable[[int], None] = no_pause
    ) -> None:
        self.name = name
        self._checksums = Checksums(only_crc=only_crc)
        self._only_crc = only_crc
        self._pause = pause
        self._position = 0
        try:
            self._descriptor = os.open(name, _READ_FLAGS, dir_fd=folder)
        except OSError as error:
            raise CheckpointError(f"{name}: {_why_not_opened(error)}") from error
        status = os.fstat(self._descriptor)
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise CheckpointError(f"{name}: expected a regular file, found a folder, pipe or device")

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        if self._descriptor >= 0:
            if self._only_crc:  # Read for pruning: the next time it shall come from the disk again.
                _not_needed(self._descriptor, 0, 0)
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, count: int) -> bytearray:
        """Return the next `count` bytes; if the file has not as many, nothing is allocated."""
        if count > self.size - self._position:
            raise self._too_short(count)
        buffer = bytearray(count)
        self.read_into(memoryview(buffer))
        return buffer

    def read_into(self, view: memoryview) -> None:
        """Fill `view`, a flat view of bytes, with the next bytes of the file."""
        filled = 0
        while filled < len(view):
            block = view[filled : filled + BLOCK_BYTES]
            try:
                count = os.preadv(self._descriptor, [block], self._position)
            except OSError as error:
                raise CheckpointError(f"{self.name}: cannot be read: {error_name(error)}") from error
            if count == 0:
                raise self._too_short(len(view) - filled)
            self._checksums.update(block[:count])
            self._position += count
            filled += count
            self._pause(count)

    def problem(self, expected: FileRecord) -> str:
        """Return what differs between the bytes read so far and `expected`; "" if nothing does."""
        return self._checksums.problem(expected)

    def _too_short(self, wanted: int) -> CheckpointError:
        return CheckpointError(
            f"{self.name}: expected {wanted} more bytes after byte {self._position}, the file ends before: "
            "it was truncated"
        )


def _why_not_opened(error: OSError) -> str:
    """Return the reason in the words of this module."""
    if error.errno == errno.ENOENT:
        return "is missing"
    if error.errno == errno.ELOOP:
        return "is a symbolic link, and only regular files are read"
    return f"cannot be opened: {error_name(error)}"
