"""What one call of `fit` trains: the job, and the numbers of the step that several files share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from distbp.data import Dataset, Order, Transform
from distbp.nn import Network
from distbp.optim import Optimizer

if TYPE_CHECKING:
    from distbp.backends.base import Seat

__all__ = ["SCALARS", "TAIL", "Job", "epoch_ends_at", "epoch_of"]

LOSS, WEIGHT, CORRECT, STOP, SAVE, ENTROPY, SQUARES = range(7)
TAIL = 8
"""Columns of the float64 tail that rides with the gradient; eight fill a cache line.  Behind them come the
statistics of the network."""

SAMPLES, EPOCH_LOSS, EPOCH_WEIGHT, EPOCH_CORRECT, SKIPPED_IN_ROW, SKIPPED = range(6)
SCALARS = 8
"""Places in the scalar state: the sample cursor, sums since the last epoch's end, skipped steps.  Behind them
come the averages of the network's statistics."""

EPOCH_SUMS = {EPOCH_LOSS: LOSS, EPOCH_WEIGHT: WEIGHT, EPOCH_CORRECT: CORRECT}
"""What is added up over an epoch: the place in the scalars, and the column of the tail."""

MAX_SKIPPED_IN_ROW = 3
START, COMPUTE, REDUCE, UPDATE, EVALUATE, SAVING = range(6)
PHASES = ("start", "compute", "reduce", "update", "evaluate", "save")
"""Phases that the arena's progress words name, and what messages call them."""

SLOW_PHASES = (START, SAVING)
"""Phases that depend on a disk, or touch memory for the first time."""


@dataclass
class Job:
    """What one call of `fit` trains: the parts, and the numbers that tie them together."""

    network: Network
    optimizer: Optimizer
    schedule: Callable[[int], float]
    clip_norm: float | None
    train: Dataset
    validation: Dataset | None
    order: Order
    seed: int
    batch_size: int
    micro_batch: int
    total_steps: int
    checkpoint_every_steps: int | None
    checkpoint_every_seconds: float | str | None
    keep: int
    log_samples: bool
    metadata: dict[str, Any]
    augment: tuple[Transform, ...] = ()
    """How the samples of a micro-batch are changed before they are trained on."""
    verify_every: int = 100
    """Steps between two checks of the state in memory; 0: never."""
    overlap: bool = True
    """Whether the exchange between hosts begins while backprop goes on."""
    bucket_bytes: int | None = None
    """Least size of a bucket of that exchange; None: measured at the start."""
    observer: Callable[[int, float], bool] | None = None
    """Called after each step, in place of the diagnosis, with the number of steps and the mean loss, which is
    infinite where the step was refused; True asks the run to stop."""
    records: tuple[str, ...] = ()
    """Where records go besides `metrics.jsonl` (`metrics/sinks.py`)."""
    banner: Callable[[Job, Seat], str] = lambda job, seat: ""

    @property
    def micro_batches(self) -> int:
        """Return M, the number of micro-batches in a global batch."""
        return self.batch_size // self.micro_batch

    @property
    def tail(self) -> int:
        """Return the columns of the tail, statistics included."""
        return TAIL + self.network.statistics_layout.size

    def change(self, x: NDArray[Any], step: int, first: int) -> None:
        """Augment the samples of stacked micro-batches in place; the first of them has the number `first`."""
        for transform in self.augment:
            for number, micro_batch in enumerate(x, first):
                transform(micro_batch, self.seed, step, number)


def epoch_ends_at(step: int, samples: int, batch_size: int) -> bool:
    """Return whether `step` steps are the first that complete some epoch."""
    return step > 0 and (step * batch_size) // samples > ((step - 1) * batch_size) // samples


def epoch_of(step: int, samples: int, batch_size: int) -> int:
    """Return how many epochs `step` steps have completed."""
    return step * batch_size // samples
