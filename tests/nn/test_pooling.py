"""Pooling against plain loops, and what happens where numbers tie or are missing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from distbp import nn
from distbp.errors import ConfigError

from .layer_examples import LAYERS, TRAINING, random_stack

POOLS = [name for name in LAYERS if name.startswith(("max pool", "avg pool"))]


def windows(layer, x):
    """Yield the place of each window of one sample, and its numbers for one channel after the other."""
    counts = [
        (length - size) // stride + 1
        for length, size, stride in zip(x.shape, layer.size, layer.stride, strict=False)
    ]
    for place in itertools.product(*map(range, counts)):
        corner = (
            slice(i * stride, i * stride + size)
            for i, stride, size in zip(place, layer.stride, layer.size, strict=True)
        )
        yield place, x[tuple(corner)].reshape(-1, x.shape[-1])


@pytest.mark.parametrize("name", POOLS)
def test_against_loops(name):
    """Maximum pooling gives the very numbers of a loop over windows, means within 1e-6 (9 additions)."""
    make, shape = LAYERS[name]
    layer = make()
    layer.build(shape)
    x = random_stack(2, 3, shape)
    y = layer.forward(x, TRAINING)
    for g, n in np.ndindex(2, 3):
        for place, numbers in windows(layer, x[g, n]):
            if name.startswith("max"):
                assert (y[g, n][place] == numbers.max(axis=0)).all()
            else:
                np.testing.assert_allclose(y[g, n][place], numbers.mean(axis=0), rtol=0, atol=1e-6)


def test_of_equal_numbers_the_first_gets_the_gradient():
    """Where all numbers of a window are equal, the whole gradient goes to the first."""
    layer = nn.MaxPool2d(2)
    layer.build((4, 4, 1))
    layer.forward(np.zeros((1, 1, 4, 4, 1), np.float32), TRAINING)
    dx = layer.backward(np.arange(1.0, 5.0, dtype=np.float32).reshape(1, 1, 2, 2, 1))
    assert dx[0, 0, ..., 0].tolist() == [[1, 0, 2, 0], [0, 0, 0, 0], [3, 0, 4, 0], [0, 0, 0, 0]]


def test_gradients_of_overlapping_windows_add_up():
    """A number that is the maximum of two windows gets both gradients, also in a second step."""
    layer = nn.MaxPool1d(2, stride=1)
    layer.build((3, 1))
    x = np.array([1.0, 5.0, 2.0], np.float32).reshape(1, 1, 3, 1)
    for _ in range(2):
        layer.forward(x, TRAINING)
        assert layer.backward(np.array([3, 4], np.float32).reshape(1, 1, 2, 1)).reshape(-1).tolist() == [
            0,
            7,
            0,
        ]


def test_nan_is_not_hidden():
    """A NaN in a window is its maximum, so that the step's verdict sees it."""
    layer = nn.MaxPool1d(2)
    layer.build((4, 1))
    x = np.array([1, np.nan, 2, 3], np.float32).reshape(1, 1, 4, 1)
    assert np.isnan(layer.forward(x, TRAINING).reshape(-1)).tolist() == [True, False]


def test_global_mean():
    """The mean over all places, of sequences and images; its gradient is the same for every place."""
    layer = nn.GlobalAvgPool()
    assert layer.build((2, 3, 4)) == (4,)
    x = random_stack(2, 3, (2, 3, 4))
    np.testing.assert_allclose(layer.forward(x, TRAINING), x.mean(axis=(2, 3)), rtol=0, atol=1e-6)
    dx = layer.backward(np.ones((2, 3, 4), np.float32))
    assert (dx == np.float32(1 / 6)).all()


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (lambda: nn.MaxPool2d(2), (8, 8), "channels"),
        (lambda: nn.AvgPool2d(9), (8, 8, 1), "window"),
        (lambda: nn.MaxPool2d(0), (8, 8, 1), "size"),
        (lambda: nn.MaxPool1d(2, stride=(1, 1)), (8, 1), "stride"),
        (nn.GlobalAvgPool, (8,), "places"),
    ],
)
def test_impossible_pools(make, shape, words):
    """A pool that does not fit its samples is a ConfigError that says what was expected."""
    with pytest.raises(ConfigError, match=words):
        make().build(shape)
