"""Looks closer at a step now and then: what diagnosis needs and a step does not have anyway.

Every step has its loss, its predictive entropy and the sums of squares of the summed gradient over fixed
blocks (`optim/norm.py`).  A *look* adds what costs more:

* the squared norm of some micro-batches' gradients, taken from the leaves before the tree adds them: together
  with that of the sum it gives the gradient noise scale (`metrics/noise.py`);
* the change of each block of parameters against its size, taken by the lane owners after the update;
* which units did nothing for the micro-batch number 0, which rank 0 always has (`nn/inactive.py`).

Whether a step is looked at depends on its number and on the plan of the run alone, and so does what is seen:
a look has the same bits for any number of workers.  Nothing here is read by the training.

The numbers that outlive a step (`Arena.watched`) lie in two generations beside the state, go to new hosts and
into the metadata of checkpoints with it, but belong to no hash.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.arena import Arena
from distbp.exchange import Piece
from distbp.job import ENTROPY, LOSS, SQUARES, WEIGHT, Job, epoch_ends_at
from distbp.leaf import Leaf, LeafInPieces
from distbp.metrics import noise
from distbp.nn import Sums
from distbp.nn.inactive import inactive_units
from distbp.optim import norm

__all__ = ["CloserLook", "watched_in_epoch", "watched_noise_scale"]

Array = NDArray[Any]

_EPOCH_ENTROPY, _EPOCH_ANSWERS, _SIGNAL, _TRACE, _LOOKS, _LOSS, _WEIGHT = range(7)
"""Places in `Arena.watched`: sums since the last epoch's end; averages of the noise, and how many looks they
hold; sums since the last look."""

_LEAST_STEPS = 25
"""Steps between two looks: one costs a tenth of a step of an mlp (docs/LOG.md)."""

_MOST_LOOKS = 200
"""Looks of a run, beside the early ones: each is a record, and records are read as a whole."""

_MEASURED = 2
"""Micro-batches of a look whose gradients are measured, each time others: all would cost more than the rest
of a look, and the noise scale is an average over looks."""

_UNIT_SAMPLES = 64
"""Samples that a unit must have been inactive for before it counts as such, at least."""


class CloserLook:
    """One worker's part in the looks of a call of `fit`; `first, last` are its micro-batches."""

    def __init__(self, arena: Arena, job: Job, first: int, last: int) -> None:
        self._arena = arena
        self._job = job
        self._every = max(_LEAST_STEPS, -(-job.total_steps // _MOST_LOOKS))
        self._first = first
        self._squares = np.zeros(last - first)
        self._measured: list[int] = []
        self._stride = max(1, job.micro_batches // _MEASURED)
        self._blocks = norm.blocks(job.network.layout.borders())
        self._scratch = np.empty(norm.BLOCK, np.float32)
        self._least = -(-_UNIT_SAMPLES // job.micro_batch)
        self._idle: dict[int, dict[str, NDArray[np.bool_]]] = {}
        self._step = 0
        self.on = False

    def is_due(self, step: int) -> bool:
        """Return whether `step` is looked at: every so often, and more often while a run is young."""
        early, rest = divmod(step, _LEAST_STEPS)
        return step % self._every == 0 or (rest == 0 and early & (early - 1) == 0)

    def begin(self, step: int) -> None:
        """Begin a step."""
        self._step, self.on = step, self.is_due(step)
        if self.on:
            own = range(self._first, self._first + len(self._squares))
            self._measured = [n - self._first for n in self._in_turn(step) if n in own]
            self._squares.fill(0)

    def _in_turn(self, step: int) -> range:
        """Return the numbers of the micro-batches that are measured in a look at `step`."""
        return range(step // _LEAST_STEPS % self._stride, self._job.micro_batches, self._stride)

    def measured(self, leaf: Leaf) -> Leaf:
        """Return a leaf, and see that the squares of the measured micro-batches are added up.

        A leaf that knows them without its gradients is asked; of others, what they write is measured.
        """
        if isinstance(leaf, LeafInPieces):
            for number in self._measured:
                self._squares[number] += leaf.square(number)
            return leaf

        def write(low: int, high: int, out: Array) -> None:
            leaf(low, high, out)
            rows = out.reshape(high - low, -1)
            for number in self._measured:
                if low <= number < high:
                    self._squares[number] += np.vecdot(rows[number - low], rows[number - low])

        return write

    def write_tail(self, rows: NDArray[np.float64], sums: Sums) -> None:
        """Write the columns of the tail that are only watched; their values are finite, always."""
        rows[:, ENTROPY] = sums.entropy
        if self.on:
            means = self._squares / np.maximum(sums.weight, 1e-30) ** 2
            rows[:, SQUARES] = np.where(np.isfinite(means), means, 0)

    def follow(
        self, step: int, tail: NDArray[np.float64], gradient_sums: Sequence[float] | NDArray[np.float64]
    ) -> None:
        """Write the next generation of the watched numbers; the first worker of a host does.

        `gradient_sums` are those of all blocks of a gradient that was accepted, empty if it was not.
        """
        # A list: arrays of eight numbers take several times as long, and a step has few microseconds for it.
        job, watched = self._job, self._arena.watched(step).tolist()
        if epoch_ends_at(step, len(job.train), job.batch_size):
            watched[_EPOCH_ENTROPY] = watched[_EPOCH_ANSWERS] = 0.0
        if step and self.is_due(step - 1):
            watched[_LOSS] = watched[_WEIGHT] = 0.0
        if len(gradient_sums):
            loss, weight, entropy = tail[LOSS].item(), tail[WEIGHT].item(), tail[ENTROPY].item()
            watched[_EPOCH_ENTROPY] += entropy
            watched[_EPOCH_ANSWERS] += job.batch_size * job.network.loss.answers
            watched[_LOSS] += loss
            watched[_WEIGHT] += weight
            if self.on and job.micro_batches > 1:
                small = tail[SQUARES].item() / len(self._in_turn(step))
                self._follow_noise(watched, small, math.fsum(gradient_sums) / weight**2)
        self._arena.watched(step + 1)[:] = watched

    def _follow_noise(self, watched: list[float], small: float, big: float) -> None:
        """Move the averages of the noise by the squared norms of small and big gradients."""
        job, looks = self._job, int(watched[_LOOKS])
        new = noise.estimate(small, big, job.micro_batch, job.batch_size)
        for place, value in zip((_SIGNAL, _TRACE), new, strict=True):
            watched[place] = noise.average(watched[place], value, looks)
        watched[_LOOKS] = float(looks + 1)

    def measure_change(self, step: int, pieces: Sequence[Piece]) -> None:
        """Write the squares of the change and of the size of each block that this worker has updated."""
        before = self._arena.vectors(step)["parameters"]
        after = self._arena.vectors(step + 1)["parameters"]
        changes, sizes = self._arena.looks
        for piece in pieces:
            for index in range(piece.first, piece.last):
                start, stop = self._blocks[index]
                part, change = before[start:stop], self._scratch[: stop - start]
                np.subtract(after[start:stop], part, out=change)
                changes[index] = np.vecdot(change, change)
                sizes[index] = np.vecdot(part, part)

    def layers(self, tail: NDArray[np.float64], accepted: bool) -> dict[str, Any]:
        """Return what rank 0 has seen in this step, once everybody has updated."""
        gradients, sizes = self._arena.sums, self._arena.looks[1]
        loss, seen = self._arena.watched(self._step + 1)[[_LOSS, _WEIGHT]]
        found: dict[str, Any] = {
            "loss": float(loss / seen) if seen else None,
            "lr": self._job.schedule(self._step),
            "gradient_norm": {},
            "update_ratio": {},
            "inactive": self._inactive(),
        }
        if not accepted:
            return found
        changes, weight = self._arena.looks[0], float(tail[WEIGHT])
        position = 0
        for name, (_, length) in zip(
            self._job.network.layout.names, self._job.network.layout.borders(), strict=True
        ):
            own = slice(position, position + -(-length // norm.BLOCK))
            position = own.stop
            found["gradient_norm"][name] = _short(math.sqrt(math.fsum(gradients[own])) / weight)
            size = math.fsum(sizes[own])
            if size > 0:
                found["update_ratio"][name] = _short(math.sqrt(math.fsum(changes[own]) / size))
        return found

    def _inactive(self) -> dict[str, float]:
        """Return the share of each layer's units that were inactive in all of the last looks, if enough."""
        units = inactive_units(self._job.network)
        # A step that is done again is looked at again.
        kept = [(step, idle) for step, idle in self._idle.items() if step < self._step]
        self._idle = dict([*kept, (self._step, units)][-self._least :])
        if len(self._idle) < self._least:
            return {}
        together = {layer: [look[layer] for look in self._idle.values()] for layer in units}
        return {layer: _short(float(np.mean(np.all(idle, axis=0)))) for layer, idle in together.items()}


def watched_in_epoch(watched: NDArray[np.float64], kind: str) -> dict[str, float | None]:
    """Return what an epoch's record has beside loss and accuracy; the entropy in nats is one of classes."""
    answers = watched[_EPOCH_ANSWERS]
    found: dict[str, float | None] = {}
    if kind == "classification":
        found["entropy"] = float(watched[_EPOCH_ENTROPY] / answers) if answers else None
    return found | {"noise_scale": watched_noise_scale(watched)}


def watched_noise_scale(watched: NDArray[np.float64]) -> float | None:
    """Return the gradient noise scale, in samples, if it is known."""
    return noise.noise_scale((float(watched[_SIGNAL]), float(watched[_TRACE])), float(watched[_LOOKS]))


def _short(value: float) -> float:
    """Return `value` with the four digits that a record has room for."""
    return float(f"{value:.4g}")
