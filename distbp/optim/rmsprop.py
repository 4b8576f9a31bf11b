"""RMSProp: the gradient divided by a moving root mean square of itself.

With g the mean gradient (and wd * p added to it), p the parameters:

    v = rho * v + (1 - rho) * g * g
    p = p - lr * g / (sqrt(v) + epsilon)
    with momentum mu:   b = mu * b + g / (sqrt(v) + epsilon),   p = p - lr * b

T. Tieleman and G. Hinton, 2012, lecture 6.5 of "Neural networks for machine learning"; the momentum and the
place of epsilon are those of PyTorch's RMSprop.  The lecture's rho is 0.9.
"""

from __future__ import annotations

import numpy as np

from distbp.optim.base import Optimizer
from distbp.optim.checks import check_decay, check_epsilon, check_share
from distbp.optim.update import Update

__all__ = ["RMSProp"]


class RMSProp(Optimizer):
    """RMSProp; `beta2` is the share rho of the old mean square that is kept."""

    default_lr = 0.001
    scratch_rows = 2

    def __init__(
        self,
        *,
        beta2: float = 0.9,
        momentum: float = 0.0,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.beta2 = check_share("beta2", beta2)
        self.momentum = check_share("momentum", momentum)
        self.epsilon = check_epsilon("epsilon", epsilon)
        self.weight_decay = check_decay(weight_decay)
        self.vectors = ("mean_square", "momentum") if momentum else ("mean_square",)

    def apply(self, update: Update) -> None:
        """Write the next generation of a slice; see `Optimizer.apply`."""
        current, following = update.current, update.following
        for part, g, spare in update.pieces(decay=self.weight_decay):
            p, v = current["parameters"][part], following["mean_square"][part]
            np.multiply(g, g, out=spare)
            np.multiply(spare, 1.0 - self.beta2, out=spare)
            np.multiply(current["mean_square"][part], self.beta2, out=v)
            np.add(v, spare, out=v)
            np.sqrt(v, out=spare)
            np.add(spare, self.epsilon, out=spare)
            np.divide(g, spare, out=g)
            if self.momentum:
                b = following["momentum"][part]
                np.multiply(current["momentum"][part], self.momentum, out=b)
                np.add(b, g, out=b)
                g = b
            np.multiply(g, update.lr, out=spare)
            np.subtract(p, spare, out=following["parameters"][part])
