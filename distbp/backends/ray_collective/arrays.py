"""What callers hand over, and the flat arrays that operations work on.

Operations want C-contiguous arrays of one dimension.  An array that is one in disguise is used as it is;
any other is copied, and its results are copied back.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from distbp.backends.ray_collective.circle import JOINS, MOST_ITEM_BYTES, Array, Bytes, Call
from distbp.errors import ConfigError

__all__ = ["bytes_of", "checked", "copy_back", "flat", "joining", "only", "root_of", "same_sizes"]


def only(tensors: Sequence[Any]) -> Any:
    """Return the one entry of a list: Ray makes lists for groups that drive several devices."""
    if not isinstance(tensors, list) or len(tensors) != 1:
        raise ConfigError(
            f"expected a list with one entry, got {tensors!r}; the _multigpu calls are not for this backend"
        )
    return tensors[0]


def checked(array: Any, *, writable: bool = False) -> Array:
    """Return what was handed over as an array that can be moved, or raise `ConfigError`."""
    if not isinstance(array, np.ndarray):
        kind = f"{type(array).__module__}.{type(array).__qualname__}"
        raise ConfigError(
            f"expected a NumPy array, got {kind!r}; a torch tensor on the CPU shares its memory with "
            "tensor.numpy(), which can be given instead"
        )
    if isinstance(array, np.ma.MaskedArray):
        raise ConfigError("expected a plain array, got a masked one; its mask would be lost: give array.data")
    dtype = array.dtype
    if dtype.hasobject or not dtype.isnative or dtype.itemsize == 0:
        raise ConfigError(
            f"expected elements of a fixed size in this machine's byte order, got {dtype!r}; "
            "convert the array with astype"
        )
    if writable and not array.flags.writeable:
        raise ConfigError(
            "expected an array that results can be written into, got a read-only one, as ray.get returns; "
            "give a copy of it"
        )
    return np.asarray(array)


def same_sizes(one: Array, others: Sequence[Array], world: int) -> None:
    """Raise unless there is an array like `one` for each rank."""
    wanted = (one.dtype, one.shape)
    odd = next((i for i, other in enumerate(others) if (other.dtype, other.shape) != wanted), None)
    if len(others) != world:
        raise ConfigError(f"expected a list of {world} arrays, one for each rank, got {len(others)}")
    if odd is not None:
        raise ConfigError(
            f"expected arrays of {one.dtype}{list(one.shape)} for every rank, got {others[odd].dtype}"
            f"{list(others[odd].shape)} for rank {odd}"
        )


def joining(operation: str, x: Array, options: Any, root: int) -> Call:
    """Return the call of an operation that joins arrays like `x` in the way that `options` names."""
    name = "SUM" if options is None else options.reduceOp.name
    return known_joining(operation, name, x.dtype, x.size, root)


@lru_cache(256)
def known_joining(operation: str, name: str, dtype: np.dtype[Any], size: int, root: int) -> Call:
    """Return a call, after finding out by trying whether NumPy joins two such numbers to one of the kind."""
    call = Call(operation, name, dtype, size, root)
    try:
        fits = JOINS[name](np.ones(1, dtype), np.ones(1, dtype)).dtype == dtype
    except (TypeError, ValueError):
        fits = False
    if not fits or dtype.itemsize > MOST_ITEM_BYTES:
        raise ConfigError(
            f"expected numbers for {operation} that numpy.{JOINS[name].__name__} joins to one of the same "
            f"type, got {dtype!r}"
        )
    return call


def root_of(options: Any) -> int:
    """Return the rank that an operation begins or ends with."""
    return 0 if options is None else int(options.root_rank)


def flat(array: Array) -> Array:
    """Return the elements of `array` in C order: a view if that is possible, else a copy."""
    return np.ascontiguousarray(array).reshape(-1)


def copy_back(array: Array, elements: Array) -> None:
    """Write what `flat(array)` returned back into `array`, if it is a copy."""
    if not array.flags.c_contiguous:
        array[...] = elements.reshape(array.shape)


def bytes_of(elements: Array) -> Bytes:
    """Return a flat array as bytes, in the same memory."""
    return elements.view(np.uint8)
