"""Losses against formulas written independently with autograd, their masks, and their errors."""

from __future__ import annotations

import autograd.numpy as anp
import numpy as np
import pytest
from autograd import grad

from distbp.errors import ConfigError, DataError
from distbp.nn import (
    BinaryCrossEntropy,
    Huber,
    MeanSquaredError,
    Network,
    Sequential,
    SoftmaxCrossEntropy,
    build_loss,
    check_gradient,
)

from .layer_examples import random_stack, same_bits

G, B, C = 3, 6, 4
WEIGHTS = [0.5, 2.0, 1.0, 0.25]

# Both sides are float64 and differ by the order of a few roundings.
TOLERANCE = 1e-13

CROSS_ENTROPIES = {
    "plain": {},
    "weights": {"class_weights": WEIGHTS},
    "smoothing": {"label_smoothing": 0.1},
    "both": {"label_smoothing": 0.3, "class_weights": WEIGHTS},
}


def classes(seed: int = 5, shape: tuple[int, ...] = (G, B)):
    """Return random class numbers."""
    return np.random.default_rng(seed).integers(0, C, size=shape)


def oracle_cross_entropy(z, y, smoothing, weights, mask):
    """Return the loss sum of one micro-batch, sample by sample and class by class, as torch defines it."""
    total = 0.0
    for n in range(len(y)):
        nll = [anp.log(anp.sum(anp.exp(z[n]))) - z[n, c] for c in range(C)]
        smooth = sum(weights[c] * nll[c] for c in range(C)) / C
        total = total + mask[n] * ((1 - smoothing) * weights[y[n]] * nll[y[n]] + smoothing * smooth)
    return total


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
def test_cross_entropy_is_torchs(options, masked):
    """Loss, weight, count and gradient are those of the definition, with weights, smoothing and mask."""
    z, y = random_stack(G, B, (C,)).astype(np.float64) * 3, classes()
    mask = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 0], [0] * 6], np.float32) if masked else None
    counted = np.ones((G, B)) if mask is None else mask
    weights = options.get("class_weights", [1.0] * C)
    loss = SoftmaxCrossEntropy(**options)
    sums, gradient = loss.forward(z, y, mask), loss.backward()
    for g in range(G):
        arguments = (z[g], y[g], options.get("label_smoothing", 0.0), weights, counted[g])
        np.testing.assert_allclose(sums.loss[g], oracle_cross_entropy(*arguments), rtol=TOLERANCE)
        expected = grad(oracle_cross_entropy)(*arguments)
        np.testing.assert_allclose(gradient[g], expected, rtol=0, atol=TOLERANCE)
        assert sums.weight[g] == sum(counted[g, n] * weights[y[g, n]] for n in range(B))
        assert sums.correct[g] == sum(counted[g, n] * (z[g, n].argmax() == y[g, n]) for n in range(B))


@pytest.mark.parametrize("target_shape", [(G, B, 2), (G, B)])
def test_mean_squared_error(target_shape):
    """Loss and gradient are those of the mean over outputs, for targets with and without an output axis."""
    num_outputs = target_shape[2] if len(target_shape) == 3 else 1
    output = random_stack(G, B, (num_outputs,)).astype(np.float64)
    target = np.random.default_rng(8).normal(size=target_shape)
    mask = (np.arange(G * B).reshape(G, B) % 4 > 0).astype(np.float32)

    def oracle(y, t, m):
        return anp.sum(m * anp.mean((y - t) ** 2, axis=1))

    loss = MeanSquaredError()
    sums, gradient = loss.forward(output, target, mask), loss.backward()
    for g in range(G):
        arguments = (output[g], target[g].reshape(B, num_outputs), mask[g])
        np.testing.assert_allclose(sums.loss[g], oracle(*arguments), rtol=TOLERANCE)
        np.testing.assert_allclose(gradient[g], grad(oracle)(*arguments), rtol=0, atol=TOLERANCE)
    assert sums.weight.tolist() == mask.sum(axis=1).tolist()
    assert sums.correct.tolist() == [0.0] * G


def numbers(shape: tuple[int, ...] = (G, B, C)):
    """Return targets from 0 to 1, the ends among them."""
    return np.random.default_rng(8).uniform(-0.2, 1.2, size=shape).clip(0, 1)


def oracle_huber(y, t, m, delta):
    """Return the loss sum of one micro-batch by the two branches of the definition."""
    r = y - t
    branches = anp.where(anp.abs(r) <= delta, r**2 / 2, delta * (anp.abs(r) - delta / 2))
    return anp.sum(m * anp.mean(branches, axis=1))


def oracle_binary(z, t, m):
    """Return the loss sum of one micro-batch by the logarithms of the definition."""
    p = 1 / (1 + anp.exp(-z))
    return -anp.sum(m * anp.mean(t * anp.log(p) + (1 - t) * anp.log(1 - p), axis=1))


