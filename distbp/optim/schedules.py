"""Learning rates: pure functions of the step.

A schedule keeps no state, so a run that is resumed, or a step that is done again, gets the same rate without
anything being saved.  Step 0 is the first.  A warm-up rises in a straight line (P. Goyal et al., 2017,
"Accurate, large minibatch SGD", section 2.2); the chosen shape fills the steps that remain.

`Schedule.scaled` is the recipe of that paper for large batches: k times the batch wants k times the rate
(section 2.1), and a warm-up that begins at the rate of the small batch.  Their correction of the momentum
(section 3) is not needed: here the rate multiplies the velocity when it is applied.

A shape maps its own steps, `position` of `length`, to a share of the peak rate.  A new one is a function
below and a line in SCHEDULES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from distbp.optim.choose import choose

__all__ = ["SCHEDULES", "Schedule"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A learning rate for each step; the fields have the names and the meaning of the table `[schedule]`.

    The warm-up begins at the share `warmup_from` of the rate, which `scaled` sets.  Raises ConfigError for an
    unknown name, which says the nearest known one.
    """

    lr: float
    name: str = "cosine"
    warmup_steps: int = 0
    step_size: int = 1000
    gamma: float = 0.1
    final_fraction: float = 0.0
    power: float = 1.0
    initial_fraction: float = 0.04
    rise_fraction: float = 0.3
    warmup_from: float = 0.0

    @classmethod
    def scaled(cls, *, lr: float, batch_size: int, scaling_batch: int, **options: Any) -> Schedule:
        """Return the schedule for `batch_size` when `lr` is right for batches of `scaling_batch` samples."""
        factor = batch_size / scaling_batch
        return cls(lr=lr * factor, warmup_from=min(1.0, 1.0 / factor), **options)

    def __post_init__(self) -> None:
        choose(SCHEDULES, self.name, "schedule.name")

    def __call__(self, step: int, total_steps: int) -> float:
        """Return the learning rate of `step` >= 0 in a run of `total_steps`; later steps keep the last."""
        assert step >= 0, f"there is no step {step}"
        if step < self.warmup_steps:
            if self.warmup_from == 0:
                return self.lr * (step + 1) / self.warmup_steps
            risen = (step + 1) / self.warmup_steps
            return self.lr * (self.warmup_from + (1.0 - self.warmup_from) * risen)
        length = max(total_steps - self.warmup_steps, 1)
        position = min(step - self.warmup_steps, length)
        return self.lr * SCHEDULES[self.name](self, position, length)


def constant(schedule: Schedule, position: int, length: int) -> float:
    """Stay at the peak."""
    return 1.0


def step_down(schedule: Schedule, position: int, length: int) -> float:
    """Multiply by gamma after every `step_size` steps."""
    return float(schedule.gamma ** (position // schedule.step_size))


def cosine(schedule: Schedule, position: int, length: int) -> float:
    """Fall along half a cosine to `final_fraction` (I. Loshchilov and F. Hutter, ICLR 2017, equation 5)."""
    return _ease(1.0, schedule.final_fraction, position / length)


def polynomial(schedule: Schedule, position: int, length: int) -> float:
    """Fall as (1 - t) ** power to `final_fraction`; power 1 is a straight line."""
    remaining = (1.0 - position / length) ** schedule.power
    return float(schedule.final_fraction + (1.0 - schedule.final_fraction) * remaining)


def one_cycle(schedule: Schedule, position: int, length: int) -> float:
    """Rise from `initial_fraction` to the peak, then fall to `final_fraction`, both along half a cosine.

    After L. Smith and N. Topin, 2018, "Super-convergence"; the momentum is not cycled.
    """
    time = position / length
    if time < schedule.rise_fraction:
        return _ease(schedule.initial_fraction, 1.0, time / schedule.rise_fraction)
    return _ease(
        1.0, schedule.final_fraction, (time - schedule.rise_fraction) / (1.0 - schedule.rise_fraction)
    )


def _ease(begin: float, end: float, time: float) -> float:
    """Go from `begin` (time 0) to `end` (time 1) along half a cosine."""
    return end + (begin - end) * 0.5 * (1.0 + math.cos(math.pi * time))


SCHEDULES: dict[str, Callable[[Schedule, int, int], float]] = {
    "constant": constant,
    "cosine": cosine,
    "one_cycle": one_cycle,
    "polynomial": polynomial,
    "step": step_down,
}
