"""Stochastic gradient descent, plain, with momentum, or with Nesterov's look-ahead.

With g the mean gradient, p the parameters, v the velocity, mu the momentum and wd the weight decay:

    g = g + wd * p
    v = mu * v + g
    p = p - lr * v                  momentum:  B. T. Polyak, 1964, "Some methods of speeding up the
                                    convergence of iteration methods"
    p = p - lr * (g + mu * v)       nesterov:  Y. Nesterov, 1983, in the form of I. Sutskever, J. Martens,
                                    G. Dahl and G. Hinton, ICML 2013, section 2, re-arranged so that the
                                    gradient is taken at p

The learning rate multiplies the velocity when it is applied, not the gradient when it is collected: this is
PyTorch's definition.  Both agree while lr is constant, and differ under a schedule.  Weight decay is the
plain L2 term, also as in PyTorch's SGD (no dampening, which is rarely wanted).
"""

from __future__ import annotations

import numpy as np

from distbp.errors import ConfigError
from distbp.optim.base import Optimizer
from distbp.optim.checks import check_decay, check_share
from distbp.optim.update import Update

__all__ = ["SGD"]


class SGD(Optimizer):
    """Stochastic gradient descent; without momentum it has no state vector."""

    default_lr = 0.1
    scratch_rows = 2

    def __init__(self, *, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0) -> None:
        self.momentum = check_share("momentum", momentum)
        self.weight_decay = check_decay(weight_decay)
        if nesterov and momentum == 0:
            raise ConfigError("expected a momentum > 0 with nesterov, got 0; give one or leave nesterov off")
        self.nesterov = nesterov
        self.vectors = ("momentum",) if momentum else ()

    def apply(self, update: Update) -> None:
        """Write the next generation of a slice; see `Optimizer.apply`."""
        current, following = update.current, update.following
        for part, g, spare in update.pieces(decay=self.weight_decay):
            p = current["parameters"][part]
            direction = g
            if self.momentum:
                v = following["momentum"][part]
                np.multiply(current["momentum"][part], self.momentum, out=v)
                np.add(v, g, out=v)
                direction = v
                if self.nesterov:
                    np.multiply(v, self.momentum, out=spare)
                    np.add(g, spare, out=g)
                    direction = g
            np.multiply(direction, update.lr, out=spare)
            np.subtract(p, spare, out=following["parameters"][part])
