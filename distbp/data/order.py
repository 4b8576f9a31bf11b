"""The order of samples: the permutations of epoch 0, 1, 2, ... joined to one endless stream (DESIGN 2.1).

The permutation of an epoch is keyed (`permutation.py`) and evaluated only where it is needed, so that any
worker can enter the stream anywhere.  Data that are read from a disk have an order of blocks
(`block_order.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from distbp.data.block_order import Blocks
from distbp.data.permutation import CHUNK, MAX_SIZE, permute

__all__ = ["Order"]


class Order:
    """The endless stream of sample numbers for `size` samples and a seed, in `blocks` or freely mixed.

    Positions are evaluated ahead in chunks, so that small requests in a row are cheap.  The chunk changes
    only the cost, never a number.  An instance belongs to one thread.
    """

    def __init__(self, size: int, seed: int, blocks: Blocks | None = None) -> None:
        assert 1 <= size <= MAX_SIZE, f"an order has 1 to 2^62 samples, not {size}"
        self.size = size
        self.seed = seed
        self.blocks = blocks
        self._start = 0
        self._chunk: NDArray[np.int64] = np.empty(0, np.int64)

    def indices(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the sample numbers at stream positions `[start, start + count)`, across epochs if need be.

        The array is read-only and stays valid as long as the caller holds it.
        """
        first = start - self._start
        if first < 0 or first + count > self._chunk.size:
            # Every epoch has keys of its own, so tiny data sets look fewer positions ahead.
            self._chunk = self._stream(start, max(count, min(CHUNK, 64 * self.size)))
            self._start = start
            first = 0
        return self._chunk[first : first + count]

    def _stream(self, start: int, count: int) -> NDArray[np.int64]:
        """Return the stream's sample numbers at `[start, start + count)` as a new read-only array."""
        assert start >= 0, f"the stream begins at position 0, not {start}"
        assert count >= 0, f"a request is for 0 or more positions, not {count}"
        result: NDArray[np.int64] = np.empty(count, np.int64)
        done = 0
        while done < count:
            epoch, offset = divmod(start + done, self.size)
            length = min(count - done, self.size - offset, CHUNK)
            result[done : done + length] = self._samples(offset, length, epoch)
            done += length
        result.flags.writeable = False
        return result

    def _samples(self, offset: int, length: int, epoch: int) -> NDArray[np.int64]:
        """Return the sample numbers at positions `[offset, offset + length)` of an epoch."""
        if self.blocks is not None:
            return self.blocks.permute(offset, length, self.size, self.seed, epoch)
        return permute(np.arange(offset, offset + length), self.size, self.seed, epoch)
