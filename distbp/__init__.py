"""distbp: distributed data-parallel training in NumPy, with the same bits for any number of workers.

The names below are imported when they are first used, so that `import distbp` and `distbp --help` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ArrayDataset": "distbp.data",
    "DistbpError": "distbp.errors",
    "History": "distbp.trainer",
    "SGD": "distbp.optim",
    "Schedule": "distbp.optim",
    "Trainer": "distbp.trainer",
    "load_data": "distbp.api",
    "nn": "distbp",
    "print": "distbp.api",
    "rank": "distbp.api",
    "size": "distbp.api",
}

__all__ = sorted(_HOMES)

if TYPE_CHECKING:
    from distbp import nn as nn
    from distbp.api import load_data as load_data
    from distbp.api import print as print  # noqa: A004  It is meant to stand in for print.
    from distbp.api import rank as rank
    from distbp.api import size as size
    from distbp.data import ArrayDataset as ArrayDataset
    from distbp.errors import DistbpError as DistbpError
    from distbp.optim import SGD as SGD
    from distbp.optim import Schedule as Schedule
    from distbp.trainer import History as History
    from distbp.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    """Import a public name from its home."""
    if name not in _HOMES:
        raise AttributeError(f"module 'distbp' has no attribute {name!r}")
    if name == "nn":
        return importlib.import_module("distbp.nn")
    return getattr(importlib.import_module(_HOMES[name]), name)
