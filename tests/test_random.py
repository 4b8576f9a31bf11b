"""`distbp/random.py`: a key names its numbers, on every machine and version."""

from __future__ import annotations

import numpy as np
import pytest

from distbp import random
from distbp.random import normal, raw_words, uniform


def test_the_words_of_a_key_never_change():
    """The first words of two keys are pinned: weights, order and augmentation hang on them."""
    assert [hex(word) for word in raw_words(2, 0, "pinned")] == PINNED[0]
    assert [hex(word) for word in raw_words(2, 7, "pinned", step=3, micro_batch=5)] == PINNED[1]


PINNED = [["0xfd97b88ee181ebf1", "0x8f3ca04bc38528e4"], ["0x93ede16bb6712410", "0x12b286f7822b15fd"]]


def test_every_part_of_the_key_counts():
    """Seed, purpose, step and micro-batch each select another stream."""
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    assert len({raw_words(1, *key)[0] for key in keys}) == len(keys)


def test_a_longer_draw_begins_like_a_shorter_one():
    """Words and uniform numbers do not depend on how many are asked for."""
    assert uniform(5, 3, "x").tolist() == uniform(9, 3, "x")[:5].tolist()


def test_a_stream_may_be_entered_anywhere():
    """Words from the middle are those that a draw from the beginning would come to."""
    words = raw_words(40, 4, "x").tolist()
    for start in range(12):
        assert raw_words(9, 4, "x", start=start).tolist() == words[start : start + 9]


@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 127, 128, 129, 1000])
def test_the_size_of_blocks_changes_no_bit(monkeypatch, count):
    """Numbers that are made block by block are those that are made at once."""
    whole = normal(count, 5, "w").tobytes(), uniform(count, 5, "w").tobytes()
    monkeypatch.setattr(random, "_BLOCK", 64)
    assert (normal(count, 5, "w").tobytes(), uniform(count, 5, "w").tobytes()) == whole
    assert len(normal(count, 5, "w")) == count


def test_the_distributions_have_their_moments():
    """Mean and variance of 100,000 numbers lie within five standard errors."""
    u, n = uniform(100_000, 1, "u"), normal(100_000, 1, "n")
    assert u.min() > 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * np.sqrt(1 / 12 / len(u))
    assert abs(n.mean()) < 5 / np.sqrt(len(n))
    assert abs(n.var() - 1) < 5 * np.sqrt(2 / len(n))
