"""The contract of every optimizer in the table, and each against its published definition."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbp.errors import ConfigError
from distbp.optim import (
    CHUNK,
    OPTIMIZERS,
    SGD,
    Averaged,
    Optimizer,
    SliceTensors,
    Update,
    blocks,
    measure,
    new_scratch,
)
from distbp.optim.adam import power
from distbp.optim.chunks import chunks

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "sgd, plain": ("sgd", {"momentum": 0.0}),
    "sgd, decay": ("sgd", {"momentum": 0.0, "weight_decay": 0.01}),
    "sgd, momentum": ("sgd", {"momentum": 0.9}),
    "sgd, all": ("sgd", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("adam", {}),
    "adam, all": ("adam", {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-3, "weight_decay": 0.1}),
    "adamw": ("adamw", {}),
    "adamw, all": ("adamw", {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-3, "weight_decay": 0.1}),
    "rmsprop": ("rmsprop", {}),
    "rmsprop, all": ("rmsprop", {"beta2": 0.8, "momentum": 0.5, "epsilon": 1e-3, "weight_decay": 0.1}),
    "adagrad": ("adagrad", {}),
    "adagrad, all": ("adagrad", {"epsilon": 1e-3, "weight_decay": 0.1}),
    "lion": ("lion", {}),
    "lion, all": ("lion", {"beta1": 0.8, "beta2": 0.9, "weight_decay": 0.1}),
    "lars": ("lars", {}),
    "lars, all": ("lars", {"momentum": 0.5, "trust": 0.01, "weight_decay": 0.1}),
    "lamb": ("lamb", {}),
    "lamb, all": ("lamb", {"beta1": 0.8, "beta2": 0.99, "epsilon": 1e-3, "weight_decay": 0.1}),
    "average of sgd": ("sgd", {"average": 0.9}),
    "average of lamb": ("lamb", {"average": 0.9}),
}
LENGTHS = [0, 1, 2, 97, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 13]


@pytest.fixture(params=VARIANTS)
def optimizer(request) -> Optimizer:
    """Return one of the optimizers above."""
    return make(request.param)


def make(variant: str) -> Optimizer:
    """Return the optimizer of a variant."""
    name, options = VARIANTS[variant]
    options = dict(options)
    decay = options.pop("average", None)
    made = OPTIMIZERS[name](**options)
    return made if decay is None else Averaged(made, decay=decay)


def make_state(optimizer: Optimizer, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random parameters and state vectors; those that hold squares are not negative."""
    generator = np.random.default_rng(seed)
    names = ("parameters", *optimizer.vectors)
    state = {name: generator.standard_normal(length, dtype=np.float32) for name in names}
    return {name: np.square(v) if "squa" in name or "second" in name else v for name, v in state.items()}


