"""From what was loaded to what is trained on: split, learn the normalisation, apply it to both parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Source, Sources
from distbp.data.memory import ArrayDataset
from distbp.data.preprocessing import Preprocessing, learn
from distbp.data.rows import Column, Rows
from distbp.data.selected import Selected
from distbp.data.split import split

__all__ = ["Prepared", "prepare", "treated"]

# Samples gathered at a time, so that the normalised copy is the only large one.
ROWS = 4096


@dataclass(frozen=True)
class Prepared:
    """Training data, validation data (None if there are none), and how to treat new samples alike."""

    train: ArrayDataset
    validation: ArrayDataset | None
    preprocessing: Preprocessing


def prepare(
    sources: Sources, *, validation_fraction: float, split: str, normalize: str, seed: int
) -> Prepared:
    """Return training and validation data as the model sees them, samples in the order of the file.

    A validation set that came with the data is used whole, and `validation_fraction` then only says whether
    validation is wanted at all (0: no).  Otherwise that fraction is held out (see `split`).  Raises
    ConfigError if nothing would be left for training.
    """
    source, held_out = sources.train, sources.validation
    fraction = 0.0 if held_out is not None and 0 <= validation_fraction < 1 else validation_fraction
    train_indices, validation_indices = _split(source, fraction, split, seed)
    preprocessing = learn(source, train_indices, normalize)
    train = treated(source, preprocessing, train_indices)
    if validation_fraction == 0:
        return Prepared(train, None, preprocessing)
    if held_out is not None:
        return Prepared(train, treated(held_out, preprocessing), preprocessing)
    return Prepared(train, treated(source, preprocessing, validation_indices), preprocessing)


# The keyword `split` of `prepare` is the configuration's name for it, and hides the function there.
_split = split


def treated(
    source: Source, preprocessing: Preprocessing, indices: NDArray[np.int64] | None = None
) -> ArrayDataset:
    """Return the chosen samples (None: all), normalised, and their targets as the loss sees them.

    Arrays are treated now and held; rows are treated when they are asked for.
    """
    if indices is None:
        indices = np.arange(len(source.x), dtype=np.int64)
    y: Column
    if isinstance(source.y, Rows):
        y = Selected(source.y, indices, preprocessing, targets=True)
    else:
        y = preprocessing.apply_targets(source.y[indices])
    if isinstance(source.x, Rows):
        return ArrayDataset(Selected(source.x, indices, preprocessing, targets=False), y)
    x: NDArray[Any] = np.empty((len(indices), *preprocessing.sample_shape), preprocessing.sample_type)
    for start in range(0, len(indices), ROWS):
        chosen = indices[start : start + ROWS]
        preprocessing.apply(source.x[chosen], out=x[start : start + len(chosen)])
    return ArrayDataset(x, y)