@pytest.mark.parametrize("num_outputs", [1, C])
@pytest.mark.parametrize(
    ("loss", "oracle"),
    [
        (Huber(), lambda y, t, m: oracle_huber(y, t, m, 1.0)),
        (Huber(delta=0.3), lambda y, t, m: oracle_huber(y, t, m, 0.3)),
        (BinaryCrossEntropy(), oracle_binary),
    ],
)
def test_other_losses_are_their_definitions(loss, oracle, num_outputs):
    """Loss and gradient of Huber and of binary cross entropy are autograd's of the formula, with a mask."""
    output = random_stack(G, B, (num_outputs,)).astype(np.float64) * 2
    target = numbers((G, B, num_outputs))
    loss.build((num_outputs,))
    if loss.kind == "classification":
        target = (target > 0.5).astype(np.int64)
    mask = (np.arange(G * B).reshape(G, B) % 4 > 0).astype(np.float32)
    given = target[..., 0] if loss.kind == "classification" else target
    sums, gradient = loss.forward(output, given, mask), loss.backward()
    for g in range(G):
        arguments = (output[g], target[g].astype(np.float64), mask[g])
        np.testing.assert_allclose(sums.loss[g], oracle(*arguments), rtol=TOLERANCE)
        np.testing.assert_allclose(gradient[g], grad(oracle)(*arguments), rtol=0, atol=TOLERANCE)
        right = ((output[g, :, 0] > 0) == target[g, :, 0]) * mask[g] if loss.kind == "classification" else [0]
        assert sums.correct[g] == np.sum(right)
    assert sums.weight.tolist() == mask.sum(axis=1).tolist()


@pytest.mark.parametrize("options", CROSS_ENTROPIES.values(), ids=CROSS_ENTROPIES)
def test_sequences_are_many_answers(options):
    """Cross entropy over positions is that of the positions as samples; a mask silences whole sequences."""
    z, y = random_stack(G, B, (5, C)).astype(np.float64), classes(shape=(G, B, 5))
    mask = (np.arange(G * B).reshape(G, B) % 3 > 0).astype(np.float32)
    loss, flat = SoftmaxCrossEntropy(**options), SoftmaxCrossEntropy(**options)
    loss.build((5, C))
    assert loss.answers == 5
    sums, gradient = loss.forward(z, y, mask), loss.backward()
    positions = flat.forward(z.reshape(G, B * 5, C), y.reshape(G, B * 5), np.repeat(mask, 5, axis=1))
    for name in ("loss", "weight", "correct"):
        assert same_bits(getattr(sums, name), getattr(positions, name))
    assert same_bits(gradient.reshape(G, B * 5, C), flat.backward())


EVERY_LOSS = [
    *((lambda o=o: SoftmaxCrossEntropy(**o)) for o in CROSS_ENTROPIES.values()),
    MeanSquaredError,
    Huber,
    BinaryCrossEntropy,
]


@pytest.mark.parametrize("make", EVERY_LOSS)
def test_losses_pass_the_gradient_check(make):
    """The shipped checker agrees, so it serves whoever writes a loss."""
    loss = make()
    y = classes() if isinstance(loss, SoftmaxCrossEntropy) else numbers()
    report = check_gradient(Network(Sequential(), (C,), loss), random_stack(G, B, (C,)), y)
    assert report.ok, f"\n{report}"


def test_yes_and_no_pass_the_gradient_check():
    """Binary cross entropy of one output takes classes, also under the checker."""
    y = (numbers((G, B)) > 0.5).astype(np.int64)
    network = Network(Sequential(), (1,), BinaryCrossEntropy())
    report = check_gradient(network, random_stack(G, B, (1,)), y)
    assert report.ok, f"\n{report}"


