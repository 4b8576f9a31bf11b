"""Leaves of the tree of additions: how the gradient of one tensor passes from backprop to the one who adds.

A leaf is called with a range of the worker's micro-batches and an array to write their gradients into, one
row of it for each.  Whoever adds decides how many are written at once, and where.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from numpy.typing import NDArray

__all__ = ["Leaf", "LeafInPieces", "Piece"]

Leaf: TypeAlias = Callable[[int, int, NDArray[Any]], None]
"""`leaf(lo, hi, out)` writes the gradients of local micro-batches `[lo, hi)`, shape (hi - lo, *tensor)."""

Piece: TypeAlias = tuple[slice, slice]
"""Rows and columns of a matrix."""


class LeafInPieces(ABC):
    """A leaf of a matrix that is also written piece by piece, with the same bits.

    Gradients of large weights from small micro-batches take longer to write, read and add than to compute.
    So many of them as fit the cache are made of one piece, and added there, before the next piece comes.
    """

    @abstractmethod
    def __call__(self, lo: int, hi: int, out: NDArray[Any]) -> None:
        """Write whole gradients, as every leaf does."""

    @abstractmethod
    def pieces(self, most: int) -> Sequence[Piece]:
        """Return pieces that cover the matrix, of `most` elements or fewer; none: better whole."""

    @abstractmethod
    def square(self, number: int) -> float:
        """Return the sum of squares of the gradient of local micro-batch `number`, without making it."""

    @abstractmethod
    def write(self, piece: Piece, lo: int, hi: int, out: NDArray[Any]) -> None:
        """Write one piece of the gradients, shape (hi - lo, rows, columns)."""
