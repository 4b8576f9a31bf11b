"""GRU and LSTM: layers that read a sequence from its beginning to its end.

Legend: T steps, I inputs and H units at each step; N = b T rows of a micro-batch, in the order (b, T).

What does not depend on the state is done for all steps at once: the product with the inputs before the loop,
and in backward, from the gradients of the gates that the loop has left behind, the sums over all steps.
Inside the loop there is one product of (b, H) rows for each micro-batch and step, and elementwise work.

The state before the first step is zero.  Sequences of one sample all have the length T; there is no mask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
from numpy.typing import NDArray

from distbp.errors import ConfigError
from distbp.nn import initial
from distbp.nn.layer import Array, Context, Layer, Parameter, Shape
from distbp.nn.product import rows_times_matrix, rows_times_transpose, sum_of_rows, transpose_times_rows

__all__ = ["GRU", "LSTM"]


class _Recurrent(Layer, ABC):
    """What both have in common: shapes, the product with the inputs, and the sums over all steps."""

    gates: int
    """Blocks of H columns in the weights."""

    def __init__(self, units: int, *, last: bool = False) -> None:
        if units < 1:
            raise ConfigError(f"{type(self).__name__}: expected at least one unit, got {units!r}")
        self.units = units
        self.last = last

    def build(self, input_shape: Shape) -> Shape:
        """Create the weights for samples (T, I), or (T,) with I = 1."""
        if len(input_shape) not in (1, 2) or min(input_shape) < 1:
            raise ConfigError(
                f"{type(self).__name__}: expected samples of shape (steps, inputs) or (steps,), got "
                f"{input_shape!r}"
            )
        self._steps, self._inputs = (*input_shape, 1)[:2]
        H, columns = self.units, self.gates * self.units
        self.weight_x = Parameter(
            (self._inputs, columns), initial.lecun_normal, fan_in=self._inputs, fan_out=H
        )
        self.weight_h = Parameter((H, columns), initial.lecun_normal, fan_in=H, fan_out=H)
        return (H,) if self.last else (self._steps, H)

    def multiply_adds(self) -> int:
        """Return those of the products with inputs and state at every step."""
        return self._steps * (self._inputs + self.units) * self.gates * self.units

    def _array(self, name: str, like: Array, columns: int) -> Array:
        """Return a buffer (G, b, T, columns)."""
        return self.buffer(name, (*like.shape[:2], self._steps, columns), like.dtype)

    def _project(self, x: Array, bias: Parameter) -> Array:
        """Return x W_x + bias for every step, (G, b, T, gates H)."""
        self._x_shape = x.shape
        self._x_GNI = x.reshape(x.shape[0], -1, self._inputs)
        a = self._array("a", x, self.gates * self.units)
        a_GNC = a.reshape(a.shape[0], -1, a.shape[-1])
        rows_times_matrix(self._x_GNI, self.weight_x.value, a_GNC)
        np.add(a_GNC, bias.value, out=a_GNC)
        return a

    def _output(self, h: Array) -> Array:
        """Return the states h (G, b, T, H), or the last one."""
        if not self.last:
            return h
        y = self.buffer("y", (*h.shape[:2], self.units), h.dtype)
        np.copyto(y, h[:, :, -1])
        return y

    def _gradient_of_states(self, dy: Array) -> Array:
        """Return ∂L/∂h_t as far as it comes from the outputs alone, (G, b, T, H)."""
        if not self.last:
            return dy
        dh = self._array("dh", dy, self.units)
        dh.fill(0)  # It stays zero but for the last step; a gap in time costs no more than this.
        np.copyto(dh[:, :, -1], dy)
        return dh

    def _collect_sum(self, parameter: Parameter, d: Array) -> None:
        """Collect Σ_n d_n for d (G, b, T, C)."""
        d_GNC = d.reshape(d.shape[0], -1, d.shape[-1])
        parameter.collect(lambda lo, hi, out: sum_of_rows(d_GNC[lo:hi], out))

    def _collect_product(self, parameter: Parameter, rows_GNF: Array, d: Array) -> None:
        """Collect rowsᵀ d for d (G, b, T, C)."""
        d_GNC = d.reshape(d.shape[0], -1, d.shape[-1])

        def leaf(lo: int, hi: int, out: Array) -> None:
            transpose_times_rows(rows_GNF[lo:hi], d_GNC[lo:hi], out)

        parameter.collect(leaf)

    def _before(self, h: Array) -> Array:
        """Return the state before each step as rows: h_0 = 0, h_1, ..., h_{T-1}, (G, N, H)."""
        before = self._array("before", h, self.units)
        np.copyto(before[:, :, 1:], h[:, :, :-1])
        return before.reshape(before.shape[0], -1, self.units)

    def _dx(self, da: Array) -> Array:
        """Return da W_xᵀ in the shape of the input."""
        dx_GNI = self.buffer("dx", self._x_GNI.shape, da.dtype)
        rows_times_transpose(da.reshape(da.shape[0], -1, da.shape[-1]), self.weight_x.value, dx_GNI)
        return dx_GNI.reshape(self._x_shape)

    @abstractmethod
    def forward(self, x: Array, context: Context) -> Array:
        """Return the states of all steps, (G, b, T, H), or with `last` that of the last one, (G, b, H)."""


class GRU(_Recurrent):
    """Gated recurrent unit (Cho et al., EMNLP 2014), in the form of cuDNN and PyTorch.

        r = σ(a_r + c_r),  z = σ(a_z + c_z),  n = tanh(a_n + r c_n),  h' = n + z (h - n)

    with a = x W_x + b_x and c = h W_h + b_h, whose columns are the blocks r, z, n.  With `last` the output is
    the state after the last step, (units,), else those of all steps, (T, units).
    """

    gates = 3

    def build(self, input_shape: Shape) -> Shape:
        """Create `weight_x` (I, 3 H), `weight_h` (H, 3 H), `bias_x` and `bias_h` (3 H,)."""
        output_shape = super().build(input_shape)
        self.bias_x, self.bias_h = (
            Parameter((3 * self.units,), initial.zeros, fan_in=1, fan_out=1) for _ in range(2)
        )
        return output_shape

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return the weights, then the biases."""
        return [
            ("weight_x", self.weight_x),
            ("weight_h", self.weight_h),
            ("bias_x", self.bias_x),
            ("bias_h", self.bias_h),
        ]

    def forward(self, x: Array, context: Context) -> Array:
        """Return the states; r, z, n and c_n of all steps are kept."""
        H = self.units
        a = self._project(x, self.bias_x)  # Becomes r, z, n in place.
        c = self.buffer("c", (*x.shape[:2], 3 * H), x.dtype)
        self._c_n = self._array("c_n", x, H)
        h = self._h = self._array("h", x, H)
        state = self.buffer("zero state", (*x.shape[:2], H), x.dtype)
        for t in range(self._steps):
            rows_times_matrix(state, self.weight_h.value, c)
            np.add(c, self.bias_h.value, out=c)
            rz, n, c_n = a[:, :, t, : 2 * H], a[:, :, t, 2 * H :], self._c_n[:, :, t]
            np.copyto(c_n, c[..., 2 * H :])
            np.add(rz, c[..., : 2 * H], out=rz)
            _sigmoid(rz)
            following = h[:, :, t]
            np.multiply(a[:, :, t, :H], c_n, out=following)
            np.add(n, following, out=n)
            np.tanh(n, out=n)
            np.subtract(state, n, out=following)
            np.multiply(following, a[:, :, t, H : 2 * H], out=following)
            np.add(following, n, out=following)
            state = following
        self._gates = a
        return self._output(h)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect the gradients of the four parameters, return dx.

        Let e be ∂L/∂h' at a step: what comes from the output and from the step after.  From
        h' = n + z (h - n) and n = tanh(a_n + r c_n):

            da_n = e (1 - z)(1 - n²)         dc_n = da_n r
            da_z = dc_z = e (h - n) z (1 - z)
            da_r = dc_r = da_n c_n r (1 - r)
            ∂L/∂h = e z + dc W_hᵀ, which is the next e on the way back

        and over all steps dW_x = Σ xᵀ da, db_x = Σ da, dW_h = Σ hᵀ dc, db_h = Σ dc, dx = da W_xᵀ.
        """
        H, gates = self.units, self._gates
        outer = self._gradient_of_states(dy)
        before_GNH = self._before(self._h)
        before = before_GNH.reshape(self._h.shape)
        da, dc = self._array("da", gates, 3 * H), self._array("dc", gates, 3 * H)
        shape = (*gates.shape[:2], H)
        e = self.buffer("e", shape, dy.dtype)
        back, spare = self.buffer("back", shape, dy.dtype), self.buffer("spare", shape, dy.dtype)
        e.fill(0)
        for t in range(self._steps - 1, -1, -1):
            np.add(e, outer[:, :, t], out=e)
            r, z, n = (gates[:, :, t, block * H : (block + 1) * H] for block in range(3))
            da_r, da_z, da_n = (da[:, :, t, block * H : (block + 1) * H] for block in range(3))
            np.multiply(n, n, out=da_n)
            np.subtract(1, da_n, out=da_n)
            np.multiply(da_n, e, out=da_n)
            np.subtract(1, z, out=spare)
            np.multiply(da_n, spare, out=da_n)
            np.multiply(spare, z, out=spare)
            np.subtract(before[:, :, t], n, out=da_z)
            np.multiply(da_z, e, out=da_z)
            np.multiply(da_z, spare, out=da_z)
            np.subtract(1, r, out=spare)
            np.multiply(spare, r, out=spare)
            np.multiply(da_n, self._c_n[:, :, t], out=da_r)
            np.multiply(da_r, spare, out=da_r)
            dc_t = dc[:, :, t]
            np.copyto(dc_t[..., : 2 * H], da[:, :, t, : 2 * H])
            np.multiply(da_n, r, out=dc_t[..., 2 * H :])
            np.multiply(e, z, out=e)
            np.add(e, rows_times_transpose(dc_t, self.weight_h.value, back), out=e)
        self._collect_sum(self.bias_h, dc)
        self._collect_sum(self.bias_x, da)
        self._collect_product(self.weight_h, before_GNH, dc)
        self._collect_product(self.weight_x, self._x_GNI, da)
        return self._dx(da) if want_dx else None


class LSTM(_Recurrent):
    """Long short-term memory (Hochreiter and Schmidhuber, 1997) with a forget gate (Gers et al., 2000).

        i, f, o = σ(a_i), σ(a_f), σ(a_o),  g = tanh(a_g),  c' = f c + i g,  h' = o tanh(c')

    with a = x W_x + h W_h + b, whose columns are the blocks i, f, o, g.  The bias of the forget gate starts
    at 1, so that a new network remembers (Jozefowicz et al., ICML 2015).  With `last` the output is the state
    h after the last step, (units,), else those of all steps, (T, units).
    """

    gates = 4

    def build(self, input_shape: Shape) -> Shape:
        """Create `weight_x` (I, 4 H), `weight_h` (H, 4 H) and `bias` (4 H,)."""
        output_shape = super().build(input_shape)
        self.bias = Parameter((4 * self.units,), _remember, fan_in=1, fan_out=1)
        return output_shape

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return the weights, then the bias."""
        return [("weight_x", self.weight_x), ("weight_h", self.weight_h), ("bias", self.bias)]

    def forward(self, x: Array, context: Context) -> Array:
        """Return the states; the gates, c and tanh(c) of all steps are kept."""
        H = self.units
        a = self._project(x, self.bias)  # Becomes i, f, o, g in place.
        product = self.buffer("product", (*x.shape[:2], 4 * H), x.dtype)
        h, c, tanh_c = (self._array(name, x, H) for name in ("h", "cells", "tanh"))
        zero = self.buffer("zero state", (*x.shape[:2], H), x.dtype)
        for t in range(self._steps):
            state, cell = (h[:, :, t - 1], c[:, :, t - 1]) if t else (zero, zero)
            gates = a[:, :, t]
            np.add(gates, rows_times_matrix(state, self.weight_h.value, product), out=gates)
            _sigmoid(gates[..., : 3 * H])
            i, f, o, g = (gates[..., block * H : (block + 1) * H] for block in range(4))
            np.tanh(g, out=g)
            np.multiply(f, cell, out=c[:, :, t])
            np.multiply(i, g, out=h[:, :, t])
            np.add(c[:, :, t], h[:, :, t], out=c[:, :, t])
            np.tanh(c[:, :, t], out=tanh_c[:, :, t])
            np.multiply(o, tanh_c[:, :, t], out=h[:, :, t])
        self._gates, self._h, self._c, self._tanh_c = a, h, c, tanh_c
        return self._output(h)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect the gradients of the three parameters, return dx.

        Let e be ∂L/∂h' and k be ∂L/∂c' at a step, on the way back from the last one.  With u = tanh(c'):

            k += e o (1 - u²),               da_o = e u o (1 - o)
            da_i = k g i (1 - i),            da_f = k c f (1 - f),     da_g = k i (1 - g²)
            ∂L/∂c = k f,  ∂L/∂h = da W_hᵀ, which are the next k and part of the next e

        and over all steps dW_x = Σ xᵀ da, dW_h = Σ hᵀ da, db = Σ da, dx = da W_xᵀ.
        """
        H, gates = self.units, self._gates
        outer = self._gradient_of_states(dy)
        da = self._array("da", gates, 4 * H)
        shape = (*gates.shape[:2], H)
        e, k, spare = (self.buffer(name, shape, dy.dtype) for name in ("e", "k", "spare"))
        zero = self.buffer("zero state", shape, dy.dtype)
        e.fill(0)
        k.fill(0)
        for t in range(self._steps - 1, -1, -1):
            np.add(e, outer[:, :, t], out=e)
            i, f, o, g = (gates[:, :, t, block * H : (block + 1) * H] for block in range(4))
            da_i, da_f, da_o, da_g = (da[:, :, t, block * H : (block + 1) * H] for block in range(4))
            u = self._tanh_c[:, :, t]
            np.multiply(e, o, out=da_g)  # Until k is complete, da_g holds what goes into it.
            np.multiply(u, u, out=spare)
            np.subtract(1, spare, out=spare)
            np.multiply(da_g, spare, out=da_g)
            np.add(k, da_g, out=k)
            np.multiply(e, u, out=da_o)
            _times_slope(da_o, o, spare)
            np.multiply(k, g, out=da_i)
            _times_slope(da_i, i, spare)
            np.multiply(k, self._c[:, :, t - 1] if t else zero, out=da_f)
            _times_slope(da_f, f, spare)
            np.multiply(g, g, out=spare)
            np.subtract(1, spare, out=spare)
            np.multiply(k, i, out=da_g)
            np.multiply(da_g, spare, out=da_g)
            np.multiply(k, f, out=k)
            rows_times_transpose(da[:, :, t], self.weight_h.value, e)
        self._collect_sum(self.bias, da)
        self._collect_product(self.weight_h, self._before(self._h), da)
        self._collect_product(self.weight_x, self._x_GNI, da)
        return self._dx(da) if want_dx else None


def _sigmoid(x: Array) -> None:
    """Replace x by (1 + tanh(x/2)) / 2: never overflows, as in `Sigmoid`."""
    np.multiply(x, 0.5, out=x)
    np.tanh(x, out=x)
    np.multiply(x, 0.5, out=x)
    np.add(x, 0.5, out=x)


def _times_slope(d: Array, gate: Array, spare: Array) -> None:
    """Multiply `d` by gate (1 - gate), the derivative of the logistic function by its value."""
    np.subtract(1, gate, out=spare)
    np.multiply(spare, gate, out=spare)
    np.multiply(d, spare, out=d)


def _remember(parameter: Parameter, seed: int) -> NDArray[np.float64]:
    """Return zeros, and ones for the second of four blocks."""
    start = np.zeros(parameter.shape)
    H = len(start) // 4
    start[H : 2 * H] = 1.0
    return start
