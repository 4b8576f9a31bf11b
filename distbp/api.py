"""Small functions of the Python API that belong to no part: data by name, and who am I."""

from __future__ import annotations

import builtins
from typing import Any

from distbp.data import ArrayDataset, Options, load, prepare
from distbp.trainer import membership

__all__ = ["load_data", "print", "rank", "size"]


def load_data(
    path: str,
    *,
    target: str | None = None,
    validation_fraction: float = 0.1,
    split: str = "auto",
    normalize: str = "auto",
    seed: int = 0,
    **options: Any,
) -> tuple[ArrayDataset, ArrayDataset | None]:
    """Return training and validation data of a file, a directory or a built-in name such as "digits".

    The arguments mean what the keys of the table `[data]` mean, `options` those that only some formats have;
    errors are those of `distbp train`.  Numbers to predict come normalised, too: pass `normalize="none"` to
    keep their unit.
    """
    prepared = prepare(
        load(path, target=target, options=Options(**options)),
        validation_fraction=validation_fraction,
        split=split,
        normalize=normalize,
        seed=seed,
    )
    return prepared.train, prepared.validation


def rank() -> int:
    """Return this worker's number; 0 when the script runs alone."""
    return membership().rank


def size() -> int:
    """Return the number of workers; 1 when the script runs alone."""
    return membership().size


def print(*values: Any, **options: Any) -> None:  # noqa: A001  It is meant to stand in for print.
    """Print on rank 0 only."""
    if rank() == 0:
        builtins.print(*values, **options)