@pytest.mark.parametrize("b", [1, 7, 64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", EVERY_LOSS)
def test_stacked_equals_single(make, b, masked):
    """Sums and gradient of a micro-batch have the same bits stacked with others and alone, for any G."""
    loss = make()
    loss.build((C,))
    for num_micro_batches in (1, 2, 3, 5, 200):
        z = random_stack(num_micro_batches, b, (C,))
        shape = (num_micro_batches, b)
        is_classes = isinstance(loss, SoftmaxCrossEntropy)
        y = classes(shape=shape) if is_classes else numbers((*shape, C)).astype(np.float32)
        mask = (
            (np.arange(num_micro_batches * b).reshape(-1, b) % 3 > 0).astype(np.float32) if masked else None
        )
        sums, gradient = loss.forward(z, y, mask), loss.backward().copy()
        for g in range(0, num_micro_batches, max(1, num_micro_batches // 5)):
            one = slice(g, g + 1)
            single = loss.forward(z[one], y[one], None if mask is None else mask[one])
            assert same_bits(single.loss, sums.loss[one])
            assert same_bits(single.weight, sums.weight[one])
            assert same_bits(single.correct, sums.correct[one])
            assert same_bits(loss.backward(), gradient[one])


def test_sums_are_float64_and_gradients_follow_the_output():
    """float32 outputs give float64 sums of shape (G,) and a float32 gradient."""
    loss = SoftmaxCrossEntropy(label_smoothing=0.1, class_weights=WEIGHTS)
    sums = loss.forward(random_stack(G, B, (C,)), classes())
    for values in (sums.loss, sums.weight, sums.correct):
        assert (values.dtype, values.shape) == (np.float64, (G,))
    assert loss.backward().dtype == np.float32


@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
def test_huge_outputs_stay_finite(scale):
    """Outputs of any size give a finite loss and gradient, without a warning."""
    targets = numbers().astype(np.float32)
    pairs = [(SoftmaxCrossEntropy(label_smoothing=0.1), classes()), (BinaryCrossEntropy(), targets)]
    for loss, target in [*pairs, (Huber(), targets)]:
        loss.build((C,))
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            sums = loss.forward(np.float32(scale) * random_stack(G, B, (C,)), target)
            assert np.isfinite(sums.loss).all()
            assert np.isfinite(loss.backward()).all()


def test_memory_order_does_not_matter():
    """Outputs that lie in memory in another order give the same bits."""
    z, y = random_stack(G, B, (C,)), classes()
    for loss, target in ((SoftmaxCrossEntropy(label_smoothing=0.1), y), (MeanSquaredError(), z[::-1])):
        expected, gradient = loss.forward(z, target).loss, loss.backward().copy()
        assert same_bits(loss.forward(np.asfortranarray(z), target).loss, expected)
        assert same_bits(loss.backward(), gradient)


def test_nan_is_not_hidden():
    """A NaN output makes the loss sum and the gradient of its micro-batch NaN, and no other's."""
    for loss, y in ((SoftmaxCrossEntropy(), classes()), (MeanSquaredError(), random_stack(G, B, (C,)))):
        z = random_stack(G, B, (C,), seed=6)
        z[1, 2, 0] = np.nan
        assert np.isnan(loss.forward(z, y).loss).tolist() == [False, True, False]
        assert np.isnan(loss.backward()).any(axis=(1, 2)).tolist() == [False, True, False]


def test_ties_go_to_the_first():
    """Of equal outputs the first counts as the answer."""
    sums = SoftmaxCrossEntropy().forward(np.zeros((1, 3, 4), np.float32), np.array([[0, 1, 0]]))
    assert sums.correct.tolist() == [2.0]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (np.full((G, B), C), f"got {C}"),
        (np.full((G, B), -1), "got -1"),
        (np.zeros((G, B), np.float32), "mean_squared_error"),
        (np.zeros((G, B, 1), np.int64), "shape"),
    ],
)
def test_impossible_classes(target, words):
    """Targets that are no class numbers are a DataError that says what came."""
    with pytest.raises(DataError, match=words):
        SoftmaxCrossEntropy().forward(random_stack(G, B, (C,)), target)


def test_impossible_answers():
    """Binary cross entropy refuses targets outside 0 to 1, and classes other than 0 and 1."""
    loss = BinaryCrossEntropy()
    loss.build((2,))
    with pytest.raises(DataError, match=r"from 0 to 1, got .* to 1\.5"):
        loss.forward(random_stack(1, 2, (2,)), np.array([[[0.0, 1.5], [0.0, 0.0]]]))
    loss.build((1,))
    with pytest.raises(DataError, match="got 2"):
        loss.forward(random_stack(1, 2, (1,)), np.array([[1, 2]]))


def test_impossible_numbers():
    """Targets that do not match the outputs are a DataError."""
    with pytest.raises(DataError, match="expected targets of shape"):
        MeanSquaredError().forward(random_stack(G, B, (2,)), np.zeros((G, B)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SoftmaxCrossEntropy(label_smoothing=1.0), r"in \[0, 1\)"),
        (lambda: SoftmaxCrossEntropy(label_smoothing=float("nan")), "nan"),
        (lambda: SoftmaxCrossEntropy(class_weights=[1.0, -1.0]), "class_weights"),
        (lambda: SoftmaxCrossEntropy(class_weights=[1.0]).build((2,)), "2 classes, got 1"),
        (lambda: SoftmaxCrossEntropy().build((1,)), "at least two classes"),
        (lambda: SoftmaxCrossEntropy().build(()), "output shape"),
        (lambda: SoftmaxCrossEntropy().build((2, 1)), "output shape"),
        (lambda: build_loss("mean_squared_error", label_smoothing=0.1), "cross_entropy"),
        (lambda: build_loss("cross_entrophy"), "did you mean 'cross_entropy'"),
        (lambda: build_loss("huber", delta=-1.0), "delta > 0"),
        (lambda: build_loss("cross_entropy", delta=2.0), "belongs to 'huber'"),
        (lambda: BinaryCrossEntropy().build((0,)), "at least one output"),
    ],
)
def test_impossible_losses(make, words):
    """An option out of range, or that the loss does not have, is a ConfigError that names it."""
    with pytest.raises(ConfigError, match=words):
        make()
