"""The order of samples: a bijection, each sample once per epoch, the same from wherever one enters."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from distbp.data import Order, permute
from distbp.data.permutation import SORTED_UP_TO

# Chi-square exceeds its mean by this many standard deviations about once in 10,000; seeds are fixed.
DEVIATIONS = 4.0


def chi_square_deviations(counts: NDArray, constraints: int = 1) -> float:
    """Return by how many standard deviations the counts are less even than chance would have them."""
    expected = counts.sum() / counts.size
    freedom = counts.size - constraints
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3 * SORTED_UP_TO), st.integers(0, 2**63), st.integers(0, 1000))
def test_bijection(size: int, seed: int, epoch: int) -> None:
    """For every size, seed and epoch each number comes exactly once."""
    image = permute(np.arange(size), size, seed, epoch)
    assert np.array_equal(np.sort(image), np.arange(size))


@settings(max_examples=60, deadline=None)
@given(st.integers(SORTED_UP_TO + 1, 2**62), st.data())
def test_large_sizes_collide_nowhere(size: int, data: st.DataObject) -> None:
    """Up to 2^62 samples, positions anywhere go to different numbers in range."""
    start = data.draw(st.integers(0, size - 500))
    image = permute(np.arange(start, start + 500), size, 7, 3)
    assert len(np.unique(image)) == 500
    assert 0 <= image.min() <= image.max() < size


@pytest.mark.parametrize("size", [1, 2, 3, 97, 1797, SORTED_UP_TO, SORTED_UP_TO + 1, 20011])
def test_each_sample_once_per_epoch(size: int) -> None:
    """Cut into epochs, the stream holds every sample exactly once in each, and epochs differ."""
    epochs = Order(size, 5).indices(0, 3 * size).reshape(3, size)
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    if size >= 97:
        assert not np.array_equal(epochs[0], epochs[1])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9000),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 700)), min_size=1, max_size=12),
)
def test_cache_changes_nothing(size: int, requests: list[tuple[int, int]]) -> None:
    """Any requests in any sequence give what `permute` gives position by position."""
    order = Order(size, 11)
    for start, count in requests:
        got = order.indices(start, count)
        epochs, offsets = np.divmod(np.arange(start, start + count), size)
        expected = [permute(offsets[epochs == e], size, 11, int(e)) for e in np.unique(epochs)]
        assert got.tolist() == [i for part in expected for i in part.tolist()]


def test_results_stay_valid_and_read_only() -> None:
    """What was handed out is neither overwritten by later requests nor writable."""
    order = Order(100_000, 1)
    first = order.indices(0, 256)
    kept = first.copy()
    order.indices(5_000_000, 256)
    assert np.array_equal(first, kept)
    assert not first.flags.writeable


def test_seed_epoch_and_purpose_are_keys() -> None:
    """Another seed, epoch or purpose gives another order, in both ways of making one."""
    for size in (1000, 100_000):
        positions = np.arange(500)
        kinds = [(1, 0, "epoch"), (2, 0, "epoch"), (1, 1, "epoch"), (1, 0, "split")]
        orders = [tuple(permute(positions, size, *kind)) for kind in kinds]
        assert len(set(orders)) == len(kinds)


def test_the_order_is_part_of_the_format() -> None:
    """These numbers hold for ever: a run that is resumed under another version sees the same samples."""
    assert permute(np.arange(6), 10, 42, 0).tolist() == SMALL_ORDER
    assert permute(np.arange(6), 50_000_000, 42, 0).tolist() == MIDDLE_ORDER
    assert permute(np.arange(3), 2**40, 42, 0).tolist() == LARGE_ORDER


SMALL_ORDER = [3, 1, 6, 0, 4, 9]
MIDDLE_ORDER = [19011901, 25348806, 20181511, 692239, 15389729, 32767241]
LARGE_ORDER = [655024135369, 964393287993, 91544992211]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_all_orders_of_few_samples_are_equally_likely(size: int) -> None:
    """Over 20,000 epochs each of the `size!` orders comes equally often."""
    epochs = Order(size, 7).indices(0, 20_000 * size).reshape(-1, size)
    number = {order: i for i, order in enumerate(itertools.permutations(range(size)))}
    counts = np.bincount([number[tuple(row)] for row in epochs.tolist()], minlength=len(number))
    assert abs(chi_square_deviations(counts)) < DEVIATIONS


@pytest.mark.parametrize(("size", "places", "distances"), [(100, 50, 33), (5050, 50, 51)])
def test_first_places_and_neighbours_are_uniform(size: int, places: int, distances: int) -> None:
    """The first sample of an epoch, and the distance between the first two, are spread evenly."""
    # `places` divides size and `distances` divides size - 1, so that all bins are equally wide.
    pairs = np.array([permute(np.arange(2), size, 3, epoch) for epoch in range(8000)])
    first = np.bincount(pairs[:, 0] * places // size, minlength=places)
    distance = np.bincount(
        (pairs[:, 1] - pairs[:, 0] - 1) % size // ((size - 1) // distances), minlength=distances
    )
    assert abs(chi_square_deviations(first)) < DEVIATIONS
    assert abs(chi_square_deviations(distance)) < DEVIATIONS


def test_places_and_numbers_are_independent() -> None:
    """In a network's order, where a sample stood in the file says nothing about where it comes."""
    size = 5000
    counts = np.zeros((16, 16))
    for epoch in range(200):
        image = permute(np.arange(size), size, 11, epoch)
        np.add.at(counts, (np.arange(size) * 16 // size, image * 16 // size), 1)
    # Rows and columns are fixed by the bijection, which makes the counts a little more even than chance.
    assert abs(chi_square_deviations(counts, constraints=31)) < DEVIATIONS
