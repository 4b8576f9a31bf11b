"""Work on the last axis of images: sums for each channel, and vectors of channels against whole images.

With few channels (16, say) NumPy's inner loops are 16 numbers long and cost more than the arithmetic.  So
several neighbouring positions are taken as one row: (P, C) is seen as (P/d, d*C), a vector of channels is
repeated d times, and sums over rows are a product with ones, which BLAS does at the speed of memory.

The fold d depends on P and C alone, and P is the number of positions in one micro-batch: nothing here sees
how many micro-batches are stacked.

Legend: G micro-batches, P positions in each (samples times places in the image), C channels.
"""

from __future__ import annotations

import functools

import numpy as np

from distbp.nn.layer import Array

__all__ = ["blocks_of_rows", "channel_sums", "fold", "repeated"]

ROW_ELEMENTS = 512
"""Length that a row may reach; longer ones gain nothing."""


BLOCK_ELEMENTS = 1 << 15
"""Numbers of a block: 128 KiB of float32, so that a few blocks stay in the second-level cache."""


@functools.cache
def blocks_of_rows(rows: int, length: int) -> tuple[slice, ...]:
    """Return the blocks in which `rows` rows of `length` numbers are worked on."""
    step = max(1, BLOCK_ELEMENTS // length)
    return tuple(slice(start, min(start + step, rows)) for start in range(0, rows, step))


@functools.cache
def fold(positions: int, channels: int) -> int:
    """Return how many neighbouring positions make one row: the largest divisor of `positions` that fits."""
    most = max(1, ROW_ELEMENTS // channels)
    return next(count for count in range(min(most, positions), 0, -1) if positions % count == 0)


def repeated(vector_C: Array, count: int) -> Array:
    """Return the vector `count` times, one behind the other."""
    return np.tile(vector_C, count)


def channel_sums(x_GPC: Array, out_GC: Array) -> Array:
    """Write the sum over the positions of each micro-batch into `out_GC` and return it."""
    G, positions, channels = x_GPC.shape
    count = fold(positions, channels)
    rows = x_GPC.reshape(G, positions // count, count * channels)
    ones = np.ones((1, rows.shape[1]), x_GPC.dtype)
    sums = np.matmul(ones, rows).reshape(G, count, channels)
    return np.add.reduce(sums, axis=1, out=out_GC)
