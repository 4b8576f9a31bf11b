"""What an optimizer is told about one update of a slice, and the walk through it that all rules share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distbp.optim.chunks import chunks

__all__ = ["TensorPart", "Update", "Vectors"]

Slice = NDArray[np.float32]

# Slices of equal length by name: "parameters" and each of `Optimizer.vectors`.
Vectors = Mapping[str, Slice]


@dataclass(frozen=True)
class TensorPart:
    """The part of one tensor in a slice: its elements `[start, stop)`, the padding behind it included.

    `is_matrix` says whether the tensor has two axes or more, as weights have and biases and gains have not.
    `sums` are those of the whole tensor, wherever its other parts lie: first the sum of squares of the summed
    gradient, then one for each of `Optimizer.num_sums`; in `prepare` they are empty.
    """

    start: int
    stop: int
    is_matrix: bool
    sums: tuple[float, ...] = ()


@dataclass
class Update:
    """One update of a slice of n elements.

    Attributes:
        gradient: shape (n,), the slice of the gradient SUMMED over the global batch; it is only read.
        scale: clip factor / weight sum, so that `gradient * scale` is the (clipped) mean gradient.
        lr: the learning rate of this step.
        number: the number of this update, from 1; steps that were skipped do not count.
        current: "parameters" and every state vector, each (n,); only read.
        following: the same names and shapes, sharing no memory with `current`; every element is written.
        scratch: from `chunks.new_scratch(scratch_rows)`; its contents before and after mean nothing.
        tensors: the parts of tensors that make up the slice, in order, where `num_sums` is not 0.
    """

    gradient: Slice
    scale: float
    lr: float
    number: int
    current: Vectors
    following: Vectors
    scratch: Slice
    tensors: Sequence[TensorPart] = ()

    def __post_init__(self) -> None:
        # A NumPy float64 scalar would turn float32 arithmetic into float64; a Python float does not.
        self.scale, self.lr = float(self.scale), float(self.lr)

    def pieces(
        self, start: int = 0, stop: int | None = None, *, decay: float = 0.0
    ) -> Iterator[tuple[slice, Slice, Slice]]:
        """Yield pieces of `[start, stop)` that stay in the cache: where, the mean gradient, a spare row.

        `decay` times the parameters is added to the gradient.  Both rows are free until the next piece.
        """
        for part in chunks(len(self.gradient) if stop is None else stop, start):
            g, spare = self.scratch[:2, : part.stop - part.start]
            np.multiply(self.gradient[part], self.scale, out=g)
            if decay:
                np.multiply(self.current["parameters"][part], decay, out=spare)
                np.add(g, spare, out=g)
            yield part, g, spare