def blank(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A following generation full of NaN, so that an element that is not written shows."""
    return {name: np.full_like(vector, np.nan) for name, vector in state.items()}


def tensors_of(length: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Return borders and numbers of axes of tensors in a vector: matrices and vectors by turns, with gaps."""
    borders, offset, sizes = [], 0, itertools.cycle([40, 16_400, 3, 30_000])
    while offset < length:
        borders.append((offset, min(next(sizes), length - offset)))
        offset += borders[-1][1] + 5
    return borders, [1 + index % 2 for index in range(len(borders))]


def update(optimizer, gradient, current, scale=0.125, lr=0.3, number=3, cuts=()):
    """Return the generation that one step writes, in slices that end at the norm blocks nearest to `cuts`."""
    length = len(gradient)
    borders, axes = tensors_of(length)
    ranges = blocks(borders)
    starts = [start for start, _ in ranges]
    edges = sorted({0, length, *(min(starts, key=lambda s, c=cut: abs(s - c)) for cut in cuts if starts)})
    following, scratch = blank(current), new_scratch(optimizer.scratch_rows)
    sums = np.full((1 + optimizer.num_sums, len(ranges)), np.nan)
    measure(gradient, ranges, sums[0])
    slices = []
    for low, high in itertools.pairwise(edges):
        inside = [index for index, start in enumerate(starts) if low <= start < high]
        shifted = [(ranges[index][0] - low, ranges[index][1] - low) for index in inside]
        tensors = SliceTensors(borders, axes, ranges, length, low, high)
        part = Update(
            gradient=gradient[low:high],
            scale=scale,
            lr=lr,
            number=number,
            current={key: vector[low:high] for key, vector in current.items()},
            following={key: vector[low:high] for key, vector in following.items()},
            scratch=scratch,
            tensors=tensors.parts,
        )
        slices.append((part, tensors))
        if optimizer.num_sums and inside:
            optimizer.prepare(part, shifted, sums[1:, inside[0] : inside[-1] + 1])
    for part, tensors in slices:
        optimizer.apply(replace(part, tensors=tensors.with_sums(sums)))
    return following


def bits(vector: np.ndarray) -> np.ndarray:
    """Return the bits of float32 numbers."""
    return vector.view(np.uint32)


def test_every_optimizer_is_under_contract() -> None:
    """A newcomer in the table is a newcomer in these tests."""
    assert {name for name, _ in VARIANTS.values()} == set(OPTIMIZERS)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_element_is_written_and_nothing_is_changed(optimizer, length) -> None:
    """An update fills the following generation and leaves the current one and the gradient as they were."""
    current = make_state(optimizer, length)
    gradient = np.random.default_rng(1).standard_normal(length, dtype=np.float32)
    before = {key: vector.copy() for key, vector in current.items()}, gradient.copy()
    for vector in (*current.values(), gradient):
        vector.flags.writeable = False
    following = update(optimizer, gradient, current)
    for key, vector in current.items():
        assert np.array_equal(bits(vector), bits(before[0][key]))
        assert following[key].dtype == np.float32
        assert np.isfinite(following[key]).all()
    assert np.array_equal(bits(gradient), bits(before[1]))


@pytest.mark.parametrize("variant", VARIANTS)
@given(
    length=st.integers(0, CHUNK + 500),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_slice_of_the_whole_is_the_whole_of_the_slice(variant, length, cuts, seed) -> None:
    """However a vector is cut into lanes, the update has the same bits."""
    optimizer = make(variant)
    current = make_state(optimizer, length, seed)
    gradient = np.random.default_rng(seed + 1).standard_normal(length, dtype=np.float32)
    whole = update(optimizer, gradient, current)
    pieces = update(optimizer, gradient, current, cuts=[cut * length for cut in cuts])
    for key in whole:
        assert np.array_equal(bits(pieces[key]), bits(whole[key]))


def test_padding_stays_zero(optimizer) -> None:
    """Elements that are 0 in state and gradient, as padding is, are 0 in the next generation."""
    current = {key: np.zeros_like(vector) for key, vector in make_state(optimizer, 500).items()}
    for vector in update(optimizer, np.zeros(500, np.float32), current, number=1).values():
        assert not vector.any()


def test_steady_step_allocates_no_arrays(optimizer) -> None:
    """After the first step, an update of 300,000 elements allocates less than 4 KB: no array at all."""
    current = make_state(optimizer, 300_000)
    following = blank(current)
    gradient = np.ones(300_000, dtype=np.float32)
    scratch = new_scratch(optimizer.scratch_rows)
    tensors = SliceTensors([(0, 300_000)], [2], [(0, 300_000)], 300_000, 0, 300_000)
    parts = tensors.with_sums(np.ones((1 + optimizer.num_sums, 1)))

    def step() -> None:
        optimizer.apply(Update(gradient, 1.0, 0.1, 7, current, following, scratch, parts))

    step()
    tracemalloc.start()
    try:
        step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4096


def test_numpy_scalars_mean_the_same_as_floats(optimizer) -> None:
    """A float64 scale, as it comes from the reduced tail, gives the bits of a Python float."""
    current = make_state(optimizer, 100)
    gradient = np.ones(100, dtype=np.float32)
    plain = update(optimizer, gradient, current, scale=1 / 3, lr=0.1)
    wide = update(optimizer, gradient, current, scale=np.float64(1 / 3), lr=np.float64(0.1))
    for key in plain:
        assert np.array_equal(bits(plain[key]), bits(wide[key]))


# ----- each against its definition, in float64, one number after the other


def sgd(p, g, s, t, lr, momentum=0.9, nesterov=False, weight_decay=0.0):
    """Polyak 1964, or Nesterov 1983 as in Sutskever et al. 2013; PyTorch's order."""
    g = g + weight_decay * p
    s["v"] = momentum * s.get("v", 0.0) + g
    return p - lr * (g + momentum * s["v"] if nesterov else s["v"])


def moments(g, s, t, beta1, beta2, epsilon):
    """Kingma and Ba 2015, algorithm 1, up to the direction."""
    s["m"] = beta1 * s.get("m", 0.0) + (1 - beta1) * g
    s["v"] = beta2 * s.get("v", 0.0) + (1 - beta2) * g**2
    return (s["m"] / (1 - beta1**t)) / (math.sqrt(s["v"] / (1 - beta2**t)) + epsilon)


def adam(p, g, s, t, lr, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.0):
    """Kingma and Ba 2015, algorithm 1."""
    return p - lr * moments(g + weight_decay * p, s, t, beta1, beta2, epsilon)


def adamw(p, g, s, t, lr, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01):
    """Loshchilov and Hutter 2019, algorithm 2, the decay times the learning rate."""
    return p - lr * moments(g, s, t, beta1, beta2, epsilon) - lr * weight_decay * p


def rmsprop(p, g, s, t, lr, beta2=0.9, momentum=0.0, epsilon=1e-8, weight_decay=0.0):
    """Tieleman and Hinton 2012, lecture 6.5, with PyTorch's momentum."""
    g = g + weight_decay * p
    s["v"] = beta2 * s.get("v", 0.0) + (1 - beta2) * g**2
    s["b"] = momentum * s.get("b", 0.0) + g / (math.sqrt(s["v"]) + epsilon)
    return p - lr * s["b"]


def adagrad(p, g, s, t, lr, epsilon=1e-10, weight_decay=0.0):
    """Duchi, Hazan and Singer 2011, the diagonal form."""
    g = g + weight_decay * p
    s["s"] = s.get("s", 0.0) + g**2
    return p - lr * g / (math.sqrt(s["s"]) + epsilon)


def lion(p, g, s, t, lr, beta1=0.9, beta2=0.99, weight_decay=0.0):
    """Chen et al. 2023, program 1."""
    c = beta1 * s.get("m", 0.0) + (1 - beta1) * g
    s["m"] = beta2 * s.get("m", 0.0) + (1 - beta2) * g
    return p - lr * (math.copysign(1.0, c) + weight_decay * p)


REFERENCES = {"sgd": sgd, "adam": adam, "adamw": adamw, "rmsprop": rmsprop, "adagrad": adagrad, "lion": lion}


@pytest.mark.parametrize(
    "variant", [v for v, (name, o) in VARIANTS.items() if name in REFERENCES and "average" not in o]
)
def test_elementwise_rules_follow_their_definitions(variant) -> None:
    """Ten updates agree with the published recursion, done in float64 one number after the other.

    Tolerance: an update rounds about ten times to float32 (6e-8 relative to values near 1), and an average
    with share 0.9 carries each error on at most tenfold: 10 updates x 10 x 6e-8 x 10 = 6e-5.
    """
    name, options = VARIANTS[variant]
    optimizer, generator = make(variant), np.random.default_rng(3)
    state = {key: np.zeros_like(vector) for key, vector in make_state(optimizer, 50).items()}
    state["parameters"] += 1
    p, memory = [1.0] * 50, [{} for _ in range(50)]
    for t in range(1, 11):
        lr = 0.1 / t
        gradient = generator.standard_normal(50, dtype=np.float32)
        state = update(optimizer, gradient, state, scale=0.25, lr=lr, number=t)
        for i in range(50):
            p[i] = REFERENCES[name](p[i], float(gradient[i]) * 0.25, memory[i], t, lr, **options)
    np.testing.assert_allclose(state["parameters"], p, rtol=0, atol=6e-5)


@pytest.mark.parametrize("variant", ["lars", "lars, all", "lamb", "lamb, all"])
def test_layerwise_rules_follow_their_definitions(variant) -> None:
    """Ten updates of matrices and biases agree with the published algorithm in float64, tensor by tensor.

    The tolerance is that of the elementwise rules; norms over 16,400 elements in float32 add 1e-6.
    """
    name, options = VARIANTS[variant]
    optimizer, generator, length = make(variant), np.random.default_rng(3), 17_000
    borders, axes = tensors_of(length)
    state = {key: np.zeros_like(vector) for key, vector in make_state(optimizer, length).items()}
    p = np.zeros(length)
    for offset, size in borders:
        p[offset : offset + size] = generator.standard_normal(size, dtype=np.float32)
    state["parameters"][:] = p
    memory = {"m": np.zeros(length), "v": np.zeros(length)}
    for t in range(1, 11):
        gradient = np.where(p != 0, generator.standard_normal(length), 0).astype(np.float32)
        state = update(optimizer, gradient, state, scale=0.25, lr=0.1, number=t)
        g = gradient.astype(np.float64) * 0.25
        for (offset, size), count in zip(borders, axes, strict=True):
            at = slice(offset, offset + size)
            p[at] = (lars_tensor if name == "lars" else lamb_tensor)(
                p[at], g[at], memory, at, t, count > 1, options
            )
    np.testing.assert_allclose(state["parameters"], p, rtol=0, atol=6e-5)


def lars_tensor(p, g, memory, at, t, is_matrix, options):
    """Return a tensor after LARS with lr 0.1 (You, Gitman and Ginsburg 2017, algorithm 1)."""
    momentum, trust, decay = ({"momentum": 0.9, "trust": 0.001, "weight_decay": 0.0} | options).values()
    ratio = trust * np.linalg.norm(p) / (np.linalg.norm(g) + decay * np.linalg.norm(p)) if is_matrix else 1.0
    memory["v"][at] = momentum * memory["v"][at] + 0.1 * ratio * (g + (decay if is_matrix else 0.0) * p)
    return p - memory["v"][at]


def lamb_tensor(p, g, memory, at, t, is_matrix, options):
    """Return a tensor after LAMB with lr 0.1 (You et al. 2020, algorithm 2, phi the identity)."""
    defaults = {"beta1": 0.9, "beta2": 0.999, "epsilon": 1e-6, "weight_decay": 0.01}
    beta1, beta2, epsilon, decay = (defaults | options).values()
    memory["m"][at] = beta1 * memory["m"][at] + (1 - beta1) * g
    memory["v"][at] = beta2 * memory["v"][at] + (1 - beta2) * g**2
    d = memory["m"][at] / (1 - beta1**t) / (np.sqrt(memory["v"][at] / (1 - beta2**t)) + epsilon)
    if not is_matrix:
        return p - 0.1 * d
    d += decay * p
    return p - 0.1 * np.linalg.norm(p) / np.linalg.norm(d) * d


def test_a_tensor_of_zeros_begins_to_move() -> None:
    """Where |p| is 0 the layer-wise rules take the ratio 1: a matrix of zeros does not stay there."""
    for variant in ("lars", "lamb"):
        optimizer = make(variant)
        state = {key: np.zeros(2000, np.float32) for key in make_state(optimizer, 1)}
        after = update(optimizer, np.ones(2000, np.float32), state, number=1)
        borders, _ = tensors_of(2000)
        assert all(after["parameters"][start : start + size].all() for start, size in borders)


def test_an_average_follows_its_definition() -> None:
    """The first average is the parameters; later ones keep min(decay, (t - 1) / (t + 9)) of the last one."""
    optimizer = Averaged(SGD(momentum=0.0), decay=0.2)
    state = {"parameters": np.ones(3, np.float32), "average": np.zeros(3, np.float32)}
    assert optimizer.vectors == ("average",)
    expected = 0.0
    for t in range(1, 20):
        state = update(optimizer, np.ones(3, np.float32), state, scale=1.0, lr=0.5, number=t)
        kept = min(0.2, (t - 1) / (t + 9))
        expected = kept * expected + (1 - kept) * (1.0 - 0.5 * t)
        # Values up to 10 are rounded to float32 twenty times.
        np.testing.assert_allclose(state["average"], expected, rtol=1e-5)
    assert state["parameters"].tolist() == [1.0 - 0.5 * 19] * 3


@given(base=st.floats(0, 0.9999999), exponent=st.integers(1, 10**7))
def test_powers_are_powers(base, exponent) -> None:
    """Squaring agrees with the C library to the accuracy of 2 log2(exponent) roundings."""
    assert power(base, exponent) == pytest.approx(base**exponent, rel=1e-9, abs=1e-300)


def test_sgd_with_exact_numbers() -> None:
    """Two steps in numbers that float32 holds exactly: p = 1, g = 8 * 0.25, lr = 0.5, mu = 0.5."""
    optimizer = SGD(momentum=0.5)
    state = {"parameters": np.ones(3, np.float32), "momentum": np.zeros(3, np.float32)}
    gradient = np.full(3, 8, np.float32)
    state = update(optimizer, gradient, state, scale=0.25, lr=0.5)
    assert state["parameters"].tolist() == [0.0] * 3
    state = update(optimizer, gradient, state, scale=0.25, lr=0.5)
    assert state["momentum"].tolist() == [3.0] * 3
    assert state["parameters"].tolist() == [-1.5] * 3


def test_no_memory_is_spent_on_what_nobody_reads() -> None:
    """Without momentum there is no velocity."""
    assert SGD(momentum=0.0).vectors == ()
    assert SGD(momentum=0.9).vectors == ("momentum",)
    assert OPTIMIZERS["rmsprop"]().vectors == ("mean_square",)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"momentum": 1.0}),
        ("sgd", {"momentum": -0.1}),
        ("sgd", {"momentum": float("nan")}),
        ("sgd", {"weight_decay": -1.0}),
        ("sgd", {"weight_decay": float("inf")}),
        ("sgd", {"weight_decay": float("nan")}),
        ("sgd", {"momentum": 0.0, "nesterov": True}),
        ("adam", {"beta1": 1.0}),
        ("adamw", {"beta2": -0.1}),
        ("lamb", {"epsilon": 0.0}),
        ("lion", {"beta2": float("nan")}),
        ("rmsprop", {"momentum": 1.0}),
        ("adagrad", {"epsilon": float("inf")}),
        ("lars", {"trust": 0.0}),
    ],
)
def test_impossible_options_are_refused(name, options) -> None:
    """Options that come from Python and not through a configuration file are checked as well."""
    with pytest.raises(ConfigError, match="expected a"):
        OPTIMIZERS[name](**options)


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_cover_everything_once(length) -> None:
    """Chunks are contiguous, in order, none longer than CHUNK, from any beginning."""
    for begin in (0, min(length, 7)):
        covered = [i for part in chunks(length, begin) for i in (part.start, part.stop)]
        borders = [begin, *range(begin + CHUNK, length, CHUNK), length] if length > begin else []
        assert covered == [b for pair in itertools.pairwise(borders) for b in pair]


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    block=st.integers(1, 20),
    cut=st.integers(0, 40),
)
def test_tensors_cover_a_slice_and_have_the_sums_of_the_whole(lengths, block, cut) -> None:
    """Parts of tensors cover their slice without a gap, and each knows the sum over its whole tensor."""
    borders, offset = [], 0
    for length in lengths:
        borders.append((offset, length))
        offset += length + 3
    ranges = blocks(borders, block)
    at = ranges[cut % len(ranges)][0]
    sums = np.arange(2.0 * len(ranges)).reshape(2, -1)
    found = {}
    for low, high in ((0, at), (at, offset)):
        tensors = SliceTensors(borders, [2] * len(borders), ranges, offset, low, high)
        parts = tensors.with_sums(sums)
        covered = [i for part in parts for i in range(part.start, part.stop)]
        assert covered == list(range(high - low))
        for part in parts:
            index = max(i for i, (start, _) in enumerate(borders) if start <= part.start + low)
            start, length = borders[index]
            mine = [i for i, (first, _) in enumerate(ranges) if start <= first < start + length]
            assert part.sums == tuple(sum(row[i] for i in mine) for row in sums)
            assert found.setdefault(index, part.sums) == part.sums
    assert len(found) == len(borders)
