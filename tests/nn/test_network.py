"""Layout, initial values, models by name, and what Network refuses."""

from __future__ import annotations

import numpy as np
import pytest

from distbp import nn
from distbp.errors import ConfigError, DataError
from distbp.nn import initial
from distbp.nn.layer import Parameter

from .layer_examples import TRAINING, Recorder, random_stack, same_bits, samples_for, start


def small(**changes) -> nn.Network:
    """Return a network with three Linear layers, 74 parameters and 3 classes."""
    options = {"outputs": 3, "hidden": (5, 4), "activation": "tanh"} | changes
    return nn.Network(nn.mlp(**options), (2, 3), nn.SoftmaxCrossEntropy())


def test_layout_is_aligned_and_disjoint():
    """Every tensor begins at a multiple of 64 bytes, in declaration order, and none overlaps another."""
    layout = small().layout
    assert layout.names == ("1.weight", "1.bias", "3.weight", "3.bias", "5.weight", "5.bias")
    assert layout.shapes == ((6, 5), (5,), (5, 4), (4,), (4, 3), (3,))
    assert layout.offsets == (0, 32, 48, 80, 96, 112)
    assert layout.size == 128
    vector = np.zeros(layout.size, np.float32)
    for view in layout.views(vector):
        assert np.shares_memory(view, vector)
        view += 1
    assert vector.max() == 1
    assert vector.sum() == small().num_parameters == 30 + 5 + 20 + 4 + 12 + 3


def test_layout_without_parameters():
    """A model without parameters has a vector of size 0 and works."""
    network = nn.Network(nn.Sequential(), (4,), nn.SoftmaxCrossEntropy())
    start(network)
    assert (network.layout.size, network.num_parameters) == (0, 0)
    assert network.evaluate(random_stack(2, 3, (4,)), np.zeros((2, 3), np.int64)).weight.tolist() == [3, 3]


def test_digest_tells_models_apart():
    """Equal names and shapes give an equal digest; another width, order or name gives another."""
    digest = nn.arrange([("a", (2, 3)), ("b", (3,))]).digest()
    assert digest == nn.arrange([("a", (2, 3)), ("b", (3,))]).digest()
    others = [
        [("a", (3, 2)), ("b", (3,))],
        [("b", (3,)), ("a", (2, 3))],
        [("a", (2, 3)), ("c", (3,))],
        [("a", (2, 3))],
    ]
    assert digest not in {nn.arrange(other).digest() for other in others}


def test_initialise_is_a_function_of_the_seed():
    """The same seed gives the same bits and zero padding, another seed other weights, biases are 0."""
    network = small()
    vectors = [np.full(network.layout.size, np.nan, np.float32) for _ in range(3)]
    for vector, seed in zip(vectors, (1, 1, 2), strict=True):
        network.initialise(vector, seed)
    assert same_bits(vectors[0], vectors[1])
    weights, others = network.views(vectors[0])[0], network.views(vectors[2])[0]
    assert not (weights == others).any()
    for view in network.views(vectors[0])[1::2]:
        assert not view.any()
    for view in network.views(vectors[0]):
        view[:] = 0
    assert not vectors[0].any()


def test_equal_tensors_start_differently():
    """Two layers of the same shape draw different weights, because a stream is keyed by the tensor's name."""
    network = nn.Network(nn.Sequential(nn.Linear(4), nn.Linear(4)), (4,), nn.SoftmaxCrossEntropy())
    vector = np.empty(network.layout.size, np.float32)
    network.initialise(vector, 0)
    first, _, second, _ = network.views(vector)
    assert not (first == second).any()


@pytest.mark.parametrize("distribution", ["normal", "uniform"])
@pytest.mark.parametrize(("rule", "variance"), [("he", 2 / 300), ("glorot", 2 / 700), ("lecun", 1 / 300)])
def test_variance_of_initial_values(rule, variance, distribution):
    """Mean and variance are those of the formula, within 5 standard errors of 120,000 draws."""
    draw = getattr(initial, f"{rule}_{distribution}")
    parameter = Parameter((300, 400), draw, fan_in=300, fan_out=400)
    parameter.name = "0.weight"
    values = draw(parameter, 7)
    assert values.shape == (300, 400)
    # The standard error of a variance is variance * sqrt((kurtosis - 1) / n); a normal's kurtosis is 3.
    assert abs(values.var() / variance - 1) < 5 * np.sqrt(2 / values.size)
    assert abs(values.mean()) < 5 * np.sqrt(variance / values.size)
    if distribution == "uniform":
        assert np.abs(values).max() < np.sqrt(3 * variance)


def test_constant_initial_values():
    """Zeros are zeros and ones are ones, in the parameter's shape."""
    parameter = Parameter((2, 3), initial.zeros, fan_in=2, fan_out=3)
    assert initial.zeros(parameter, 1).tolist() == [[0.0] * 3] * 2
    assert initial.ones(parameter, 1).tolist() == [[1.0] * 3] * 2


