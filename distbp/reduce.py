"""THE FUNCTION THAT ADDS: values made by different micro-batches are added here and nowhere else.

Theory
------
Floating-point addition is not associative, so "the same bits for any number of workers" means: one fixed
order of additions.  The order is a binary tree over the M micro-batches of the global batch.  Its inner nodes
are the *aligned blocks* `[i * 2^j, (i + 1) * 2^j)`; when M is no power of two, what is left on the right is
folded in from right to left.  For M = 7:

            (0..6)
           /      \\
       (0..3)    (4..6)          a node is written (first..last); (0..3) = (0..1) + (2..3), and so on
       /   \\      /   \\
    (0..1)(2..3)(4..5) (6)

The tree speaks of micro-batch numbers only.  Who computed a leaf, when it arrived, and how many workers there
are cannot be seen in it.  Three parties build it, each from the blocks that the one before left:

1. A **worker** owns the micro-batches `[start, stop)`.  It adds them up to the largest aligned blocks inside
   that range (`MicroBatchSum`): one array when the range is itself aligned, at most 2 log2 M otherwise.
2. A **host** has its workers in a row, so their blocks lie side by side and siblings merge (`TreeSum`).  The
   vector is cut into lanes, one owner each, and an owner adds only its lane, in place in the slots.
3. **Hosts** stand in a row as well.  The owners of the same lane swap slices, add what they got in host order
   with the same `TreeSum`, and hand the sums round.

A transport moves the arrays and never looks inside.  Any path gives the bits of one worker that adds
everything itself; `tests/test_reduce.py` holds this against a recursive definition for all small M and W.

Rejected: adding rank by rank (bits change with the worker count), a reduction by MPI or Ray (its
order is unspecified), exact summation by wide accumulators (several times the memory, and backprop itself
already rounds).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.leaf import Leaf, LeafInPieces
from distbp.partition import round_up, split_range
from distbp.transports.base import Transport

__all__ = ["LaneReduction", "MicroBatchSum", "TreeSum", "aligned_blocks", "tree_total"]

Array = NDArray[Any]

SMALL_ELEMENTS = 1 << 16
"""A tensor whose stacked leaves hold at most this many elements is added row-wise in one go: two or three
calls into NumPy instead of two for every micro-batch.  The additions, and so the bits, are the same."""

CHUNK_ELEMENTS = 1 << 16
"""A lane is added in chunks of this many elements, so that the chunk of every worker is still in the second
level cache when the next merge needs it (64 Ki float32 are 256 KiB)."""

PIECE_BYTES = 1 << 21
"""Memory for the stacked leaves of one piece of a tensor: they stay in the cache until they are added."""

MOST_STACKED = 8
"""Leaves of a piece that are written in one call."""

SLICE_ALIGNMENT = 16
"""Slices of a lane that go to different hosts start at multiples of 16 elements: whole cache lines."""


def aligned_blocks(start: int, stop: int) -> list[tuple[int, int]]:
    """Return the largest aligned blocks `(start, count)` that cover the micro-batches `[start, stop)`."""
    blocks = []
    while start < stop:
        count = start & -start or 1 << (stop - start).bit_length()
        while start + count > stop:
            count //= 2
        blocks.append((start, count))
        start += count
    return blocks


def tree_total(rows: Array, join: np.ufunc = np.add) -> Array:
    """Return the tree sum of `rows`, shape (M, ...), over the first axis.  `rows` is not changed.

    Adding neighbours level by level and carrying an odd last one upwards is the tree of the module docstring.
    `join` stands for what `TreeSum` says of it.
    """
    while len(rows) > 1:
        even = len(rows) // 2 * 2
        added = join(rows[0:even:2], rows[1:even:2])
        rows = np.concatenate([added, rows[even:]]) if even < len(rows) else added
    total: Array = rows[0].copy()
    return total


class TreeSum:
    """Add blocks of micro-batches that are pushed from left to right.

    The sum owns every array from `push` on and writes merged values into the left one, so a caller that
    pushes views finds the results in the views it pushed first.  `join` may be another elementwise function
    of two arrays, for collectives that offer products and extremes too; training adds.
    """

    def __init__(self, join: np.ufunc = np.add) -> None:
        self.blocks: list[tuple[int, int, Array]] = []
        self.join = join

    def push(self, start: int, count: int, array: Array) -> None:
        """Take the block `[start, start + count)`, which must begin where the last one ended."""
        blocks = self.blocks
        if blocks:
            last_start, last_count, _ = blocks[-1]
            assert start == last_start + last_count, (
                f"block {start} does not follow {last_start}+{last_count}"
            )
        blocks.append((start, count, array))
        while len(blocks) > 1:
            left_start, left_count, left = blocks[-2]
            _, right_count, right = blocks[-1]
            if left_count != right_count or left_start % (2 * left_count):
                break
            self.join(left, right, out=left)
            blocks[-2:] = [(left_start, 2 * left_count, left)]

    def total(self) -> Array:
        """Fold what is left from right to left into the first array and return it."""
        first, count, total = self.blocks[-1]
        for start, left_count, left in reversed(self.blocks[:-1]):
            self.join(left, total, out=left)
            first, count, total = start, count + left_count, left
        self.blocks = [(first, count, total)]
        return total


class MicroBatchSum:
    """Add the gradients of one worker's micro-batches into its aligned blocks, tensor by tensor.

    `start, stop` are the worker's micro-batches; `vectors` holds one flat vector for each of
    `aligned_blocks(start, stop)`.  A tensor is added up completely before the next one comes, so the spare
    memory is log2(stop - start) times the largest *tensor*, never the model.
    """

    def __init__(self, start: int, stop: int, vectors: Sequence[Array]) -> None:
        self.count = stop - start
        self.blocks = [(block - start, count) for block, count in aligned_blocks(start, stop)]
        self.vectors = list(vectors)
        assert len(self.vectors) == len(self.blocks), (
            f"{len(self.blocks)} blocks, {len(self.vectors)} vectors"
        )
        self._spares: dict[int, Array] = {}

    def collect(self, offset: int, shape: tuple[int, ...], leaf: Leaf) -> None:
        """Add up one tensor: `leaf(lo, hi, out)` writes the gradients of local micro-batches `[lo, hi)`.

        `offset` is the tensor's place in the flat vectors, in elements.  `leaf` is called once or more for
        every micro-batch range, always before this returns.
        """
        size = int(np.prod(shape, dtype=np.int64))
        small = self.count * size <= SMALL_ELEMENTS
        if small and self.count > 1:
            rows = self._spare(-1, self.count * size).reshape(self.count, *shape)
            leaf(0, self.count, rows)
        for (start, count), vector in zip(self.blocks, self.vectors, strict=True):
            target = vector[offset : offset + size].reshape(shape)
            if not small or self.count == 1:
                self._add_block(leaf, start, count, target)
            else:
                _add_rows(rows[start : start + count], target)

    def _add_block(self, leaf: Leaf, start: int, count: int, target: Array) -> None:
        """Write the sum of `count` (a power of two) leaves of a large tensor into `target`."""
        if count * target.nbytes > PIECE_BYTES and count > 1 and isinstance(leaf, LeafInPieces):
            stacked = min(count, MOST_STACKED)
            if pieces := leaf.pieces(PIECE_BYTES // (stacked * target.itemsize)):
                for piece in pieces:
                    write = functools.partial(leaf.write, piece)
                    self._add_leaves(write, start, count, target[piece], stacked)
                return
        self._add_leaves(leaf, start, count, target, 1)

    def _add_leaves(self, leaf: Leaf, start: int, count: int, target: Array, stacked: int) -> None:
        """Write the sum of `count` (a power of two) leaves into `target`; a call writes up to `stacked`."""
        if count == 1:
            leaf(start, start + 1, target[None])
            return
        if count <= stacked:
            rows = self._spare(-1, count * target.size).reshape(count, *target.shape)
            leaf(start, start + count, rows)
            _add_rows(rows, target)
            return
        half = count // 2
        self._add_leaves(leaf, start, half, target, stacked)
        right = self._spare(half, target.size).reshape(target.shape)
        self._add_leaves(leaf, start + half, half, right, stacked)
        np.add(target, right, out=target)

    def _spare(self, level: int, size: int) -> Array:
        """Return a scratch array of `size` elements; from the second step on it is the same memory."""
        spare = self._spares.get(level)
        if spare is None or len(spare) < size:
            spare = self._spares[level] = np.empty(size, self.vectors[0].dtype)
        return spare[:size]


def _add_rows(rows: Array, target: Array) -> None:
    """Write the tree sum of `rows` (a power of two of them) into `target`; `rows` is used up."""
    while len(rows) > 2:
        half = rows[0::2]
        np.add(half, rows[1::2], out=half)
        rows = half
    if len(rows) == 1:
        np.copyto(target, rows[0])
    else:
        np.add(rows[0], rows[1], out=target)


class LaneReduction:
    """Add one lane over all workers of all hosts; the total appears in the first slot of every host.

    `slots[w][k]` is block k of local worker w: a view of the lane, shape (n,).  `worker_ranges` and
    `host_ranges` give `(start, stop)` in micro-batches.  With one host `transport` is None.

    Cost for H hosts, k blocks a host, n elements: k n (H - 1) / H sent for the sums, n (H - 1) / H for the
    totals, by each lane of each host, however many workers the host has.
    """

    def __init__(
        self,
        slots: Sequence[Sequence[Array]],
        worker_ranges: Sequence[tuple[int, int]],
        host_ranges: Sequence[tuple[int, int]],
        transport: Transport | None,
    ) -> None:
        self.target = slots[0][0]
        self.pieces = [
            (start, count, array)
            for blocks, (first, last) in zip(slots, worker_ranges, strict=True)
            for (start, count), array in zip(aligned_blocks(first, last), blocks, strict=True)
        ]
        self.transport = transport
        if transport is not None:
            self._lay_out_exchange(transport, host_ranges)

    def _lay_out_exchange(self, transport: Transport, host_ranges: Sequence[tuple[int, int]]) -> None:
        """Compute every size of the exchange, on both sides alike, and allocate its buffers once."""
        size, dtype = len(self.target), self.target.dtype
        cuts = [
            tuple(
                min(size, SLICE_ALIGNMENT * edge)
                for edge in split_range(
                    round_up(size, SLICE_ALIGNMENT) // SLICE_ALIGNMENT, len(host_ranges), host
                )
            )
            for host in range(len(host_ranges))
        ]
        self._cuts = cuts
        self._host_blocks = [aligned_blocks(*host_range) for host_range in host_ranges]
        mine = self._host_blocks[transport.rank]
        low, high = cuts[transport.rank]
        self._send = [np.empty((len(mine), stop - start), dtype) for start, stop in cuts]
        self._receive = [np.empty((len(blocks), high - low), dtype) for blocks in self._host_blocks]

    def run(self, start: int = 0, stop: int | None = None) -> None:
        """Add the elements `[start, stop)` of the lane over this host's workers, then over the hosts.

        Several calls may cover the lane piece by piece when there is one host; with more hosts the whole
        lane goes at once.
        """
        stop = len(self.target) if stop is None else stop
        host_blocks = self._add_host(start, stop)
        if self.transport is None:
            return
        assert (start, stop) == (0, len(self.target)), "between hosts a lane travels whole"
        self._exchange(self.transport, host_blocks)

    def _add_host(self, start: int, stop: int) -> list[Array]:
        """Add this host's blocks in cache-sized chunks; return the lane's remaining blocks as whole views."""
        if len(self.pieces) > 1:
            for low in range(start, stop, CHUNK_ELEMENTS):
                high = min(stop, low + CHUNK_ELEMENTS)
                tree = TreeSum()
                for block, count, array in self.pieces:
                    tree.push(block, count, array[low:high])
                if self.transport is None:
                    tree.total()
        first = {block: array for block, _, array in self.pieces}
        edges = (self.pieces[0][0], self.pieces[-1][0] + self.pieces[-1][1])
        return [first[block] for block, _ in aligned_blocks(*edges)]

    def _exchange(self, transport: Transport, host_blocks: Sequence[Array]) -> None:
        """Swap slices with the same lane on the other hosts, add them, hand the totals round."""
        for (low, high), buffer in zip(self._cuts, self._send, strict=True):
            for row, block in zip(buffer, host_blocks, strict=True):
                np.copyto(row, block[low:high])
        transport.alltoall(self._send, self._receive)
        tree = TreeSum()
        for blocks, arrays in zip(self._host_blocks, self._receive, strict=True):
            for (start, count), array in zip(blocks, arrays, strict=True):
                tree.push(start, count, array)
        total = tree.total()
        transport.allgather(total, [self.target[low:high] for low, high in self._cuts])
