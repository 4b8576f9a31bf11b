"""LayerNorm and RMSNorm: every row brought to one length, over the last axis.

A row is one position of one sample, so nothing here joins samples, and the modes train and evaluate are the
same.  Means over a row are dot products of fixed length (`np.vecdot`), which no number of rows can change;
sums over the rows of a micro-batch are products with a row of ones (product.py).

Legend: N rows of a micro-batch (b times all axes but the last), F features.
"""

from __future__ import annotations

import math

import numpy as np

from distbp.errors import ConfigError
from distbp.nn import initial
from distbp.nn.layer import Array, Context, Layer, Parameter, Shape
from distbp.nn.product import sum_of_rows

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(Layer):
    """y = w x̂ + b with x̂ = (x - mean) / √(variance + ε) over the last axis (Ba, Kiros and Hinton, 2016)."""

    def __init__(self, *, epsilon: float = 1e-5) -> None:
        self.epsilon = _checked("LayerNorm", epsilon)

    def build(self, input_shape: Shape) -> Shape:
        """Create `weight` and `bias` (F,)."""
        features = _features("LayerNorm", input_shape)
        self.weight = Parameter((features,), initial.ones, fan_in=1, fan_out=1)
        self.bias = Parameter((features,), initial.zeros, fan_in=1, fan_out=1)
        return input_shape

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return weight, then bias."""
        return [("weight", self.weight), ("bias", self.bias)]

    def forward(self, x: Array, context: Context) -> Array:
        """Return w x̂ + b.  The variance is that of the centred row: the one-pass formula cancels."""
        x_GNF = _rows(x)
        scale_GN1 = self.buffer("scale", (*x_GNF.shape[:2], 1), x.dtype)
        share_F = np.full(x_GNF.shape[2], 1.0 / x_GNF.shape[2], x.dtype)
        np.vecdot(x_GNF, share_F, out=scale_GN1[..., 0])
        hat_GNF = np.subtract(x_GNF, scale_GN1, out=self.buffer("hat", x_GNF.shape, x.dtype))
        _inverse_length(hat_GNF, self.epsilon, scale_GN1)
        np.multiply(hat_GNF, scale_GN1, out=hat_GNF)
        y_GNF = np.multiply(hat_GNF, self.weight.value, out=self.buffer("y", x_GNF.shape, x.dtype))
        self._hat_GNF, self._scale_GN1 = hat_GNF, scale_GN1
        return np.add(y_GNF, self.bias.value, out=y_GNF).reshape(x.shape)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect dw = Σ_n dy x̂ and db = Σ_n dy, return dx.

        With s = 1/√(variance + ε), and c = w dy = ∂L/∂x̂ for one row: x̂ = s (x - mean), ∂mean/∂x_j = 1/F and
        ∂s/∂x_j = -s² x̂_j / F, because Σ_i (x_i - mean) ∂mean/∂x_j = 0.  So ∂x̂_i/∂x_j =
        s ([i = j] - 1/F - x̂_i x̂_j / F), and

            dx_j = s (c_j - 1/F Σ_i c_i - x̂_j 1/F Σ_i c_i x̂_i).
        """
        dy_GNF, hat_GNF = _rows(dy), self._hat_GNF
        product_GNF = np.multiply(dy_GNF, hat_GNF, out=self.buffer("product", dy_GNF.shape, dy.dtype))
        self.bias.collect(lambda lo, hi, out: sum_of_rows(dy_GNF[lo:hi], out))
        self.weight.collect(lambda lo, hi, out: sum_of_rows(product_GNF[lo:hi], out))
        if not want_dx:
            return None
        share_F = self.weight.value * (1.0 / dy_GNF.shape[2])
        mean_GN1 = self.buffer("mean", (*dy_GNF.shape[:2], 1), dy.dtype)
        np.vecdot(product_GNF, share_F, out=mean_GN1[..., 0])
        np.multiply(hat_GNF, mean_GN1, out=product_GNF)
        np.vecdot(dy_GNF, share_F, out=mean_GN1[..., 0])
        np.add(product_GNF, mean_GN1, out=product_GNF)
        dx_GNF = np.multiply(dy_GNF, self.weight.value, out=self.buffer("dx", dy_GNF.shape, dy.dtype))
        np.subtract(dx_GNF, product_GNF, out=dx_GNF)
        return np.multiply(dx_GNF, self._scale_GN1, out=dx_GNF).reshape(dy.shape)


