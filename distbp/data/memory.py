"""A data set held in memory: two arrays, and batches gathered from them.

Every process that calls `ArrayDataset(x, y)` on views of one shared segment (`shared.py`) reads the same
memory. It knows nothing of files, order or normalisation.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ArrayDataset"]


class ArrayDataset:
    """The `Dataset` of `x` float32 (N, *sample_shape) and `y` int64 (N,) or float32 (N, O).

    Both are C-contiguous, referenced rather than copied, and never written.
    """

    def __init__(self, x: NDArray[np.float32], y: NDArray[Any]) -> None:
        assert x.dtype == np.float32, f"x must be float32, not {x.dtype}"
        assert y.dtype in (np.int64, np.float32), f"y must be int64 or float32, not {y.dtype}"
        assert len(x) == len(y), f"x has {len(x)} samples and y has {len(y)}"
        assert x.flags.c_contiguous, "x must be C-contiguous"
        assert y.flags.c_contiguous, "y must be C-contiguous"
        self.x = x
        self.y = y

    def __len__(self) -> int:
        return len(self.x)

    def batch(
        self,
        indices: NDArray[np.int64],
        x_out: NDArray[np.float32] | None = None,
        y_out: NDArray[Any] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Return samples `indices` (see `Dataset.batch`).  Raises IndexError outside `range(len(self))`."""
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(
                f"expected sample numbers in 0..{len(self) - 1}, got {indices.min()}..{indices.max()}"
            )
        # The check is done, so "clip" changes no value; with `out`, "raise" would gather into a copy first.
        x = np.take(self.x, indices, axis=0, out=x_out, mode="clip")
        y = np.take(self.y, indices, axis=0, out=y_out, mode="clip")
        return x, y
