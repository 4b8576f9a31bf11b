"""Products of features and rows for codes, against plain loops; what is refused, and with which words."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from distbp import nn
from distbp.errors import ConfigError, DataError

from .layer_examples import LAYERS, TRAINING, Recorder, network_of, random_stack, samples_for, start


@pytest.mark.parametrize("name", ["pairs", "one pair", "triples", "pairs of rows"])
def test_products_against_loops(name):
    """The products are those of `itertools.combinations`, bit for bit, and dx is theirs within 1e-5.

    The bits agree because both multiply from the left; a slope is a sum of up to 15 terms of size 1, and a
    loop adds them in another order.
    """
    make, shape = LAYERS[name]
    layer = make()
    layer.build(shape)
    x = random_stack(2, 3, shape)
    y = layer.forward(x, TRAINING)
    groups = list(itertools.combinations(range(shape[-1]), layer.order))
    assert y.shape == (*x.shape[:-1], math.comb(shape[-1], layer.order))
    dy = random_stack(2, 3, y.shape[2:], seed=2)
    dx = layer.backward(dy)
    expected = np.zeros_like(x)
    for product, group in enumerate(groups):
        factors = x[..., group[0]]
        for other in group[1:]:
            factors = factors * x[..., other]
        assert (y[..., product] == factors).all()
        for i in group:
            others = [x[..., j] for j in group if j != i]
            expected[..., i] += dy[..., product] * np.prod(others, axis=0)
    np.testing.assert_allclose(dx, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("order", "inputs", "words"),
    [(2, 300, "got 44,850 of 2 of 300 inputs"), (5, 60, "got 5,461,512 of 5"), (3, 2, "got 0 of 3 of 2")],
)
def test_too_many_products_are_refused_with_their_number(order, inputs, words):
    """What would be too many products, or none, is refused before anything is allocated."""
    with pytest.raises(ConfigError, match=words):
        nn.FeatureCross(order).build((inputs,))


@pytest.mark.parametrize("name", ["column embedding", "column embedding of codes alone"])
def test_rows_against_loops(name):
    """Each code's row of its table is looked up, and gets the sum of the gradients of its places."""
    network = network_of(name)
    start(network)
    layer = network.layer
    x = samples_for(network, 2, 5)
    recorder = Recorder(2)
    network.send_gradients_to(recorder)
    y = network.forward(x, TRAINING)
    columns = [column for column, _ in layer.codes]
    numbers = [column for column in range(x.shape[-1]) if column not in columns]
    dy = random_stack(2, 5, y.shape[2:], seed=3)
    dx = layer.backward(dy)
    assert (y[..., : len(numbers)] == x[..., numbers]).all()
    assert (dx[..., numbers] == dy[..., : len(numbers)]).all()
    assert not dx[..., columns].any()
    for index, (column, rows) in enumerate(layer.codes):
        place = len(numbers) + index * layer.width
        table = dict(layer.parameters())[f"weight{column}"].value
        expected = np.zeros((2, rows, layer.width))
        for g, n in np.ndindex(2, 5):
            code = int(x[g, n, column])
            assert (y[g, n, place : place + layer.width] == table[code]).all()
            expected[g, code] += dy[g, n, place : place + layer.width]
        # Sums of at most five terms of size 1.
        np.testing.assert_allclose(recorder.whole[f"weight{column}"], expected, rtol=0, atol=1e-5)


def test_row_0_starts_at_zero():
    """What training did not have begins as nothing, and the other rows have a length of about 1."""
    network = nn.Network(nn.ColumnEmbedding([(0, 50)], 8), (1,), nn.MeanSquaredError())
    vector = np.empty(network.layout.size)
    network.initialise(vector, 0)
    (table,) = network.views(vector)
    assert not table[0].any()
    assert 0.8 < np.linalg.norm(table[1:], axis=1).mean() < 1.2


@pytest.mark.parametrize("wrong", [-1.0, 5.0])
def test_a_code_outside_its_table_is_named(wrong):
    """A column that holds another number than a code is refused with its number."""
    network = network_of("column embedding")
    start(network)
    x = samples_for(network, 1, 3)
    x[0, 1, 1] = wrong
    with pytest.raises(DataError, match=rf"codes 0\.\.4 in column 1, got {wrong}"):
        network.forward(x, TRAINING)


@pytest.mark.parametrize(
    ("codes", "width", "shape"),
    [
        ([(0, 3)], 0, (2,)),
        ([(0, 0)], 1, (2,)),
        ([(2, 3)], 1, (2,)),
        ([(0, 3), (0, 3)], 1, (2,)),
        ([], 1, (2, 2)),
    ],
)
def test_what_does_not_fit_together_is_refused(codes, width, shape):
    """Columns that are not there, twice there, without rows, or of images are configuration mistakes."""
    with pytest.raises(ConfigError, match="ColumnEmbedding"):
        nn.ColumnEmbedding(codes, width).build(shape)
