"""The contract of data: what a format's reader returns, and what the trainer reads from.

A format is one module with two functions, listed in `distbp.data.SOURCES`:

    matches(path) -> bool            is the file or directory in this format?  (by content before name)
    read(request) -> Sources         parse it into the canonical form

The canonical form is `Source`: the samples as one array, the targets as one array, and a JSON-able `schema`
that lets `predict` read another file in the same way.  Nothing here knows formats, normalisation or order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from distbp.data.rows import Column

__all__ = ["Dataset", "Format", "Options", "Request", "Schema", "Source", "Sources", "Task"]

Task = Literal["classification", "regression"]
Schema = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a format is read where there is a choice; each field is the key of its name in `[data]`.

    A schema knows what was chosen, so options matter only where there is none.
    """

    categorical: tuple[str, ...] = ()
    categories: str = "one_hot"
    context: int = 64
    image_size: int | None = None
    length: int | None = None
    level: str = "char"
    on_disk: bool | None = None
    samples: int | None = None
    stride: int | None = None


@dataclass(frozen=True)
class Request:
    """What the caller of `load` asked for."""

    path: Path
    target: str | None = None
    schema: Schema | None = None
    labelled: bool = True
    options: Options = Options()


@dataclass(frozen=True)
class Source:
    """One parsed data set, as it stands in the file: not normalised, not shuffled.

    `x` is (N, *sample_shape) of any real type, finite, C-contiguous.  `y` is int64 (N,) with codes into
    `classes`, or (N, *places) where there are several answers for a sample, or float32 (N, O) for regression.
    Where `labelled` is false `y` is zeros and means nothing.  `name` is the path, for messages.

    Either may be `Rows`, which are made or read when they are asked for.  A schema with `codes` says that
    samples are codes of int64, one with `ordered` that neighbours belong together: the last ones validate.
    One with `codes_at` has pairs (feature, number of codes): such a feature is a code, and stays as it is.
    """

    name: str
    task: Task
    x: Column
    y: Column
    classes: tuple[str, ...] | None
    schema: Schema
    labelled: bool = True

    @property
    def num_outputs(self) -> int:
        """Return how many numbers a model must put out for one sample."""
        return len(self.classes) if self.classes is not None else int(self.y.shape[1])


@dataclass(frozen=True)
class Sources:
    """What one path held: a data set, and the validation set that came with it, if one did."""

    train: Source
    validation: Source | None = None


class Dataset(Protocol):
    """Samples by number: the same indices give the same bytes, whenever and on whichever worker.

    Of `x` and `y` only shape and type are for everybody: they may be arrays or `Rows`.
    """

    x: Column
    y: Column

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def batch(
        self,
        indices: NDArray[np.int64],
        x_out: NDArray[Any] | None = None,
        y_out: NDArray[Any] | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return samples `indices` as x (*indices.shape, *sample_shape) and y (*indices.shape, ...).

        With `x_out` and `y_out` the result is written there and these are returned; the caller owns them.
        """
        ...


@dataclass(frozen=True)
class Format:
    """One format: the two functions of its module, the words by which messages name it, and its options.

    What is built in has a name and no files, so it does not match any.
    """

    description: str
    matches: Callable[[Path], bool]
    read: Callable[[Request], Sources]
    options: tuple[str, ...] = ()
