"""ColumnEmbedding: samples of which some numbers are codes, each looked up in a table of its own.

A table of a recommender has columns such as a price, which is a number, and a town, which is one of a list.
The list's members have no order, so each gets a row of trained numbers.  Codes travel among the numbers as
float32, which holds every whole number up to 2^24 exactly; row 0 of a table stands for what training did not
have, and starts at zero.

Samples of codes alone, all of one list, are what `Embedding` is for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distbp.errors import ConfigError, DataError
from distbp.nn import initial as start
from distbp.nn.embedding import add_segments
from distbp.nn.layer import Array, Context, Layer, Parameter, Shape

__all__ = ["ColumnEmbedding"]

MOST_ROWS = 2**24
"""float32 holds no more codes."""


class ColumnEmbedding(Layer):
    """(F,) becomes (F - C + C * width,): first the numbers, then a row of the table of each of C columns.

    `codes` holds pairs (column, rows of its table); the other columns are passed on in their order.
    """

    def __init__(self, codes: Sequence[tuple[int, int]], width: int) -> None:
        self.codes = tuple((int(column), int(rows)) for column, rows in codes)
        self.width = width
        if width < 1 or any(column < 0 or not 1 <= rows <= MOST_ROWS for column, rows in self.codes):
            raise ConfigError(
                f"ColumnEmbedding: expected a width of at least 1 and pairs (column, 1 to {MOST_ROWS} rows), "
                f"got width {width!r}, codes {self.codes!r}"
            )

    def build(self, input_shape: Shape) -> Shape:
        """Create a table `weight<column>` (rows, width) for each column of codes."""
        columns = [column for column, _ in self.codes]
        if (
            len(input_shape) != 1
            or len(set(columns)) < len(columns)
            or max(columns, default=0) >= math.prod(input_shape)
        ):
            raise ConfigError(
                f"ColumnEmbedding: expected samples of one axis with the columns {columns!r}, each once, got "
                f"shape {input_shape!r}"
            )
        self._numbers = np.array([c for c in range(input_shape[0]) if c not in set(columns)], np.int64)
        self._tables = [
            Parameter((rows, self.width), _unknown_at_zero, fan_in=1, fan_out=self.width)
            for _, rows in self.codes
        ]
        return (len(self._numbers) + len(self.codes) * self.width,)

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return the tables."""
        return [
            (f"weight{column}", table) for (column, _), table in zip(self.codes, self._tables, strict=True)
        ]

    def forward(self, x: Array, context: Context) -> Array:
        """Return numbers and looked-up rows side by side; DataError for what is no code of its table."""
        numbers = len(self._numbers)
        self._columns = x.shape[-1]
        y = self.buffer("y", (*x.shape[:-1], numbers + len(self.codes) * self.width), x.dtype)
        np.copyto(y[..., :numbers], x[..., self._numbers])
        self._codes = [_codes_of(x[..., column], column, rows) for column, rows in self.codes]
        for index, (codes, table) in enumerate(zip(self._codes, self._tables, strict=True)):
            np.copyto(y[..., self._span(index)], table.value[codes])
        return y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect dW_c = Σ dy over the samples with code c, for y = W[c] is linear in W.

        dx is dy for the numbers, which are passed on, and 0 for codes, between which there is nothing.
        """
        for index in range(len(self.codes) - 1, -1, -1):
            self._collect(index, dy)
        if not want_dx:
            return None
        dx = self.buffer("dx", (*dy.shape[:-1], self._columns), dy.dtype)
        dx.fill(0)
        dx[..., self._numbers] = dy[..., : len(self._numbers)]
        return dx

    def _collect(self, index: int, dy: Array) -> None:
        """Collect the gradient of one table."""
        codes, span = self._codes[index], self._span(index)

        def leaf(lo: int, hi: int, out: Array) -> None:
            for g in range(lo, hi):
                add_segments(self, codes[g], dy[g][:, span], out[g - lo])

        self._tables[index].collect(leaf)

    def _span(self, index: int) -> slice:
        """Return where the rows of one table stand in the output."""
        first = len(self._numbers) + index * self.width
        return slice(first, first + self.width)


def _codes_of(values: Array, column: int, rows: int) -> NDArray[np.int64]:
    """Return the codes that a column of floats holds."""
    codes = np.rint(values).astype(np.int64)
    if codes.size and not (codes.min() >= 0 and codes.max() < rows):
        wrong = values[(codes < 0) | (codes >= rows)].flat[0].item()
        raise DataError(
            f"ColumnEmbedding: expected codes 0..{rows - 1} in column {column}, got {wrong!r}; give the "
            "table a row for every code, and do not normalise it"
        )
    return codes


def _unknown_at_zero(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return normal values of variance 1 / width, so that a row has length 1; zeros for row 0."""
    values = start.scaled(start.lecun_normal, 1.0 / math.sqrt(parameter.fan_out))(parameter, seed)
    values[0] = 0
    return values
