"""The learning-rate range test: a rate that rises from step to step, and what the losses say of it.

L. N. Smith, 2017, "Cyclical learning rates for training neural networks", section 3.3.  The rate rises
geometrically.  While it is too low the loss stays; then it falls, and at last it explodes.  The losses are
smoothed as a moving average without a bias (D. Kingma and J. Ba, 2015, "Adam", section 3), and a rate is
suggested at which the loss still falls fast, well below where it turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from distbp.metrics.records import append_record

__all__ = ["RangeTest", "Suggestion", "smoothed", "suggest"]

_KEEP = 0.9
_MARGIN = 10.0
"""The suggestion lies so far below the rate at which the loss is least: there it is about to turn."""

_EXPLODED = 4.0
"""A loss of so many times the least one ends the test."""

_LEAST_FALL = 0.05
"""A loss that falls by less than this share tells nothing."""


@dataclass(frozen=True)
class RangeTest:
    """A schedule: `lowest` in step 0, `highest` in the last of `steps`, by equal factors."""

    lowest: float
    highest: float
    steps: int

    def __call__(self, step: int, total_steps: int) -> float:
        """Return the rate of `step`; the number of steps is the test's own."""
        return float(self.lowest * (self.highest / self.lowest) ** (step / max(self.steps - 1, 1)))

    def observer(self, path: Path) -> Callable[[int, float], bool]:
        """Return what writes the rate and the loss of each step to `path`, and says when to stop."""
        losses: list[float] = []

        def observe(step: int, loss: float) -> bool:
            losses.append(loss)
            append_record(
                path, {"kind": "lr_find", "step": step, "lr": self(step - 1, self.steps), "loss": loss}
            )
            return has_exploded(losses)

        return observe


@dataclass(frozen=True)
class Suggestion:
    """The rate to take, or None if the loss did not fall; `least_at` and `turns_at` are rates as well."""

    lr: float | None
    least_at: float | None
    turns_at: float | None


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the moving averages of the losses, up to the first that is not finite."""
    averages: list[float] = []
    total = weight = 0.0
    for loss in losses:
        if not math.isfinite(loss):
            break
        total = _KEEP * total + (1 - _KEEP) * loss
        weight = _KEEP * weight + (1 - _KEEP)
        averages.append(total / weight)
    return averages


def has_exploded(losses: Sequence[float]) -> bool:
    """Return whether nothing can be learned of higher rates."""
    averages = smoothed(losses)
    return len(averages) < len(losses) or averages[-1] > _EXPLODED * min(averages)


def suggest(rates: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """Return the rate that the losses of a range test suggest, with one digit.

    It is a tenth of the rate with the least smoothed loss.  A single digit, because the test tells no more.
    """
    averages = smoothed(losses)
    if len(averages) < 2:
        return Suggestion(None, None, None)
    place = min(range(len(averages)), key=averages.__getitem__)
    least = averages[place]
    turned = next((n for n in range(place, len(averages)) if averages[n] > averages[0]), None)
    turns_at = rates[turned] if turned is not None else None
    if turns_at is None and len(averages) < len(losses):
        turns_at = rates[len(averages)]
    if least > (1 - _LEAST_FALL) * averages[0]:
        return Suggestion(None, None, turns_at)
    return Suggestion(float(f"{rates[place] / _MARGIN:.1g}"), rates[place], turns_at)
