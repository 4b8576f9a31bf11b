"""A lane: the slice of the vector that one worker reduces, measures and updates (DESIGN 2.6).

A lane is a run of pieces, one for each bucket of the exchange, all cut at the borders of the fixed blocks
over which norms are summed.  `arena.sums` holds one row of block sums for the gradient and one for each of
the optimizer's `num_sums`; each owner writes the sums of its own blocks, and everybody reads all of them
after the next barrier.

It knows nothing of barriers, hosts, or how gradients came into the slot: the worker calls the methods in the
order of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distbp.arena import Arena
from distbp.exchange import Piece
from distbp.job import SKIPPED, WEIGHT, Job
from distbp.optim import SliceTensors, TensorPart, Update, norm
from distbp.optim.chunks import new_scratch

__all__ = ["Lane"]


class Span(Protocol):
    """Elements `[low, high)` of the vector, the blocks `[first, last)`: a piece, or a part of one."""

    @property
    def low(self) -> int: ...
    @property
    def high(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...


@dataclass(frozen=True)
class _Slice:
    """A span of the lane: its elements, its blocks, counted from its beginning, and its tensors."""

    elements: slice
    blocks: slice
    ranges: list[tuple[int, int]]
    tensors: SliceTensors


class Lane:
    """One worker's lane in one attempt; a worker that owns none has no pieces and does nothing."""

    def __init__(
        self, arena: Arena, job: Job, pieces: Sequence[Piece], blocks: list[tuple[int, int]]
    ) -> None:
        self._arena = arena
        self._job = job
        self._sums = arena.sums.reshape(1 + job.optimizer.num_sums, len(blocks))
        self._scratch = new_scratch(job.optimizer.scratch_rows)
        self._blocks = blocks
        self._pieces = pieces
        # Spans within a piece come with the first step that is verified (`verify.py`).
        self._slices: dict[tuple[int, int], _Slice] = {}

    def measure(self) -> None:
        """Write the sums of squares of the gradient, while it is still in the cache."""
        for part in map(self._slice, self._pieces):
            gradient = self._arena.slots[0][0][part.elements]
            norm.measure(gradient, part.ranges, self._sums[0, part.blocks])

    @property
    def gradient_sums(self) -> NDArray[np.float64]:
        """The sums of squares of the summed gradient, of all blocks of all lanes; whole after the barrier."""
        sums: NDArray[np.float64] = self._sums[0]
        return sums

    def is_finite(self) -> bool:
        """Return whether the gradient is finite; everybody reaches the same verdict."""
        return norm.is_finite(self._sums[0])

    def prepare(self, step: int, tail: NDArray[np.float64]) -> None:
        """Let the optimizer write its own sums; only where it has any."""
        for part in map(self._slice, self._pieces):
            update = self._update(part, step, tail, part.tensors.parts)
            self._job.optimizer.prepare(update, part.ranges, self._sums[1:, part.blocks])

    def apply(self, span: Span, step: int, tail: NDArray[np.float64]) -> None:
        """Write the next generation of a span of the lane."""
        optimizer, part = self._job.optimizer, self._slice(span)
        tensors = part.tensors.with_sums(self._sums) if optimizer.num_sums else ()
        optimizer.apply(self._update(part, step, tail, tensors))

    def copy(self, span: Span, step: int) -> None:
        """Copy a span to the next generation: a step that is skipped changes nothing."""
        part = slice(span.low, span.high)
        following = self._arena.vectors(step + 1)
        for name, vector in self._arena.vectors(step).items():
            np.copyto(following[name][part], vector[part])

    def _slice(self, span: Span) -> _Slice:
        """Return what is known of a span; made when it is first asked for."""
        key = span.low, span.high
        if key not in self._slices:
            layout, blocks = self._job.network.layout, self._blocks
            axes = [len(shape) for shape in layout.shapes]
            self._slices[key] = _Slice(
                slice(span.low, span.high),
                slice(span.first, span.last),
                [(start - span.low, stop - span.low) for start, stop in blocks[span.first : span.last]],
                SliceTensors(layout.borders(), axes, blocks, layout.size, span.low, span.high),
            )
        return self._slices[key]

    def _update(
        self, part: _Slice, step: int, tail: NDArray[np.float64], tensors: Sequence[TensorPart]
    ) -> Update:
        """Return what the optimizer is told about a span."""
        arena, job = self._arena, self._job
        weight = float(tail[WEIGHT])
        return Update(
            gradient=arena.slots[0][0][part.elements],
            scale=norm.clip_factor(self._sums[0], weight, job.clip_norm) / weight,
            lr=job.schedule(step),
            number=step - int(arena.scalars(step)[SKIPPED]) + 1,
            current={name: vector[part.elements] for name, vector in arena.vectors(step).items()},
            following={name: vector[part.elements] for name, vector in arena.vectors(step + 1).items()},
            scratch=self._scratch,
            tensors=tensors,
        )
