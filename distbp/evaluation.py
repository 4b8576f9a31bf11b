"""Exact evaluation: every sample once, in batches of one shape, for any number of workers.

A product changes its bits when its number of rows changes, so all evaluation, during training, by
`distbp evaluate` and by `distbp predict`, sees batches of exactly `EVALUATION_BATCH` samples; the last one is
filled up with sample 0 and a mask makes the filling count nothing.  Each batch gives one row of sums, and the
rows are added in the tree of `reduce.py`, so who computed a row cannot be seen in the total.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data import Dataset
from distbp.nn import Context, Network
from distbp.reduce import tree_total

__all__ = ["COLUMNS", "EVALUATION_BATCH", "evaluate", "num_batches", "predict", "summary"]

EVALUATION_BATCH = 128
"""Samples in one batch of evaluation.  Part of what decides about the bits of a reported loss."""

COLUMNS = 4
"""Sums of a batch: loss, weight, correct answers, entropy."""

Array = NDArray[Any]


def num_batches(dataset: Dataset) -> int:
    """Return how many batches, and so rows of sums, an evaluation of `dataset` has."""
    return -(-len(dataset) // EVALUATION_BATCH)


def batch_of(dataset: Dataset, index: int) -> tuple[Array, Array, NDArray[np.float32]]:
    """Return `(x, y, mask)` of evaluation batch `index`, stacked as one micro-batch: (1, b, ...)."""
    first = index * EVALUATION_BATCH
    samples = np.arange(first, first + EVALUATION_BATCH)
    mask = (samples < len(dataset)).astype(np.float32)
    x, y = dataset.batch(np.where(samples < len(dataset), samples, 0))
    return x[None], y[None], mask[None]


def write_row(network: Network, dataset: Dataset, index: int, row: NDArray[np.float64]) -> None:
    """Evaluate batch `index` and write its sums, those of COLUMNS, into `row[:4]`."""
    sums = network.evaluate(*batch_of(dataset, index))
    row[0], row[1], row[2], row[3] = sums.loss[0], sums.weight[0], sums.correct[0], sums.entropy[0]


def evaluate(network: Network, dataset: Dataset) -> dict[str, float | None]:
    """Return `{"loss", "accuracy", "entropy"}` over the whole data set; a regression has a loss alone."""
    rows = np.zeros((num_batches(dataset), COLUMNS))
    for index, row in enumerate(rows):
        write_row(network, dataset, index, row)
    return summary(tree_total(rows), network.loss.answers * len(dataset), network.loss.kind)


def predict(network: Network, dataset: Dataset) -> Iterator[Array]:
    """Yield the network's outputs batch by batch, shape (b, *output_shape), the filling left out."""
    for index in range(num_batches(dataset)):
        x, _, mask = batch_of(dataset, index)
        yield network.forward(x, Context(training=False))[0][mask[0] > 0].copy()


def summary(total: NDArray[np.float64], answers: int, kind: str) -> dict[str, float | None]:
    """Turn the sums of an evaluation into means: loss by weight, the others by number of answers."""
    classes = kind == "classification"
    return {
        "loss": float(total[0] / total[1]) if total[1] else float("nan"),
        "accuracy": float(total[2] / answers) if classes else None,
        "entropy": float(total[3] / answers) if classes else None,
    }
