"""Adagrad: a learning rate for each parameter, that falls with what its gradients have added up to.

With g the mean gradient (and wd * p added to it), p the parameters:

    s = s + g * g
    p = p - lr * g / (sqrt(s) + epsilon)

J. Duchi, E. Hazan and Y. Singer, 2011, "Adaptive subgradient methods for online learning and stochastic
optimization", JMLR 12, the diagonal form (figure 1, with the Euclidean norm as regulariser); epsilon as in
PyTorch's Adagrad.
"""

from __future__ import annotations

import numpy as np

from distbp.optim.base import Optimizer
from distbp.optim.checks import check_decay, check_epsilon
from distbp.optim.update import Update

__all__ = ["Adagrad"]


class Adagrad(Optimizer):
    """Adagrad with L2 weight decay."""

    default_lr = 0.01
    scratch_rows = 2
    vectors = ("sum_of_squares",)

    def __init__(self, *, epsilon: float = 1e-10, weight_decay: float = 0.0) -> None:
        self.epsilon = check_epsilon("epsilon", epsilon)
        self.weight_decay = check_decay(weight_decay)

    def apply(self, update: Update) -> None:
        """Write the next generation of a slice; see `Optimizer.apply`."""
        current, following = update.current, update.following
        for part, g, spare in update.pieces(decay=self.weight_decay):
            p, s = current["parameters"][part], following["sum_of_squares"][part]
            np.multiply(g, g, out=spare)
            np.add(current["sum_of_squares"][part], spare, out=s)
            np.sqrt(s, out=spare)
            np.add(spare, self.epsilon, out=spare)
            np.divide(g, spare, out=spare)
            np.multiply(spare, update.lr, out=spare)
            np.subtract(p, spare, out=following["parameters"][part])