class RMSNorm(Layer):
    """y = w x̂ with x̂ = x / √(mean of x² + ε) over the last axis (Zhang and Sennrich, NeurIPS 2019)."""

    def __init__(self, *, epsilon: float = 1e-5) -> None:
        self.epsilon = _checked("RMSNorm", epsilon)

    def build(self, input_shape: Shape) -> Shape:
        """Create `weight` (F,)."""
        features = _features("RMSNorm", input_shape)
        self.weight = Parameter((features,), initial.ones, fan_in=1, fan_out=1)
        return input_shape

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return weight."""
        return [("weight", self.weight)]

    def forward(self, x: Array, context: Context) -> Array:
        """Return w x̂."""
        x_GNF = _rows(x)
        scale_GN1 = self.buffer("scale", (*x_GNF.shape[:2], 1), x.dtype)
        _inverse_length(x_GNF, self.epsilon, scale_GN1)
        hat_GNF = np.multiply(x_GNF, scale_GN1, out=self.buffer("hat", x_GNF.shape, x.dtype))
        y_GNF = np.multiply(hat_GNF, self.weight.value, out=self.buffer("y", x_GNF.shape, x.dtype))
        self._hat_GNF, self._scale_GN1 = hat_GNF, scale_GN1
        return y_GNF.reshape(x.shape)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect dw = Σ_n dy x̂, return dx.

        With s = 1/√(mean of x² + ε) and c = w dy for one row: ∂s/∂x_j = -s² x̂_j / F, so

            dx_j = s (c_j - x̂_j 1/F Σ_i c_i x̂_i).
        """
        dy_GNF, hat_GNF = _rows(dy), self._hat_GNF
        product_GNF = np.multiply(dy_GNF, hat_GNF, out=self.buffer("product", dy_GNF.shape, dy.dtype))
        self.weight.collect(lambda lo, hi, out: sum_of_rows(product_GNF[lo:hi], out))
        if not want_dx:
            return None
        share_F = self.weight.value * (1.0 / dy_GNF.shape[2])
        mean_GN1 = self.buffer("mean", (*dy_GNF.shape[:2], 1), dy.dtype)
        np.vecdot(product_GNF, share_F, out=mean_GN1[..., 0])
        np.multiply(hat_GNF, mean_GN1, out=product_GNF)
        dx_GNF = np.multiply(dy_GNF, self.weight.value, out=self.buffer("dx", dy_GNF.shape, dy.dtype))
        np.subtract(dx_GNF, product_GNF, out=dx_GNF)
        return np.multiply(dx_GNF, self._scale_GN1, out=dx_GNF).reshape(dy.shape)


def _inverse_length(x_GNF: Array, epsilon: float, out_GN1: Array) -> None:
    """Write 1/√(mean of x² + ε) of every row."""
    np.vecdot(x_GNF, x_GNF, out=out_GN1[..., 0])
    np.multiply(out_GN1, 1.0 / x_GNF.shape[2], out=out_GN1)
    np.add(out_GN1, epsilon, out=out_GN1)
    np.sqrt(out_GN1, out=out_GN1)
    np.divide(1.0, out_GN1, out=out_GN1)


def _rows(x: Array) -> Array:
    """Return (G, b, ..., F) as (G, N, F)."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def _features(name: str, shape: Shape) -> int:
    """Return F, or raise ConfigError if a sample has no axis to normalise over."""
    if not shape or shape[-1] < 1:
        raise ConfigError(f"{name}: expected samples with at least one feature, got shape {shape!r}")
    return shape[-1]


def _checked(name: str, epsilon: float) -> float:
    if not 0 < epsilon < math.inf:
        raise ConfigError(f"{name}: expected a finite epsilon > 0, got {epsilon!r}")
    return epsilon
