"""Optimizers and schedules on flat vectors; this part knows nothing of models, ranks or files.

A new optimizer is one file that implements `base.Optimizer` and one line in OPTIMIZERS; the contract tests
run over the table.
"""

from __future__ import annotations

from distbp.optim.base import Optimizer, Vectors
from distbp.optim.choose import choose
from distbp.optim.chunks import CHUNK, new_scratch
from distbp.optim.norm import blocks, clip_factor, global_norm, is_finite, measure
from distbp.optim.schedules import SCHEDULES, Schedule
from distbp.optim.sgd import SGD

__all__ = [
    "CHUNK",
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "Optimizer",
    "Schedule",
    "Vectors",
    "blocks",
    "choose",
    "clip_factor",
    "global_norm",
    "is_finite",
    "measure",
    "new_scratch",
]

OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD}
