"""Which classes a trained model takes for which: `RUN/confusion.json`, from checkpoint and validation data.

At the end of `distbp train` it may cost little: a large checkpoint is not read again, and samples are taken
in an order that is spread over all of them, until the time is used up.  `distbp report` takes longer.  With
all samples the share of right answers is the accuracy that training reported.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.cli.job import load_data
from distbp.cli.model import TrainedModel, load_model
from distbp.data import Dataset
from distbp.environment import limit_threads
from distbp.nn import Context
from distbp.run_directory import write_file

__all__ = ["MOST_CLASSES", "add_confusion"]

MOST_CLASSES = 512
"""More classes than this make a table that says nothing, and a large file."""

_LARGEST_CHECKPOINT = 16 << 20
_FIRST_BATCH, _LARGEST_BATCH = 4, 64


def add_confusion(run: Path, validation: Dataset | None = None, *, budget_s: float, hurry: bool) -> str:
    """Write `confusion.json` of a run, and return why not if there is none: an empty text is success.

    `validation` are the samples; None: they are read as the configuration says.  `hurry` leaves a large
    checkpoint alone.  Raises DistbpError if checkpoint or data cannot be read.
    """
    newest = sorted((run / "checkpoints").glob("step-????????"))
    if not newest:
        return "there is no checkpoint"
    if hurry and sum(file.stat().st_size for file in newest[-1].iterdir()) > _LARGEST_CHECKPOINT:
        return "the checkpoint is large; distbp report reads it"
    model = load_model(str(run))
    classes = model.preprocessing.classes
    if classes is None or len(classes) > MOST_CLASSES:
        return "the answers are numbers" if classes is None else f"there are {len(classes):,} classes"
    if validation is None:
        validation = load_data(model.config).validation
    if validation is None or not len(validation):
        return "there are no validation samples"
    with limit_threads(model.config.run.threads):
        counts, answers = _count(model, validation, len(classes), budget_s)
    found = {
        "step": model.step,
        "classes": [_shown(name) for name in classes],
        "counts": counts.tolist(),
        "of": answers,
    }
    write_file(run / "confusion.json", json.dumps(found) + "\n")
    return ""


def _count(
    model: TrainedModel, dataset: Dataset, classes: int, budget_s: float
) -> tuple[NDArray[np.int64], int]:
    """Return answers counted by class of the data and predicted class, and how many there would be."""
    counts = np.zeros((classes, classes), np.int64)
    network = model.trainer.ready()
    until = time.monotonic() + budget_s
    samples = _spread(len(dataset))
    answers = len(dataset)
    start, batch = 0, _FIRST_BATCH  # Of a large model a few samples may take all the time that there is.
    while start < len(samples):
        begun = time.monotonic()
        x, y = dataset.batch(samples[start : start + batch])
        outputs = network.forward(x[None], Context(training=False))[0]
        answers = len(dataset) * (y.size // len(y))
        predicted = outputs.argmax(axis=-1) if outputs.shape[-1] > 1 else (outputs[..., 0] > 0)
        np.add.at(counts, (y.reshape(-1), predicted.reshape(-1).astype(np.int64)), 1)
        start += batch
        now = time.monotonic()
        if now + (now - begun) > until:
            break
        batch = min(2 * batch, _LARGEST_BATCH)
    return counts, answers


def _spread(count: int) -> NDArray[np.int64]:
    """Return all numbers below `count` in an order whose beginning is spread over them evenly."""
    stride = max(1, round(count * 0.618))
    while np.gcd(stride, count) != 1:
        stride += 1
    return np.arange(count, dtype=np.int64) * stride % count


def _shown(name: str) -> Any:
    """Return a class as it can be shown: a line break or a blank has no shape of its own."""
    return name if name.strip() == name and name.isprintable() and name else repr(name)
