"""The contract of an optimizer: how a slice of the mean gradient changes the same slice of the state.

Everything is flat float32: the parameters are one vector, and so is each state vector of the optimizer (the
velocity of SGD, say).  A worker updates only its lane, a slice; because every operation is elementwise
(`+ - * / sqrt`), a slice of the updated whole equals the updated slice, bit for bit.

The state exists in two generations.  An update reads the current one and writes every element of the
following one; it never writes into what it reads, so that whoever dies in the middle leaves the current
state whole.

What needs a norm happens in two phases: `measure` writes sums over fixed blocks, all workers meet and learn
all sums, then `apply` receives what followed from them as the factor `scale`.

A contract has no logic; `optim/norm.py` holds the arithmetic of norms, `optim/sgd.py` is the plainest
example.  Buffers belong to the caller, who may reuse them as soon as a call returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["Optimizer", "Vectors"]

# Slices of equal length by name: "parameters" and each of `Optimizer.vectors`.
Vectors = Mapping[str, NDArray[np.float32]]


class Optimizer(ABC):
    """An update rule; it holds options, never state, so one instance may serve many lanes."""

    vectors: tuple[str, ...]
    """Names of the state vectors besides "parameters"; each is as long, and begins as zeros."""

    scratch_rows: int
    """Rows of the scratch buffer that `apply` needs; `chunks.new_scratch` makes one."""

    @abstractmethod
    def measure(
        self,
        gradient: NDArray[np.float32],
        blocks: Sequence[tuple[int, int]],
        sums: NDArray[np.float64],
        *,
        offset: int = 0,
    ) -> None:
        """Write into `sums[i]` the sum that belongs to `blocks[i]`; not finite if the gradient there is not.

        Arguments:
            gradient: shape (n,), the slice of the summed gradient that begins at element `offset`.
            blocks: shape (k,), ranges in elements of the whole vector, all inside the slice.
            sums: shape (k,).
        """

    @abstractmethod
    def apply(
        self,
        gradient: NDArray[np.float32],
        *,
        scale: float,
        lr: float,
        current: Vectors,
        following: Vectors,
        scratch: NDArray[np.float32],
    ) -> None:
        """Write the next generation of a slice.

        Arguments:
            gradient: shape (n,), the slice of the gradient SUMMED over the global batch; it is only read.
            scale: clip factor / weight sum, so that `gradient * scale` is the (clipped) mean gradient.
            lr: the learning rate of this step.
            current: "parameters" and every state vector, each (n,); only read.
            following: the same names and shapes, sharing no memory with `current`; every element is written.
            scratch: from `chunks.new_scratch(self.scratch_rows)`; its contents before and after mean nothing.
        """
