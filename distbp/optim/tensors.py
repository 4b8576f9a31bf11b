"""Which tensors make up a slice, and their sums from the sums of fixed blocks.

A tensor may be cut over several lanes.  Every owner of a part adds the sums of all blocks of the tensor,
which all workers see, by `math.fsum`: rounded once, so every owner gets the same total.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from distbp.optim.update import TensorPart

__all__ = ["SliceTensors"]


class SliceTensors:
    """The tensors of which the slice `[low, high)` of a flat vector of `size` elements is made.

    `borders` are `(offset, length)` of all tensors in order, `axes` their numbers of axes, `blocks` those of
    `norm.blocks(borders)`.  `parts` cover the slice and have no sums.
    """

    def __init__(
        self,
        borders: Sequence[tuple[int, int]],
        axes: Sequence[int],
        blocks: Sequence[tuple[int, int]],
        size: int,
        low: int,
        high: int,
    ) -> None:
        self.parts: list[TensorPart] = []
        self._blocks: list[slice] = []
        starts = [start for start, _ in blocks]
        ends = [*(offset for offset, _ in borders[1:]), size]
        for (offset, length), end, count in zip(borders, ends, axes, strict=True):
            if offset < high and end > low and offset < end:
                part = TensorPart(max(offset, low) - low, min(end, high) - low, count > 1)
                self.parts.append(part)
                self._blocks.append(slice(bisect_left(starts, offset), bisect_left(starts, offset + length)))

    def with_sums(self, sums: NDArray[np.float64]) -> list[TensorPart]:
        """Return the parts with the sums of their tensors; `sums` (rows, number of blocks) is complete."""
        return [
            replace(part, sums=tuple(math.fsum(row[blocks]) for row in sums))
            for part, blocks in zip(self.parts, self._blocks, strict=True)
        ]
