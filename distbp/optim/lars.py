"""LARS: for every weight tensor a learning rate in proportion to |p| / |g|, for very large batches.

With g the mean gradient, p the parameters, v the velocity, and norms over a whole tensor:

    r = trust * |p| / (|g| + wd * |p|)
    v = mu * v + lr * r * (g + wd * p)
    p = p - v

Y. You, I. Gitman and B. Ginsburg, 2017, "Large batch training of convolutional networks", algorithm 1.  As
there, the learning rate multiplies what is collected, unlike in `sgd.py`.

Tensors of one axis, biases and gains, have r = 1 and no decay, as in the reference implementations: they
begin at 0, where r would keep them.  A weight tensor whose |p| or |g| is 0 has r = 1 too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distbp.optim import norm
from distbp.optim.base import Optimizer
from distbp.optim.checks import check_decay, check_epsilon, check_share
from distbp.optim.update import TensorPart, Update

__all__ = ["LARS"]


class LARS(Optimizer):
    """LARS with momentum; `trust` is the coefficient that the paper calls eta."""

    default_lr = 10.0
    scratch_rows = 2
    num_sums = 1
    vectors = ("momentum",)

    def __init__(self, *, momentum: float = 0.9, trust: float = 0.001, weight_decay: float = 0.0) -> None:
        self.momentum = check_share("momentum", momentum)
        self.trust = check_epsilon("trust", trust)
        self.weight_decay = check_decay(weight_decay)

    def prepare(self, update: Update, blocks: Sequence[tuple[int, int]], sums: NDArray[np.float64]) -> None:
        """Write the sums of squares of the parameters."""
        norm.measure(update.current["parameters"], blocks, sums[0])

    def apply(self, update: Update) -> None:
        """Write the next generation of a slice; see `Optimizer.apply`."""
        current, following = update.current, update.following
        for tensor in update.tensors:
            decay = self.weight_decay if tensor.is_matrix else 0.0
            rate = update.lr * self._ratio(tensor, update.scale)
            for part, g, _ in update.pieces(tensor.start, tensor.stop, decay=decay):
                v = following["momentum"][part]
                np.multiply(g, rate, out=g)
                np.multiply(current["momentum"][part], self.momentum, out=v)
                np.add(v, g, out=v)
                np.subtract(current["parameters"][part], v, out=following["parameters"][part])

    def _ratio(self, tensor: TensorPart, scale: float) -> float:
        """Return r of a tensor."""
        gradient, parameters = (math.sqrt(square) for square in tensor.sums)
        if not tensor.is_matrix or gradient == 0 or parameters == 0:
            return 1.0
        return self.trust * parameters / (gradient * scale + self.weight_decay * parameters)
