"""How an operation runs: in pieces, through stages, over areas of the node's memory and lanes between nodes.

A *piece* of the arrays fits into an area (`memory.py`).  It goes through stages: ranks *load* it into the
area, some work on it or send it elsewhere, ranks *unload* it.  Stages of neighbouring pieces overlap: between
two barriers a rank loads piece p, works on piece p - 1 and unloads piece p - 2, in three different areas.

Between nodes there are as many *lanes* as the smallest node has ranks.  A lane belongs to one rank of each
node and moves its share of every piece, so that a byte crosses once per node, however many ranks a node has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from distbp.backends.ray_collective.circle import ALIGNMENT, Array, Bytes, Call, Circle, cuts, describe
from distbp.backends.ray_collective.memory import NodeMemory, mismatch
from distbp.transports.base import Transport

__all__ = ["Flow", "Stage"]

Stage = Callable[[int, int, Bytes], None]
"""Does something with the elements [low, high) of an operation, in the area that they pass through."""


class Flow:
    """One rank's means to run operations.  `lane` joins it with its like on other nodes, if it owns one.

    `capacity` is the size of an area in bytes.
    """

    def __init__(self, circle: Circle, memory: NodeMemory, lane: Transport | None, capacity: int) -> None:
        self.circle = circle
        self.memory = memory
        self.lane = lane
        self.capacity = capacity
        self._turn = 0
        self._scratch = np.empty(0, np.uint8)

    def run(self, call: Call, size: int, most: int, *stages: Stage) -> None:
        """Send `size` elements through `stages` in pieces of at most `most`, one stage behind the other.

        All ranks of the node compare their calls at the first barrier.
        """
        memory = self.memory
        memory.begin()
        count = max(1, -(-size // (most // ALIGNMENT * ALIGNMENT)))
        pieces = cuts(size, count)
        last = count + len(stages) - 2
        for tick in range(last + 1):
            for lag, stage in enumerate(stages):
                piece = tick - lag
                if 0 <= piece < count:
                    low, high = pieces[piece]
                    stage(low, high, memory.areas[(self._turn + piece) % 3])
            if tick == 0:
                memory.meet(call.words, describe)
            elif tick < last:
                memory.wait()
        self._turn = (self._turn + count) % 3

    def next_area(self) -> int:
        """Return the number of the area of an operation that takes one piece and is not `run`."""
        turn = self._turn
        self._turn = (turn + 1) % 3
        return turn

    def row_elements(self, rows: int, x: Array) -> int:
        """Return how many elements like those of `x` a row has when an area holds so many rows."""
        return self.capacity // rows // ALIGNMENT * ALIGNMENT // x.itemsize

    def receiving(self, counts: Sequence[int], size: int, dtype: np.dtype[Any], own: int) -> list[Array]:
        """Return room for `counts[h]` arrays of each node but `own`; the same memory in every operation."""
        counts = [0 if node == own else count for node, count in enumerate(counts)]
        needed = sum(counts) * size * dtype.itemsize
        if self._scratch.size < needed:
            self._scratch = np.empty(needed, np.uint8)
        room: Array = self._scratch[:needed].view(dtype)
        start, arrays = 0, []
        for count in counts:
            arrays.append(room[start : start + count * size].reshape(count, size))
            start += count * size
        return arrays

    # ----- between nodes

    def hand_round(self, lane: Transport, mine: Array, everybody: Sequence[Array]) -> None:
        """Give `mine` to every node and take `everybody[h]` from node h; `mine` is this node's part of it."""
        nothing = mine[:0]
        others = [node != lane.rank for node in range(lane.size)]
        lane.alltoall(
            [mine if other else nothing for other in others],
            [array if other else nothing for array, other in zip(everybody, others, strict=True)],
        )

    def hand_over(self, lane: Transport, mine: Array, everybody: Sequence[Array], node: int) -> None:
        """Do the same for one node only."""
        nothing, is_target = mine[:0], lane.rank == node
        lane.alltoall(
            [mine if other == node and not is_target else nothing for other in range(lane.size)],
            [array if is_target and other != node else nothing for other, array in enumerate(everybody)],
        )

    def compare_nodes(self, lane: Transport, call: Call, low: int) -> None:
        """Before its first piece, find out whether all nodes are in the same operation."""
        if low == 0:
            words = np.zeros((lane.size, 2), np.int64)
            words[lane.rank] = call.words
            self.hand_round(lane, words[lane.rank], list(words))
            self.compare_words(call, list(words))

    def compare_words(self, call: Call, everybody: Sequence[Array]) -> None:
        """Raise unless every node announced the same."""
        for ranks, words in zip(self.circle.nodes, everybody, strict=True):
            theirs = (int(words[0]), int(words[1]))
            if theirs != call.words:
                raise mismatch(describe(*call.words), ranks[0], describe(*theirs))
