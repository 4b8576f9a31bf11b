"""Pooling: the largest number, or the mean, of each window of an image or a sequence, channel by channel.

A window of kh x kw has kh*kw *planes*: the strided views of the input that hold the same corner of every
window.  Pooling is elementwise over planes, so no index arrays are made, and it sees no micro-batches at all.

Rows and columns that the last window does not reach are ignored; their gradient is 0.

Legend: N = G * b samples, H W places, C channels, Ho Wo windows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from distbp.errors import ConfigError
from distbp.nn.channels import blocks_of_rows
from distbp.nn.layer import Array, Context, Layer, Shape

__all__ = ["AvgPool1d", "AvgPool2d", "GlobalAvgPool", "MaxPool1d", "MaxPool2d"]

Size = int | tuple[int, ...]


class _Pool(Layer):
    """What all windows share: shapes, and the planes of an array."""

    dimensions: int

    def __init__(self, size: Size, *, stride: Size | None = None) -> None:
        self.size = self._lengths("size", size)
        self.stride = self.size if stride is None else self._lengths("stride", stride)

    def build(self, input_shape: Shape) -> Shape:
        """Return (Ho, Wo, C), or (Lo, C); ConfigError for samples that are smaller than the window."""
        kind, names = type(self).__name__, "HW"[-self.dimensions :]
        if len(input_shape) != self.dimensions + 1:
            raise ConfigError(
                f"{kind}: expected samples of shape ({', '.join(names)}, channels), got {input_shape!r}"
            )
        *image, channels = input_shape
        if any(length < size for length, size in zip(image, self.size, strict=True)):
            raise ConfigError(
                f"{kind}: expected samples no smaller than the window {self.size!r}, got {tuple(image)!r}"
            )
        self._input_shape = input_shape
        self._windows = tuple(
            (length - size) // stride + 1
            for length, size, stride in zip(image, self.size, self.stride, strict=True)
        )
        self._overlap = any(stride < size for stride, size in zip(self.stride, self.size, strict=True))
        return (*self._windows, channels)

    def _planes(self, x: Array) -> Iterator[Array]:
        """Yield the views (G, b, Ho, Wo, C) of `x` in the order of the window's places, row by row."""
        for corner in np.ndindex(*self.size):
            places = (
                slice(first, first + stride * count, stride)
                for first, stride, count in zip(corner, self.stride, self._windows, strict=True)
            )
            yield x[:, :, *places]

    def _dx(self, dy: Array) -> Array:
        """Return the array for dx, zero where no window comes, everywhere if windows overlap."""
        dx = self.buffer("dx", (*dy.shape[:2], *self._input_shape), dy.dtype)
        if self._overlap:
            dx.fill(0)
        return dx

    def _add(self, part: Array, plane: Array) -> None:
        """Let `part` be the gradient of a plane, or add it where windows overlap."""
        if self._overlap:
            np.add(plane, part, out=plane)
        else:
            np.copyto(plane, part)

    def _lengths(self, name: str, value: Size) -> tuple[int, ...]:
        """Return one length for each dimension; ConfigError if they are not that."""
        lengths = (value,) * self.dimensions if isinstance(value, int) else tuple(value)
        if len(lengths) != self.dimensions or not all(isinstance(n, int) and n >= 1 for n in lengths):
            raise ConfigError(
                f"{type(self).__name__}: {name}: expected {self.dimensions} whole numbers >= 1, or one for "
                f"all, got {value!r}"
            )
        return lengths


