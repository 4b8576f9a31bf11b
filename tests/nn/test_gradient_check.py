"""The gradient check must catch what is wrong, or its silence means nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from distbp import nn
from distbp.errors import DataError
from distbp.nn import check_gradient
from distbp.nn.product import TransposeTimesRows

from .layer_examples import random_stack


class SlightlyWrongWeights(nn.Linear):
    """A Linear whose weight gradient is 0.1 % too large."""

    def backward(self, dy, want_dx=True):
        wrong = 1.001 * dy
        self.bias.collect(lambda lo, hi, out: np.add.reduce(dy[lo:hi], axis=1, out=out))
        self.weight.collect(TransposeTimesRows(self._x_GbI, wrong))
        return dy @ self.weight.value.T if want_dx else None


class SlightlyWrongActivation(nn.Tanh):
    """A Tanh whose dx is 0.1 % too large."""

    def backward(self, dy, want_dx=True):
        dx = super().backward(dy, want_dx)
        return None if dx is None else 1.001 * dx


def network(first: nn.Layer, activation: nn.Layer, loss: nn.Loss) -> nn.Network:
    """Return a network whose parts may be wrong."""
    return nn.Network(nn.Sequential(first, activation, nn.Linear(3)), (4,), loss)


LOSSES = {
    "cross entropy": (nn.SoftmaxCrossEntropy, np.random.default_rng(2).integers(0, 3, size=(2, 5))),
    "squares": (nn.MeanSquaredError, random_stack(2, 5, (3,), seed=2)),
}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("loss", LOSSES)
def test_right_passes(loss, activation, seed):
    """A right network passes for any seed, kinks or not."""
    make_loss, y = LOSSES[loss]
    report = check_gradient(
        network(nn.Linear(6), activation(), make_loss()), random_stack(2, 5, (4,)), y, seed=seed
    )
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
@pytest.mark.parametrize("loss", LOSSES)
def test_both_methods_catch_a_wrong_factor(loss, activation, seed):
    """A factor of 1.001 in one weight gradient is seen by both methods, in that tensor alone."""
    make_loss, y = LOSSES[loss]
    wrong = network(SlightlyWrongWeights(6), activation(), make_loss())
    report = check_gradient(wrong, random_stack(2, 5, (4,)), y, seed=seed)
    assert not report.ok
    for tensor in report.tensors:
        is_wrong = tensor.name == "0.weight"
        assert (tensor.error > 100 * report.tolerance) == is_wrong
        assert (tensor.order < report.least_order) == is_wrong
    assert [line.split()[0] for line in str(report).splitlines() if "WRONG" in line] == ["0.weight"]


def test_a_wrong_dx_is_caught_below():
    """A factor of 1.001 in an activation's dx is seen in everything below it, and in nothing above."""
    make_loss, y = LOSSES["cross entropy"]
    wrong = network(nn.Linear(6), SlightlyWrongActivation(), make_loss())
    report = check_gradient(wrong, random_stack(2, 5, (4,)), y)
    seen = {t.name for t in report.tensors if t.error > report.tolerance and t.order < report.least_order}
    assert seen == {"input", "0.weight", "0.bias"}


def test_linear_functions_have_no_remainder():
    """Where the loss is linear along every direction the order is infinite and the check passes."""

    class Sum(nn.MeanSquaredError):
        def forward(self, output, target, mask=None):
            self._shape = output.shape
            return nn.Sums(output.sum(axis=(1, 2)), np.ones(len(output)), np.zeros(len(output)))

        def backward(self):
            return np.ones(self._shape)

    report = check_gradient(
        nn.Network(nn.Linear(3), (4,), Sum()), random_stack(2, 5, (4,)), np.zeros((2, 5, 3))
    )
    assert report.ok, f"\n{report}"
    assert report.lowest_order == math.inf


def test_nan_does_not_pass():
    """A forward pass that gives NaN fails the check."""
    make_loss, y = LOSSES["cross entropy"]
    x = random_stack(2, 5, (4,))
    x[0, 0, 0] = np.nan
    assert not check_gradient(network(nn.Linear(6), nn.Tanh(), make_loss()), x, y).ok


def test_the_network_is_given_back():
    """Values and sink are those from before, also when the check fails with an error."""
    make_loss, y = LOSSES["cross entropy"]
    model = network(nn.Linear(6), nn.Tanh(), make_loss())
    vector = np.zeros(model.layout.size, np.float32)
    model.use(model.views(vector))
    seen = []
    model.send_gradients_to(lambda parameter, leaf: seen.append(parameter.name))
    check_gradient(model, random_stack(2, 5, (4,)), y)
    with pytest.raises(DataError):
        check_gradient(model, random_stack(2, 5, (4,)), y[:, :4])
    assert not seen
    assert all(np.shares_memory(parameter.value, vector) for parameter in model.parameters)
    model.loss_and_gradient(random_stack(2, 5, (4,)), y, nn.Context(training=True))
    assert seen == ["2.bias", "2.weight", "0.bias", "0.weight"]
