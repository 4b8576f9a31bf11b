"""How samples become what the model sees: `(x - mean) * (1 / std)`, learnt from the training part alone.

A `Preprocessing` also carries the task, the classes and the schema, so that a checkpoint needs nothing else
to predict from another file.  It is made of Python numbers and goes through JSON without losing a bit.

Sums are taken in float64, row by row over whole samples: such additions are elementwise, so that their order,
and with it every bit, does not depend on the processor.  Two passes, because the one-pass formula cancels.
Regression targets are treated alike, always one mean and deviation for each output: a network starts with
outputs of size 1, and targets of size 10^5 would make its first steps 10^5 times too long.  The loss is then
in units of the variance of the training targets, so 1 is what predicting their mean gives.  Rejected:
multiplying the reported loss back, because it would no longer be the number that is made small.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Schema, Source, Task
from distbp.data.rows import Column
from distbp.errors import ConfigError, DataError

__all__ = ["MODES", "Preprocessing", "learn"]

MODES = ("auto", "none", "targets", "global", "feature")

# Samples are handled in blocks of about this many values: 2 MiB of float64 stay in the second-level cache.
BLOCK_VALUES = 1 << 18

# The reciprocal of a smaller deviation would not fit in float32; such a feature is taken as constant.
SMALLEST_STD = 1e-30


@dataclass(frozen=True)
class Preprocessing:
    """What was learnt from the training samples.

    `mode` is "none" or "targets" (`mean` and `std` empty), "global" (one number each) or "feature" (one for
    each value of a flattened sample).

    `target_mean` and `target_std` hold one number for each output of a regression.  They are empty, and
    targets stay as they are, for classes, where `mode` is "none", and in checkpoints that were written before
    there were these fields.
    """

    task: Task
    classes: tuple[str, ...] | None
    schema: Schema
    sample_shape: tuple[int, ...]
    num_outputs: int
    mode: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()

    def apply(self, x: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Return samples `x` (N, *sample_shape) as the model sees them: float32 or codes, new or in `out`.

        The arithmetic is float32 where that holds every input exactly, else float64, rounded once.  Raises
        DataError if the samples have another shape.
        """
        if x.shape[1:] != self.sample_shape:
            raise DataError(f"expected samples of shape {self.sample_shape}, got {x.shape[1:]}")
        result = np.empty(x.shape, self.sample_type) if out is None else out
        for start, stop in _blocks(len(x), self.sample_shape):
            result[start:stop] = self._apply_block(x[start:stop])
        return result

    def apply_targets(self, y: NDArray[Any]) -> NDArray[Any]:
        """Return targets as the model sees them: float32 (N, O), computed in float64; codes as they are."""
        if not self.target_mean:
            return y
        values = y.astype(np.float64)
        values -= np.array(self.target_mean)
        values *= 1.0 / np.array(self.target_std)
        return values.astype(np.float32)

    def restore_targets(self, outputs: NDArray[np.float32]) -> NDArray[np.float64]:
        """Return a regression's outputs (N, O) in the unit of the targets that `apply_targets` was given."""
        values = outputs.astype(np.float64)
        if self.target_mean:
            values *= np.array(self.target_std)
            values += np.array(self.target_mean)
        return values

    def to_dict(self) -> dict[str, Any]:
        """Return the same as JSON-able values; floats survive JSON exactly (shortest round-trip form)."""
        fields = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @property
    def sample_type(self) -> type:
        """The type of samples as the model sees them: int64 for codes, else float32."""
        return np.int64 if self.schema.get("codes") else np.float32

    @property
    def target_type(self) -> type:
        """The type of targets as the loss sees them: int64 for classes, else float32."""
        return np.int64 if self.task == "classification" else np.float32

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Return what `to_dict` described.  Raises DataError if a part is missing or does not fit."""
        try:
            classes = values["classes"]
            made = cls(
                task=values["task"],
                classes=None if classes is None else tuple(str(name) for name in classes),
                schema=dict(values["schema"]),
                sample_shape=tuple(int(n) for n in values["sample_shape"]),
                num_outputs=int(values["num_outputs"]),
                mode=values["mode"],
                mean=tuple(float(m) for m in values["mean"]),
                std=tuple(float(s) for s in values["std"]),
                target_mean=tuple(float(m) for m in values.get("target_mean", ())),
                target_std=tuple(float(s) for s in values.get("target_std", ())),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"preprocessing: expected the fields of a checkpoint, got: {error!r}") from error
        made._check()
        return made

    def _check(self) -> None:
        """Raise DataError unless the fields fit together."""
        expected = {"none": 0, "targets": 0, "global": 1, "feature": math.prod(self.sample_shape)}.get(
            self.mode
        )
        targets = len(self.target_mean)
        fits = (
            expected == len(self.mean) == len(self.std)
            and targets == len(self.target_std)
            and targets in ((0, self.num_outputs) if self.task == "regression" else (0,))
            and all(math.isfinite(m) for m in (*self.mean, *self.target_mean))
            and all(math.isfinite(s) and s >= SMALLEST_STD for s in (*self.std, *self.target_std))
            and self.task in ("classification", "regression")
            and (self.task == "classification") == (self.classes is not None)
            and (self.classes is None or len(self.classes) == self.num_outputs)
            and self.num_outputs >= 1
        )
        if not fits:
            raise DataError(
                f"preprocessing: expected task, classes, mode, mean and std that fit together, got task "
                f"{self.task!r}, mode {self.mode!r}, {len(self.mean)} means, {len(self.std)} deviations for "
                f"samples of shape {self.sample_shape}, {targets} means, {len(self.target_std)} deviations "
                f"for {self.num_outputs} outputs"
            )

    def _apply_block(self, x: NDArray[Any]) -> NDArray[Any]:
        """Return one block of samples as the model sees it."""
        if not self.mean:
            return x.astype(self.sample_type)
        exact = x.dtype == np.float32 or (x.dtype.kind in "iu" and x.dtype.itemsize <= 2)
        work = np.float32 if exact else np.float64
        shape = () if self.mode == "global" else self.sample_shape
        mean = np.array(self.mean, work).reshape(shape)
        scale = (1.0 / np.array(self.std)).astype(work).reshape(shape)
        values: NDArray[Any] = x.astype(work)
        values -= mean
        values *= scale
        return values.astype(np.float32, copy=False)


def learn(source: Source, train_indices: NDArray[np.int64], normalize: str = "auto") -> Preprocessing:
    """Return the preprocessing learnt from the samples `train_indices` of `source`.

    `normalize` is "none", "targets" (samples stay as they are), "global", "feature", or "auto": global for
    images (two dimensions or more) and sounds, by feature for tables, and targets where the schema says that
    samples are scaled.  A feature or target that never changes is only shifted.  Raises ConfigError for
    another word.
    """
    if normalize not in MODES:
        raise ConfigError(f"data.normalize: expected one of {', '.join(MODES)}, got {normalize!r}")
    sample_shape = source.x.shape[1:]
    if source.schema.get("codes"):
        if normalize not in ("auto", "none"):
            raise ConfigError(
                f"data.normalize: samples of {source.name} are codes, expected none, got {normalize!r}"
            )
        normalize = "none"
    mode = _natural_mode(source) if normalize == "auto" else normalize
    codes = [feature for feature, _ in source.schema.get("codes_at", [])]
    if codes and mode == "global":
        raise ConfigError(
            f"data.normalize: {source.name} has columns of codes, expected 'feature' or 'none', got 'global'"
        )
    mean: NDArray[np.float64] = np.empty(0)
    std: NDArray[np.float64] = np.empty(0)
    target_mean: NDArray[np.float64] = np.empty(0)
    target_std: NDArray[np.float64] = np.empty(0)
    if mode in ("global", "feature"):
        mean, std = _statistics(source.x, train_indices, over_everything=mode == "global")
        mean[codes], std[codes] = 0.0, 1.0
    if mode != "none" and source.task == "regression":
        target_mean, target_std = _statistics(source.y, train_indices, over_everything=False)
    return Preprocessing(
        task=source.task,
        classes=source.classes,
        schema=source.schema,
        sample_shape=sample_shape,
        num_outputs=source.num_outputs,
        mode=mode,
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
        target_mean=tuple(target_mean.tolist()),
        target_std=tuple(target_std.tolist()),
    )


def _natural_mode(source: Source) -> str:
    """Return the mode that fits the samples."""
    if source.schema.get("scaled"):
        return "targets"
    return "global" if len(source.x.shape) >= 3 or source.schema.get("sound") else "feature"


def _statistics(
    x: Column, indices: NDArray[np.int64], *, over_everything: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and standard deviation of the chosen rows of `x`, each (1,) or (number of features,)."""
    num_features = math.prod(x.shape[1:])
    count = len(indices) * (num_features if over_everything else 1)
    total, squares = np.zeros(num_features), np.zeros(num_features)
    least, greatest = np.full(num_features, np.inf), np.full(num_features, -np.inf)
    for rows in _rows(x, indices):
        total += rows.sum(axis=0)
        # Arrays were checked, with the place, when they were read; what stays on a disk is seen here first.
        if not np.isfinite(total).all():
            raise DataError("expected finite samples, got NaN or Inf in one of them; repair or remove it")
        np.minimum(least, rows.min(axis=0), out=least)
        np.maximum(greatest, rows.max(axis=0), out=greatest)
    if over_everything:
        total, least, greatest = (
            np.array([math.fsum(total)]),
            least.min(keepdims=True),
            greatest.max(keepdims=True),
        )
    mean = total / count
    for rows in _rows(x, indices):
        rows -= mean
        squares += np.square(rows, out=rows).sum(axis=0)
    if over_everything:
        squares = np.array([math.fsum(squares)])
    std = np.sqrt(squares / count)
    # Rounding of the mean leaves a tiny deviation in a constant feature, and dividing by it would make noise.
    std[(least == greatest) | (std < SMALLEST_STD)] = 1.0
    return mean, std


def _rows(x: Column, indices: NDArray[np.int64]) -> Iterator[NDArray[np.float64]]:
    """Yield the chosen samples as new float64 (rows, number of features), block by block."""
    for start, stop in _blocks(len(indices), x.shape[1:]):
        yield x[indices[start:stop]].reshape(stop - start, -1).astype(np.float64)


def _blocks(count: int, sample_shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Yield `[start, stop)` of blocks that depend on the shapes alone."""
    step = max(1, BLOCK_VALUES // math.prod(sample_shape))
    for start in range(0, count, step):
        yield start, min(count, start + step)
