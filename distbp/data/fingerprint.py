"""A short name for a data set, by which workers find out at start that they hold the same one (FAULTS B8).

Reading everything would cost as much as loading it; so sizes, types and 66 fixed blocks of samples are
hashed: the first, the last, and 64 at keyed places.  It finds another file, another version, another
normalisation and another order.  It does not find one changed sample in a large data set; it is not a
checksum.
"""

from __future__ import annotations

import hashlib

import numpy as np

from distbp.data.memory import ArrayDataset
from distbp.random import raw_words

__all__ = ["fingerprint"]

BLOCK_SAMPLES = 16
NUM_KEYED_BLOCKS = 64


def fingerprint(dataset: ArrayDataset) -> str:
    """Return 64 hexadecimal digits; equal data sets have equal ones on every machine."""
    digest = hashlib.sha256()
    starts = _block_starts(len(dataset))
    for array in (dataset.x, dataset.y):
        little_endian = array.dtype.newbyteorder("<")
        digest.update(f"{little_endian.str} {array.shape}\n".encode())
        for start in starts:
            block = array[start : start + BLOCK_SAMPLES]
            digest.update(np.ascontiguousarray(block, dtype=little_endian).tobytes())
    return digest.hexdigest()


def _block_starts(size: int) -> list[int]:
    """Return where the hashed blocks start; they cover a small data set completely."""
    if size <= BLOCK_SAMPLES * NUM_KEYED_BLOCKS:
        return list(range(0, size, BLOCK_SAMPLES))
    last = size - BLOCK_SAMPLES
    keyed = [int(word) % (last + 1) for word in raw_words(NUM_KEYED_BLOCKS, 0, "fingerprint")]
    return [0, *keyed, last]
