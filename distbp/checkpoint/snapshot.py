"""What a checkpoint stores, and the fingerprints by which two states are called the same.

The fingerprints are taken over bytes in C order, little-endian, so that they do not depend on the memory
layout of an array or on the machine.  They know nothing of files: a state in memory and the same state loaded
have one hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["IDENTITY_KEY", "Snapshot", "little_endian_bytes", "parameters_sha256", "state_sha256"]

IDENTITY_KEY = "identity"  # The part of the metadata whose hash the manifest shows as `config_sha256`.


@dataclass(frozen=True)
class Snapshot:
    """Everything that crosses a step.

    `tensors` maps names such as "parameters/0.weight" or "scalars" to arrays and keeps their order.
    `metadata` is JSON: its key "identity" holds the configuration that the state is a function of;
    preprocessing, environment and world size are further keys.  The arrays belong to the caller, and must not
    change until `save` has returned.
    """

    step: int
    tensors: dict[str, NDArray[Any]]
    metadata: dict[str, Any]


def little_endian_bytes(array: NDArray[Any]) -> memoryview:
    """Return the bytes of `array` in C order, little-endian: a view where possible, else a copy."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return plain.reshape(-1).view(np.uint8).data


def state_sha256(tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of a state: names, types, shapes and values, in the order of the names.

    Sorting makes the figure independent of who inserted what first; a NUL ends each description, so that no
    two states share one byte stream.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name]
        shape = ",".join(str(length) for length in array.shape)
        digest.update(f"{name}:{array.dtype.newbyteorder('<').str}:{shape}\0".encode())
        digest.update(little_endian_bytes(array))
    return digest.hexdigest()


def parameters_sha256(arrays: Iterable[NDArray[Any]]) -> str:
    """Return the SHA-256 over `arrays` in the given (declaration) order, C order, little-endian.

    They are the parameters, float32, and behind them the averages of the model's statistics, float64, if it
    has any.
    """
    digest = hashlib.sha256()
    for array in arrays:
        assert array.dtype in (np.float32, np.float64), f"expected float32 or float64, got {array.dtype!r}"
        digest.update(little_endian_bytes(array))
    return digest.hexdigest()
