"""Some rows of a source, as the model sees them: chosen, normalised, one batch at a time.

It is what `prepare` makes of rows that are too many to hold: the arithmetic is that of `Preprocessing`, so
the same samples have the same bytes, prepared at once or one by one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.preprocessing import Preprocessing
from distbp.data.rows import Array, Column, Packer, Rows, Unpacker, take_rows

__all__ = ["Selected"]


class Selected(Rows):
    """Rows `indices` (n,) int64 of `column`, treated as samples, or with `targets` as targets."""

    def __init__(
        self, column: Column, indices: NDArray[np.int64], preprocessing: Preprocessing, *, targets: bool
    ) -> None:
        self._column = column
        self._indices = indices
        self._preprocessing = preprocessing
        self._targets = targets
        self.shape = (len(indices), *column.shape[1:])
        self.dtype = np.dtype(preprocessing.target_type if targets else preprocessing.sample_type)
        self.disk_row_bytes = column.disk_row_bytes if isinstance(column, Rows) else 0

    def read_ahead(self, indices: NDArray[np.int64]) -> None:
        """Pass it on to the source; see `Rows.read_ahead`."""
        if isinstance(self._column, Rows):
            self._column.read_ahead(self._indices[indices])

    def take(self, indices: NDArray[np.int64], out: Array | None = None) -> Array:
        """Return the chosen rows; see `Rows.take`."""
        raw = take_rows(self._column, self._indices[indices.reshape(-1)])
        apply = self._preprocessing.apply_targets if self._targets else self._preprocessing.apply
        treated: Array = apply(raw)
        treated = treated.reshape(*indices.shape, *self.shape[1:])
        if out is None:
            return treated
        np.copyto(out, treated, casting="no")
        return out

    def describe(self, packer: Packer) -> dict[str, Any]:
        """Return the description; see `Rows.describe`."""
        return {
            "column": packer.column(self._column),
            "indices": packer.array(self._indices),
            "preprocessing": self._preprocessing.to_dict(),
            "targets": self._targets,
        }

    @classmethod
    def restore(cls, description: Mapping[str, Any], unpacker: Unpacker) -> Selected:
        """Return what was described; see `Rows.restore`."""
        return cls(
            unpacker.column(description["column"]),
            unpacker.array(description["indices"]),
            Preprocessing.from_dict(description["preprocessing"]),
            targets=description["targets"],
        )
