"""Adam, and AdamW, whose weight decay does not pass through the moments.

With g the mean gradient, p the parameters, t the number of the update, from 1:

    m = b1 * m + (1 - b1) * g                        v = b2 * v + (1 - b2) * g * g
    u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + epsilon)

    Adam   p = p - lr * u, with g + wd * p in place of g
           D. Kingma and J. Ba, ICLR 2015, "Adam: a method for stochastic optimization", algorithm 1; the
           decay is the L2 term of PyTorch's Adam
    AdamW  p = p - lr * u - lr * wd * p
           I. Loshchilov and F. Hutter, ICLR 2019, "Decoupled weight decay regularization", algorithm 2, with
           lr * wd where they write eta * wd: this is PyTorch's AdamW, and the decay follows the schedule

Everything is decayed, biases and gains too.  LAMB begins with the same moments: they are functions below.
"""

from __future__ import annotations

import math
from abc import ABC

import numpy as np
from numpy.typing import NDArray

from distbp.optim.base import Optimizer
from distbp.optim.checks import check_decay, check_epsilon, check_share
from distbp.optim.update import Update

__all__ = ["Adam", "AdamW", "Moments", "power"]

Slice = NDArray[np.float32]


class Moments(Optimizer, ABC):
    """What Adam and its kin share: two moving averages of the gradient and the direction that they give."""

    default_lr = 0.001
    scratch_rows = 2
    vectors = ("first_moment", "second_moment")

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.beta1 = check_share("beta1", beta1)
        self.beta2 = check_share("beta2", beta2)
        self.epsilon = check_epsilon("epsilon", epsilon)
        self.weight_decay = check_decay(weight_decay)

    def average(self, update: Update, part: slice, g: Slice, spare: Slice) -> None:
        """Write m and v of `part` from its gradient `g`, which is used up."""
        current, following = update.current, update.following
        m, v = following["first_moment"][part], following["second_moment"][part]
        np.multiply(current["first_moment"][part], self.beta1, out=m)
        np.multiply(g, 1.0 - self.beta1, out=spare)
        np.add(m, spare, out=m)
        np.multiply(current["second_moment"][part], self.beta2, out=v)
        np.multiply(g, g, out=g)
        np.multiply(g, 1.0 - self.beta2, out=g)
        np.add(v, g, out=v)

    def direct(self, update: Update, part: slice, size: float, out: Slice) -> None:
        """Write `size * u` of `part` into `out`, from m and v as `average` left them."""
        following, number = update.following, update.number
        np.sqrt(following["second_moment"][part], out=out)
        np.multiply(out, 1.0 / math.sqrt(1.0 - power(self.beta2, number)), out=out)
        np.add(out, self.epsilon, out=out)
        np.divide(following["first_moment"][part], out, out=out)
        np.multiply(out, size / (1.0 - power(self.beta1, number)), out=out)


class Adam(Moments):
    """Adam, with weight decay as an L2 term."""

    def apply(self, update: Update) -> None:
        """Write the next generation of a slice; see `Optimizer.apply`."""
        p, following = update.current["parameters"], update.following["parameters"]
        for part, g, spare in update.pieces(decay=self.weight_decay):
            self.average(update, part, g, spare)
            self.direct(update, part, update.lr, spare)
            np.subtract(p[part], spare, out=following[part])


class AdamW(Moments):
    """Adam with decoupled weight decay; 0.01 unless told otherwise."""

    def __init__(
        self,
        *,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(beta1=beta1, beta2=beta2, epsilon=epsilon, weight_decay=weight_decay)

    def apply(self, update: Update) -> None:
        """Write the next generation of a slice; see `Optimizer.apply`."""
        p, following = update.current["parameters"], update.following["parameters"]
        for part, g, spare in update.pieces():
            self.average(update, part, g, spare)
            self.direct(update, part, update.lr, spare)
            np.multiply(p[part], 1.0 - update.lr * self.weight_decay, out=g)
            np.subtract(g, spare, out=following[part])


def power(base: float, exponent: int) -> float:
    """Return `base ** exponent` for a whole exponent >= 1, by squaring.

    Multiplications round alike everywhere; the C library's `pow` need not, and two hosts would then differ.
    """
    assert exponent >= 1, f"updates count from 1, got {exponent}"
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
