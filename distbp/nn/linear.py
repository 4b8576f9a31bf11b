"""Linear: y = x W + b, the fully connected layer.

Weights are stored [in, out], so that forward needs no transpose and a row of W belongs to one input.  The
products are those of product.py.  Samples of several axes are rows of their last one: (T, I) are T rows, and
a micro-batch of b samples is one product of b T rows.  What came from the layer before is kept by reference,
not copied: the contract says that it holds until that layer's next call.
"""

from __future__ import annotations

import math

import numpy as np

from distbp.errors import ConfigError
from distbp.nn import initial as start
from distbp.nn.layer import Array, Context, Initial, Layer, Parameter, Shape
from distbp.nn.product import gradient_of_weights, rows_times_matrix, rows_times_transpose, sum_of_rows

__all__ = ["Linear"]


class Linear(Layer):
    """Fully connected layer over the last axis: samples of shape (*S, I) become (*S, outputs).

    `initial` starts the weights; the bias starts at zero.  Where all features of a sample belong together,
    as in images, put a Flatten before it.
    """

    def __init__(self, outputs: int, *, bias: bool = True, initial: Initial = start.lecun_normal) -> None:
        if outputs < 1:
            raise ConfigError(f"Linear: expected at least one output, got {outputs!r}")
        self.outputs = outputs
        self.has_bias = bias
        self.initial = initial

    def build(self, input_shape: Shape) -> Shape:
        """Create `weight` (I, O) and `bias` (O,)."""
        if not input_shape or math.prod(input_shape) < 1:
            raise ConfigError(
                f"Linear: expected samples with at least one feature, got shape {input_shape!r}; put a "
                "Flatten() before it"
            )
        *places, inputs = input_shape
        self._rows_of_a_sample = math.prod(places)
        self._joins_rows = bool(places)
        fans = {"fan_in": inputs, "fan_out": self.outputs}
        self.weight = Parameter((inputs, self.outputs), self.initial, **fans)
        self.bias = Parameter((self.outputs,), start.zeros, **fans)
        return (*places, self.outputs)

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return weight, then bias if there is one."""
        named = [("weight", self.weight), ("bias", self.bias)]
        return named if self.has_bias else named[:1]

    def multiply_adds(self) -> int:
        """Return I * O for each row of a sample."""
        return self._rows_of_a_sample * self.weight.size

    def forward(self, x: Array, context: Context) -> Array:
        """Return y = x W + b, shape (G, b, *S, O)."""
        x_GbI = self._x_GbI = self._rows(x)
        y_GbO = self.buffer("y", (*x_GbI.shape[:2], self.outputs), x.dtype)
        rows_times_matrix(x_GbI, self.weight.value, y_GbO)
        if self.has_bias:
            np.add(y_GbO, self.bias.value, out=y_GbO)
        return y_GbO.reshape(*x.shape[:-1], self.outputs)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect dW = xᵀ dy and db = Σ_b dy of each micro-batch, return dx = dy Wᵀ.

        With y_no = Σ_i x_ni W_io + b_o for row n, and L the loss that dy = ∂L/∂y came from:

            ∂L/∂W_io = Σ_n (∂L/∂y_no)(∂y_no/∂W_io) = Σ_n x_ni dy_no = (xᵀ dy)_io
            ∂L/∂b_o  = Σ_n dy_no
            ∂L/∂x_ni = Σ_o dy_no W_io = (dy Wᵀ)_ni

        The sums over n stay inside one micro-batch.
        """
        dy_GbO = self._dy_GbO = self._rows(dy)
        if self.has_bias:
            self.bias.collect(self._bias_leaf)
        self.weight.collect(gradient_of_weights(self._x_GbI, dy_GbO))
        if not want_dx:
            return None
        dx_GbI = self.buffer("dx", self._x_GbI.shape, dy_GbO.dtype)
        rows_times_transpose(dy_GbO, self.weight.value, dx_GbI)
        return dx_GbI.reshape(*dy.shape[:-1], dx_GbI.shape[-1])

    def _rows(self, x: Array) -> Array:
        """Return (G, b, *S, F) as (G, rows, F)."""
        return x.reshape(x.shape[0], -1, x.shape[-1])

    def _bias_leaf(self, lo: int, hi: int, out_GO: Array) -> None:
        if self._joins_rows:
            sum_of_rows(self._dy_GbO[lo:hi], out_GO)
        else:
            np.add.reduce(self._dy_GbO[lo:hi], axis=1, out=out_GO)
