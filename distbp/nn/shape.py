"""Layers that only rearrange: no arithmetic, and no copies but those of Transpose."""

from __future__ import annotations

import math

import numpy as np

from distbp.errors import ConfigError
from distbp.nn.layer import Array, Context, Layer, Shape

__all__ = ["AsImage", "Flatten", "Reshape", "Transpose"]


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


class AsImage(Layer):
    """Take gray images (H, W) as (H, W, 1), and (H, W, C) as they are, of at least `least_side` pixels."""

    def __init__(self, least_side: int = 1) -> None:
        self.least_side = least_side

    def build(self, input_shape: Shape) -> Shape:
        """Return (H, W, C); ConfigError for samples that are no images, or too small ones."""
        self._input_shape = input_shape
        if len(input_shape) not in (2, 3):
            raise ConfigError(
                "expected images of shape (height, width) or (height, width, channels), got samples of shape "
                f"{input_shape!r}; the model 'mlp' takes any"
            )
        if min(input_shape[:2]) < self.least_side:
            raise ConfigError(
                f"expected images of at least {self.least_side} x {self.least_side} pixels, channels last, "
                f"got samples of shape {input_shape!r}"
            )
        self._output_shape = (*input_shape, 1)[:3]
        return self._output_shape

    def forward(self, x: Array, context: Context) -> Array:
        """Return x with an axis of channels."""
        return x.reshape(*x.shape[:2], *self._output_shape)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dy in the shape of the input: y is a renaming of x."""
        return dy.reshape(*dy.shape[:2], *self._input_shape) if want_dx else None


class Reshape(Layer):
    """Give the features another shape with as many elements, in C order; one length may be -1.

    The result is a view of the argument (a copy only if that was not contiguous).
    """

    def __init__(self, *shape: int) -> None:
        if any(length < 1 and length != -1 for length in shape) or shape.count(-1) > 1:
            raise ConfigError(f"Reshape: expected lengths >= 1 and at most one -1, got {shape!r}")
        self.shape = shape

    def build(self, input_shape: Shape) -> Shape:
        """Return the new shape; ConfigError if the numbers of elements differ."""
        elements, known = math.prod(input_shape), math.prod(n for n in self.shape if n != -1)
        filled = tuple(elements // known if length == -1 else length for length in self.shape)
        if math.prod(filled) != elements:
            raise ConfigError(
                f"Reshape: expected a shape of {elements} elements for samples of shape {input_shape!r}, got "
                f"{self.shape!r}"
            )
        self._input_shape, self._output_shape = input_shape, filled
        return filled

    def forward(self, x: Array, context: Context) -> Array:
        """Return x in the new shape."""
        return x.reshape(*x.shape[:2], *self._output_shape)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dy in the shape of the input: y is a renaming of x."""
        return dy.reshape(*dy.shape[:2], *self._input_shape) if want_dx else None


class Transpose(Layer):
    """Put the feature axes into another order, as numpy.transpose does; `axes` counts them from 0.

    The result is a contiguous copy, because the layers behind it are fast on those only.  Transpose(1, 2, 0)
    makes images with channels last of images with channels first.
    """

    def __init__(self, *axes: int) -> None:
        if sorted(axes) != list(range(len(axes))):
            raise ConfigError(f"Transpose: expected every axis from 0 once, got {axes!r}")
        self.axes = axes

    def build(self, input_shape: Shape) -> Shape:
        """Return the shape in the new order; ConfigError if there are more or fewer axes."""
        if len(input_shape) != len(self.axes):
            raise ConfigError(
                f"Transpose: expected samples with {len(self.axes)} axes, got shape {input_shape!r}"
            )
        return tuple(input_shape[axis] for axis in self.axes)

    def forward(self, x: Array, context: Context) -> Array:
        """Return y with y[i_axes] = x[i]."""
        moved = x.transpose(0, 1, *(axis + 2 for axis in self.axes))
        y = self.buffer("y", moved.shape, x.dtype)
        np.copyto(y, moved)
        return y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dy with its axes put back: y is a renaming of x, so ∂L/∂x is the inverse renaming of dy."""
        if not want_dx:
            return None
        moved = dy.transpose(0, 1, *(self.axes.index(axis) + 2 for axis in range(len(self.axes))))
        dx = self.buffer("dx", moved.shape, dy.dtype)
        np.copyto(dx, moved)
        return dx
