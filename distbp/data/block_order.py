"""The order of samples that lie on a disk: shuffled, and yet read in long runs.

A disk reads a run of rows far faster than the same rows one by one from all over the file.  So the samples of
an epoch are cut into blocks, the blocks are permuted, and the samples of `window` consecutive blocks of that
permutation are permuted among each other.  A batch then has samples of many places in the file, while the
blocks of a window fit in the page cache and are fetched whole (`read_ahead.py`).

In each epoch the cuts lie elsewhere, by a keyed shift, so that two samples which share a block do not do so
for ever.  What is left over behind the last whole block comes last in its epoch; the shift makes it another
part of the file each time.  As in `order.py` nothing is stored and every position can be asked for alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distbp.data.permutation import permute
from distbp.random import raw_words

__all__ = ["Blocks"]

BLOCK_BYTES = 256 << 10
"""A disk that reads 500 MB/s and seeks in 0.1 ms spends four fifths of its time on reading such blocks."""
BLOCKS_IN_WINDOW = 64


@dataclass(frozen=True)
class Blocks:
    """Blocks of `block` samples, of which `window` at a time are mixed."""

    block: int
    window: int = BLOCKS_IN_WINDOW

    @classmethod
    def of_rows(cls, row_bytes: int, size: int) -> Blocks:
        """Return the blocks for `size` rows of `row_bytes` bytes."""
        return cls(min(size, max(1, BLOCK_BYTES // row_bytes)))

    @property
    def samples(self) -> int:
        """Samples in one window."""
        return self.block * self.window

    def permute(self, offset: int, length: int, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples at positions `[offset, offset + length)` of an epoch of `size` samples."""
        result = np.empty(length, np.int64)
        done = 0
        while done < length:
            window, first = divmod(offset + done, self.samples)
            begin = window * self.samples
            inside = min(self.samples, size - begin)
            count = min(length - done, inside - first)
            mixed = permute(np.arange(first, first + count), inside, seed, epoch, f"window {window}")
            result[done : done + count] = self._place(begin + mixed, size, seed, epoch)
            done += count
        return result

    def _place(self, positions: NDArray[np.int64], size: int, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return the samples at positions of the permuted blocks."""
        whole = size // self.block
        block, row = np.divmod(positions, self.block)
        moved = permute(np.minimum(block, whole - 1), whole, seed, epoch, "blocks") * self.block + row
        shift = int(raw_words(1, seed, "blocks/shift", epoch)[0] % np.uint64(size))
        placed: NDArray[np.int64] = np.where(block < whole, moved, positions) + shift
        return placed % size
