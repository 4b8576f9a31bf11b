"""Ten steps of SGD with momentum against the same networks written with the `autograd` package in float64.

distbp runs in float32.  Elementwise the two drift apart by up to 1e-3 where a value is near zero, so tensors
are compared by norm: |a - b| / |b| was measured at 2e-7 to 7e-7 after ten steps, and at 2e-6 for the biases
behind a batch norm, which begin at zero (`pytest -s` prints them).  1e-5 leaves room for other BLAS kernels
and is still below what one wrong step would do (asserted below).
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


def mlp(activation):
    """Return the function of an MLP."""

    def outputs(parameters, x):
        hidden = x.reshape(len(x), -1)
        for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
            hidden = activation(anp.dot(hidden, weight) + bias)
        return anp.dot(hidden, parameters[-2]) + parameters[-1]

    return outputs


def convolve(x, weight, stride=1):
    """Return the convolution with "same" padding of images (N, H, W, C): a sum of shifted products."""
    size = weight.shape[0]
    (_, height, width, _), margin = x.shape, size // 2
    x = anp.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0)), "constant")
    return sum(
        anp.dot(x[:, r : r + height : stride, c : c + width : stride], weight[r, c])
        for r in range(size)
        for c in range(size)
    )


def normalise(x, gain, bias):
    """Return the batch norm of one micro-batch."""
    axes = tuple(range(x.ndim - 1))
    return (x - anp.mean(x, axis=axes)) / anp.sqrt(anp.var(x, axis=axes) + 1e-5) * gain + bias


def plain_network(parameters, x):
    """Convolution, maximum over 2 x 2, rectifier, fully connected: a small LeNet."""
    w1, b1, w2, b2 = parameters
    hidden = convolve(x[..., np.newaxis], w1) + b1
    count, height, width, channels = hidden.shape
    hidden = hidden.reshape(count, height // 2, 2, width // 2, 2, channels)
    hidden = anp.maximum(anp.max(anp.max(hidden, axis=4), axis=2), 0.0)
    return anp.dot(hidden.reshape(count, -1), w2) + b2


def residual_network(parameters, x):
    """The residual network of one block in each of two stages, the second at half the size."""
    relu = ACTIVATIONS["relu"]
    stem, block, last = parameters[:3], parameters[3:9], parameters[18:]
    hidden = relu(normalise(convolve(x, stem[0]), *stem[1:]))
    inner = relu(normalise(convolve(hidden, block[0]), *block[1:3]))
    hidden = relu(hidden + normalise(convolve(inner, block[3]), *block[4:]))
    block, shortcut = parameters[9:15], parameters[15:18]
    inner = relu(normalise(convolve(hidden, block[0], 2), *block[1:3]))
    past = normalise(convolve(hidden, shortcut[0], 2), *shortcut[1:])
    hidden = relu(past + normalise(convolve(inner, block[3]), *block[4:]))
    return anp.dot(anp.mean(hidden, axis=(1, 2)), last[0]) + last[1]


NETWORKS = {
    **{
        f"mlp, {name}": (nn.mlp(outputs=7, hidden=(24, 16), activation=name), (4, 5), mlp(function))
        for name, function in ACTIVATIONS.items()
    },
    "plain": (
        nn.Sequential(
            nn.AsImage(),
            nn.Conv2d(5, 3, padding="same"),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(7),
        ),
        (8, 6),
        plain_network,
    ),
    "residual": (nn.resnet(outputs=7, blocks=1, widths=(4, 6)), (8, 9, 2), residual_network),
}


def autograd_loss(parameters, x, y, outputs):
    """Return the mean cross entropy."""
    z = outputs(parameters, x)
    z = z - anp.max(z, axis=1, keepdims=True)
    log_softmax = z - anp.log(anp.sum(anp.exp(z), axis=1, keepdims=True))
    return -anp.mean(log_softmax[np.arange(len(y)), y])


def train_with_autograd(start, batches, outputs, lr=LR):
    """Return the float64 parameters after all batches, and the loss of each."""
    parameters = [tensor.astype(np.float64) for tensor in start]
    velocity = [np.zeros_like(tensor) for tensor in parameters]
    losses = []
    for x, y in batches:
        x = x.astype(np.float64)
        losses.append(autograd_loss(parameters, x, y, outputs))
        gradients = grad(autograd_loss)(parameters, x, y, outputs)
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


@pytest.mark.parametrize("name", NETWORKS)
def test_ten_steps(name):
    """After ten steps from equal weights every tensor agrees within 1e-5 of its norm; so does each loss."""
    layer, shape, outputs = NETWORKS[name]
    rng = np.random.default_rng(11)
    batches = [
        (rng.normal(size=(SAMPLES, *shape)).astype(np.float32), rng.integers(0, 7, size=SAMPLES))
        for _ in range(STEPS)
    ]
    network = nn.Network(layer, shape, nn.SoftmaxCrossEntropy())
    vector = np.empty(network.layout.size, np.float32)
    network.initialise(vector, 5)
    start = [view.copy() for view in network.views(vector)]
    expected, expected_losses = train_with_autograd(start, batches, outputs)
    parameters, losses = train_with_distbp(network, vector, batches)
    np.testing.assert_allclose(losses, expected_losses, rtol=TOLERANCE)
    found = {
        tensor: distance(ours, theirs)
        for tensor, ours, theirs in zip(network.layout.names, parameters, expected, strict=True)
    }
    print(found)
    assert max(found.values()) < TOLERANCE, found
    # The tolerance has teeth: a learning rate that is 0.1 % off leaves it.
    other, _ = train_with_autograd(start, batches, outputs, lr=1.001 * LR)
    assert max(map(distance, other, expected)) > TOLERANCE
