"""Linear: y = x W + b, the fully connected layer.

Weights are stored [in, out], so that forward needs no transpose and a row of W belongs to one input.  The
products are those of product.py.  What came from the layer before is kept by reference, not copied: the
contract says that it holds until that layer's next call.
"""

from __future__ import annotations

import numpy as np

from distbp.errors import ConfigError
from distbp.nn import initial as start
from distbp.nn.layer import Array, Context, Initial, Layer, Parameter, Shape
from distbp.nn.product import rows_times_matrix, rows_times_transpose, transpose_times_rows

__all__ = ["Linear"]


class Linear(Layer):
    """Fully connected layer for samples of shape (I,), with output shape (outputs,).

    `initial` starts the weights; the bias starts at zero.  Samples of more dimensions want a Flatten before.
    """

    def __init__(self, outputs: int, *, bias: bool = True, initial: Initial = start.lecun_normal) -> None:
        if outputs < 1:
            raise ConfigError(f"Linear: expected at least one output, got {outputs!r}")
        self.outputs = outputs
        self.has_bias = bias
        self.initial = initial

    def build(self, input_shape: Shape) -> Shape:
        """Create `weight` (I, O) and `bias` (O,)."""
        if len(input_shape) != 1 or input_shape[0] < 1:
            raise ConfigError(
                f"Linear: expected samples of one dimension with at least one feature, "
                f"got shape {input_shape!r}; put a Flatten() before it"
            )
        (inputs,) = input_shape
        fans = {"fan_in": inputs, "fan_out": self.outputs}
        self.weight = Parameter((inputs, self.outputs), self.initial, **fans)
        self.bias = Parameter((self.outputs,), start.zeros, **fans)
        return (self.outputs,)

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return weight, then bias if there is one."""
        named = [("weight", self.weight), ("bias", self.bias)]
        return named if self.has_bias else named[:1]

    def multiply_adds(self) -> int:
        """Return I * O."""
        return self.weight.size

    def forward(self, x_GbI: Array, context: Context) -> Array:
        """Return y = x W + b, shape (G, b, O)."""
        self._x_GbI = x_GbI
        y_GbO = self.buffer("y", (*x_GbI.shape[:2], self.outputs), x_GbI.dtype)
        rows_times_matrix(x_GbI, self.weight.value, y_GbO)
        if self.has_bias:
            np.add(y_GbO, self.bias.value, out=y_GbO)
        return y_GbO

    def backward(self, dy_GbO: Array, want_dx: bool = True) -> Array | None:
        """Collect dW = xᵀ dy and db = Σ_b dy of each micro-batch, return dx = dy Wᵀ.

        With y_no = Σ_i x_ni W_io + b_o for sample n, and L the loss that dy = ∂L/∂y came from:

            ∂L/∂W_io = Σ_n (∂L/∂y_no)(∂y_no/∂W_io) = Σ_n x_ni dy_no = (xᵀ dy)_io
            ∂L/∂b_o  = Σ_n dy_no
            ∂L/∂x_ni = Σ_o dy_no W_io = (dy Wᵀ)_ni

        The sums over n stay inside one micro-batch.
        """
        self._dy_GbO = dy_GbO
        if self.has_bias:
            self.bias.collect(self._bias_leaf)
        self.weight.collect(self._weight_leaf)
        if not want_dx:
            return None
        dx_GbI = self.buffer("dx", self._x_GbI.shape, dy_GbO.dtype)
        return rows_times_transpose(dy_GbO, self.weight.value, dx_GbI)

    def _weight_leaf(self, lo: int, hi: int, out_GIO: Array) -> None:
        transpose_times_rows(self._x_GbI[lo:hi], self._dy_GbO[lo:hi], out_GIO)

    def _bias_leaf(self, lo: int, hi: int, out_GO: Array) -> None:
        np.add.reduce(self._dy_GbO[lo:hi], axis=1, out=out_GO)
