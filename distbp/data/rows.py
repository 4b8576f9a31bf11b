"""Rows: what stands where an array of samples would, if samples are made or read when they are asked for.

`ArrayDataset`, splitting, statistics and fingerprints use of an array its shape, its type and the rows of
some numbers; whatever offers these three is data.  The same number gives the same bytes, on every worker.

For the way to other processes an object takes itself apart into JSON values and arrays, which travel in
shared memory under names (`describe`), and is put together again there (`restore`); `parts.py` does the rest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Column", "Packer", "Rows", "Unpacker", "take_rows"]

Array: TypeAlias = NDArray[Any]
Column: TypeAlias = "Array | Rows"


class Packer(Protocol):
    """Takes what cannot be JSON, and returns what can."""

    def array(self, array: Array) -> str:
        """Return the name under which `array` travels."""
        ...

    def column(self, column: Column) -> dict[str, Any]:
        """Return the description of an array or of rows."""
        ...


class Unpacker(Protocol):
    """Gives back what a packer took."""

    def array(self, name: str) -> Array:
        """Return the array of that name."""
        ...

    def column(self, description: Mapping[str, Any]) -> Column:
        """Return what was described."""
        ...


class Rows(ABC):
    """An array of `shape` and `dtype` of which nobody holds more than some rows."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    disk_row_bytes: int = 0
    """Bytes that a row takes on a disk from which it is read when it is asked for; 0 where none is."""

    def read_ahead(self, indices: NDArray[np.int64]) -> None:  # noqa: B027  Most rows are in memory.
        """Begin to fetch rows that will soon be asked for."""

    @abstractmethod
    def take(self, indices: NDArray[np.int64], out: Array | None = None) -> Array:
        """Return rows `indices` (n,), all in range, as (n, *shape[1:]): in `out`, or new."""

    @abstractmethod
    def describe(self, packer: Packer) -> dict[str, Any]:
        """Return JSON values from which `restore` makes an equal object."""

    @classmethod
    @abstractmethod
    def restore(cls, description: Mapping[str, Any], unpacker: Unpacker) -> Rows:
        """Return what `describe` described."""

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | NDArray[np.int64]) -> Array:
        """Return the rows of a slice or of an array of numbers, new."""
        indices = np.arange(*key.indices(len(self))) if isinstance(key, slice) else key
        return self.take(indices)


def take_rows(column: Column, indices: NDArray[np.int64], out: Array | None = None) -> Array:
    """Return rows `indices` of an array or of rows; they must be in range."""
    if isinstance(column, Rows):
        return column.take(indices, out)
    # The caller has checked, so "clip" changes no value; with `out`, "raise" would gather into a copy first.
    taken: Array = np.take(column, indices, axis=0, out=out, mode="clip")
    return taken
