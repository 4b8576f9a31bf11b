"""The contract of a layer, over every layer of layer_examples.py."""

from __future__ import annotations

import numpy as np
import pytest

from distbp import nn
from distbp.nn import Array, Context

from .layer_examples import (
    KNOW_THE_MODE,
    LAYERS,
    NEED_TWO_SAMPLES,
    TRAINING,
    Recorder,
    network_of,
    random_stack,
    same_bits,
    samples_for,
    start,
)

MICRO_BATCHES = (1, 5, 16)


def run(network: nn.Network, x: Array, dy: Array, first: int = 0) -> tuple[Array, Array, Recorder]:
    """Return copies of y and dx, and what the leaves wrote; micro-batches are numbered from `first`.

    Codes have no dx, and zeros stand for it.
    """
    recorder = Recorder(x.shape[0])
    network.send_gradients_to(recorder)
    y = network.forward(x, Context(training=True, first_micro_batch=first)).copy()
    dx = network.layer.backward(dy)
    if network.layer.takes_codes:
        assert dx is None
        return y, np.zeros(len(x), y.dtype), recorder
    assert dx is not None
    return y, dx.copy(), recorder


@pytest.mark.parametrize("name", LAYERS)
def test_gradient(name):
    """Parameters' gradients and dx agree with differences and Taylor remainders of the forward pass."""
    network = network_of(name)
    x = samples_for(network, 2, 3)
    report = nn.check_gradient(network, x, random_stack(2, 3, network.output_shape, seed=2))
    assert report.ok, f"\n{report}"
    names = list(network.layout.names)
    assert [t.name for t in report.tensors] == (names if network.layer.takes_codes else ["input", *names])


@pytest.mark.parametrize("b", MICRO_BATCHES)
@pytest.mark.parametrize("num_micro_batches", [1, 2, 3, 5])
@pytest.mark.parametrize("name", LAYERS)
def test_stacked_equals_single(name, num_micro_batches, b):
    """Output, dx, gradients and statistics of a micro-batch have the same bits stacked and alone."""
    if b == 1 and name in NEED_TWO_SAMPLES:
        pytest.skip("one sample has no variance")
    network = network_of(name)
    start(network)
    x = samples_for(network, num_micro_batches, b)
    dy = random_stack(num_micro_batches, b, network.output_shape, seed=2)
    y, dx, gradients = run(network, x, dy)
    observed = np.zeros((num_micro_batches, network.statistics_layout.size))
    network.write_statistics(observed)
    for g in range(num_micro_batches):
        y_g, dx_g, gradients_g = run(network, x[g : g + 1], dy[g : g + 1], g)
        observed_g = np.zeros((1, network.statistics_layout.size))
        network.write_statistics(observed_g)
        assert same_bits(observed[g : g + 1], observed_g)
        assert same_bits(y[g : g + 1], y_g)
        assert same_bits(dx[g : g + 1], dx_g)
        for tensor in network.layout.names:
            assert same_bits(gradients.whole[tensor][g : g + 1], gradients_g.whole[tensor])


@pytest.mark.parametrize("name", LAYERS)
def test_leaf_ranges(name):
    """A leaf writes the same bits for a range of micro-batches, one by one, and into a strided array."""
    network = network_of(name)
    start(network)
    x, dy = samples_for(network, 5, 4), random_stack(5, 4, network.output_shape, seed=2)
    strided = {}

    def sink(parameter, leaf):
        # As in the arena: one row for each micro-batch, the tensor somewhere inside it.
        rows = np.full((5, parameter.size + 48), np.nan, np.float32)
        out = rows[:, 16 : 16 + parameter.size].reshape(5, *parameter.shape)
        assert np.shares_memory(out, rows)
        leaf(0, 2, out[0:2])
        leaf(2, 5, out[2:5])
        assert np.isnan(rows[:, :16]).all()
        assert np.isnan(rows[:, 16 + parameter.size :]).all()
        strided[parameter.name] = out

    _, _, recorder = run(network, x, dy)
    network.send_gradients_to(sink)
    network.forward(x, TRAINING)
    network.layer.backward(dy)
    for tensor in network.layout.names:
        assert same_bits(recorder.whole[tensor], recorder.single[tensor])
        assert same_bits(recorder.whole[tensor], strided[tensor])


@pytest.mark.parametrize("name", LAYERS)
def test_arguments_stay(name):
    """Neither x nor dy nor the parameters are written to."""
    network = network_of(name)
    vector = start(network)
    vector.setflags(write=False)
    network.use(network.views(vector))
    x, dy = samples_for(network, 2, 3), random_stack(2, 3, network.output_shape, seed=2)
    x.setflags(write=False)
    dy.setflags(write=False)
    run(network, x, dy)


