"""Transformer blocks against the same mathematics written with the `autograd` package, in float64.

Both sides are float64 and differ by the order of roundings, so outputs and gradients agree to 1e-10 of their
size: 10^5 times the dtype's epsilon leaves room for sums over some hundred terms and softmax.
"""

from __future__ import annotations

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad

from distbp import nn

from .layer_examples import TRAINING, Recorder, start

TOLERANCE = 1e-10
B, T, D, H, V = 3, 5, 8, 2, 7


def layer_norm(x, weight, bias):
    """Return the normalised rows (Ba, Kiros and Hinton, 2016)."""
    centred = x - anp.mean(x, axis=-1, keepdims=True)
    return weight * centred / anp.sqrt(anp.mean(centred**2, axis=-1, keepdims=True) + 1e-5) + bias


def attention(x, qkv_weight, qkv_bias, out_weight, out_bias):
    """Return causal multi-head attention, head by head (Vaswani et al., 2017)."""
    q, k, v = anp.split(anp.dot(x, qkv_weight) + qkv_bias, 3, axis=-1)
    heads = []
    for head in range(H):
        part = slice(head * D // H, (head + 1) * D // H)
        scores = anp.einsum("bik,bjk->bij", q[..., part], k[..., part]) / np.sqrt(D // H)
        scores = anp.where(np.tril(np.ones((T, T))) > 0, scores, -1e30)
        scores = anp.exp(scores - anp.max(scores, axis=-1, keepdims=True))
        scores = scores / anp.sum(scores, axis=-1, keepdims=True)
        heads.append(anp.einsum("bij,bjk->bik", scores, v[..., part]))
    return anp.dot(anp.concatenate(heads, axis=-1), out_weight) + out_bias


def gelu(x):
    """Return the tanh form."""
    return 0.5 * x * (1 + anp.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def language_model(parameters, codes, targets):
    """Return the summed cross entropy of a transformer of one layer, parameters in distbp's order."""
    values = iter(parameters)

    def take(count):
        return [next(values) for _ in range(count)]

    (table,), (positions,) = take(1), take(1)
    x = table[codes] + positions
    x = x + attention(layer_norm(x, *take(2)), *take(4))
    normed, first, second = layer_norm(x, *take(2)), take(2), take(2)
    x = x + anp.dot(gelu(anp.dot(normed, first[0]) + first[1]), second[0]) + second[1]
    z = layer_norm(x, *take(2))
    weight, bias = take(2)
    z = anp.dot(z, weight) + bias
    z = z - anp.max(z, axis=-1, keepdims=True)
    log_softmax = z - anp.log(anp.sum(anp.exp(z), axis=-1, keepdims=True))
    return -anp.sum(log_softmax[np.arange(B)[:, None], np.arange(T), targets])


@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients(seed):
    """The loss of a whole language model and the gradient of each tensor are autograd's."""
    generator = np.random.default_rng(seed)
    codes, targets = generator.integers(0, V, size=(2, B, T))
    model = nn.transformer(outputs=V, layers=1, heads=H, width=D)
    network = nn.Network(model, (T,), nn.SoftmaxCrossEntropy())
    vector = start(network, np.float64)
    parameters = [view.copy() for view in network.views(vector)]
    recorder = Recorder(1)
    network.send_gradients_to(recorder)
    sums = network.loss_and_gradient(codes[None], targets[None], TRAINING)
    assert sums.weight.tolist() == [B * T]
    expected = language_model(parameters, codes, targets)
    np.testing.assert_allclose(sums.loss[0], expected, rtol=TOLERANCE)
    for name, wanted in zip(
        network.layout.names, grad(language_model)(parameters, codes, targets), strict=True
    ):
        found = recorder.whole[name][0]
        assert np.linalg.norm(found - wanted) <= TOLERANCE * max(1.0, np.linalg.norm(wanted)), name


def test_rms_norm():
    """RMSNorm is its formula (Zhang and Sennrich, 2019)."""
    network = nn.Network(nn.RMSNorm(), (6,), nn.MeanSquaredError())
    weight = start(network, np.float64)[:6]
    x = np.random.default_rng(1).normal(size=(1, 4, 6))
    expected = weight * x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(network.forward(x, TRAINING), expected, rtol=TOLERANCE)


@pytest.mark.parametrize("positions", [6, 64, 65, 130])
def test_nothing_is_seen_ahead(positions):
    """With a causal mask a change at position t changes no output before t, in any block."""
    network = nn.Network(nn.MultiHeadAttention(2, causal=True), (positions, 4), nn.MeanSquaredError())
    start(network, np.float64)
    x = np.random.default_rng(1).normal(size=(1, 1, positions, 4))
    before = network.forward(x, TRAINING).copy()
    changed = x.copy()
    at = positions - 2
    changed[0, 0, at] += 1.0
    after = network.forward(changed, TRAINING)
    assert np.array_equal(after[0, 0, :at], before[0, 0, :at])
    assert not (after[0, 0, at:] == before[0, 0, at:]).any()


def test_blocks_change_nothing_but_roundings():
    """Attention in blocks, for 130 positions, is attention by the formula in one piece."""
    generator = np.random.default_rng(2)
    T = 130
    network = nn.Network(nn.MultiHeadAttention(1, causal=True), (T, 4), nn.MeanSquaredError())
    vector = start(network, np.float64)
    qkv_weight, qkv_bias, out_weight, out_bias = network.views(vector)
    x = generator.normal(size=(T, 4))
    q, k, v = np.split(x @ qkv_weight + qkv_bias, 3, axis=-1)
    scores = np.where(np.tril(np.ones((T, T))) > 0, q @ k.T / 2, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    expected = weights @ v @ out_weight + out_bias
    np.testing.assert_allclose(network.forward(x[None, None], TRAINING)[0, 0], expected, atol=TOLERANCE)
