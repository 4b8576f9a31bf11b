"""LAMB: Adam's direction, stretched for every weight tensor to the length of its parameters.

With m, v and u of `adam.py`, p the parameters, and norms over a whole tensor:

    d = u + wd * p
    p = p - lr * |p| / |d| * d

Y. You and others, ICLR 2020, "Large batch optimization for deep learning: training BERT in 76 minutes",
algorithm 2, with phi(z) = z.

Tensors of one axis, biases and gains, have the ratio 1 and no decay, as in the reference implementations:
they begin at 0, where the ratio would keep them.  A weight tensor whose |p| or |d| is 0 has the ratio 1 too.

`prepare` leaves d where the following parameters will be, so that nothing is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distbp.optim import norm
from distbp.optim.adam import Moments
from distbp.optim.chunks import chunks
from distbp.optim.update import TensorPart, Update

__all__ = ["LAMB"]


class LAMB(Moments):
    """LAMB with decoupled weight decay."""

    default_lr = 0.002
    num_sums = 2

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=weight_decay)

    def prepare(self, update: Update, blocks: Sequence[tuple[int, int]], sums: NDArray[np.float64]) -> None:
        """Write m, v, d, and the sums of squares of the parameters and of d."""
        p, d = update.current["parameters"], update.following["parameters"]
        for tensor in update.tensors:
            decay = self.weight_decay if tensor.is_matrix else 0.0
            for part, g, spare in update.pieces(tensor.start, tensor.stop):
                self.average(update, part, g, spare)
                self.direct(update, part, 1.0, d[part])
                if decay:
                    np.multiply(p[part], decay, out=spare)
                    np.add(d[part], spare, out=d[part])
        norm.measure(p, blocks, sums[0])
        norm.measure(d, blocks, sums[1])

    def apply(self, update: Update) -> None:
        """Write the following parameters; the moments are there already.  See `Optimizer.apply`."""
        p, d = update.current["parameters"], update.following["parameters"]
        for tensor in update.tensors:
            rate = update.lr * _ratio(tensor)
            for part in chunks(tensor.stop, tensor.start):
                spare = update.scratch[0, : part.stop - part.start]
                np.multiply(d[part], rate, out=spare)
                np.subtract(p[part], spare, out=d[part])


def _ratio(tensor: TensorPart) -> float:
    """Return |p| / |d| of a tensor."""
    _, parameters, direction = (math.sqrt(square) for square in tensor.sums)
    if not tensor.is_matrix or parameters == 0 or direction == 0:
        return 1.0
    return parameters / direction
