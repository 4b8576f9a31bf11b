"""A data set: samples and targets, and batches gathered from them.

Both are arrays held in memory, or `Rows`, which are made or read when they are asked for.  Every process that
calls `ArrayDataset(x, y)` on views of one shared segment (`shared.py`) reads the same memory.  It knows
nothing of files, order or normalisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.rows import Column, Rows, take_rows

__all__ = ["ArrayDataset"]


class ArrayDataset:
    """The `Dataset` of `x` (N, *sample_shape) and `y` (N, ...).

    `x` is float32, or int64 where samples are codes; `y` int64 or float32.  Arrays are C-contiguous,
    referenced rather than copied, and never written.
    """

    def __init__(self, x: Column, y: Column) -> None:
        for name, column in (("x", x), ("y", y)):
            assert column.dtype in (np.int64, np.float32), (
                f"{name} must be int64 or float32, not {column.dtype}"
            )
            assert isinstance(column, Rows) or column.flags.c_contiguous, f"{name} must be C-contiguous"
        assert len(x) == len(y), f"x has {len(x)} samples and y has {len(y)}"
        self.x = x
        self.y = y

    def __len__(self) -> int:
        return len(self.x)

    def batch(
        self,
        indices: NDArray[np.int64],
        x_out: NDArray[Any] | None = None,
        y_out: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return samples `indices` (see `Dataset.batch`).  Raises IndexError outside `range(len(self))`."""
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(
                f"expected sample numbers in 0..{len(self) - 1}, got {indices.min()}..{indices.max()}"
            )
        return take_rows(self.x, indices, x_out), take_rows(self.y, indices, y_out)
