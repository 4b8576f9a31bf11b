"""Dropout: what is dropped depends on seed, layer, step and micro-batch, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from distbp import nn
from distbp.errors import ConfigError

SHAPE = (1000,)


def dropped(layer, **context):
    """Return which of the numbers were dropped, (G, b, 1000)."""
    return layer.forward(np.ones((2, 3, *SHAPE), np.float32), nn.Context(training=True, **context)) == 0


@pytest.fixture
def layers():
    """Two Dropouts in one network."""
    first, second = nn.Dropout(0.25), nn.Dropout(0.25)
    nn.Network(nn.Sequential(first, second), SHAPE, nn.MeanSquaredError())
    return first, second


def test_every_part_of_the_key_counts(layers):
    """Another seed, step, micro-batch or layer drops other numbers; the same key drops the same ones."""
    first, second = layers
    base = dropped(first, seed=1, step=5)
    assert (dropped(first, seed=1, step=5) == base).all()
    others = [
        dropped(first, seed=2, step=5),
        dropped(first, seed=1, step=6),
        dropped(first, seed=1, step=5, first_micro_batch=7),
        dropped(second, seed=1, step=5),
    ]
    assert all((other != base).any() for other in others)
    assert (base[0] != base[1]).any()
    # Micro-batch 1 is the same one whether it is the second of a stack or the first of another.
    assert (dropped(first, seed=1, step=5, first_micro_batch=1)[0] == base[1]).all()


def test_share_and_scale(layers):
    """About a quarter is dropped (6,000 draws, within 5 standard errors), what stays is divided by 3/4."""
    y = layers[0].forward(np.full((2, 3, *SHAPE), 3.0, np.float32), nn.Context(training=True)).copy()
    assert set(np.unique(y)) == {0.0, 4.0}
    assert abs(np.mean(y == 0) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / y.size)


def test_evaluation_does_nothing(layers):
    """In evaluation, and with a share of 0, what comes out is what came in."""
    x = np.ones((1, 2, *SHAPE), np.float32)
    assert layers[0].forward(x, nn.Context(training=False)) is x
    assert nn.Dropout(0.0).forward(x, nn.Context(training=True)) is x


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_impossible_shares(share):
    """A share outside of [0, 1) is refused."""
    with pytest.raises(ConfigError, match="share"):
        nn.Dropout(share)
