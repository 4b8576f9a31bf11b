"""Dropout: numbers are set to zero at random in training, so that no unit relies on another one.

N. Srivastava et al., "Dropout", JMLR 15, 2014, in the inverted form: what stays is divided by the share that
stays, so that evaluation does nothing.

Which numbers stay is keyed by (seed, the layer's place in the model, step, micro-batch): the same on every
worker, at every worker count, and when a step is done again.
"""

from __future__ import annotations

import math

import numpy as np

from distbp import random
from distbp.errors import ConfigError
from distbp.nn.layer import Array, Context, Layer, Shape

__all__ = ["Dropout"]


class Dropout(Layer):
    """y = x / (1 - share) with probability 1 - share, else 0, for each number by itself; y = x in evaluation.

    Probabilities are rounded to multiples of 2^-32.
    """

    def __init__(self, share: float = 0.5) -> None:
        if not 0.0 <= share < 1.0:
            raise ConfigError(f"Dropout: expected a share in [0, 1), got {share!r}")
        self.share = share

    def build(self, input_shape: Shape) -> Shape:
        """Keep the shape."""
        return input_shape

    def forward(self, x: Array, context: Context) -> Array:
        """Return x times a factor of 0 or 1 / (1 - share)."""
        if not context.training or not self.share:
            self._factors: Array | None = None
            return x
        self._factors = self.buffer("factors", x.shape, x.dtype)
        count = math.prod(x.shape[1:])
        for g, factors in enumerate(self._factors):
            key = (context.seed, f"dropout:{self._place}", context.step, context.first_micro_batch + g)
            stays = random.bernoulli(count, 1.0 - self.share, *key)
            np.copyto(factors, stays.reshape(factors.shape))
            factors *= 1.0 / (1.0 - self.share)
        return np.multiply(x, self._factors, out=self.buffer("y", x.shape, x.dtype))

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = dy times the same factors, because y = factor x with factors that x does not move."""
        if not want_dx:
            return None
        if self._factors is None:
            return dy
        return np.multiply(dy, self._factors, out=self.buffer("dx", dy.shape, dy.dtype))