def test_use_switches_generations():
    """After `use` the outputs are those of the new vector, and nothing was copied."""
    network = small()
    vectors = [np.empty(network.layout.size, np.float32) for _ in range(2)]
    for seed, vector in enumerate(vectors):
        network.initialise(vector, seed)
    generations = [network.views(vector) for vector in vectors]
    x = random_stack(1, 4, (2, 3))
    outputs = []
    for step in range(4):
        network.use(generations[step & 1])
        outputs.append(network.forward(x, TRAINING).copy())
    assert same_bits(outputs[0], outputs[2])
    assert same_bits(outputs[1], outputs[3])
    assert not same_bits(outputs[0], outputs[1])


def test_gradient_of_masked_samples_is_zero():
    """Samples with mask 0 change neither sums nor gradients, whatever they hold."""
    network = small()
    start(network)
    y = np.random.default_rng(1).integers(0, 3, size=(2, 4))
    mask = np.array([[1, 1, 0, 0], [1, 0, 1, 0]], np.float32)
    results = []
    for noise in (0.0, 5.0):
        x = random_stack(2, 4, (2, 3)) + np.float32(noise) * (1 - mask)[:, :, None, None]
        recorder = Recorder(2)
        network.send_gradients_to(recorder)
        sums = network.loss_and_gradient(x, np.where(mask > 0, y, int(noise > 0)), TRAINING, mask)
        results.append((sums, recorder.whole))
    assert results[0][0].weight.tolist() == [2, 2]
    assert same_bits(results[0][0].loss, results[1][0].loss)
    for name in network.layout.names:
        # -0 and 0 are both no contribution, so values are compared, exactly.
        assert (results[0][1][name] == results[1][1][name]).all()


def test_evaluate_equals_the_training_loss():
    """Where no layer behaves differently in training, evaluation gives the same bits and sends nothing."""
    network = small()
    start(network)
    recorder = Recorder(2)
    network.send_gradients_to(recorder)
    x, y = random_stack(2, 4, (2, 3)), np.random.default_rng(1).integers(0, 3, size=(2, 4))
    evaluated = network.evaluate(x, y)
    assert not recorder.order
    trained = network.loss_and_gradient(x, y, TRAINING)
    assert same_bits(evaluated.loss, trained.loss)
    assert same_bits(evaluated.correct, trained.correct)


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (lambda: nn.Linear(3), (), "Flatten"),
        (lambda: nn.Linear(3), (0,), "at least one feature"),
        (lambda: nn.Linear(0), (4,), "at least one output"),
        (lambda: nn.LeakyReLU(1.5), (4,), "slope"),
        (nn.Softmax, (), "at least one axis"),
        (nn.Parallel, (4,), "at least one branch"),
        (lambda: nn.Residual(nn.Linear(3)), (4,), "keeps the shape"),
        (lambda: nn.Parallel(nn.Flatten(), nn.ReLU()), (2, 3), "last axis"),
        (lambda: nn.Sequential(*[nn.Linear(4)] * 2), (4,), "'0'.*'1'|'1'.*'0'"),
        (lambda: nn.Sequential(nn.Residual(shared := nn.Tanh()), shared), (4,), "object both as"),
        (lambda: nn.Linear(1), (4,), "at least two classes"),
        (lambda: nn.MultiHeadAttention(0), (4, 4), "at least one head"),
        (lambda: nn.MultiHeadAttention(3), (4, 4), "multiple of 3 heads"),
        (lambda: nn.MultiHeadAttention(2, mask=[[True] * 3] * 4), (4, 4), "4 rows of 4"),
        (
            lambda: nn.MultiHeadAttention(2, mask=[[False, True]] * 2, causal=True),
            (2, 4),
            "position 0 sees none",
        ),
        (lambda: nn.Embedding(0, 3), (4,), "at least one code"),
        (nn.PositionalEmbedding, (), "at least one axis"),
        (nn.LayerNorm, (), "at least one feature"),
        (lambda: nn.RMSNorm(epsilon=0.0), (4,), "epsilon > 0"),
        (lambda: nn.Parallel(nn.Embedding(3, 2), nn.Tanh()), (4,), "all take codes"),
        (lambda: nn.transformer(outputs=3, width=10), (4,), "multiple of the heads"),
        (lambda: nn.GRU(0), (4,), "at least one unit"),
        (lambda: nn.LSTM(3), (2, 3, 4), "steps, inputs"),
        (lambda: nn.gru(outputs=3, hidden=()), (4,), "at least one recurrent layer"),
    ],
)
def test_impossible_models(layer, shape, words):
    """A model whose shapes do not fit, or with a layer in two places, is a ConfigError that says where."""
    with pytest.raises(ConfigError, match=words):
        nn.Network(layer(), shape, nn.SoftmaxCrossEntropy())


@pytest.mark.parametrize(
    "x", [np.zeros((1, 2, 6), np.float32), np.zeros((2, 3), np.float32), np.zeros((1, 2, 2, 3), np.uint8)]
)
def test_impossible_input(x):
    """Samples of another shape or of integers are a DataError that names the expected shape."""
    with pytest.raises(DataError, match="2, 3"):
        small().forward(x, TRAINING)


