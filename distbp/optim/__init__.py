"""Optimizers and schedules on flat vectors; this part knows nothing of models, ranks or files.

A new optimizer is one file that implements `base.Optimizer` and one line in OPTIMIZERS; the contract tests
run over the table.
"""

from __future__ import annotations

from distbp.optim.adagrad import Adagrad
from distbp.optim.adam import Adam, AdamW
from distbp.optim.average import Averaged
from distbp.optim.base import Optimizer
from distbp.optim.choose import choose
from distbp.optim.chunks import CHUNK, new_scratch
from distbp.optim.lamb import LAMB
from distbp.optim.lars import LARS
from distbp.optim.lion import Lion
from distbp.optim.norm import blocks, clip_factor, global_norm, is_finite, measure
from distbp.optim.rmsprop import RMSProp
from distbp.optim.schedules import SCHEDULES, Schedule
from distbp.optim.sgd import SGD
from distbp.optim.tensors import SliceTensors
from distbp.optim.update import TensorPart, Update, Vectors

__all__ = [
    "CHUNK",
    "LAMB",
    "LARS",
    "OPTIMIZERS",
    "SCHEDULES",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Averaged",
    "Lion",
    "Optimizer",
    "RMSProp",
    "Schedule",
    "SliceTensors",
    "TensorPart",
    "Update",
    "Vectors",
    "blocks",
    "choose",
    "clip_factor",
    "global_norm",
    "is_finite",
    "measure",
    "new_scratch",
]

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adagrad": Adagrad,
    "adam": Adam,
    "adamw": AdamW,
    "lamb": LAMB,
    "lars": LARS,
    "lion": Lion,
    "rmsprop": RMSProp,
    "sgd": SGD,
}
