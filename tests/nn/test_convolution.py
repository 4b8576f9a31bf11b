"""Convolutions against scipy and against their definition, and the map to columns against its transpose."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import correlate

from distbp import nn
from distbp.errors import ConfigError
from distbp.nn.columns import Columns

from .layer_examples import LAYERS, TRAINING, Recorder, network_of, random_stack, start

CONVOLUTIONS = [name for name in LAYERS if name.startswith("conv")]


def by_definition(layer, x, weight, bias):
    """Return y of one sample in float64, each pair of channels by scipy's correlation without FFT."""
    groups = layer.groups
    x = np.pad(x, [(p, p) for p in layer.padding] + [(0, 0)])
    channels, outputs = weight.shape[-2], weight.shape[-1]
    maps = []
    for o in range(outputs):
        first = o // (outputs // groups) * channels
        dense = sum(
            correlate(x[..., first + c], weight[..., c, o], mode="valid", method="direct")
            for c in range(channels)
        )
        maps.append(dense[tuple(slice(None, None, stride) for stride in layer.stride)])
    y = np.stack(maps, axis=-1)
    return y if bias is None else y + bias


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_against_scipy(name):
    """In float64 the output is scipy's correlation within 1e-12, in float32 within 1e-5 of its norm.

    A sum of up to 150 products of values near 1 rounds to about 150 * 1e-16, or 150 * 6e-8, at worst.
    """
    network = network_of(name)
    layer = network.layer
    vector = start(network, np.float64)
    x = random_stack(2, 3, network.input_shape).astype(np.float64)
    views = dict(zip(network.layout.names, network.views(vector), strict=True))
    expected = np.array(
        [[by_definition(layer, s, views["weight"], views.get("bias")) for s in micro] for micro in x]
    )
    np.testing.assert_allclose(network.forward(x, TRAINING), expected, rtol=0, atol=1e-12)
    network.use(network.views(vector.astype(np.float32)))
    single = network.forward(x.astype(np.float32), TRAINING)
    assert np.linalg.norm(single - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_gradients_against_the_transpose(name):
    """The layer is linear in x and in W, so <dy, conv(v)> = <dx, v> for any v, and likewise for W.

    Float64; the relative difference of two sums of some thousand products stays below 1e-11.
    """
    network = network_of(name)
    vector = start(network, np.float64)
    x, v = (random_stack(1, 4, network.input_shape, seed=seed).astype(np.float64) for seed in (1, 2))
    dy = random_stack(1, 4, network.output_shape, seed=3).astype(np.float64)
    recorder = Recorder(1)
    network.send_gradients_to(recorder)
    at_zero = network.forward(np.zeros_like(x), TRAINING).copy()
    moved = np.sum(dy * (network.forward(v, TRAINING) - at_zero))
    network.forward(x, TRAINING)
    dx = network.layer.backward(dy)
    assert abs(np.sum(dx * v) - moved) < 1e-11 * np.abs(dy).sum()
    direction = np.random.default_rng(4).normal(size=vector.shape)
    network.use(network.views(direction))
    moved = np.sum(dy * network.forward(x, TRAINING))
    gradients = [recorder.whole[tensor][0] for tensor in network.layout.names]
    along = sum(np.sum(g * d) for g, d in zip(gradients, network.views(direction), strict=True))
    assert abs(along - moved) < 1e-11 * np.abs(dy).sum()


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("image", "options"),
    [
        ((5, 6), {"window": (3, 2), "stride": (1, 1), "padding": (0, 0), "groups": 1}),
        ((5, 6), {"window": (3, 3), "stride": (2, 1), "padding": (1, 2), "groups": 2}),
        ((1, 7), {"window": (1, 4), "stride": (1, 3), "padding": (0, 1), "groups": 1}),
        ((2, 2), {"window": (1, 1), "stride": (5, 5), "padding": (0, 0), "groups": 3}),
    ],
)
def test_scatter_is_the_transpose_of_gather(image, options, dtype, samples):
    """<gather(x), c> = <x, scatter(c)>, exactly for small whole numbers."""
    columns = Columns(image, 2, **options)
    rng = np.random.default_rng(0)
    x = rng.integers(-9, 9, (samples, *image, 2 * options["groups"])).astype(dtype)
    gathered = columns.gather(x).copy()
    c = rng.integers(-9, 9, gathered.shape).astype(dtype)
    scattered = np.empty_like(x)
    columns.scatter(c, scattered)
    assert np.sum(gathered * c) == np.sum(x * scattered)
    # The margin is still zero: a second call gives the same.
    assert (columns.gather(x) == gathered).all()


def test_parts_cover_every_sample_once():
    """However large a sample is, the parts follow each other and cover all; a large one comes alone."""
    for side in (4, 64, 512):
        columns = Columns((side, side), 8, window=(3, 3), stride=(1, 1), padding=(1, 1), groups=1)
        parts = list(columns.parts(13))
        assert [i for part in parts for i in range(part.start, part.stop)] == list(range(13))
    assert len(parts) == 13


@pytest.mark.parametrize(
    ("make", "shape", "words"),
    [
        (lambda: nn.Conv2d(4, 3), (8, 8), "channels"),
        (lambda: nn.Conv1d(4, 3), (8, 8, 1), "channels"),
        (lambda: nn.Conv2d(4, 9), (8, 8, 1), "as large as the window"),
        (lambda: nn.Conv2d(0, 3), (8, 8, 1), "outputs"),
        (lambda: nn.Conv2d(4, 3, groups=3), (8, 8, 3), "multiple of groups"),
        (lambda: nn.Conv2d(4, 3, groups=2), (8, 8, 3), "2 equal groups"),
        (lambda: nn.Conv2d(4, 2, padding="same"), (8, 8, 1), "odd sizes"),
        (lambda: nn.Conv2d(4, (3, 3, 3)), (8, 8, 1), "2 whole numbers"),
        (lambda: nn.Conv2d(4, 3, stride=0), (8, 8, 1), "stride"),
        (lambda: nn.Conv2d(4, 3, padding=-1), (8, 8, 1), "padding"),
    ],
)
def test_impossible_convolutions(make, shape, words):
    """A convolution that does not fit its samples is a ConfigError that says what was expected."""
    with pytest.raises(ConfigError, match=words):
        make().build(shape)
