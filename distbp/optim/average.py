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

import numpy as np
from numpy.typing import NDArray

from distbp.optim.base import Optimizer
from distbp.optim.checks import check_share
from distbp.optim.chunks import chunks
from distbp.optim.update import Update

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

    def prepare(self, update: Update, blocks: Sequence[tuple[int, int]], sums: NDArray[np.float64]) -> None:
        """Let the inner optimizer prepare."""
        self.inner.prepare(update, blocks, sums)

    def apply(self, update: Update) -> None:
        """Let the inner optimizer write its part, then move the average."""
        self.inner.apply(update)
        kept = min(self.decay, (update.number - 1) / (update.number + 9))
        for part in chunks(len(update.gradient)):
            spare = update.scratch[0, : part.stop - part.start]
            average = update.following["average"][part]
            np.multiply(update.following["parameters"][part], 1.0 - kept, out=spare)
            np.multiply(update.current["average"][part], kept, out=average)
            np.add(average, spare, out=average)
