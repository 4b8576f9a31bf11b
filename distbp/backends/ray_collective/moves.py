"""The operations of a collective group that move arrays: broadcast, allgather; and the barrier.

Arrays are bytes here, of one dimension.  What arrives is written once into the area of a piece, by the rank
of the node that has it or by the lanes, and every rank copies it from there.
"""

from __future__ import annotations

from collections.abc import Sequence

from distbp.backends.ray_collective.circle import ALIGNMENT, Bytes, Call, cuts, describe, rows_of
from distbp.backends.ray_collective.flow import Flow
from distbp.partition import round_up

__all__ = ["Moves"]


class Moves:
    """One rank's side of the operations that move arrays."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def barrier(self, call: Call) -> None:
        """Return when every rank has called this."""
        memory, circle, lane = self._flow.memory, self._flow.circle, self._flow.lane
        memory.begin()
        memory.meet(call.words, describe)
        if circle.lanes:
            if lane is not None and circle.local == 0:
                lane.barrier()
            memory.wait()

    def broadcast(self, x: Bytes, call: Call) -> None:
        """Fill `x` on every rank with the root's."""
        flow, circle, lane = self._flow, self._flow.circle, self._flow.lane
        if circle.world == 1:
            return
        is_root, source = circle.rank == call.root, circle.node_of(call.root)

        def load(low: int, high: int, area: Bytes) -> None:
            if is_root:
                area[: high - low] = x[low:high]

        def travel(low: int, high: int, area: Bytes) -> None:
            if lane is not None:
                flow.compare_nodes(lane, call, low)
                start, stop = cuts(high - low, circle.lanes)[circle.local]
                lane.broadcast(area[start:stop], source)

        def unload(low: int, high: int, area: Bytes) -> None:
            if not is_root:
                x[low:high] = area[: high - low]

        stages = (load, travel, unload) if circle.lanes else (load, unload)
        flow.run(call, x.size, flow.capacity, *stages)

    def allgather(self, outs: Sequence[Bytes], x: Bytes, call: Call) -> None:
        """Fill `outs[r]` with the array of rank r, for every r."""
        flow, circle, lane = self._flow, self._flow.circle, self._flow.lane
        outs[circle.rank][:] = x
        if circle.world == 1:
            return

        def load(low: int, high: int, area: Bytes) -> None:
            rows_of(area, circle.world, high - low, x.dtype)[circle.position] = x[low:high]

        def travel(low: int, high: int, area: Bytes) -> None:
            if lane is None:
                return
            flow.compare_nodes(lane, call, low)
            stride = round_up(high - low, ALIGNMENT)
            parts = []
            for first, ranks in zip(circle.firsts, circle.nodes, strict=True):
                start, stop = cuts(len(ranks) * stride, circle.lanes)[circle.local]
                parts.append(area[first * stride + start : first * stride + stop])
            flow.hand_round(lane, parts[circle.node], parts)

        def unload(low: int, high: int, area: Bytes) -> None:
            rows = rows_of(area, circle.world, high - low, x.dtype)
            for rank, row in zip(circle.order, rows, strict=True):
                if rank != circle.rank:
                    outs[rank][low:high] = row

        stages = (load, travel, unload) if circle.lanes else (load, unload)
        flow.run(call, x.size, flow.row_elements(circle.world, x), *stages)
