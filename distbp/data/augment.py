"""Augmentation: each time a sample is trained on it is changed a little, so that the model learns what stays.

A transform changes one micro-batch in place and draws from the stream keyed by (seed, its kind, step,
micro-batch), so the same samples come out on every worker, at every worker count, and when a step is done
again.  It sees samples as the model does, after normalisation, and only those that are trained on; evaluation
and prediction never do.

A transform has options as public attributes, `check` for the shape of a sample, and a call.  A new one is a
class here; `distbp train` knows it when `transforms` makes it of a key of the table `[data]`.

Legend: b samples, H W places, C channels; gray images have no C.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from distbp.errors import ConfigError
from distbp.random import bernoulli, normal, raw_words

__all__ = ["Crop", "Flip", "Noise", "Transform", "transforms"]


class Transform(Protocol):
    """What the trainer asks of an augmentation."""

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """Raise ConfigError if samples of this shape cannot be changed so."""
        ...

    def __call__(self, x: NDArray[np.float32], seed: int, step: int, micro_batch: int) -> None:
        """Change the samples `x` (b, *sample_shape) of one micro-batch in place."""
        ...


class Crop:
    """Move each image by up to `pixels` up or down, and as many to the left or right.

    Places that become free repeat the edge: a margin of zeros would be a margin of the mean colour, since
    samples are normalised.  With 4 pixels this is the usual "pad by 4 and crop at random".
    """

    def __init__(self, pixels: int) -> None:
        if not isinstance(pixels, int) or pixels < 1:
            raise ConfigError(f"augment_crop: expected a whole number of pixels >= 1, got {pixels!r}")
        self.pixels = pixels

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """Refuse what is no image, and moves by the whole image."""
        _check_image("augment_crop", sample_shape)
        if self.pixels >= min(sample_shape[:2]):
            raise ConfigError(
                f"data.augment_crop: expected fewer pixels than images of {sample_shape[0]} x "
                f"{sample_shape[1]} have, got {self.pixels!r}"
            )

    def __call__(self, x: NDArray[np.float32], seed: int, step: int, micro_batch: int) -> None:
        """Move each image; the remainder of a 64-bit word is uniform but for 1 part in 10^17."""
        count, height, width = x.shape[:3]
        words = raw_words(2 * count, seed, "augment:crop", step, micro_batch).reshape(2, count, 1)
        down, right = (words % np.uint64(2 * self.pixels + 1)).astype(np.int64) - self.pixels
        rows = np.clip(np.arange(height) + down, 0, height - 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)
        samples = np.arange(count)[:, np.newaxis, np.newaxis]
        x[:] = x[samples, rows[:, :, np.newaxis], columns[:, np.newaxis, :]]


class Flip:
    """Mirror every second image, chosen at random, left to right."""

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """Refuse what is no image."""
        _check_image("augment_flip", sample_shape)

    def __call__(self, x: NDArray[np.float32], seed: int, step: int, micro_batch: int) -> None:
        """Mirror the chosen images."""
        chosen = bernoulli(len(x), 0.5, seed, "augment:flip", step, micro_batch)
        x[chosen] = x[chosen][:, :, ::-1]


class Noise:
    """Add to every number a normal one of deviation `size`, in the unit of normalised samples."""

    def __init__(self, size: float) -> None:
        if not 0 < size < math.inf:
            raise ConfigError(f"augment_noise: expected a finite number > 0, got {size!r}")
        self.size = float(size)

    def check(self, sample_shape: tuple[int, ...]) -> None:
        """Accept any samples."""

    def __call__(self, x: NDArray[np.float32], seed: int, step: int, micro_batch: int) -> None:
        """Add the noise, drawn in float64 and rounded once."""
        values = normal(x.size, seed, "augment:noise", step, micro_batch)
        values *= self.size
        x += values.astype(np.float32).reshape(x.shape)


def transforms(*, crop: int = 0, flip: bool = False, noise: float = 0.0) -> tuple[Transform, ...]:
    """Return the transforms that the keys `data.augment_*` ask for, in the order in which they are done."""
    chosen: list[Transform] = []
    if crop:
        chosen.append(Crop(crop))
    if flip:
        chosen.append(Flip())
    if noise:
        chosen.append(Noise(noise))
    return tuple(chosen)


def _check_image(key: str, sample_shape: tuple[int, ...]) -> None:
    """Raise ConfigError unless samples are (H, W) or (H, W, C)."""
    if len(sample_shape) not in (2, 3):
        raise ConfigError(
            f"data.{key}: expected images of shape (height, width) or (height, width, channels), got samples "
            f"of shape {sample_shape!r}; leave the key out"
        )
