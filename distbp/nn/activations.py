"""Activations: elementwise functions, and Softmax over the last axis.

Each keeps from forward to backward what makes the derivative cheapest: its own output where the derivative
is a function of it, the derivative itself for GELU.  All write into buffers of their own.

GELU, with its eighteen operations, goes through its numbers in blocks that stay in the cache, 1.6 times as
fast; the others with two or three gain nothing by that.

Rejected: `putmask` or `copyto(where=)` for ReLU (tens of times slower than a multiplication by the mask).
"""

from __future__ import annotations

import math

import numpy as np

from distbp.errors import ConfigError
from distbp.nn.channels import BLOCK_ELEMENTS, blocks_of_rows
from distbp.nn.layer import Array, Context, Layer, Shape

__all__ = ["GELU", "LeakyReLU", "ReLU", "SiLU", "Sigmoid", "Softmax", "Tanh"]


class ReLU(Layer):
    """y = max(x, 0)."""

    @property
    def outputs(self) -> Array:
        """What the last forward pass returned, (G, b, *shape); only to be looked at."""
        return self._y

    def build(self, input_shape: Shape) -> Shape:
        """Keep the shape."""
        return input_shape

    def forward(self, x: Array, context: Context) -> Array:
        """Return max(x, 0); NaN stays NaN."""
        # NumPy's maximum of two arrays is three times as fast as that of an array and a number.
        zeros = self.buffer("zeros", x.shape, x.dtype)
        self._y = np.maximum(x, zeros, out=self.buffer("y", x.shape, x.dtype))
        return self._y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = dy · [x > 0]; at the kink x = 0 the derivative is taken as 0.  [x > 0] = [y > 0]."""
        if not want_dx:
            return None
        mask = np.greater(self._y, 0, out=self.buffer("mask", dy.shape, np.bool_))
        return np.multiply(dy, mask, out=self.buffer("dx", dy.shape, dy.dtype))


class LeakyReLU(Layer):
    """y = max(x, slope x) with 0 <= slope < 1 (Maas, Hannun and Ng, ICML 2013)."""

    def __init__(self, slope: float = 0.01) -> None:
        if not 0.0 <= slope < 1.0:
            raise ConfigError(f"LeakyReLU: expected 0 <= slope < 1, got {slope!r}")
        self.slope = slope

    def build(self, input_shape: Shape) -> Shape:
        """Keep the shape."""
        return input_shape

    def forward(self, x: Array, context: Context) -> Array:
        """Return max(x, slope x)."""
        self._x = x
        y = np.multiply(x, self.slope, out=self.buffer("y", x.shape, x.dtype))
        return np.maximum(x, y, out=y)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = dy · max(sign(x), slope): the derivative is 1 for x > 0 and `slope` elsewhere."""
        if not want_dx:
            return None
        dx = np.sign(self._x, out=self.buffer("dx", dy.shape, dy.dtype))
        np.maximum(dx, self.slope, out=dx)
        return np.multiply(dy, dx, out=dx)


class Tanh(Layer):
    """y = tanh x."""

    @property
    def outputs(self) -> Array:
        """What the last forward pass returned, (G, b, *shape); only to be looked at."""
        return self._y

    def build(self, input_shape: Shape) -> Shape:
        """Keep the shape."""
        return input_shape

    def forward(self, x: Array, context: Context) -> Array:
        """Return tanh x."""
        self._y = np.tanh(x, out=self.buffer("y", x.shape, x.dtype))
        return self._y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = dy · (1 - y²), because (tanh x)' = 1 - tanh² x."""
        if not want_dx:
            return None
        dx = np.multiply(self._y, self._y, out=self.buffer("dx", dy.shape, dy.dtype))
        np.subtract(1, dx, out=dx)
        return np.multiply(dy, dx, out=dx)


class Sigmoid(Layer):
    """y = 1 / (1 + exp(-x)), computed as (1 + tanh(x/2)) / 2.

    The tanh form never overflows and costs half; its absolute error is that of the dtype, but values below
    the dtype's epsilon come out as 0 (x < -17 in float32).
    """

    @property
    def outputs(self) -> Array:
        """What the last forward pass returned, (G, b, *shape); only to be looked at."""
        return self._y

    def build(self, input_shape: Shape) -> Shape:
        """Keep the shape."""
        return input_shape

    def forward(self, x: Array, context: Context) -> Array:
        """Return the logistic function of x."""
        y = np.multiply(x, 0.5, out=self.buffer("y", x.shape, x.dtype))
        np.tanh(y, out=y)
        np.multiply(y, 0.5, out=y)
        self._y = np.add(y, 0.5, out=y)
        return self._y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = dy · y (1 - y), because y' = exp(-x) / (1 + exp(-x))² = y (1 - y)."""
        if not want_dx:
            return None
        dx = np.subtract(1, self._y, out=self.buffer("dx", dy.shape, dy.dtype))
        np.multiply(dx, self._y, out=dx)
        return np.multiply(dy, dx, out=dx)


