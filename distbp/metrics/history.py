"""What a run has shown of its learning so far, as the rules of `diagnosis.py` read it.

Everything comes from the records of `metrics.jsonl`, which are the same for any number of workers, so a run
that is resumed, or a rank 0 that is replaced, goes on with the history that is written down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Epoch", "Facts", "History", "Look", "Spike"]


@dataclass(frozen=True)
class Facts:
    """What is known of a run before it begins.

    `classes` is None for numbers; `weights` are the tensors of two axes or more, from input to output;
    `kinds` are the names of the layers' classes; `answers` counts those of the validation data; `peak_lr` is
    the largest rate of the schedule.
    """

    total_steps: int
    batch_size: int
    samples: int
    classes: int | None
    weights: tuple[str, ...]
    kinds: frozenset[str]
    answers: int
    peak_lr: float


@dataclass(frozen=True)
class Look:
    """A record of kind "layers": `loss` is the mean since the look before."""

    step: int
    loss: float
    lr: float
    gradient_norm: dict[str, float]
    update_ratio: dict[str, float]
    inactive: dict[str, float]


@dataclass(frozen=True)
class Epoch:
    """The end of an epoch; None is what it does not have."""

    step: int
    loss: float
    entropy: float | None
    validation_loss: float | None
    validation_entropy: float | None


@dataclass(frozen=True)
class Spike:
    """A jump of the loss: its mean over the last steps, and what was usual before."""

    step: int
    loss: float
    usual: float


@dataclass
class History:
    """The facts of a run, and what has been seen of it, in the order of steps."""

    facts: Facts
    looks: list[Look] = field(default_factory=list)
    epochs: list[Epoch] = field(default_factory=list)
    spike: Spike | None = None
    skipped: list[int] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Return the last step that anything is known of."""
        looked = self.looks[-1].step if self.looks else 0
        return max([looked, self.epochs[-1].step if self.epochs else 0, *self.skipped[-1:]])

    @property
    def reference(self) -> float:
        """Return the loss of knowing nothing: ln C of classes, for numbers the loss of the first step."""
        if self.facts.classes is not None:
            return math.log(self.facts.classes)
        return self.looks[0].loss if self.looks else math.inf

    def read(self, records: Iterable[dict[str, Any]]) -> None:
        """Take records of `metrics.jsonl`; those of other kinds say nothing here."""
        for record in records:
            if record.get("kind") == "layers":
                self.looks.append(Look(*(record.get(name, math.nan) for name in Look.__match_args__)))
            elif record.get("epoch_end"):
                self._read_epoch(record)

    def _read_epoch(self, record: dict[str, Any]) -> None:
        """Take the end of an epoch: first the record of training, then the one of validation, if any."""
        if record["kind"] == "train" and record["loss"] is not None:
            self.epochs.append(Epoch(record["step"], record["loss"], record.get("entropy"), None, None))
        elif record["kind"] == "validation" and self.epochs and self.epochs[-1].step == record["step"]:
            last = self.epochs[-1]
            loss, entropy = record["loss"], record.get("entropy")
            self.epochs[-1] = Epoch(last.step, last.loss, last.entropy, loss, entropy)
