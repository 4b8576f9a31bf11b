"""BatchNorm: its formula, its statistics, and what evaluation makes of them."""

from __future__ import annotations

import numpy as np
import pytest

from distbp import nn
from distbp.errors import ConfigError
from distbp.nn.channels import channel_sums, fold

from .layer_examples import TRAINING, random_stack, same_bits, start

EVALUATION = nn.Context(training=False)


def network(shape, **options):
    """Return a network of one BatchNorm with gains and biases off their start, and both vectors."""
    made = nn.Network(nn.BatchNorm(**options), shape, nn.MeanSquaredError())
    vector = start(made)
    averages = np.empty(made.statistics_layout.size)
    made.begin_statistics(averages)
    made.use_statistics(averages)
    return made, vector, averages


@pytest.mark.parametrize("shape", [(3,), (7, 5), (4, 6, 16), (1, 1, 600)])
def test_training_follows_the_formula(shape):
    """Each micro-batch is normalised by its own mean and biased variance, within 1e-5 (400 terms)."""
    made, vector, _ = network(shape)
    gain, bias = made.views(vector)
    x = 3 * random_stack(2, 4, shape) + 7
    y = made.forward(x, TRAINING)
    axes = tuple(range(1, x.ndim - 1))
    wide = x.astype(np.float64)
    mean, variance = wide.mean(axis=axes, keepdims=True), wide.var(axis=axes, keepdims=True)
    np.testing.assert_allclose(y, (wide - mean) / np.sqrt(variance + 1e-5) * gain + bias, rtol=0, atol=1e-5)


def test_statistics_are_mean_and_unbiased_variance():
    """What is left for the averages is the mean and the variance over P - 1, by micro-batch and channel."""
    made, _, _ = network((5, 3))
    x = random_stack(2, 4, (5, 3))
    made.forward(x, TRAINING)
    rows = np.zeros((2, made.statistics_layout.size))
    made.write_statistics(rows)
    mean, variance = ([made.statistics_layout.views(row)[i] for row in rows] for i in (0, 1))
    np.testing.assert_allclose(mean, x.mean(axis=(1, 2)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(variance, x.var(axis=(1, 2), ddof=1), rtol=1e-6)


def test_averages_move_by_the_rate_and_evaluation_reads_them():
    """The averages are what the recursion gives, and evaluation normalises with them alone."""
    made, vector, averages = network((3,), rate=0.25)
    assert [view.tolist() for view in made.statistics_layout.views(averages)] == [[0.0] * 3, [1.0] * 3]
    expected_mean, expected_variance = np.zeros(3), np.ones(3)
    for seed in (1, 2):
        x = random_stack(1, 8, (3,), seed=seed)
        made.forward(x, TRAINING)
        rows = np.zeros((1, len(averages)))
        made.write_statistics(rows)
        made.move_statistics(averages, rows[0])
        expected_mean += 0.25 * (x[0].mean(axis=0) - expected_mean)
        expected_variance += 0.25 * (x[0].var(axis=0, ddof=1) - expected_variance)
    mean, variance = made.statistics_layout.views(averages)
    np.testing.assert_allclose(mean, expected_mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(variance, expected_variance, rtol=1e-6)
    gain, bias = made.views(vector)
    x = random_stack(2, 4, (3,), seed=3)
    wanted = (x - mean) / np.sqrt(variance + 1e-5) * gain + bias
    np.testing.assert_allclose(made.forward(x, EVALUATION), wanted, rtol=0, atol=1e-5)
    # A sample's output does not depend on who else is in its batch.
    assert same_bits(made.forward(x[:1, :1], EVALUATION), made.forward(x, EVALUATION)[:1, :1].copy())


def test_a_large_mean_does_not_spoil_the_variance():
    """Values around 10,000 with deviation 1 are normalised; the one-pass formula would lose them."""
    made, _, _ = network((4, 4, 2))
    x = random_stack(1, 16, (4, 4, 2)) + np.float32(1e4)
    made.forward(x, TRAINING)
    rows = np.zeros((1, made.statistics_layout.size))
    made.write_statistics(rows)
    variance = made.statistics_layout.views(rows[0])[1]
    np.testing.assert_allclose(variance, x[0].astype(np.float64).var(axis=(0, 1, 2), ddof=1), rtol=1e-3)


def test_a_constant_channel_gives_the_bias():
    """A channel that never changes is finite, forward and backward."""
    made, vector, _ = network((3,))
    made.send_gradients_to(lambda parameter, leaf: leaf(0, 1, np.empty((1, 3), np.float32)))
    y = made.forward(np.full((1, 8, 3), 5.0, np.float32), TRAINING)
    np.testing.assert_allclose(y[0], np.tile(made.views(vector)[1], (8, 1)), rtol=0, atol=1e-6)
    assert np.isfinite(made.layer.backward(random_stack(1, 8, (3,)))).all()


def test_one_value_has_no_variance():
    """A micro-batch with one value for each channel is refused with the key to change; evaluation is not."""
    made, _, _ = network((3,))
    with pytest.raises(ConfigError, match=r"train\.micro_batch"):
        made.forward(np.zeros((4, 1, 3), np.float32), TRAINING)
    assert made.forward(np.zeros((4, 1, 3), np.float32), EVALUATION).shape == (4, 1, 3)


@pytest.mark.parametrize("options", [{"rate": 0.0}, {"rate": 1.5}, {"epsilon": 0.0}, {"epsilon": np.inf}])
def test_impossible_options(options):
    """Rates outside of (0, 1] and an epsilon that does not keep from dividing by 0 are refused."""
    with pytest.raises(ConfigError, match="expected a"):
        nn.BatchNorm(**options)


@pytest.mark.parametrize(("positions", "channels"), [(1, 1), (7, 3), (64, 16), (97, 8), (12, 700)])
def test_channel_sums(positions, channels):
    """Sums of channels are right for any fold, and the fold divides the positions."""
    assert positions % fold(positions, channels) == 0
    x = np.random.default_rng(0).integers(-9, 9, (3, positions, channels)).astype(np.float32)
    assert (channel_sums(x, np.empty((3, channels), np.float32)) == x.sum(axis=1)).all()
