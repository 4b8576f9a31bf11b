"""A moving average of the parameters beside any optimizer, for evaluation and prediction.

With p the parameters after update t, from 1:

    k = min(decay, (t - 1) / (t + 9))
    a = k * a + (1 - k) * p

B. Polyak and A. Juditsky, 1992, "Acceleration of stochastic approximation by averaging", in the exponential
form; the rise of k (0, 1/11, 2/12, ...) lets the average begin at the first parameters and not at zero, and
forget the early ones: TensorFlow's ExponentialMovingAverage does so with (1 + t) / (10 + t).

Training goes on with p; validation, `evaluate` and `predict` use a.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.optim.base import Optimizer, TensorPart, Vectors
from distbp.optim.checks import check_share
from distbp.optim.chunks import chunks

__all__ = ["Averaged"]


class Averaged(Optimizer):
    """The optimizer `inner` with the vector "average", of which a share `decay` is kept at each update."""

    evaluated = "average"

    def __init__(self, inner: Optimizer, *, decay: float = 0.999) -> None:
        self.inner = inner
        self.decay = check_share("decay", decay)
        self.default_lr = inner.default_lr
        self.vectors = (*inner.vectors, "average")
        self.scratch_rows = inner.scratch_rows
        self.num_sums = inner.num_sums

    def prepare(self, gradient: NDArray[np.float32], **arguments: Any) -> None:
        """Let the inner optimizer prepare."""
        self.inner.prepare(gradient, **arguments)

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
        """Let the inner optimizer write its part, then move the average."""
        self.inner.apply(
            gradient,
            scale=scale,
            lr=lr,
            update=update,
            current=current,
            following=following,
            scratch=scratch,
            tensors=tensors,
        )
        kept = min(self.decay, (update - 1) / (update + 9))
        for part in chunks(len(gradient)):
            spare = scratch[0, : part.stop - part.start]
            average = following["average"][part]
            np.multiply(following["parameters"][part], 1.0 - kept, out=spare)
            np.multiply(current["average"][part], kept, out=average)
            np.add(average, spare, out=average)
