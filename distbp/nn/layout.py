"""Where each parameter lies in the flat vector: the one order of parameters that everybody shares.

Tensors lie in declaration order; each begins at a multiple of 16 elements, so that every float32 view of a
64-byte aligned vector is 64-byte aligned itself.  The gaps are padding and always 0: they take part in
copies and updates, and cost at most 15 elements a tensor.  The gradient vector has the same layout.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from distbp.nn.layer import Array, Shape
from distbp.partition import round_up

__all__ = ["ALIGNMENT", "Layout", "arrange"]

ALIGNMENT = 16
"""Elements; 64 bytes of float32, one cache line and one AVX-512 register."""


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of the tensors, and the size of the vector; offsets and size in elements."""

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    offsets: tuple[int, ...]
    size: int

    def digest(self) -> str:
        """Return the SHA-256 over names and shapes: equal for models that can share a checkpoint."""
        description = json.dumps([[name, list(s)] for name, s in zip(self.names, self.shapes, strict=True)])
        return hashlib.sha256(description.encode()).hexdigest()

    def borders(self) -> list[tuple[int, int]]:
        """Return `(offset, length)` of each tensor in elements, without the padding that follows it."""
        return [(offset, math.prod(shape)) for offset, shape in zip(self.offsets, self.shapes, strict=True)]

    def views(self, vector: Array) -> list[Array]:
        """Return a view of each tensor in the contiguous `vector` of shape (size,), in declaration order."""
        assert vector.shape == (self.size,), f"expected a vector of shape {(self.size,)}, got {vector.shape}"
        assert vector.flags.c_contiguous, "expected a contiguous vector: views of another one would be copies"
        return [
            vector[offset : offset + math.prod(shape)].reshape(shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        ]


def arrange(named_shapes: Sequence[tuple[str, Shape]]) -> Layout:
    """Return the layout of tensors with these names and shapes, in this order."""
    names = tuple(name for name, _ in named_shapes)
    shapes = tuple(shape for _, shape in named_shapes)
    assert len(set(names)) == len(names), f"parameter names are not distinct: {names}"
    offsets = []
    size = 0
    for shape in shapes:
        offsets.append(size)
        size += round_up(math.prod(shape), ALIGNMENT)
    return Layout(names, shapes, tuple(offsets), size)
