"""Matrix products of stacked rows: the one place that decides how they are computed.

The bits of a row of a matrix product change with the number of rows of that product: BLAS picks its kernels
and its blocking by shape.  So (G, b, I) is never flattened to (G*b, I).  `np.matmul` on the stack calls BLAS
once per micro-batch with the very shape that a single micro-batch has, and so gives the same bits for any G.
Rows inside a micro-batch may be joined: (G, b, T, I) is (G, b*T, I).

Flattening would be up to 3 times faster for b = 16, and where a probe of these very shapes shows equal bits
on every worker it would be allowed.  Whoever adds that probe adds it here; no layer calls `np.matmul`.
"""

from __future__ import annotations

import numpy as np

from distbp.nn.layer import Array

__all__ = ["rows_times_matrix", "rows_times_transpose", "sum_of_rows", "transpose_times_rows"]


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
