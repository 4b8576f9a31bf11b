"""Which samples train and which are held out for validation, when the data come without a validation set.

The choice depends on the number of samples, the fraction, the way and the seed alone, so that every worker,
and a later `distbp evaluate`, makes the same one.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Source
from distbp.data.permutation import permute
from distbp.errors import ConfigError

__all__ = ["split"]


def split(
    source: Source, fraction: float, how: str, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the sample numbers for training and for validation, each ascending.

    `fraction` of the samples, rounded half up but at least one, is held out: with `how="random"` those that
    come last in a keyed permutation, with `how="tail"` the last ones of the file (for data in order of time);
    "auto" is "tail" where the schema says that samples are ordered.  A fraction of 0 holds out none.  Raises
    ConfigError if nothing would be left for training.
    """
    size = len(source.x)
    if how not in ("auto", "random", "tail"):
        raise ConfigError(f"data.split: expected 'auto', 'random' or 'tail', got {how!r}")
    if how == "auto":
        how = "tail" if source.schema.get("ordered") else "random"
    if not 0 <= fraction < 1:
        raise ConfigError(
            f"data.validation_fraction: expected a number from 0 up to below 1, got {fraction!r}"
        )
    held_out = max(1, math.floor(fraction * size + 0.5)) if fraction else 0
    if held_out >= size:
        raise ConfigError(
            f"data.validation_fraction: expected some of the {size} samples of {source.name} to be left for "
            f"training, got {fraction!r}, which holds out {held_out}; lower it, or set it to 0"
        )
    everything = np.arange(size, dtype=np.int64)
    order = permute(everything, size, seed, 0, "split") if how == "random" and held_out else everything
    return np.sort(order[: size - held_out]), np.sort(order[size - held_out :])
