"""RMSProp: the gradient divided by a moving root mean square of itself.

With g the mean gradient (and wd * p added to it), p the parameters:

    v = rho * v + (1 - rho) * g * g
    p = p - lr * g / (sqrt(v) + epsilon)
    with momentum mu:   b = mu * b + g / (sqrt(v) + epsilon),   p = p - lr * b

T. Tieleman and G. Hinton, 2012, lecture 6.5 of "Neural networks for machine learning"; the momentum and the
place of epsilon are those of PyTorch's RMSprop.  The lecture's rho is 0.9.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from distbp.optim.base import Optimizer, TensorPart, Vectors
from distbp.optim.checks import check_decay, check_epsilon, check_share
from distbp.optim.chunks import chunks

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

    def apply(
        self,
        gradient: NDArray[np.float32],
        *,
        scale: float,
        lr: float,
        update: int,
        current: Vectors,
        following: Vectors,
        scratch: NDArray[np.float32],
        tensors: Sequence[TensorPart] = (),
    ) -> None:
        """Write the next generation of a slice; see `Optimizer.apply`."""
        scale, lr = float(scale), float(lr)
        for part in chunks(len(gradient)):
            g, spare = scratch[:2, : part.stop - part.start]
            p, v = current["parameters"][part], following["mean_square"][part]
            np.multiply(gradient[part], scale, out=g)
            if self.weight_decay:
                np.multiply(p, self.weight_decay, out=spare)
                np.add(g, spare, out=g)
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
            np.multiply(g, lr, out=spare)
            np.subtract(p, spare, out=following["parameters"][part])
