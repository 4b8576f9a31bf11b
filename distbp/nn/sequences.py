"""Networks that read a series of numbers from its beginning to its end, and answer after the last one.

Samples are (T, I): I measurements at each of T times, or (T,) for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distbp.errors import ConfigError
from distbp.nn.blocks import Sequential
from distbp.nn.layer import Layer
from distbp.nn.linear import Linear
from distbp.nn.recurrent import GRU, LSTM

__all__ = ["gru", "lstm"]


def gru(*, outputs: int, hidden: Sequence[int] = (64,)) -> Layer:
    """Return GRU layers of the widths `hidden`, and a Linear layer on the last state."""
    return _stacked(GRU, hidden, outputs)


def lstm(*, outputs: int, hidden: Sequence[int] = (64,)) -> Layer:
    """Return LSTM layers of the widths `hidden`, and a Linear layer on the last state."""
    return _stacked(LSTM, hidden, outputs)


def _stacked(kind: Callable[..., Layer], hidden: Sequence[int], outputs: int) -> Layer:
    """Return recurrent layers, of which all but the last hand on every state."""
    if not hidden:
        raise ConfigError("model.hidden: expected at least one recurrent layer, got none")
    layers = [kind(width, last=index == len(hidden) - 1) for index, width in enumerate(hidden)]
    return Sequential(*layers, Linear(outputs))
