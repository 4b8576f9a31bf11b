"""Keyed random numbers: a value depends on what it is for, never on who draws it or when.

Every draw names a key `(seed, purpose, step, micro_batch)`.  The key selects a Philox-4x64 stream
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), so two workers that compute the same
micro-batch draw the same numbers, and a step that is done again after a loss draws them again.

NumPy promises that the raw 64-bit output of a bit generator never changes, but not that `Generator` methods
keep their streams between versions.  Therefore only `random_raw` is used, and the few distributions that
training needs are made from it here.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

__all__ = ["bernoulli", "normal", "raw_words", "uniform"]


_WORDS_OF_A_COUNTER = 4
"""Words that Philox-4x64 makes of one value of its counter."""

_BLOCK = 1 << 16
"""Numbers that are worked on at once: what they need besides their result stays in the cache."""


def raw_words(
    count: int, seed: int, purpose: str, step: int = 0, micro_batch: int = 0, *, start: int = 0
) -> NDArray[np.uint64]:
    """Return uniform 64-bit words, `start` to `start + count`, of the stream of that key."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}/{micro_batch}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8")
    generator = np.random.Philox(key=key)
    counter, skipped = divmod(start, _WORDS_OF_A_COUNTER)
    if start:
        generator.advance(counter)
        generator.random_raw(skipped)
    words: NDArray[np.uint64] = generator.random_raw(count)
    return words


def uniform(count: int, seed: int, purpose: str, step: int = 0, micro_batch: int = 0) -> NDArray[np.float64]:
    """Return `count` float64 numbers in the open interval (0, 1), each the middle of one of 2^52 cells."""
    numbers = np.empty(count)
    for low in range(0, count, _BLOCK):
        high = min(low + _BLOCK, count)
        numbers[low:high] = _fractions(raw_words(high - low, seed, purpose, step, micro_batch, start=low))
    return numbers


def normal(count: int, seed: int, purpose: str, step: int = 0, micro_batch: int = 0) -> NDArray[np.float64]:
    """Return `count` standard normal float64 numbers (Box and Muller, Ann. Math. Stat. 29, 1958)."""
    key = seed, purpose, step, micro_batch
    pairs = (count + 1) // 2
    numbers = np.empty(2 * pairs)
    for low in range(0, pairs, _BLOCK):
        high = min(low + _BLOCK, pairs)
        radius = np.sqrt(-2.0 * np.log(_fractions(raw_words(high - low, *key, start=low))))
        angle = 2.0 * np.pi * _fractions(raw_words(high - low, *key, start=pairs + low))
        np.multiply(radius, np.cos(angle), out=numbers[low:high])
        np.multiply(radius, np.sin(angle), out=numbers[pairs + low : pairs + high])
    return numbers[:count]


def _fractions(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the middle of the cell of (0, 1) that each word falls into."""
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def bernoulli(
    count: int, probability: float, seed: int, purpose: str, step: int = 0, micro_batch: int = 0
) -> NDArray[np.bool_]:
    """Return `count` truth values, each true with `probability` rounded to a multiple of 2^-32.

    Every word gives two, its low half the first, so a draw costs half of what a uniform number does.
    """
    words = raw_words((count + 1) // 2, seed, purpose, step, micro_batch)
    halves = words.astype("<u8", copy=False).view("<u4")
    limit = round(probability * 2**32)
    if limit >= 2**32:
        return np.ones(count, np.bool_)
    smaller: NDArray[np.bool_] = halves[:count] < np.uint32(limit)
    return smaller