class _MaxPool(_Pool):
    """y = the maximum over the window; of equal numbers the first one counts."""

    def forward(self, x: Array, context: Context) -> Array:
        """Return the maximum over the planes; NaN stays NaN."""
        self._x = x
        planes = self._planes(x)
        first = next(planes)
        self._y = self.buffer("y", first.shape, x.dtype)
        np.copyto(self._y, first)
        for plane in planes:
            np.maximum(self._y, plane, out=self._y)
        return self._y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx: y is one of the window's numbers, x_k with the first k where x_k = y, so

            ∂L/∂x_k = Σ over the windows whose maximum x_k is, of dy.

        The maximum has no derivative where two numbers tie; any weights that add up to 1 are a subgradient,
        and giving all to the first one keeps zeros, as on the margin of a digit, from blurring it.
        """
        if not want_dx:
            return None
        dx = self._dx(dy)
        samples = blocks_of_rows(dy.shape[1], math.prod(dy.shape[2:]))
        for g in range(len(dy)):
            for block in samples:
                part = slice(g, g + 1), block
                self._write_dx(self._x[part], self._y[part], dy[part], dx[part])
        return dx

    def _write_dx(self, x: Array, y: Array, dy: Array, dx: Array) -> None:
        """Write dx of a few samples, which stay in the cache from plane to plane."""
        taken, mine = (
            self.buffer(f"{name} of {dy.shape[1]}", dy.shape, np.bool_) for name in ("taken", "mine")
        )
        part = self.buffer(f"part of {dy.shape[1]}", dy.shape, dy.dtype)
        taken.fill(False)
        for plane, dx_plane in zip(self._planes(x), self._planes(dx), strict=True):
            np.equal(plane, y, out=mine)
            np.greater(mine, taken, out=mine)  # True > False: mine, and taken by nobody before.
            np.logical_or(taken, mine, out=taken)
            self._add(np.multiply(dy, mine, out=part), dx_plane)


class _AvgPool(_Pool):
    """y = the mean over the window."""

    def forward(self, x: Array, context: Context) -> Array:
        """Return the mean over the planes, added in the order of the window's places."""
        planes = self._planes(x)
        first = next(planes)
        y = self.buffer("y", first.shape, x.dtype)
        np.copyto(y, first)
        for plane in planes:
            np.add(y, plane, out=y)
        return np.multiply(y, 1.0 / math.prod(self.size), out=y)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = Σ over the windows that hold x, of dy / n, with n numbers in a window."""
        if not want_dx:
            return None
        dx = self._dx(dy)
        part = self.buffer("part", dy.shape, dy.dtype)
        np.multiply(dy, 1.0 / math.prod(self.size), out=part)
        for plane in self._planes(dx):
            self._add(part, plane)
        return dx


class MaxPool2d(_MaxPool):
    """The largest number of each window of images (H, W, C); `stride` is `size` if it is not given."""

    dimensions = 2


class MaxPool1d(_MaxPool):
    """The largest number of each window of sequences (L, C)."""

    dimensions = 1


class AvgPool2d(_AvgPool):
    """The mean of each window of images (H, W, C); `stride` is `size` if it is not given."""

    dimensions = 2


class AvgPool1d(_AvgPool):
    """The mean of each window of sequences (L, C)."""

    dimensions = 1


class GlobalAvgPool(Layer):
    """The mean of each channel over the whole sample: (H, W, C), (L, C) and so on become (C,)."""

    def build(self, input_shape: Shape) -> Shape:
        """Return (C,); ConfigError where there is nothing to average over."""
        if len(input_shape) < 2 or min(input_shape) < 1:
            raise ConfigError(
                f"GlobalAvgPool: expected samples of shape (places, ..., channels), got {input_shape!r}"
            )
        self._input_shape = input_shape
        return input_shape[-1:]

    def forward(self, x: Array, context: Context) -> Array:
        """Return y_c = 1/P Σ_p x_pc over the P places of a sample."""
        x_GbPC = x.reshape(*x.shape[:2], -1, x.shape[-1])
        y = self.buffer("y", (*x.shape[:2], x.shape[-1]), x.dtype)
        np.add.reduce(x_GbPC, axis=2, out=y)
        np.multiply(y, 1.0 / x_GbPC.shape[2], out=y)
        return y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx_pc = dy_c / P: every place of a sample has the same part in its mean."""
        if not want_dx:
            return None
        dx = self.buffer("dx", (*dy.shape[:2], *self._input_shape), dy.dtype)
        dx_GbPC = dx.reshape(*dy.shape[:2], -1, dy.shape[-1])
        np.multiply(dy[:, :, np.newaxis], 1.0 / dx_GbPC.shape[2], out=dx_GbPC)
        return dx
