"""GRU and LSTM against their formulas written with the `autograd` package, step by step, in float64.

Both sides are float64 and differ by the order of roundings: 1e-11 is 10^4 to 10^5 roundings.
"""

from __future__ import annotations

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad

from distbp import nn

from .layer_examples import TRAINING, Recorder, start

TOLERANCE = 1e-11
B, T, INPUTS, H = 3, 6, 4, 5


def sigmoid(x):
    """Return the logistic function."""
    return 1 / (1 + anp.exp(-x))


def gru(parameters, x):
    """Return all states of a GRU, as PyTorch's documentation of torch.nn.GRU has it."""
    weight_x, weight_h, bias_x, bias_h = parameters
    h, states = anp.zeros((B, H)), []
    for t in range(T):
        a_r, a_z, a_n = anp.split(anp.dot(x[:, t], weight_x) + bias_x, 3, axis=1)
        c_r, c_z, c_n = anp.split(anp.dot(h, weight_h) + bias_h, 3, axis=1)
        r, z = sigmoid(a_r + c_r), sigmoid(a_z + c_z)
        n = anp.tanh(a_n + r * c_n)
        h = (1 - z) * n + z * h
        states.append(h)
    return states


def lstm(parameters, x):
    """Return all states of an LSTM, as torch.nn.LSTM has it, the gates in the order i, f, o, g."""
    weight_x, weight_h, bias = parameters
    h, c, states = anp.zeros((B, H)), anp.zeros((B, H)), []
    for t in range(T):
        i, f, o, g = anp.split(anp.dot(x[:, t], weight_x) + anp.dot(h, weight_h) + bias, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * anp.tanh(g)
        h = sigmoid(o) * anp.tanh(c)
        states.append(h)
    return states


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("layer", "formula"), [(nn.GRU, gru), (nn.LSTM, lstm)])
def test_states_and_gradients(layer, formula, last):
    """States, dx and the gradient of every parameter are autograd's, for all states and for the last one."""
    generator = np.random.default_rng(4)
    network = nn.Network(layer(H, last=last), (T, INPUTS), nn.MeanSquaredError())
    parameters = [view.copy() for view in network.views(start(network, np.float64))]
    x = generator.normal(size=(B, T, INPUTS))
    dy = generator.normal(size=(B, H) if last else (B, T, H))

    def weighted(parameters, x):
        states = formula(parameters, x)
        return anp.sum((states[-1] if last else anp.stack(states, axis=1)) * dy)

    recorder = Recorder(1)
    network.send_gradients_to(recorder)
    y = network.forward(x[None], TRAINING)
    states = formula(parameters, x)
    np.testing.assert_allclose(y[0], states[-1] if last else np.stack(states, axis=1), atol=TOLERANCE)
    dx = network.layer.backward(dy[None])
    np.testing.assert_allclose(dx[0], grad(weighted, 1)(parameters, x), atol=TOLERANCE)
    for name, wanted in zip(network.layout.names, grad(weighted)(parameters, x), strict=True):
        np.testing.assert_allclose(recorder.whole[name][0], wanted, atol=TOLERANCE, err_msg=name)


def test_the_forget_gate_begins_open():
    """The bias of the second block of gates starts at 1, the others at 0."""
    network = nn.Network(nn.LSTM(3), (2, 1), nn.MeanSquaredError())
    vector = np.zeros(network.layout.size)
    network.initialise(vector, 0)
    assert network.views(vector)[2].tolist() == [0.0] * 3 + [1.0] * 3 + [0.0] * 6