@pytest.mark.parametrize("name", LAYERS)
def test_buffers_are_reused(name):
    """A second step of the same shape returns its results at the same addresses; another shape works too."""
    network = network_of(name)
    start(network)
    network.send_gradients_to(Recorder(3))
    x, dy = samples_for(network, 3, 4), random_stack(3, 4, network.output_shape, seed=2)

    def addresses():
        y, dx = network.forward(x, TRAINING), network.layer.backward(dy)
        return [array.__array_interface__["data"] for array in (y, dx) if array is not None]

    assert addresses() == addresses()
    assert network.forward(x[:1, :2], TRAINING).shape == (1, 2, *network.output_shape)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_without_dx(name):
    """Gradients have the same bits when nobody wants dx, and then None is returned."""
    network = network_of(name)
    start(network)
    x, dy = samples_for(network, 3, 4), random_stack(3, 4, network.output_shape, seed=2)
    _, _, with_dx = run(network, x, dy)
    without_dx = Recorder(3)
    network.send_gradients_to(without_dx)
    network.forward(x, TRAINING)
    assert network.layer.backward(dy, want_dx=False) is None
    assert without_dx.order == with_dx.order
    for tensor in network.layout.names:
        assert same_bits(without_dx.whole[tensor], with_dx.whole[tensor])


@pytest.mark.parametrize("name", LAYERS)
def test_order_of_gradients(name):
    """Each parameter is collected exactly once, in the reverse order of the parameters."""
    network = network_of(name)
    start(network)
    x, dy = samples_for(network, 1, 2), random_stack(1, 2, network.output_shape)
    assert run(network, x, dy)[2].order == list(reversed(network.layout.names))


@pytest.mark.parametrize("name", LAYERS)
def test_dtype_and_shapes(name):
    """Results follow the dtype of the input and the shapes that build announced, in both modes."""
    network = network_of(name)
    for dtype in (np.float32, np.float64):
        start(network, dtype)
        network.send_gradients_to(Recorder(2))
        x = samples_for(network, 2, 3)
        if not network.layer.takes_codes:
            x = x.astype(dtype)
        trained = network.forward(x, TRAINING).copy()
        dx = network.layer.backward(trained)
        assert (trained.dtype, trained.shape) == (dtype, (2, 3, *network.output_shape))
        assert dx is None if network.layer.takes_codes else (dx.dtype, dx.shape) == (dtype, x.shape)
        evaluated = network.forward(x, Context(training=False))
        assert (evaluated.dtype, evaluated.shape) == (dtype, trained.shape)
        assert same_bits(evaluated, trained) == (name not in KNOW_THE_MODE)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("linear", 35),
        ("tanh", 0),
        ("sequential", 6 * 7 + 7 * 3),
        ("residual", 60),
        ("parallel", 35),
        ("mlp", 6464),
        ("conv2d", 7 * 6 * 9 * 3 * 5),
        ("conv2d, stride", 4 * 4 * 9 * 3 * 4),
        ("conv2d, groups", 6 * 5 * 9 * 2 * 6),
        ("conv1d", 10 * 4 * 3 * 5),
        ("batch norm of images", 0),
    ],
)
def test_multiply_adds(name, expected):
    """The cost of a sample's forward pass is m n p summed over its products."""
    assert network_of(name).multiply_adds == expected


def test_every_layer_has_an_example():
    """No layer of the package escapes this contract."""

    def kinds(layer):
        return {type(layer)}.union(*(kinds(child) for _, child in layer.children()))

    public = {v for v in vars(nn).values() if isinstance(v, type) and issubclass(v, nn.Layer)} - {nn.Layer}
    assert set().union(*(kinds(make()) for make, _ in LAYERS.values())) == public


def test_first_layer_saves_its_dx():
    """Sequential asks for dx only above the first layer with parameters, and runs nothing below it."""
    asked = []

    class Asked(nn.Tanh):
        def backward(self, dy, want_dx=True):
            asked.append(("tanh", want_dx))
            return super().backward(dy, want_dx)

    class AskedLinear(nn.Linear):
        def backward(self, dy, want_dx=True):
            asked.append(("linear", want_dx))
            return super().backward(dy, want_dx)

    network = nn.Network(
        nn.Sequential(Asked(), AskedLinear(3), Asked(), AskedLinear(2)), (4,), nn.MeanSquaredError()
    )
    start(network)
    network.send_gradients_to(Recorder(1))
    network.loss_and_gradient(random_stack(1, 2, (4,)), random_stack(1, 2, (2,)), TRAINING)
    assert asked == [("linear", True), ("tanh", True), ("linear", False)]


SATURATED = [(make, 1e30) for make in (nn.ReLU, nn.LeakyReLU, nn.Tanh, nn.Sigmoid, nn.Softmax)]
# x³ in GELU overflows float32 beyond 7e12; a training that got there has long diverged.
SATURATED += [(nn.GELU, 1e12), (nn.GELU, 100.0), (nn.Sigmoid, 100.0)]


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("make", "size"), SATURATED)
def test_large_inputs_stay_finite(make, size, sign):
    """Saturated activations give finite values and derivatives without a warning, as the functions do."""
    layer = make()
    layer.build((3,))
    x = np.array([[[sign * size, 0.0, 1.0]]], np.float32)
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        assert np.isfinite(layer.forward(x, TRAINING)).all()
        assert np.isfinite(layer.backward(np.ones_like(x))).all()
