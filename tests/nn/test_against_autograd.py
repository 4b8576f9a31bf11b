"""Ten steps of SGD with momentum against the same network written with the `autograd` package in float64.

distbp runs in float32.  Elementwise the two drift apart by up to 1e-3 where a value is near zero, so tensors
are compared by norm: |a - b| / |b| was measured at 2e-7 to 5e-7 after ten steps; 1e-5 leaves room for other
BLAS kernels and is still below what one wrong step would do (asserted below).
"""

from __future__ import annotations

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad

from distbp import nn

TOLERANCE = 1e-5
STEPS, SAMPLES, LR, MOMENTUM = 10, 32, 0.1, 0.9
ACTIVATIONS = {
    "tanh": anp.tanh,
    "relu": lambda z: anp.maximum(z, 0.0),
    "sigmoid": lambda z: 1 / (1 + anp.exp(-z)),
}


def autograd_loss(parameters, x, y, activation):
    """Return the mean cross entropy of an MLP with two hidden layers."""
    hidden = x
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        hidden = activation(anp.dot(hidden, weight) + bias)
    z = anp.dot(hidden, parameters[-2]) + parameters[-1]
    z = z - anp.max(z, axis=1, keepdims=True)
    log_softmax = z - anp.log(anp.sum(anp.exp(z), axis=1, keepdims=True))
    return -anp.mean(log_softmax[np.arange(len(y)), y])


def train_with_autograd(start, batches, activation, lr=LR):
    """Return the float64 parameters after all batches, and the loss of each."""
    parameters = [tensor.astype(np.float64) for tensor in start]
    velocity = [np.zeros_like(tensor) for tensor in parameters]
    losses = []
    for x, y in batches:
        x = x.reshape(len(x), -1).astype(np.float64)
        losses.append(autograd_loss(parameters, x, y, activation))
        gradients = grad(autograd_loss)(parameters, x, y, activation)
        velocity = [MOMENTUM * v + g for v, g in zip(velocity, gradients, strict=True)]
        parameters = [p - lr * v for p, v in zip(parameters, velocity, strict=True)]
    return parameters, losses


def train_with_distbp(network, vector, batches):
    """Run plain SGD with one micro-batch a step, so that no gradients need adding."""
    gradient, velocity = np.zeros_like(vector), np.zeros_like(vector)

    def sink(parameter, leaf):
        place = gradient[parameter.offset : parameter.offset + parameter.size]
        leaf(0, 1, place.reshape(1, *parameter.shape))

    network.send_gradients_to(sink)
    losses = []
    for x, y in batches:
        network.use(network.views(vector))
        sums = network.loss_and_gradient(x[None], y[None], nn.Context(training=True))
        losses.append(float(sums.loss[0] / sums.weight[0]))
        velocity = np.float32(MOMENTUM) * velocity + gradient / np.float32(sums.weight[0])
        vector = vector - np.float32(LR) * velocity
    return [view.copy() for view in network.views(vector)], losses


def distance(a, b):
    """Return |a - b| / |b|."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_ten_steps(activation):
    """After ten steps from equal weights every tensor agrees within 1e-5 of its norm; so does each loss."""
    rng = np.random.default_rng(11)
    batches = [
        (rng.normal(size=(SAMPLES, 4, 5)).astype(np.float32), rng.integers(0, 7, size=SAMPLES))
        for _ in range(STEPS)
    ]
    network = nn.Network(
        nn.mlp(outputs=7, hidden=(24, 16), activation=activation), (4, 5), nn.SoftmaxCrossEntropy()
    )
    vector = np.empty(network.layout.size, np.float32)
    network.initialise(vector, 5)
    start = [view.copy() for view in network.views(vector)]
    expected, expected_losses = train_with_autograd(start, batches, ACTIVATIONS[activation])
    parameters, losses = train_with_distbp(network, vector, batches)
    np.testing.assert_allclose(losses, expected_losses, rtol=TOLERANCE)
    for name, ours, theirs in zip(network.layout.names, parameters, expected, strict=True):
        assert distance(ours, theirs) < TOLERANCE, name
    # The tolerance has teeth: a learning rate that is 0.1 % off leaves it.
    other, _ = train_with_autograd(start, batches, ACTIVATIONS[activation], lr=1.001 * LR)
    assert max(map(distance, other, expected)) > TOLERANCE
