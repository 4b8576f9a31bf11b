"""Lion: only the sign of an interpolated momentum counts; one state vector.

With g the mean gradient, p the parameters, m the momentum:

    p = p - lr * (sign(b1 * m + (1 - b1) * g) + wd * p)
    m = b2 * m + (1 - b2) * g

X. Chen and others, NeurIPS 2023, "Symbolic discovery of optimization algorithms", program 1.  They use a
learning rate 3 to 10 times smaller than AdamW's, and a decay as many times larger.  The sign of 0 is 0, so
padding stays where it is.
"""

from __future__ import annotations

import numpy as np

from distbp.optim.base import Optimizer
from distbp.optim.checks import check_decay, check_share
from distbp.optim.update import Update

__all__ = ["Lion"]


class Lion(Optimizer):
    """Lion with decoupled weight decay."""

    default_lr = 0.0001
    scratch_rows = 2
    vectors = ("momentum",)

    def __init__(self, *, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 0.0) -> None:
        self.beta1 = check_share("beta1", beta1)
        self.beta2 = check_share("beta2", beta2)
        self.weight_decay = check_decay(weight_decay)

    def apply(self, update: Update) -> None:
        """Write the next generation of a slice; see `Optimizer.apply`."""
        current, following = update.current, update.following
        for part, g, spare in update.pieces():
            p, m = following["parameters"][part], following["momentum"][part]
            np.multiply(g, 1.0 - self.beta1, out=spare)
            np.multiply(current["momentum"][part], self.beta1, out=m)
            np.add(m, spare, out=spare)
            np.sign(spare, out=spare)
            np.multiply(spare, update.lr, out=spare)
            np.multiply(current["parameters"][part], 1.0 - update.lr * self.weight_decay, out=p)
            np.subtract(p, spare, out=p)
            np.multiply(g, 1.0 - self.beta2, out=g)
            np.multiply(current["momentum"][part], self.beta2, out=m)
            np.add(m, g, out=m)
