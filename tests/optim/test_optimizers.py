"""The contract of every optimizer in the table, and SGD against its written definition."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbp.errors import ConfigError
from distbp.optim import CHUNK, OPTIMIZERS, SGD, Optimizer, new_scratch
from distbp.optim.chunks import chunks

VARIANTS = {
    "plain": {"momentum": 0.0},
    "decay": {"momentum": 0.0, "weight_decay": 0.01},
    "momentum": {"momentum": 0.9},
    "all": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
}
OPTIONS = [("sgd", options) for options in VARIANTS.values()]
LENGTHS = [0, 1, 2, 97, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 13]


def make_state(optimizer: Optimizer, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random parameters and state vectors."""
    generator = np.random.default_rng(seed)
    names = ("parameters", *optimizer.vectors)
    return {name: generator.standard_normal(length, dtype=np.float32) for name in names}


def blank(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A following generation full of NaN, so that an element that is not written shows."""
    return {name: np.full_like(vector, np.nan) for name, vector in state.items()}


def update(optimizer, gradient, current, scale=0.125, lr=0.3):
    """Return the generation that one step writes."""
    following = blank(current)
    scratch = new_scratch(optimizer.scratch_rows)
    optimizer.apply(gradient, scale=scale, lr=lr, current=current, following=following, scratch=scratch)
    return following


def bits(vector: np.ndarray) -> np.ndarray:
    """Return the bits of float32 numbers."""
    return vector.view(np.uint32)


def test_every_optimizer_is_under_contract() -> None:
    """A newcomer in the table is a newcomer in these tests."""
    assert {name for name, _ in OPTIONS} == set(OPTIMIZERS)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_element_is_written_and_nothing_is_changed(name, options, length) -> None:
    """An update fills the following generation and leaves the current one and the gradient as they were."""
    optimizer = OPTIMIZERS[name](**options)
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


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@given(
    length=st.integers(0, CHUNK + 500),
    cuts=st.lists(st.floats(0, 1), max_size=6),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=25, deadline=None)
def test_slice_of_the_whole_is_the_whole_of_the_slice(name, options, length, cuts, seed) -> None:
    """However a vector is cut into lanes, the update has the same bits."""
    optimizer = OPTIMIZERS[name](**options)
    current = make_state(optimizer, length, seed)
    gradient = np.random.default_rng(seed + 1).standard_normal(length, dtype=np.float32)
    whole = update(optimizer, gradient, current)
    borders = sorted({0, length, *(int(cut * length) for cut in cuts)})
    for start, stop in itertools.pairwise(borders):
        lane = {key: vector[start:stop] for key, vector in current.items()}
        part = update(optimizer, gradient[start:stop], lane)
        for key in whole:
            assert np.array_equal(bits(part[key]), bits(whole[key][start:stop]))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_steady_step_allocates_no_arrays(name, options) -> None:
    """After the first step, an update of 300,000 elements allocates less than 4 KB: no array at all."""
    optimizer = OPTIMIZERS[name](**options)
    current = make_state(optimizer, 300_000)
    following = blank(current)
    gradient = np.ones(300_000, dtype=np.float32)
    scratch = new_scratch(optimizer.scratch_rows)

    def step() -> None:
        optimizer.apply(gradient, scale=1.0, lr=0.1, current=current, following=following, scratch=scratch)

    step()
    tracemalloc.start()
    try:
        step()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4096


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_numpy_scalars_mean_the_same_as_floats(name, options) -> None:
    """A float64 scale, as it comes from the reduced tail, gives the bits of a Python float."""
    optimizer = OPTIMIZERS[name](**options)
    current = make_state(optimizer, 100)
    gradient = np.ones(100, dtype=np.float32)
    plain = update(optimizer, gradient, current, scale=1 / 3, lr=0.1)
    wide = update(optimizer, gradient, current, scale=np.float64(1 / 3), lr=np.float64(0.1))
    for key in plain:
        assert np.array_equal(bits(plain[key]), bits(wide[key]))


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_sgd_follows_its_definition(options) -> None:
    """Ten steps of SGD agree with the published recursion, done in float64 element by element.

    Tolerance: each step rounds about six times to float32 (6e-8 relative to values near 1), and momentum 0.9
    carries each error on at most tenfold: 10 steps x 6 x 6e-8 x 10 = 4e-5.
    """
    generator = np.random.default_rng(3)
    optimizer = SGD(**options)
    state = {key: v * 0 + 1 for key, v in make_state(optimizer, 50).items()}
    state = {key: np.zeros_like(v) if key == "momentum" else v for key, v in state.items()}
    mu, wd = options["momentum"], options.get("weight_decay", 0.0)
    p, v = [1.0] * 50, [0.0] * 50
    for step in range(10):
        lr = 0.1 / (step + 1)
        gradient = generator.standard_normal(50, dtype=np.float32)
        state = update(optimizer, gradient, state, scale=0.25, lr=lr)
        for i in range(50):
            g = float(gradient[i]) * 0.25 + wd * p[i]
            v[i] = mu * v[i] + g
            p[i] -= lr * (g + mu * v[i] if options.get("nesterov") else v[i])
    np.testing.assert_allclose(state["parameters"], p, rtol=0, atol=4e-5)


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


def test_sgd_without_momentum_has_no_state() -> None:
    """Memory is not spent on a velocity that nobody reads."""
    assert SGD(momentum=0.0).vectors == ()
    assert SGD(momentum=0.9).vectors == ("momentum",)


@pytest.mark.parametrize(
    "options",
    [
        {"momentum": 1.0},
        {"momentum": -0.1},
        {"momentum": float("nan")},
        {"weight_decay": -1.0},
        {"weight_decay": float("inf")},
        {"weight_decay": float("nan")},
        {"momentum": 0.0, "nesterov": True},
    ],
)
def test_sgd_refuses_impossible_options(options) -> None:
    """Options that come from Python and not through a configuration file are checked as well."""
    with pytest.raises(ConfigError, match="expected a"):
        SGD(**options)


@pytest.mark.parametrize("length", LENGTHS)
def test_chunks_cover_everything_once(length) -> None:
    """Chunks are contiguous, in order, none longer than CHUNK."""
    covered = [i for part in chunks(length) for i in (part.start, part.stop)]
    borders = [0, *range(CHUNK, length, CHUNK), length] if length else []
    assert covered == [b for pair in itertools.pairwise(borders) for b in pair]
