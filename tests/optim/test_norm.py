"""Norms from fixed blocks: same bits for every cut, the right verdict, the right factor."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbp.optim import blocks, clip_factor, global_norm, is_finite, measure

BORDERS = [(0, 100), (112, 0), (112, 40_000), (40_112, 16_384), (56_496, 1)]


def sums_of(gradient: np.ndarray, ranges: list[tuple[int, int]], offset: int = 0) -> np.ndarray:
    """Return what `measure` writes for `ranges`."""
    sums = np.full(len(ranges), -1.0)
    measure(gradient, ranges, sums, offset=offset)
    return sums


@given(
    lengths=st.lists(st.integers(0, 70), max_size=8),
    gaps=st.lists(st.integers(0, 5), min_size=8, max_size=8),
    block=st.integers(1, 40),
)
def test_blocks_cover_each_tensor_once_and_no_gap(lengths, gaps, block) -> None:
    """Every element of a tensor is in one block, no block crosses a border or holds padding."""
    borders, offset = [], 0
    for length, gap in zip(lengths, gaps, strict=False):
        borders.append((offset, length))
        offset += length + gap
    ranges = blocks(borders, block)
    assert all(0 < stop - start <= block for start, stop in ranges)
    covered = [i for start, stop in ranges for i in range(start, stop)]
    assert covered == [i for start, length in borders for i in range(start, start + length)]
    for start, stop in ranges:
        assert any(first <= start and stop <= first + length for first, length in borders)


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 5), seed=st.integers(0, 2**32 - 1))
def test_a_lane_measures_what_the_whole_measures(cut, seed) -> None:
    """The sums of two lanes, cut at a block border, are bit for bit the sums of the whole."""
    gradient = np.random.default_rng(seed).standard_normal(56_497, dtype=np.float32)
    ranges = blocks(BORDERS)
    whole = sums_of(gradient, ranges)
    at = ranges[cut][0] if cut < len(ranges) else len(gradient)
    left = sums_of(gradient[:at].copy(), ranges[:cut])
    right = sums_of(gradient[at:].copy(), ranges[cut:], offset=at)
    assert np.array_equal(np.concatenate([left, right]).view(np.uint64), whole.view(np.uint64))


@pytest.mark.parametrize("length", [1, 7, 64, 1000, 9_999, 16_384])
def test_a_block_has_the_same_sum_wherever_it_lies(length) -> None:
    """The address of a block in memory, at any multiple of 4 bytes, does not change a bit of its sum."""
    values = np.random.default_rng(length).standard_normal(length, dtype=np.float32)
    seen = set()
    for shift in range(33):
        memory = np.zeros(length + 64, dtype=np.float32)
        memory[shift : shift + length] = values
        seen.add(sums_of(memory, [(shift, shift + length)]).tobytes())
    assert len(seen) == 1


def test_sum_of_squares_is_right() -> None:
    """A block's sum agrees with float64 to 1e-5: 16,384 float32 additions in at least 8 parallel sums."""
    gradient = np.random.default_rng(5).standard_normal(56_497, dtype=np.float32)
    ranges = blocks(BORDERS)
    exact = [math.fsum(float(x) ** 2 for x in gradient[a:b]) for a, b in ranges]
    np.testing.assert_allclose(sums_of(gradient, ranges), exact, rtol=1e-5)


def test_large_finite_gradients_are_finite() -> None:
    """Squares beyond the range of float32 are not mistaken for a gradient that is not finite."""
    gradient = np.full(1000, 3e38, dtype=np.float32)
    sums = sums_of(gradient, [(0, 1000)])
    assert is_finite(sums)
    assert global_norm(sums) == pytest.approx(float(gradient[0]) * math.sqrt(1000), rel=1e-12)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("position", [0, 16_383, 16_384, 49_999])
def test_one_poisoned_element_is_found(poison, position) -> None:
    """One NaN or infinity anywhere makes its own block's sum not finite, and no other."""
    gradient = np.ones(50_000, dtype=np.float32)
    gradient[position] = poison
    ranges = blocks([(0, 50_000)])
    sums = sums_of(gradient, ranges)
    assert not is_finite(sums)
    assert [not math.isfinite(s) for s in sums] == [a <= position < b for a, b in ranges]


def test_a_block_outside_the_slice_is_our_mistake() -> None:
    """A lane that is not cut at block borders is found, never measured in part."""
    with pytest.raises(AssertionError, match="outside the slice"):
        sums_of(np.ones(10, np.float32), [(5, 16)], offset=5)
    with pytest.raises(AssertionError, match="outside the slice"):
        sums_of(np.ones(10, np.float32), [(4, 8)], offset=5)


def test_clip_factor_shortens_to_the_norm() -> None:
    """A mean gradient of norm 5 is clipped to 1 by the factor 1 / (5 + 1e-6); a shorter one is left alone."""
    sums = np.array([36.0, 64.0])  # The summed gradient has norm 10; of 2 samples the mean has 5.
    assert clip_factor(sums, 2.0, 1.0) == 1.0 / (5.0 + 1e-6)
    assert clip_factor(sums, 2.0, 6.0) == 1.0
    assert clip_factor(sums, 2.0, None) == 1.0
    assert clip_factor(np.zeros(2), 2.0, 1.0) == 1.0


def test_no_blocks_have_norm_zero() -> None:
    """A model without parameters has a gradient of norm 0."""
    assert blocks([]) == []
    assert global_norm(np.zeros(0)) == 0.0
