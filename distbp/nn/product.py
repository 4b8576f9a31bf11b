"""Matrix products of stacked rows: the one place that decides how they are computed.

The bits of a row of a matrix product change with the number of rows of that product: BLAS picks its kernels
and its blocking by shape.  So (G, b, I) is never flattened to (G*b, I).  `np.matmul` on the stack calls BLAS
once per micro-batch with the very shape that a single micro-batch has, and so gives the same bits for any G.
Rows inside a micro-batch may be joined: (G, b, T, I) is (G, b*T, I).

Flattening would be up to 3 times faster for b = 16, and where a probe of these very shapes shows equal bits
on every worker it would be allowed.  Whoever adds that probe adds it here; no layer calls `np.matmul`.

Columns of convolutions (columns.py) go the other way: one sample has thousands of rows, and a product is cut
into equal stacks of rows where that makes each small enough for the kernels that BLAS has for small
matrices.  These pack nothing; on 16 and 32 channels they were 1.2 to 1.6 times as fast.  The cut depends on
the shapes of one sample alone.
"""

from __future__ import annotations

import numpy as np

from distbp.nn.layer import Array

__all__ = [
    "columns_times_weights",
    "columns_transpose_times",
    "rows_at_once",
    "rows_times_matrix",
    "rows_times_transpose",
    "rows_times_weights_transpose",
    "sum_of_rows",
    "transpose_times_rows",
]

SMALL_PRODUCT = 10**6
"""Multiply-adds up to which OpenBLAS takes its kernels for small matrices (m * n * k <= 100^3)."""

LEAST_ROWS = 64
"""Fewer rows in a product are slower than one large product."""


def rows_times_matrix(x_GbI: Array, w_IO: Array, out_GbO: Array) -> Array:
    """Write x w of every micro-batch into `out_GbO` and return it; more leading axes are stacks, too."""
    return np.matmul(x_GbI, w_IO, out=out_GbO)


def rows_times_transpose(dy_GbO: Array, w_IO: Array, out_GbI: Array) -> Array:
    """Write dy wᵀ of every micro-batch into `out_GbI` and return it; `w` may be stacked as well."""
    return np.matmul(dy_GbO, w_IO.mT, out=out_GbI)


def transpose_times_rows(x_GbI: Array, dy_GbO: Array, out_GIO: Array) -> Array:
    """Write xᵀ dy of every micro-batch into `out_GIO`, one matrix for each, and return it."""
    return np.matmul(x_GbI.mT, dy_GbO, out=out_GIO)


def sum_of_rows(x_GNF: Array, out_GF: Array) -> None:
    """Write the sum of the rows of every micro-batch into `out_GF`.

    A product with a row of ones takes a quarter of the time of `np.add.reduce` over that axis.
    """
    np.matmul(np.ones(x_GNF.shape[1], x_GNF.dtype), x_GNF, out=out_GF)


def rows_at_once(places: int, width: int, outputs: int) -> int:
    """Return how many of the `places` rows of a sample go into one product with a (width, outputs) matrix."""
    most = SMALL_PRODUCT // (width * outputs)
    if most < LEAST_ROWS:
        return places
    rows = next(count for count in range(min(most, places), 0, -1) if places % count == 0)
    return rows if rows >= LEAST_ROWS else places


def columns_times_weights(columns_gRK: Array, w_gKO: Array, rows: int, out_RO: Array) -> None:
    """Write columns times weights of every group, `rows` rows at once, into the contiguous (R, g * O)."""
    groups, _, width = columns_gRK.shape
    stacked = columns_gRK.reshape(groups, -1, rows, width)
    out = out_RO.reshape(-1, rows, groups, w_gKO.shape[2]).transpose(2, 0, 1, 3)
    np.matmul(stacked, w_gKO[:, np.newaxis], out=out)


def columns_transpose_times(columns_gRK: Array, dy_RO: Array, rows: int, out_gSKO: Array) -> Array:
    """Write columnsᵀ dy of every group and stack of `rows` rows into `out_gSKO`, S = R / rows; return it."""
    groups, _, width = columns_gRK.shape
    stacked = columns_gRK.reshape(groups, -1, rows, width)
    dy = dy_RO.reshape(-1, rows, groups, out_gSKO.shape[3]).transpose(2, 0, 1, 3)
    return np.matmul(stacked.mT, dy, out=out_gSKO)


def rows_times_weights_transpose(dy_RO: Array, w_gKO: Array, out_gRK: Array) -> Array:
    """Write dy wᵀ of every group into `out_gRK` and return it."""
    dy = dy_RO.reshape(-1, *w_gKO.shape[::2]).transpose(1, 0, 2)
    return np.matmul(dy, w_gKO.mT, out=out_gRK)
