"""The contract of an optimizer: how a slice of the mean gradient changes the same slice of the state.

Everything is flat float32: the parameters are one vector, and so is each state vector of the optimizer (the
velocity of SGD, say).  A worker updates only its lane, a slice; because every operation is elementwise
(`+ - * / sqrt`, sign), a slice of the updated whole equals the updated slice, bit for bit.

The state exists in two generations.  An update reads the current one and writes every element of the
following one; it never writes into what it reads, so that whoever dies in the middle leaves the current
state whole.

What needs a norm happens in phases, and all workers meet between them:

1. the worker measures the gradient over fixed blocks (`optim/norm.py`), the same for every optimizer: the
   verdict whether it is finite, and the clip factor, which arrives here inside `scale`;
2. `prepare`, only where `num_sums` is not 0 (LARS, LAMB), writes sums of its own over the same blocks;
3. `apply` writes the following generation, and is told the sums of each tensor (`update.py`).

A contract has no logic; `optim/sgd.py` is the plainest example, `optim/lamb.py` one with all phases.  Buffers
belong to the caller, who may reuse them as soon as a call returns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distbp.optim.update import Update

__all__ = ["Optimizer"]


class Optimizer(ABC):
    """An update rule; it holds options, never state, so one instance may serve many lanes."""

    default_lr: float
    """The learning rate where none is given."""

    vectors: tuple[str, ...]
    """Names of the state vectors besides "parameters"; each is as long, and begins as zeros."""

    scratch_rows: int
    """Rows of the scratch buffer that the calls need; `chunks.new_scratch` makes one."""

    num_sums: int = 0
    """How many sums over each tensor `prepare` writes; 0: there is no such phase, and no `tensors`."""

    evaluated: str = "parameters"
    """The vector with which the model is evaluated and predicts."""

    def prepare(self, update: Update, blocks: Sequence[tuple[int, int]], sums: NDArray[np.float64]) -> None:
        """Write `sums`, shape (num_sums, k); `following` may be written as well, `apply` finds it so.

        `blocks` holds k ranges in elements of the slice.  Only a rule with `num_sums` has this phase.
        """
        raise NotImplementedError(f"{type(self).__name__} has num_sums = {self.num_sums} and no prepare")

    @abstractmethod
    def apply(self, update: Update) -> None:
        """Write the next generation of a slice: every element of every vector in `update.following`."""
