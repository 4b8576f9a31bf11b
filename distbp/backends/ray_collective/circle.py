"""What the ranks of a collective group compute alike: who is where, how arrays are cut, what was asked for.

Everything here is arithmetic on integers.  Every rank does it for itself and gets the same answer, so that no
message carries a size; only what a rank was asked to do is compared, as two numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.partition import round_up, split_range
from distbp.reduce import aligned_blocks

__all__ = [
    "ALIGNMENT",
    "BARRIER",
    "JOINS",
    "MOST_ITEM_BYTES",
    "Array",
    "Bytes",
    "Call",
    "Circle",
    "area_bytes",
    "cuts",
    "describe",
    "rows_of",
]

Array = NDArray[Any]
Bytes = NDArray[np.uint8]

JOINS = {"SUM": np.add, "PRODUCT": np.multiply, "MIN": np.minimum, "MAX": np.maximum}
"""Ray's names of reductions."""

PIECE_BYTES = 1 << 20
"""What a rank puts into an area at most on one node: three of them should stay in a second-level cache."""

FAR_PIECE_BYTES = 1 << 21
"""The same when messages follow, each of which should be worth its latency."""

ALIGNMENT = 64
"""Rows of an area begin at multiples of so many bytes, slices of at least as much: whole cache lines."""

MOST_ITEM_BYTES = 32
"""The size of NumPy's largest number, a complex one of twice 128 bits."""

_OPERATIONS = ("allreduce", "reduce", "broadcast", "allgather", "reducescatter", "barrier", "send to")
_CACHED = 256


# ----- what is asked for


@dataclass(frozen=True)
class Call:
    """What a rank was asked to do, as far as all must agree on it; `words` is the same as two numbers."""

    operation: str
    joined: str
    dtype: np.dtype[Any]
    size: int
    root: int = -1
    words: tuple[int, int] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        first = (
            _OPERATIONS.index(self.operation)
            | ["", *JOINS].index(self.joined) << 8
            | ord(self.dtype.kind) << 16
            | self.dtype.itemsize << 24
            | self.root + 1 << 48
        )
        object.__setattr__(self, "words", (first, self.size))


BARRIER = Call("barrier", "", np.dtype(np.uint8), 0)


def describe(first: int, size: int) -> str:
    """Return the words of a `Call` as text."""
    operation, joined = _OPERATIONS[first & 0xFF], ("", *JOINS)[first >> 8 & 0xFF]
    kind, item_bytes, root = chr(first >> 16 & 0xFF), first >> 24 & 0xFFFFFF, (first >> 48) - 1
    name = f"{kind}{item_bytes}"
    if kind in "biufc":
        name = np.dtype(name).name
    parts = [operation, f"({joined})" if joined else "", f" rank {root}" if root >= 0 else ""]
    return "".join(parts) if operation == "barrier" else f"{''.join(parts)} of {size} x {name}"


# ----- who is where


class Circle:
    """The ranks of a group, node by node, as rank `rank` sees them.

    `nodes` lists the ranks of each node in ascending order, and the nodes by their lowest rank.  A rank's
    *position* counts node by node: the ranks of a node have neighbouring positions.
    """

    def __init__(self, rank: int, nodes: Sequence[Sequence[int]]) -> None:
        self.rank = rank
        self.nodes = [tuple(ranks) for ranks in nodes]
        self.world = sum(len(ranks) for ranks in nodes)
        self.node = next(node for node, ranks in enumerate(nodes) if rank in ranks)
        self.mine = self.nodes[self.node]
        self.local = self.mine.index(rank)
        self.order = [rank for ranks in nodes for rank in ranks]
        self.position = self.order.index(rank)
        self.firsts = [self.order.index(ranks[0]) for ranks in nodes]
        self.most = max(len(ranks) for ranks in nodes)
        self.lanes = min(len(ranks) for ranks in nodes) if len(nodes) > 1 else 0
        self.runs = runs(self.mine)
        """The neighbouring ranks of this node, as local numbers with the rank of the first."""
        self.blocks = [
            [block for first, count in runs(ranks) for block in aligned_blocks(first, first + count)]
            for ranks in self.nodes
        ]
        """The `(first rank, count)` of each node's blocks after it has joined what it can."""

    def node_of(self, rank: int) -> int:
        """Return the node of a rank."""
        return next(node for node, ranks in enumerate(self.nodes) if rank in ranks)


def runs(ranks: Sequence[int]) -> list[tuple[int, int]]:
    """Return `(first, count)` of every stretch of neighbouring numbers in `ranks`."""
    found: list[tuple[int, int]] = []
    for rank in ranks:
        if found and rank == found[-1][0] + found[-1][1]:
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((rank, 1))
    return found


def area_bytes(nodes: Sequence[Sequence[int]]) -> int:
    """Return the size of an area, which is the same on every node.

    In the narrowest case, a reducescatter, a rank's share holds `ALIGNMENT` numbers for each rank.
    """
    row_bytes = PIECE_BYTES if len(nodes) == 1 else FAR_PIECE_BYTES
    least_bytes = ALIGNMENT * MOST_ITEM_BYTES * sum(len(ranks) for ranks in nodes)
    return max(len(ranks) for ranks in nodes) * max(row_bytes, least_bytes)


@lru_cache(_CACHED)
def cuts(size: int, parts: int) -> tuple[tuple[int, int], ...]:
    """Return how `size` elements are cut into `parts`, at multiples of `ALIGNMENT`; some may be empty."""
    units = round_up(size, ALIGNMENT) // ALIGNMENT
    edges = [min(size, ALIGNMENT * split_range(units, parts, part)[0]) for part in range(parts)]
    return tuple(zip(edges, [*edges[1:], size], strict=True))


def rows_of(area: Bytes, count: int, size: int, dtype: np.dtype[Any]) -> Array:
    """Return an area as `count` rows of `size` elements, each on cache lines of its own."""
    stride = round_up(size * dtype.itemsize, ALIGNMENT)
    rows: Array = area[: count * stride].view(dtype).reshape(count, -1)[:, :size]
    return rows