def test_codes_and_numbers_are_not_mixed_up():
    """A model for codes refuses numbers, and says so; a code outside the table is refused, not clipped."""
    network = nn.Network(
        nn.transformer(outputs=5, layers=1, heads=1, width=4), (3,), nn.SoftmaxCrossEntropy()
    )
    start(network)
    with pytest.raises(DataError, match="in integers"):
        network.forward(np.zeros((1, 2, 3), np.float32), TRAINING)
    for wrong in (-1, 5):
        with pytest.raises(DataError, match=rf"codes 0\.\.4, got {wrong}"):
            network.forward(np.full((1, 2, 3), wrong), TRAINING)


def test_forgotten_bindings():
    """Whoever forgets `use` or `send_gradients_to` is told which call is missing."""
    network = small()
    with pytest.raises(AssertionError, match=r"Network\.use"):
        network.evaluate(random_stack(1, 2, (2, 3)), np.zeros((1, 2), np.int64))
    start(network)
    with pytest.raises(AssertionError, match=r"send_gradients_to"):
        network.loss_and_gradient(random_stack(1, 2, (2, 3)), np.zeros((1, 2), np.int64), TRAINING)


@pytest.mark.parametrize("activation", nn.ACTIVATIONS)
def test_every_activation_in_an_mlp(activation):
    """An mlp with every activation builds and gives one finite output for each class."""
    model = nn.build_model("mlp", outputs=3, hidden=[5], activation=activation)
    network = nn.Network(model, (8, 9), nn.SoftmaxCrossEntropy())
    start(network)
    assert np.isfinite(network.forward(random_stack(2, 4, (8, 9)), TRAINING)).all()
    assert network.output_shape == (3,)


MODEL_EXAMPLES = {
    "audio": ({"hidden": [3]}, (2048,), (11,)),
    "cnn": ({"hidden": [5]}, (8, 8, 1), (11,)),
    "lenet": ({"hidden": [5]}, (8, 8), (11,)),
    "resnet20": ({}, (8, 8), (11,)),
    "resnet32": ({}, (8, 8), (11,)),
    "resnet56": ({}, (8, 8), (11,)),
    "gru": ({"hidden": [4, 3]}, (4, 2), (11,)),
    "lstm": ({"hidden": [4, 3]}, (4,), (11,)),
    "linear": ({}, (2, 3), (11,)),
    "mlp": ({"hidden": [5], "activation": "tanh"}, (2, 3), (11,)),
    "tabular": ({"hidden": [5], "codes": [[1, 4]], "width": 3, "cross": 3}, (4,), (11,)),
    "transformer": ({"layers": 1, "heads": 2, "width": 8}, (5,), (5, 11)),
}
"""Name -> options, shape of a sample, shape of its outputs for 11 classes."""


def test_every_model_has_an_example():
    """No model escapes the tests below."""
    assert set(MODEL_EXAMPLES) == set(nn.MODELS)


@pytest.mark.parametrize("name", MODEL_EXAMPLES)
def test_models_by_name(name):
    """Every model builds with its options and without, and gives finite outputs of the shape it says."""
    options, shape, outputs = MODEL_EXAMPLES[name]
    for given in (options, {}):
        network = nn.Network(nn.build_model(name, outputs=11, **given), shape, nn.SoftmaxCrossEntropy())
        start(network)
        x = samples_for(network, 2, 4)
        assert np.isfinite(network.forward(x, TRAINING)).all()
        assert network.output_shape == outputs


@pytest.mark.parametrize(
    "name",
    # Half a minute for the spectrum of its long samples; a small one is among the layers.
    [
        pytest.param(name, marks=[pytest.mark.slow] if name == "audio" else [])
        for name in MODEL_EXAMPLES
        if not name.startswith("resnet")
    ],
)
def test_gradients_of_whole_models(name):
    """The gradient of every parameter of a model is that of differences and Taylor remainders.

    A small residual network is checked among the layers; 55 layers would take minutes.
    """
    options, shape, outputs = MODEL_EXAMPLES[name]
    network = nn.Network(nn.build_model(name, outputs=11, **options), shape, nn.SoftmaxCrossEntropy())
    y = np.random.default_rng(1).integers(0, 11, size=(2, 3, *outputs[:-1]))
    report = nn.check_gradient(network, samples_for(network, 2, 3), y)
    assert report.ok, f"\n{report}"


def test_options_of_another_model_are_refused():
    """An option that would have no effect is a mistake, and the message says which there are."""
    with pytest.raises(ConfigError, match=r"model\.hidden.*'transformer'.*it has layers, heads, width"):
        nn.build_model("transformer", outputs=3, hidden=[5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "mpl"}, "did you mean 'mlp'"),
        ({"name": "mlp", "activation": "rellu"}, "did you mean 'relu'"),
    ],
)
def test_unknown_names(options, words):
    """An unknown name is a ConfigError with the nearest known one."""
    with pytest.raises(ConfigError, match=words):
        nn.build_model(**options, outputs=3)


@pytest.mark.parametrize("name", nn.LOSSES)
def test_losses_by_name(name):
    """Every loss is made by its name."""
    assert isinstance(nn.build_loss(name), nn.LOSSES[name])
