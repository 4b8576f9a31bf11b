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


def raw_words(count: int, seed: int, purpose: str, step: int = 0, micro_batch: int = 0) -> NDArray[np.uint64]:
    """Return `count` uniform 64-bit words of the stream keyed by `(seed, purpose, step, micro_batch)`."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}/{micro_batch}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype="<u8")
    words: NDArray[np.uint64] = np.random.Philox(key=key).random_raw(count)
    return words


def uniform(count: int, seed: int, purpose: str, step: int = 0, micro_batch: int = 0) -> NDArray[np.float64]:
    """Return `count` float64 numbers in the open interval (0, 1), each the middle of one of 2^52 cells."""
    words = raw_words(count, seed, purpose, step, micro_batch)
    return ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def normal(count: int, seed: int, purpose: str, step: int = 0, micro_batch: int = 0) -> NDArray[np.float64]:
    """Return `count` standard normal float64 numbers (Box and Muller, Ann. Math. Stat. 29, 1958)."""
    pairs = (count + 1) // 2
    u = uniform(2 * pairs, seed, purpose, step, micro_batch)
    radius = np.sqrt(-2.0 * np.log(u[:pairs]))
    angle = 2.0 * np.pi * u[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]


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
