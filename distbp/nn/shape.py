"""Layers that only rearrange: no arithmetic, no copies."""

from __future__ import annotations

import math

from distbp.nn.layer import Array, Context, Layer, Shape

__all__ = ["Flatten"]


class Flatten(Layer):
    """Make one feature axis of all of them: (G, b, *F) becomes (G, b, ΠF) in C order.

    The result is a view of the argument (a copy only if that was not contiguous).
    """

    def build(self, input_shape: Shape) -> Shape:
        """Return the number of features as the only axis."""
        self._input_shape = input_shape
        self._features = math.prod(input_shape)
        return (self._features,)

    def forward(self, x: Array, context: Context) -> Array:
        """Return x with its features in one axis."""
        return x.reshape(*x.shape[:2], self._features)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dy in the shape of the input: y is a renaming of x, so ∂L/∂x is the same renaming of dy."""
        return dy.reshape(*dy.shape[:2], *self._input_shape) if want_dx else None
