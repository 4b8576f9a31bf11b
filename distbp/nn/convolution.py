"""Conv2d and Conv1d: the same small linear function at every place of an image or a sequence.

Channels come last: images are (H, W, C), sequences (L, C), because then a window row is one run of memory
(columns.py) and every product has the channels as its inner or outer dimension.  Weights are stored
(kh, kw, C / groups, O), so that seen as (kh*kw*C, O) they are the matrix that columns are multiplied with.

Each pass walks over the micro-batches and, inside one, over a few samples at a time: lay out their columns,
multiply, go on while they are in the cache.  All of it depends on the shape of a micro-batch alone.

Not here: other forms of the same function (Winograd, sums of shifted products, FFT), which are faster for
some shapes and round differently.  Columns of x are not kept for backward, because they take kh*kw times the
memory of the activations.  With stride 1 the columns of dy give dx, and dW as well where they are not the
larger ones.

Legend: G micro-batches, b samples, n samples of a part, H W places, C channels, O outputs, g groups,
K = kh*kw*C/g, R rows of columns.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from distbp.errors import ConfigError
from distbp.nn import initial as start
from distbp.nn.channels import channel_sums, repeated
from distbp.nn.columns import Columns
from distbp.nn.layer import Array, Context, Initial, Layer, Parameter, Shape
from distbp.nn.product import (
    columns_times_weights,
    columns_transpose_times,
    rows_at_once,
    rows_times_weights_transpose,
)

__all__ = ["Conv1d", "Conv2d"]

Size = int | tuple[int, ...]
Padding = Size | Literal["same"]


class _Convolution(Layer):
    """What Conv1d and Conv2d share: everything, once shapes are those of images."""

    dimensions: int

    def __init__(
        self,
        outputs: int,
        size: Size,
        *,
        stride: Size = 1,
        padding: Padding = 0,
        groups: int = 1,
        bias: bool = True,
        initial: Initial = start.he_normal,
    ) -> None:
        kind = type(self).__name__
        if outputs < 1 or groups < 1 or outputs % groups:
            raise ConfigError(
                f"{kind}: expected outputs that are a multiple of groups, got {outputs!r} and {groups!r}"
            )
        self.outputs = outputs
        self.size = self._lengths("size", size, least=1)
        self.stride = self._lengths("stride", stride, least=1)
        if padding == "same":
            if not all(length % 2 for length in self.size):
                raise ConfigError(f"{kind}: expected odd sizes with padding 'same', got {self.size!r}")
            padding = tuple(length // 2 for length in self.size)
        self.padding = self._lengths("padding", padding, least=0)
        self.groups = groups
        self.has_bias = bias
        self.initial = initial

    def build(self, input_shape: Shape) -> Shape:
        """Create `weight` (kh, kw, C / groups, O), without kh for sequences, and `bias` (O,)."""
        kind, names = type(self).__name__, "HW"[-self.dimensions :]
        if len(input_shape) != self.dimensions + 1 or min(input_shape) < 1:
            raise ConfigError(
                f"{kind}: expected samples of shape ({', '.join(names)}, channels), got {input_shape!r}"
            )
        *image, channels = input_shape
        if channels % self.groups:
            raise ConfigError(f"{kind}: expected channels in {self.groups} equal groups, got {channels!r}")
        if any(n + 2 * p < k for n, p, k in zip(image, self.padding, self.size, strict=True)):
            raise ConfigError(
                f"{kind}: expected samples at least as large as the window {self.size!r} after padding "
                f"{self.padding!r}, got {tuple(image)!r}"
            )
        self._columns = self._columns_of(tuple(image), channels, self.padding, self.stride)
        self._backward_columns = self._columns_for_dx()
        fans = {
            "fan_in": math.prod(self.size) * channels // self.groups,
            "fan_out": math.prod(self.size) * self.outputs // self.groups,
        }
        self.weight = Parameter((*self.size, channels // self.groups, self.outputs), self.initial, **fans)
        self.bias = Parameter((self.outputs,), start.zeros, **fans)
        self._input_shape = input_shape
        self._output_shape = (*self._columns.windows[-self.dimensions :], self.outputs)
        return self._output_shape

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return weight, then bias if there is one."""
        named = [("weight", self.weight), ("bias", self.bias)]
        return named if self.has_bias else named[:1]

    def multiply_adds(self) -> int:
        """Return Ho * Wo * kh * kw * C / groups * O."""
        return math.prod(self._columns.windows) * self.weight.size

    def forward(self, x: Array, context: Context) -> Array:
        """Return y_ijo = b_o + Σ_rsc x_(i·s+r-p)(j·s+s'-p)c W_rsco, zero outside of the image."""
        self._x = x
        y = self.buffer("y", (*x.shape[:2], *self._output_shape), x.dtype)
        columns, weights = self._columns, self._by_group(self.weight.value)
        rows = rows_at_once(math.prod(columns.windows), *weights.shape[1:])
        bias = repeated(self.bias.value, columns.windows[1]) if self.has_bias else None
        for x_bHWC, y_b in zip(self._as_images(x), y, strict=True):
            for part in columns.parts(len(x_bHWC)):
                columns_times_weights(columns.gather(x_bHWC[part]), weights, rows, y_b[part])
                if bias is not None:
                    wide = y_b[part].reshape(-1, len(bias))
                    np.add(wide, bias, out=wide)
        return y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect dW and db of each micro-batch, return dx.

        With X the columns of a micro-batch, one row for each place of the window, y = X W + b, and so, as
        for Linear,

            dW = Xᵀ dy        db = Σ_rows dy        dX = dy Wᵀ

        and dx, because each number of the image stands in several rows, is the sum over the places where it
        was copied to: the transpose of the copying (`Columns.scatter`).

        With stride 1 that sum is a convolution itself.  From y_ijo = Σ x_(i+r-p)(j+s-p)c W_rsco follows

            dx_uvc = Σ_rso dy_(u-r+p)(v-s+p)o W_rsco = Σ_r's'o dy_(u+r'-p')(v+s'-p')o W_(kh-1-r')(kw-1-s')co

        with r' = kh-1-r and p' = kh-1-p: the columns Y of dy times the weights turned by 180 degrees, and
        gathering is cheaper than scattering.  The same columns give dW, turned as well, from the numbers of
        the image as they lie there:

            dW_rsco = Σ_uv x_uvc dy_(u-r+p)(v-s+p)o = (Yᵀ x)_r's'oc

        which saves the columns of x where those of dy are not the larger ones.
        """
        self._dy = dy
        if self.has_bias:
            self.bias.collect(self._bias_leaf)
        back = self._backward_columns
        shares_columns = back is not None and want_dx and back.channels <= self._columns.channels
        if not shares_columns:
            self.weight.collect(self._weight_leaf)
        if not want_dx:
            return None
        dx = self.buffer("dx", self._x.shape, dy.dtype)
        if back is None:
            self._scatter(dy, self._as_images(dx))
            return dx
        dW = self.buffer("dW", (len(dy) if shares_columns else 0, *self.weight.shape), dy.dtype)
        self._convolve_back(back, dy, self._as_images(dx), dW)
        if shares_columns:
            self.weight.collect(lambda lo, hi, out: np.copyto(out, dW[lo:hi]))
        return dx

    def _bias_leaf(self, lo: int, hi: int, out_GO: Array) -> None:
        channel_sums(self._dy[lo:hi].reshape(hi - lo, -1, self.outputs), out_GO)

    def _weight_leaf(self, lo: int, hi: int, out: Array) -> None:
        columns = self._columns
        for x_bHWC, dy_b, tensor in zip(self._as_images(self._x[lo:hi]), self._dy[lo:hi], out, strict=True):
            target_gKO = self._by_group(tensor)
            for part in columns.parts(len(x_bHWC)):
                self._add_weights(columns.gather(x_bHWC[part]), dy_b[part], target_gKO, part.start == 0)

    def _add_weights(self, columns_gRK: Array, images_n: Array, target_gKO: Array, is_first: bool) -> None:
        """Write or add columnsᵀ images of a part, summed over its stacks of rows."""
        groups, num_rows, _ = columns_gRK.shape
        rows = rows_at_once(num_rows // len(images_n), *target_gKO.shape[1:])
        shape = (groups, num_rows // rows, *target_gKO.shape[1:])
        products = self.buffer(f"products of {len(images_n)}", shape, images_n.dtype)
        columns_transpose_times(columns_gRK, images_n, rows, products)
        if is_first:
            np.add.reduce(products, axis=1, out=target_gKO)
        else:
            total = self.buffer("total", target_gKO.shape, images_n.dtype)
            np.add(target_gKO, np.add.reduce(products, axis=1, out=total), out=target_gKO)

    def _scatter(self, dy: Array, dx_GbHWC: Array) -> None:
        """Write dx as the scattered dX = dy Wᵀ."""
        columns, weights = self._columns, self._by_group(self.weight.value)
        places = math.prod(columns.windows)
        for dy_b, dx_bHWC in zip(dy, dx_GbHWC, strict=True):
            for part in columns.parts(len(dx_bHWC)):
                dy_n = dy_b[part]
                shape = (self.groups, len(dy_n) * places, columns.width)
                dX = self.buffer(f"dX of {len(dy_n)}", shape, dy_n.dtype)
                columns.scatter(rows_times_weights_transpose(dy_n, weights, dX), dx_bHWC[part])

    def _convolve_back(self, columns: Columns, dy: Array, dx_GbHWC: Array, dW: Array) -> None:
        """Write dx as the convolution of dy with the weights turned around; and dW, where it has rows."""
        (kh, kw), groups, channels = columns.window, self.groups, self._input_shape[-1] // self.groups
        weights = self.weight.value.reshape(kh, kw, channels, groups, -1)
        turned = self.buffer("turned", (groups, kh, kw, weights.shape[-1], channels), dy.dtype)
        np.copyto(turned, weights[::-1, ::-1].transpose(3, 0, 1, 4, 2))
        turned_gKC = turned.reshape(groups, columns.width, channels)
        dW_turned = self.buffer("dW turned", turned_gKC.shape, dy.dtype)
        rows = rows_at_once(math.prod(columns.windows), *turned_gKC.shape[1:])
        dy_GbHWO = dy.reshape(*dy.shape[:2], *columns.image, self.outputs)
        for g, (dy_bHWO, dx_bHWC, x_bHWC) in enumerate(
            zip(dy_GbHWO, dx_GbHWC, self._as_images(self._x), strict=True)
        ):
            for part in columns.parts(len(dy_bHWO)):
                gathered = columns.gather(dy_bHWO[part])
                columns_times_weights(gathered, turned_gKC, rows, dx_bHWC[part])
                if len(dW):
                    self._add_weights(gathered, x_bHWC[part], dW_turned, part.start == 0)
            if len(dW):
                upright = dW_turned.reshape(turned.shape)[:, ::-1, ::-1].transpose(1, 2, 4, 0, 3)
                np.copyto(dW[g].reshape(weights.shape), upright)

    def _columns_for_dx(self) -> Columns | None:
        """Return the columns of dy for `_convolve_back`, or None where dx must be scattered."""
        forward = self._columns
        (kh, kw), (top, left) = forward.window, forward.padding
        if forward.stride != (1, 1) or top >= kh or left >= kw:
            return None
        padding = (kh - 1 - top, kw - 1 - left)
        return self._columns_of(forward.windows, self.outputs, padding, (1, 1))

    def _columns_of(self, image: Shape, channels: int, padding: Shape, stride: Shape) -> Columns:
        """Return columns under this layer's window; a sequence is an image of height 1."""
        return Columns(
            _pair(image, 1),
            channels // self.groups,
            window=_pair(self.size, 1),
            stride=_pair(stride, 1),
            padding=_pair(padding, 0),
            groups=self.groups,
        )

    def _as_images(self, x: Array) -> Array:
        """Return a view of inputs as (G, b, H, W, C)."""
        return x.reshape(*x.shape[:2], *self._columns.image, self._input_shape[-1])

    def _by_group(self, tensor: Array) -> Array:
        """Return a view (groups, K, O / groups) of a tensor of the weights' shape."""
        split = tensor.reshape(self._columns.width, self.groups, -1)
        return split.transpose(1, 0, 2)

    def _lengths(self, name: str, value: Size, *, least: int) -> tuple[int, ...]:
        """Return one length for each dimension; ConfigError if they are not that."""
        lengths = (value,) * self.dimensions if isinstance(value, int) else tuple(value)
        if len(lengths) != self.dimensions or not all(isinstance(n, int) and n >= least for n in lengths):
            raise ConfigError(
                f"{type(self).__name__}: {name}: expected {self.dimensions} whole numbers >= {least}, or one "
                f"for all, got {value!r}"
            )
        return lengths


class Conv2d(_Convolution):
    """Convolution of images (H, W, C) to (Ho, Wo, outputs).

    `size`, `stride` and `padding` (zeros around the image; "same": size // 2) are one number, or one for
    height and one for width.  With `groups` each group of outputs sees one group of channels.  Ho is
    (H + 2 padding - size) // stride + 1; rows that the last window does not reach are ignored.
    """

    dimensions = 2


class Conv1d(_Convolution):
    """Convolution of sequences (L, C) to (Lo, outputs); options are those of Conv2d."""

    dimensions = 1


def _pair(lengths: Shape, filler: int) -> tuple[int, int]:
    """Return height and width; a sequence has the height `filler`."""
    return (filler, lengths[0]) if len(lengths) == 1 else (lengths[0], lengths[1])
