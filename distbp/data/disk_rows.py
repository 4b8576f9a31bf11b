"""Rows of an array that stays in its file: read by position when they are asked for.

For arrays larger than memory.  Rows that lie near each other are read at once; the kernel's page cache keeps
what was read as long as there is room, and `read_ahead` asks it to fetch rows that will be wanted soon while
something else is computed.  Nothing is mapped: a mapped file that is cut short kills whoever touches it
(SIGBUS), a short read is an error with a name.

Every worker opens the file by its path, so the path must mean the same file on every host.  Size and time of
the last change are compared when it is opened; who writes into the file
while it is read gets what was asked for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.rows import Array, Packer, Rows, Unpacker
from distbp.errors import DataError

__all__ = ["DiskRows"]

NEAR_BYTES = 64 << 10
"""Rows with a smaller gap between them are fetched together: a disk reads that in less time than it seeks."""


class DiskRows(Rows):
    """An array of `shape` and `dtype`, C-contiguous from byte `offset` of the file at `path` on."""

    def __init__(
        self, path: str, offset: int, shape: tuple[int, ...], dtype: str, *, changed: int | None = None
    ) -> None:
        self.shape = shape
        self.dtype = np.dtype(dtype).newbyteorder("=")
        self._stored = np.dtype(dtype)
        self._path = str(Path(path).absolute())
        self._offset = offset
        self.disk_row_bytes = math.prod(shape[1:]) * self._stored.itemsize
        try:
            self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise DataError(
                f"{path}: expected the file of the samples on every host, got: {error.strerror}; put it on a "
                "shared disk, or set data.on_disk=false"
            ) from error
        # The page cache would read on behind every row, and rows are asked for in no order.
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        found = os.fstat(self._descriptor)
        self._changed = found.st_mtime_ns
        if found.st_size < offset + shape[0] * self.disk_row_bytes or changed not in (None, self._changed):
            raise DataError(
                f"{path}: expected the file as it was when the job began, got another; start anew"
            )

    def __del__(self) -> None:
        """Close the file."""
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def take(self, indices: NDArray[np.int64], out: Array | None = None) -> Array:
        """Return the rows; see `Rows.take`."""
        flat = indices.reshape(-1)
        rows = np.empty((flat.size, self.disk_row_bytes), np.uint8)
        order = np.argsort(flat, kind="stable")
        # Slices of a memoryview cost a fraction of those of an array.
        content = rows.reshape(-1).data
        numbers, places = flat[order], order.tolist()
        for first, last in _runs(numbers, 1):
            # Rows that lie side by side in the file need one read.
            self._read(content, places[first:last], int(numbers[first]))
        values = rows.view(self._stored).reshape(*indices.shape, *self.shape[1:])
        if out is None:
            return values.astype(self.dtype, copy=False)
        np.copyto(out, values)
        return out

    def read_ahead(self, indices: NDArray[np.int64]) -> None:
        """Ask the kernel to fetch these rows, and return at once; what lies between near ones comes too."""
        ordered = np.sort(indices, axis=None)
        near = 1 + NEAR_BYTES // self.disk_row_bytes
        for first, last in _runs(ordered, near):
            start, stop = int(ordered[first]), int(ordered[last - 1]) + 1
            place, length = self._offset + start * self.disk_row_bytes, (stop - start) * self.disk_row_bytes
            os.posix_fadvise(self._descriptor, place, length, os.POSIX_FADV_WILLNEED)

    def describe(self, packer: Packer) -> dict[str, Any]:
        """Return the description; see `Rows.describe`."""
        return {
            "path": self._path,
            "offset": self._offset,
            "shape": list(self.shape),
            "dtype": self._stored.str,
            "changed": self._changed,
        }

    @classmethod
    def restore(cls, description: Mapping[str, Any], unpacker: Unpacker) -> DiskRows:
        """Return what was described; see `Rows.restore`."""
        return cls(
            description["path"],
            description["offset"],
            tuple(description["shape"]),
            description["dtype"],
            changed=description["changed"],
        )

    def _read(self, content: memoryview, places: list[int], first: int) -> None:
        """Read consecutive rows from number `first` on, one into each of `places` of `content`."""
        size = self.disk_row_bytes
        buffers = [content[place * size : (place + 1) * size] for place in places]
        wanted = len(buffers) * self.disk_row_bytes
        done = os.preadv(
            self._descriptor, buffers[:_MOST_BUFFERS], self._offset + first * self.disk_row_bytes
        )
        if done != min(wanted, _MOST_BUFFERS * self.disk_row_bytes):
            raise DataError(
                f"{self._path}: expected {wanted} bytes at row {first}, got {done}; the file was cut short"
            )
        if len(buffers) > _MOST_BUFFERS:
            self._read(content, places[_MOST_BUFFERS:], first + _MOST_BUFFERS)


_MOST_BUFFERS = min(1024, os.sysconf("SC_IOV_MAX"))
"""More are refused by one call (readv(2))."""


def _runs(ordered: NDArray[np.int64], near: int) -> list[tuple[int, int]]:
    """Return the ranges of `ordered` in which each number is at most `near` above the one before.

    With `near` 1, a number that comes twice begins a new range: its row is read twice.
    """
    if not ordered.size:
        return []
    steps = np.diff(ordered)
    breaks = (steps > near) if near > 1 else (steps != 1)
    ends = np.flatnonzero(breaks) + 1
    return list(zip([0, *ends.tolist()], [*ends.tolist(), len(ordered)], strict=True))
