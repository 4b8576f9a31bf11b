"""Matrix products of stacked rows: the one place that decides how they are computed.

The bits of a row of a matrix product may change with the number of rows of that product: BLAS picks its
kernels and its blocking by shape.  What counts is the product of a single micro-batch.  `np.matmul` on the
stack (G, b, I) calls BLAS once per micro-batch with that very shape, and so gives its bits for any G.  Rows
inside a micro-batch may be joined: (G, b, T, I) is (G, b*T, I).

One product of all G*b rows is up to 3 times as fast, because BLAS prepares the weights once.  It is taken
where a probe shows that it has the same bits (`keeps_bits`), as with many shapes on processors with AVX-512
and with hardly any on others.  Every process probes for itself: what it computes is the same in either case.
No layer calls `np.matmul`.

Gradients of large weights from few rows are cut the other way, into pieces of the result that stay in the
cache until all micro-batches are added (`TransposeTimesRows`); a probe finds a cut with the bits of the
whole product (`cut_product`), or there is none.

Columns of convolutions (columns.py) go the other way: one sample has thousands of rows, and a product is cut
into equal stacks of rows where that makes each small enough for the kernels that BLAS has for small
matrices.  These pack nothing; on 16 and 32 channels they were 1.2 to 1.6 times as fast.  The cut depends on
the shapes of one sample alone.
"""

from __future__ import annotations

import functools

import numpy as np

from distbp.leaf import Leaf, LeafInPieces, Piece
from distbp.nn.layer import Array

__all__ = [
    "TransposeTimesRows",
    "columns_times_weights",
    "columns_transpose_times",
    "cut_product",
    "forget_probes",
    "gradient_of_weights",
    "keeps_bits",
    "rows_at_once",
    "rows_times_matrix",
    "rows_times_transpose",
    "rows_times_weights_transpose",
    "sum_of_rows",
    "transpose_times_rows",
]

SMALL_PRODUCT = 10**6
"""Multiply-adds up to which OpenBLAS takes its kernels for small matrices (m * n * k <= 100^3)."""

ENOUGH_ROWS = 256
"""Rows with which a product is about as fast as it becomes."""

FEW_ROWS = 32
"""Rows up to which gradients of weights are better made in pieces: with more, the product takes the time."""

PIECE_COLUMNS = 512
"""Columns of such a piece, where BLAS allows."""

PROBED = 128
"""Numbers along the shorter side of a product that a probe compares."""

LEAST_ROWS = 64
"""Fewer rows in a product are slower than one large product."""


def rows_times_matrix(x_GbI: Array, w_IO: Array, out_GbO: Array) -> Array:
    """Write x w of every micro-batch into `out_GbO` and return it; more leading axes are stacks, too."""
    if _may_join(x_GbI, w_IO, out_GbO) and keeps_bits(*x_GbI.shape, w_IO.shape[1], x_GbI.dtype.char, False):
        np.matmul(x_GbI.reshape(-1, w_IO.shape[0]), w_IO, out=out_GbO.reshape(-1, w_IO.shape[1]))
        return out_GbO
    return np.matmul(x_GbI, w_IO, out=out_GbO)


def rows_times_transpose(dy_GbO: Array, w_IO: Array, out_GbI: Array) -> Array:
    """Write dy wᵀ of every micro-batch into `out_GbI` and return it; `w` may be stacked as well."""
    if _may_join(dy_GbO, w_IO, out_GbI) and keeps_bits(*dy_GbO.shape, w_IO.shape[0], dy_GbO.dtype.char, True):
        np.matmul(dy_GbO.reshape(-1, w_IO.shape[1]), w_IO.T, out=out_GbI.reshape(-1, w_IO.shape[0]))
        return out_GbI
    return np.matmul(dy_GbO, w_IO.mT, out=out_GbI)


def _may_join(x_GbK: Array, w: Array, out: Array) -> bool:
    """Return whether the rows of all micro-batches lie in one matrix, and it is worth asking for more."""
    return (
        x_GbK.ndim == 3
        and w.ndim == 2
        and x_GbK.shape[0] > 1
        and x_GbK.shape[1] < ENOUGH_ROWS
        and x_GbK.flags.c_contiguous
        and w.flags.c_contiguous
        and out.flags.c_contiguous
    )


