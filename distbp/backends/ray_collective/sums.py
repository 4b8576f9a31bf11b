"""The operations of a collective group that join arrays: allreduce, reduce, reducescatter.

Values of different ranks are joined in the tree of `reduce.py` with ranks as its leaves, whatever node they
are on.  So the bits depend on ranks alone, and are the same on every rank, in every repetition, on one node
and on several.  How the work is shared out is another matter:

* **Two ranks on one node** each read the other's array and join it with their own, in place: nothing is
  written twice, and there is one barrier for each piece.
* **More ranks on one node** do the same with small arrays, where barriers cost more than additions.  Of large
  ones each rank joins one slice of each piece; its own part of that slice never leaves its array.
* **Several nodes and a small array**: the first rank of each node sends all rows of the node, in one message.
* **Two nodes**: each lane joins its slice over the node, swaps it, and joins the two halves.
* **More nodes**: a lane swaps parts of its slice (alltoall), joins what it got, and hands the totals round.

A rank that is alone on its node works in its array itself.  Ranks of a node need not be neighbours: a node
then keeps one block for each aligned run of its ranks, as hosts do in training, and sends more than one.

An allreduce of b bytes makes each node send 2 b (H - 1) / H bytes, for H nodes that keep one block each.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from distbp.backends.ray_collective.circle import (
    ALIGNMENT,
    JOINS,
    Array,
    Bytes,
    Call,
    cuts,
    describe,
    rows_of,
)
from distbp.backends.ray_collective.flow import Flow
from distbp.partition import round_up
from distbp.reduce import TreeSum, tree_total
from distbp.transports.base import Transport

__all__ = ["Sums"]

SMALL_BYTES = 1 << 16
"""On one node an array up to this size is joined by every rank for itself, after one barrier."""

SMALL_FAR_BYTES = 1 << 18
"""Between nodes this is what a node sends at most in one message, to save the latency of a second one."""

_CACHED = 256
"""Sizes of small arrays for which the views are kept."""


class Sums:
    """One rank's side of the operations that join arrays; arrays have one dimension.

    An operation that raises leaves its results undefined.
    """

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._small: dict[tuple[Any, int], list[tuple[Array, Array, Array]]] = {}

    def close(self) -> None:
        """Forget the views of the node's memory."""
        self._small = {}

    def allreduce(self, x: Array, call: Call) -> None:
        """Join the arrays of all ranks into `x`; with a root only into the root's, and others stay."""
        circle, join = self._flow.circle, JOINS[call.joined]
        if circle.world == 1:
            return
        wanted = call.root in (-1, circle.rank)
        if circle.lanes == 0:
            if x.nbytes <= SMALL_BYTES:
                self._small_here(x, call, join, wanted)
            elif circle.world == 2:
                self._two_here(x, call, join, wanted)
            else:
                self._here(x, call, join, wanted)
        elif x.nbytes * circle.most <= SMALL_FAR_BYTES and self._small_far_bytes(x) <= self._flow.capacity:
            self._small_far(x, call, join, wanted)
        else:
            self._far(x, call, join, wanted)

    def reducescatter(self, out: Array, parts: Sequence[Array], call: Call) -> None:
        """Fill `out` with the joined `parts[rank]` of all ranks."""
        flow, circle, lane, join = self._flow, self._flow.circle, self._flow.lane, JOINS[call.joined]
        if circle.world == 1:
            out[:] = parts[0]
            return

        def columns(low: int, high: int, area: Bytes) -> Array:
            return rows_of(area, len(circle.mine), circle.world * (high - low), out.dtype)

        def load(low: int, high: int, area: Bytes) -> None:
            row = columns(low, high, area)[circle.local].reshape(circle.world, -1)
            for rank, column in zip(circle.order, row, strict=True):
                column[:] = parts[rank][low:high]

        def travel(low: int, high: int, area: Bytes) -> None:
            if lane is None:
                return
            flow.compare_nodes(lane, call, low)
            ours = []
            for first, ranks in zip(circle.firsts, circle.nodes, strict=True):
                base = first * (high - low)
                start, stop = cuts(len(ranks) * (high - low), circle.lanes)[circle.local]
                ours.append((base + start, base + stop))
            self._swap(lane, columns(low, high, area), ours, join)

        def unload(low: int, high: int, area: Bytes) -> None:
            rows, start = columns(low, high, area), circle.position * (high - low)
            if circle.lanes:
                out[low:high] = rows[0][start : start + high - low]
            else:
                out[low:high] = tree_of(rows[:, start : start + high - low], join)

        stages = (load, travel, unload) if circle.lanes else (load, unload)
        flow.run(call, out.size, flow.row_elements(circle.most, out) // circle.world, *stages)

    # ----- on one node

    def _small_here(self, x: Array, call: Call, join: np.ufunc, wanted: bool) -> None:
        """Read everybody's array and join all of them."""
        flow, circle = self._flow, self._flow.circle
        plan = self._small.get((x.dtype, x.size))
        if plan is None:
            if len(self._small) == _CACHED:
                self._small.clear()
            rows = [rows_of(area, circle.world, x.size, x.dtype) for area in flow.memory.areas]
            plan = self._small[x.dtype, x.size] = [(some, some[circle.rank], some[0]) for some in rows]
        everybody, mine, first = plan[flow.next_area()]
        flow.memory.begin()
        mine[:] = x
        flow.memory.meet(call.words, describe)
        if not wanted:
            return
        if circle.world == 2:
            join(first, everybody[1], out=x)
        else:
            x[:] = tree_total(everybody, join)

    def _two_here(self, x: Array, call: Call, join: np.ufunc, wanted: bool) -> None:
        """Join the other rank's array with `x`, in place."""
        rank = self._flow.circle.rank
        is_needed = call.root != rank  # The root's own array is nobody else's business.

        def load(low: int, high: int, area: Bytes) -> None:
            if is_needed:
                rows_of(area, 2, high - low, x.dtype)[rank] = x[low:high]

        def work(low: int, high: int, area: Bytes) -> None:
            if wanted:
                other, mine = rows_of(area, 2, high - low, x.dtype)[1 - rank], x[low:high]
                left, right = (mine, other) if rank == 0 else (other, mine)
                join(left, right, out=mine)

        self._flow.run(call, x.size, self._flow.row_elements(2, x), load, work)

    def _here(self, x: Array, call: Call, join: np.ufunc, wanted: bool) -> None:
        """Join one slice of each piece; this rank's own part of it stays in `x`."""
        world, rank = self._flow.circle.world, self._flow.circle.rank

        def load(low: int, high: int, area: Bytes) -> None:
            row = rows_of(area, world, high - low, x.dtype)[rank]
            start, stop = cuts(high - low, world)[rank] if wanted else (0, 0)
            row[:start] = x[low : low + start]
            row[stop:] = x[low + stop : high]

        def work(low: int, high: int, area: Bytes) -> None:
            start, stop = cuts(high - low, world)[rank]
            parts = list(rows_of(area, world, high - low, x.dtype)[:, start:stop])
            shared = parts[0]
            if wanted:
                parts[rank] = x[low + start : low + stop]
            total = tree_of(parts, join)
            if total is not shared:
                shared[:] = total

        def unload(low: int, high: int, area: Bytes) -> None:
            if wanted:
                x[low:high] = rows_of(area, world, high - low, x.dtype)[0]

        self._flow.run(call, x.size, self._flow.row_elements(world, x), load, work, unload)

    # ----- on several

    def _small_far(self, x: Array, call: Call, join: np.ufunc, wanted: bool) -> None:
        """Swap all rows of all nodes as they are, with what was called in front of them."""
        flow, circle, stride = self._flow, self._flow.circle, round_up(x.nbytes, ALIGNMENT)
        regions, rows, position = [], {}, 0
        area = flow.memory.areas[flow.next_area()]
        for ranks in circle.nodes:
            region = area[position : position + ALIGNMENT + len(ranks) * stride]
            for place, rank in enumerate(ranks):
                rows[rank] = region[ALIGNMENT + place * stride :][: x.nbytes].view(x.dtype)
            regions.append(region)
            position += region.size
        flow.memory.begin()
        rows[circle.rank][:] = x
        flow.memory.meet(call.words, describe)
        if flow.lane is not None and circle.local == 0:
            regions[circle.node][:16].view(np.int64)[:] = call.words
            flow.hand_round(flow.lane, regions[circle.node], regions)
            flow.compare_words(call, [region[:16].view(np.int64) for region in regions])
            tree_of([rows[rank] for rank in range(circle.world)], join)
        flow.memory.wait()
        if wanted:
            x[:] = rows[0]

    def _small_far_bytes(self, x: Array) -> int:
        """Return what `_small_far` puts into an area."""
        circle = self._flow.circle
        return ALIGNMENT * len(circle.nodes) + circle.world * round_up(x.nbytes, ALIGNMENT)

    def _far(self, x: Array, call: Call, join: np.ufunc, wanted: bool) -> None:
        """Lane owners join slices over the node, then over nodes."""
        flow, circle, lane = self._flow, self._flow.circle, self._flow.lane
        in_place = len(circle.mine) == 1 and wanted
        is_pair = [len(blocks) for blocks in circle.blocks] == [1, 1]

        def rows(low: int, high: int, area: Bytes) -> Array:
            return x[None, low:high] if in_place else rows_of(area, len(circle.mine), high - low, x.dtype)

        def load(low: int, high: int, area: Bytes) -> None:
            if not in_place:
                rows(low, high, area)[circle.local] = x[low:high]

        def travel(low: int, high: int, area: Bytes) -> None:
            if lane is None:
                return
            flow.compare_nodes(lane, call, low)
            start, stop = cuts(high - low, circle.lanes)[circle.local]
            here = rows(low, high, area)
            if is_pair:
                self._swap_whole(lane, here, (start, stop), call, join)
                return
            inner = [(start + first, start + last) for first, last in cuts(stop - start, lane.size)]
            total = self._swap(lane, here, inner, join)
            target = [here[0, first:last] for first, last in inner]
            if call.root < 0:
                flow.hand_round(lane, total, target)
            else:
                flow.hand_over(lane, total, target, circle.node_of(call.root))

        def unload(low: int, high: int, area: Bytes) -> None:
            if wanted and not in_place:
                x[low:high] = rows(low, high, area)[0]

        flow.run(call, x.size, flow.row_elements(circle.most, x), load, travel, unload)

    def _swap_whole(
        self, lane: Transport, rows: Array, part: tuple[int, int], call: Call, join: np.ufunc
    ) -> None:
        """Join one part of all rows of two nodes that keep one block each, into the first row."""
        circle, (start, stop) = self._flow.circle, part
        (mine,) = self._join_rows(rows, start, stop, join)
        takes = call.root < 0 or circle.node_of(call.root) == lane.rank
        gives = call.root < 0 or not takes
        counts = [1, 1] if takes else [0, 0]
        receive = self._flow.receiving(counts, stop - start, rows.dtype, lane.rank)
        nothing, other = rows[0, :0], 1 - lane.rank
        send = [mine if gives and node == other else nothing for node in range(2)]
        lane.alltoall(send, [some.reshape(-1) for some in receive])
        if takes:
            theirs = receive[other][0]
            left, right = (mine, theirs) if lane.rank == 0 else (theirs, mine)
            join(left, right, out=rows[0, start:stop])

    def _swap(self, lane: Transport, rows: Array, ours: Sequence[tuple[int, int]], join: np.ufunc) -> Array:
        """Join the elements `ours[h]` of all rows of all nodes for node h; return this node's total.

        The total lies in the first row.
        """
        blocks = self._flow.circle.blocks
        low, high = ours[lane.rank]
        sums = [self._join_rows(rows, start, stop, join) for start, stop in ours]
        send = [some[0] if len(some) == 1 else np.concatenate(some) for some in sums]
        receive = self._flow.receiving([len(some) for some in blocks], high - low, rows.dtype, lane.rank)
        mine, send[lane.rank] = sums[lane.rank], rows[0, :0]
        lane.alltoall(send, [some.reshape(-1) for some in receive])
        arrays = [mine if node == lane.rank else list(some) for node, some in enumerate(receive)]
        pieces = [
            (first, count, array)
            for places, some in zip(blocks, arrays, strict=True)
            for (first, count), array in zip(places, some, strict=True)
        ]
        tree = TreeSum(join)
        for first, count, array in sorted(pieces, key=lambda piece: piece[0]):
            tree.push(first, count, array)
        total, target = tree.total(), rows[0, low:high]
        if lane.rank != 0:  # Rank 0 is the first leaf, so the tree's result is already in its node's rows.
            target[:] = total
        return target

    def _join_rows(self, rows: Array, start: int, stop: int, join: np.ufunc) -> list[Array]:
        """Join elements [start, stop) of this node's rows, in place; return what is left of its blocks."""
        left = []
        local = 0
        for first, count in self._flow.circle.runs:
            tree = TreeSum(join)
            for place in range(count):
                tree.push(first + place, 1, rows[local + place, start:stop])
            left += [array for _, _, array in tree.blocks]
            local += count
        return left


def tree_of(leaves: Iterable[Array], join: np.ufunc) -> Array:
    """Join the arrays of ranks 0, 1, ... in place and return the one that holds the total."""
    tree = TreeSum(join)
    for rank, leaf in enumerate(leaves):
        tree.push(rank, 1, leaf)
    return tree.total()
