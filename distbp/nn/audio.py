"""A network for sounds: a picture of the tones over time, and convolutions over it.

    (L,) -> LogSpectrogram (T, K, 1) -> 3 x [convolution, half the tones, norm, rectifier] -> mlp

Halving goes along the axis of tones only: a sound of half a second has few places in time.  What is learnt
can be a class, as a word or a note, or a number, as a pitch.
"""

from __future__ import annotations

from collections.abc import Sequence

from distbp.nn import initial
from distbp.nn.activations import ReLU
from distbp.nn.batch_norm import BatchNorm
from distbp.nn.blocks import Sequential
from distbp.nn.convolution import Conv2d
from distbp.nn.layer import Layer
from distbp.nn.linear import Linear
from distbp.nn.shape import Flatten
from distbp.nn.spectrogram import LogSpectrogram

__all__ = ["audio"]

CHANNELS = (16, 32, 32)
WIDTHS = (9, 5, 5)
"""Tones that a convolution sees at once; it sees three places in time."""


def audio(*, outputs: int, hidden: Sequence[int] = (128,), front: Layer | None = None) -> Layer:
    """Return a network for sounds (L,) of at least 2,048 numbers; `front` may be another first layer."""
    layers: list[Layer] = [LogSpectrogram() if front is None else front, BatchNorm()]
    for channels, width in zip(CHANNELS, WIDTHS, strict=True):
        convolution = Conv2d(channels, (3, width), stride=(1, 2), padding=(1, width // 2), bias=False)
        layers += [convolution, BatchNorm(), ReLU()]
    layers.append(Flatten())
    for units in hidden:
        layers += [Linear(units, initial=initial.he_normal), ReLU()]
    return Sequential(*layers, Linear(outputs, initial=initial.lecun_normal))