@functools.cache
def keeps_bits(G: int, b: int, K: int, N: int, dtype: str, transposed: bool) -> bool:
    """Return whether one product of (G*b, K) and (K, N) has the bits of G products of (b, K) and (K, N).

    `transposed`: the second matrix is stored as (N, K).  Tried with random numbers of the whole precision:
    the order in which BLAS adds depends on shapes and not on numbers, and of sums in another order every
    second or third one differs.  A kernel for the last rows or columns alone would show in one row or column
    at least, so it is tried until `PROBED` numbers of the shorter side were seen.  Answers hold for the
    number of BLAS threads of the first call; a new `Network` forgets them.
    """
    random = np.random.default_rng(G * b)
    real = np.dtype(dtype).type
    w = random.standard_normal((N, K) if transposed else (K, N), real)
    w_KN = w.T if transposed else w
    for _ in range(max(2, -(-PROBED // min(G * b, N)))):
        x_GbK = random.standard_normal((G, b, K), real)
        each: Array = np.matmul(x_GbK, w_KN)
        together: Array = np.matmul(x_GbK.reshape(G * b, K), w_KN)
        if not np.array_equal(each.reshape(G * b, N), together):
            return False
    return True


def transpose_times_rows(x_GbI: Array, dy_GbO: Array, out_GIO: Array) -> None:
    """Write xᵀ dy of every micro-batch into `out_GIO`, one matrix for each."""
    np.matmul(x_GbI.mT, dy_GbO, out=out_GIO)


def gradient_of_weights(x_GbI: Array, dy_GbO: Array) -> Leaf:
    """Return xᵀ dy of every micro-batch as a leaf; in pieces, if there are few rows."""
    if x_GbI.shape[1] > FEW_ROWS:
        return lambda lo, hi, out: transpose_times_rows(x_GbI[lo:hi], dy_GbO[lo:hi], out)
    return TransposeTimesRows(x_GbI, dy_GbO)


class TransposeTimesRows(LeafInPieces):
    """xᵀ dy of every micro-batch as a leaf that may be written in pieces (`distbp/reduce.py`).

    The products of 4 x 16 rows for 4,096 x 4,096 weights, and their sum: 112 ms whole, 60 ms in pieces.
    """

    def __init__(self, x_GbI: Array, dy_GbO: Array) -> None:
        self._x_GbI = x_GbI
        self._dy_GbO = dy_GbO

    def __call__(self, lo: int, hi: int, out_GIO: Array) -> None:
        """Write the products of micro-batches `[lo, hi)`."""
        transpose_times_rows(self._x_GbI[lo:hi], self._dy_GbO[lo:hi], out_GIO)

    def square(self, number: int) -> float:
        """Return Σ_io (Σ_n x_ni dy_no)² = Σ_nm (x_n · x_m) (dy_n · dy_m): b² numbers in place of I O."""
        x_bI, dy_bO = self._x_GbI[number], self._dy_GbO[number]
        with np.errstate(over="ignore", invalid="ignore"):
            return float(np.vdot((x_bI @ x_bI.T).astype(np.float64), (dy_bO @ dy_bO.T).astype(np.float64)))

    def pieces(self, most: int) -> tuple[Piece, ...]:
        """Return pieces of at most `most` elements in which the product has the bits of the whole, if any."""
        return cut_product(*self._x_GbI.shape[1:], self._dy_GbO.shape[2], self._x_GbI.dtype.char, most)

    def write(self, piece: Piece, lo: int, hi: int, out_GRC: Array) -> None:
        """Write one piece of the products of micro-batches `[lo, hi)`."""
        rows, columns = piece
        np.matmul(self._x_GbI.mT[lo:hi, rows], self._dy_GbO[lo:hi, :, columns], out=out_GRC)


@functools.cache
def cut_product(b: int, width: int, outputs: int, dtype: str, most: int) -> tuple[Piece, ...]:
    """Return a cut of xᵀ dy, x (b, width) and dy (b, outputs), with the bits of the whole, or ().

    No piece has more than `most` elements.  Tried with random numbers of the whole precision, every piece:
    cuts that suit the kernels for small matrices, or else whole rows by the dozen: kernels for AVX2 walk
    through rows by 12, and the bits depend on where a row stands in its dozen.
    """
    columns = -(-outputs // -(-outputs // PIECE_COLUMNS))
    rows = min(SMALL_PRODUCT // b, most) // columns
    cuts = [(rows // 16 * 16, columns), (most // outputs // 12 * 12, outputs)]
    random = np.random.default_rng(b)
    x_bI, dy_bO = (random.standard_normal((b, count), np.dtype(dtype).type) for count in (width, outputs))
    whole_IO: Array = np.matmul(x_bI.T, dy_bO)
    for rows, columns in cuts:
        if not 0 < rows * columns < width * outputs:
            continue
        pieces = tuple(
            (slice(row, min(row + rows, width)), slice(column, min(column + columns, outputs)))
            for row in range(0, width, rows)
            for column in range(0, outputs, columns)
        )
        if all(np.array_equal(np.matmul(x_bI.T[r], dy_bO[:, c]), whole_IO[r, c]) for r, c in pieces):
            return pieces
    return ()


def forget_probes() -> None:
    """Forget what products were found to have the same bits."""
    keeps_bits.cache_clear()
    cut_product.cache_clear()


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
