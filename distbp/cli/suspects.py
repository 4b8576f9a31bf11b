"""Suspects: the samples whose label a trained model finds least likely.

A wrong label is learned late (D. Arpit et al., ICML 2017, "A closer look at memorization in deep networks"),
so until the model knows the samples by heart, and always with samples that it was not trained on, its loss
stays high.  One pass over the data, after the training: nothing is kept of each sample while a run goes on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from distbp.cli.model import Samples, TrainedModel, predict
from distbp.errors import ConfigError

__all__ = ["describe_suspects", "find_suspects"]


def find_suspects(model: TrainedModel, samples: Samples, count: int) -> list[dict[str, Any]]:
    """Return `count` samples at most that the model takes for another class, the least likely label first.

    `loss` is -ln of the probability of the label, in nats.  Raises ConfigError where samples have no class.
    """
    targets = np.asarray(samples.targets[:])
    if model.preprocessing.task != "classification" or targets.ndim != 1:
        raise ConfigError("--suspects: expected data with one class for each sample, got numbers or a text")
    logits = predict(model, samples).astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    rows = np.arange(len(targets))
    losses, guesses = -log_p[rows, targets], log_p.argmax(axis=1)
    worst = np.argsort(-losses, kind="stable")
    worst = worst[guesses[worst] != targets[worst]][:count]
    classes = model.preprocessing.classes or [str(number) for number in range(log_p.shape[1])]
    return [
        {
            "sample": int(row),
            "label": classes[targets[row]],
            "predicted": classes[guesses[row]],
            "probability": float(np.exp(log_p[row, guesses[row]])),
            "loss": float(losses[row]),
        }
        for row in worst
    ]


def describe_suspects(suspects: list[dict[str, Any]]) -> Iterator[str]:
    """Yield a line for each suspect."""
    yield f"{len(suspects)} samples whose label the model doubts most, counted from 0:"
    for one in suspects:
        yield (
            f"  sample {one['sample']:<8} label {one['label']!s:<12} the model says {one['predicted']!s:<12} "
            f"({one['probability']:.1%} sure, loss {one['loss']:.2f})"
        )