class SiLU(Layer):
    """y = x sigmoid(x), also called swish (Elfwing, Uchibe and Doya, 2017)."""

    def build(self, input_shape: Shape) -> Shape:
        """Keep the shape."""
        return input_shape

    def forward(self, x: Array, context: Context) -> Array:
        """Return x (1 + tanh(x/2)) / 2, the form of Sigmoid."""
        self._x = x
        sigmoid = np.multiply(x, 0.5, out=self.buffer("sigmoid", x.shape, x.dtype))
        np.tanh(sigmoid, out=sigmoid)
        np.multiply(sigmoid, 0.5, out=sigmoid)
        self._sigmoid = np.add(sigmoid, 0.5, out=sigmoid)
        return np.multiply(x, sigmoid, out=self.buffer("y", x.shape, x.dtype))

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = dy · s (1 + x (1 - s)), s = sigmoid(x), because y = x s and s' = s (1 - s)."""
        if not want_dx:
            return None
        dx = np.subtract(1, self._sigmoid, out=self.buffer("dx", dy.shape, dy.dtype))
        np.multiply(dx, self._x, out=dx)
        np.add(dx, 1, out=dx)
        np.multiply(dx, self._sigmoid, out=dx)
        return np.multiply(dy, dx, out=dx)


class GELU(Layer):
    """y = x/2 · (1 + tanh(u)), u = √(2/π) (x + 0.044715 x³).

    The tanh form of Hendrycks and Gimpel, "Gaussian error linear units", 2016; NumPy has no erf.
    In float32 x³ overflows for |x| > 7e12.
    """

    _SCALE = math.sqrt(2.0 / math.pi)
    _CUBIC = 0.044715 * math.sqrt(2.0 / math.pi)

    def build(self, input_shape: Shape) -> Shape:
        """Keep the shape."""
        return input_shape

    def forward(self, x: Array, context: Context) -> Array:
        """Return y; in training also store dy/dx, which shares the tanh."""
        y = self.buffer("y", x.shape, x.dtype)
        flat, out = x.reshape(-1), y.reshape(-1)
        tanh, spare = self.buffer("spare", (2, BLOCK_ELEMENTS), x.dtype)
        if context.training:
            self._derivative = self.buffer("derivative", x.shape, x.dtype)
        for block in blocks_of_rows(flat.size, 1):
            count = block.stop - block.start
            self._write_y(flat[block], tanh[:count], out[block])
            if context.training:
                derivative = self._derivative.reshape(-1)[block]
                self._write_derivative(flat[block], tanh[:count], spare[:count], derivative)
        return y

    def _write_y(self, x: Array, tanh: Array, out: Array) -> None:
        """Write y, and tanh u; u = x (_SCALE + _CUBIC x²)."""
        np.multiply(x, x, out=tanh)
        np.multiply(tanh, self._CUBIC, out=tanh)
        np.add(tanh, self._SCALE, out=tanh)
        np.multiply(tanh, x, out=tanh)
        np.tanh(tanh, out=tanh)
        np.add(tanh, 1, out=out)
        np.multiply(out, x, out=out)
        np.multiply(out, 0.5, out=out)

    def _write_derivative(self, x: Array, tanh: Array, spare: Array, out: Array) -> None:
        """Write y' = (1 + t)/2 + x/2 · (1 - t²) u', t = tanh u, u' = _SCALE + 3 _CUBIC x²."""
        np.multiply(tanh, tanh, out=out)
        np.subtract(1, out, out=out)
        np.multiply(out, x, out=out)
        np.multiply(x, x, out=spare)
        np.multiply(spare, 3.0 * self._CUBIC, out=spare)
        np.add(spare, self._SCALE, out=spare)
        np.multiply(out, spare, out=out)
        np.add(out, tanh, out=out)
        np.add(out, 1, out=out)
        np.multiply(out, 0.5, out=out)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = dy · y'(x), with the derivative that forward stored."""
        if not want_dx:
            return None
        return np.multiply(dy, self._derivative, out=self.buffer("dx", dy.shape, dy.dtype))


class Softmax(Layer):
    """y_i = exp(x_i) / Σ_j exp(x_j) over the last axis.

    For classification use the loss SoftmaxCrossEntropy on the raw outputs instead: it is fused and exact.
    """

    def build(self, input_shape: Shape) -> Shape:
        """Keep the shape; ConfigError if there is no axis to sum over."""
        if not input_shape:
            raise ConfigError("Softmax: expected samples with at least one axis, got shape ()")
        return input_shape

    def forward(self, x: Array, context: Context) -> Array:
        """Return the softmax; the maximum is taken off first, so that no exponential overflows."""
        y = self.buffer("y", x.shape, x.dtype)
        row = self.buffer("row", (*x.shape[:-1], 1), x.dtype)
        np.maximum.reduce(x, axis=-1, keepdims=True, out=row)
        np.subtract(x, row, out=y)
        np.exp(y, out=y)
        np.add.reduce(y, axis=-1, keepdims=True, out=row)
        self._y = np.divide(y, row, out=y)
        return self._y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx_i = y_i (dy_i - Σ_j dy_j y_j), because ∂y_j/∂x_i = y_j ([i = j] - y_i)."""
        if not want_dx:
            return None
        row = self.buffer("row", (*dy.shape[:-1], 1), dy.dtype)
        dx = np.multiply(dy, self._y, out=self.buffer("dx", dy.shape, dy.dtype))
        np.add.reduce(dx, axis=-1, keepdims=True, out=row)
        np.subtract(dy, row, out=dx)
        return np.multiply(dx, self._y, out=dx)
