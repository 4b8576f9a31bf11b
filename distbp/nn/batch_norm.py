"""BatchNorm: each channel of a micro-batch is shifted and scaled to mean 0 and variance 1.

S. Ioffe and C. Szegedy, "Batch normalization", ICML 2015.  The batch whose statistics count is the
micro-batch, whatever the global batch is: that is what keeps the bits free of the number of workers, and it
is known as ghost batch normalization (E. Hoffer, I. Hubara and D. Soudry, NeurIPS 2017), whose gradients are
noisier for small micro-batches and generalise as well or better.  So the size of a micro-batch is part of
what the network computes; below some eight samples the noise of the statistics hurts.

Channels come last and everything before them is averaged over, so one class serves images, sequences and
vectors.  Evaluation uses the running averages of mean and variance (layer.py, `Statistic`), with the rate and
the unbiased variance that PyTorch takes.

The variance comes from a second pass over x - mean: the one-pass formula loses all digits when the mean is
large.  Every pass goes over a micro-batch in blocks of rows that stay in the cache, and x - mean is computed
again where it is needed: that takes less time than to write it to memory and to read it from there.

Legend: G micro-batches, P values of a channel in each (samples times places), C channels, R rows of L numbers
(channels.py): R * L = P * C, K blocks.
"""

from __future__ import annotations

import math

import numpy as np

from distbp.errors import ConfigError
from distbp.nn import initial as start
from distbp.nn.channels import blocks_of_rows, channel_sums, fold, repeated
from distbp.nn.layer import Array, Context, Layer, Parameter, Shape, Statistic
from distbp.nn.product import sum_of_rows

__all__ = ["BatchNorm"]


class BatchNorm(Layer):
    """y = gain (x - mean) / sqrt(variance + epsilon) + bias, for samples (..., C).

    `rate` is the share of a step in the running averages.
    """

    def __init__(self, *, rate: float = 0.1, epsilon: float = 1e-5) -> None:
        if not 0.0 < rate <= 1.0:
            raise ConfigError(f"BatchNorm: rate: expected a number in (0, 1], got {rate!r}")
        if not 0.0 < epsilon < math.inf:
            raise ConfigError(f"BatchNorm: epsilon: expected a finite number > 0, got {epsilon!r}")
        self.rate = rate
        self.epsilon = epsilon

    def build(self, input_shape: Shape) -> Shape:
        """Create `gain` (C,) and `bias` (C,), and the statistics `mean` and `variance` (C,)."""
        if not input_shape or min(input_shape) < 1:
            raise ConfigError(f"BatchNorm: expected samples of shape (..., channels), got {input_shape!r}")
        shape = input_shape[-1:]
        self.gain = Parameter(shape, start.ones, fan_in=1, fan_out=1)
        self.bias = Parameter(shape, start.zeros, fan_in=1, fan_out=1)
        self._mean = Statistic(shape, start=0.0, rate=self.rate)
        self._variance = Statistic(shape, start=1.0, rate=self.rate)
        return input_shape

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return gain, then bias."""
        return [("gain", self.gain), ("bias", self.bias)]

    def statistics(self) -> list[tuple[str, Statistic]]:
        """Return mean, then variance."""
        return [("mean", self._mean), ("variance", self._variance)]

    def forward(self, x: Array, context: Context) -> Array:
        """Return y, with the statistics of each micro-batch in training, else with the running averages.

        Raises ConfigError in training where a micro-batch has a single value for each channel, because the
        output would be the bias whatever x is.
        """
        y = self.buffer("y", x.shape, x.dtype)
        if not context.training:
            return self._apply_averages(x, y)
        G, C = x.shape[0], x.shape[-1]
        P = math.prod(x.shape[1:-1])
        if P < 2:
            raise ConfigError(
                f"BatchNorm ({self._place}): expected at least two values for each channel in a micro-batch, "
                f"got one; set train.micro_batch to 2 or more"
            )
        self._x, self._fold = x, fold(P, C)
        self._mean_GC = channel_sums(x.reshape(G, P, C), self.buffer("mean", (G, C), x.dtype))
        np.multiply(self._mean_GC, 1.0 / P, out=self._mean_GC)
        variance = self.buffer("variance", (G, C), x.dtype)
        self._scale = self.buffer("scale", (G, C), x.dtype)
        for g in range(G):
            np.multiply(self._sum_of_squares(g), 1.0 / P, out=variance[g])
            self._scale[g] = 1.0 / np.sqrt(variance[g] + self.epsilon)
            self._write_y(g, y)
        self._mean.observe(self._mean_GC)
        self._variance.observe(np.multiply(variance, P / (P - 1)))
        return y

    def _rows(self, x: Array, g: int) -> Array:
        """Return a view of micro-batch g of an array like x as (R, L)."""
        x_RL: Array = x[g].reshape(-1, self._fold * x.shape[-1])
        return x_RL

    def _sum_of_squares(self, g: int) -> Array:
        """Return Σ_p (x_p - mean)² of each channel, (C,)."""
        x_RL = self._rows(self._x, g)
        mean = repeated(self._mean_GC[g], self._fold)
        blocks = blocks_of_rows(*x_RL.shape)
        sums = self.buffer("block sums", (len(blocks), x_RL.shape[1]), x_RL.dtype)
        for block, total in zip(blocks, sums, strict=True):
            centred = self._spare(x_RL[block])
            np.subtract(x_RL[block], mean, out=centred)
            np.multiply(centred, centred, out=centred)
            sum_of_rows(centred[None], total[None])
        return self._of_channels(sums)

    def _write_y(self, g: int, y: Array) -> None:
        """Write y of micro-batch g."""
        x_RL, y_RL = self._rows(self._x, g), self._rows(y, g)
        mean, bias = repeated(self._mean_GC[g], self._fold), repeated(self.bias.value, self._fold)
        factor = repeated(self.gain.value * self._scale[g], self._fold)
        for block in blocks_of_rows(*x_RL.shape):
            out = np.subtract(x_RL[block], mean, out=y_RL[block])
            np.multiply(out, factor, out=out)
            np.add(out, bias, out=out)

    def _spare(self, block: Array) -> Array:
        """Return scratch of the shape of a block; only the last one may be shorter."""
        return self.buffer(f"block of {len(block)}", block.shape, block.dtype)

    def _of_channels(self, sums_KL: Array) -> Array:
        """Return the sums of each channel, (C,), from the sums of the rows' columns in each block."""
        total: Array = np.add.reduce(sums_KL.reshape(-1, sums_KL.shape[1] // self._fold), axis=0)
        return total

    def _apply_averages(self, x: Array, y: Array) -> Array:
        """Write gain (x - mean) / sqrt(variance + epsilon) + bias with the running averages into `y`."""
        scale = self.gain.value / np.sqrt(self._variance.average + self.epsilon)
        shift = self.bias.value - self._mean.average * scale
        np.multiply(x, scale.astype(x.dtype), out=y)
        np.add(y, shift.astype(x.dtype), out=y)
        return y

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect dbias and dgain of each micro-batch, return dx.

        For one channel with P values, s = 1 / sqrt(variance + epsilon), z_p = (x_p - mean) s and
        y_p = gain z_p + bias:

            dbias = Σ_p dy_p        dgain = Σ_p dy_p z_p        dz_p = gain dy_p

        mean and variance depend on every x_q: ∂mean/∂x_q = 1/P and, because Σ_p (x_p - mean) = 0,
        ∂variance/∂x_q = 2/P (x_q - mean), so ∂s/∂x_q = -s³/P (x_q - mean) = -s² z_q / P.  With
        z_p = (x_p - mean) s,

            ∂z_p/∂x_q = s ([p = q] - 1/P) - (x_p - mean) s² z_q / P = s ([p = q] - 1/P - z_p z_q / P)

            dx_q = Σ_p gain dy_p ∂z_p/∂x_q = gain s (dy_q - dbias/P - z_q dgain/P)
        """
        G, C = dy.shape[0], dy.shape[-1]
        self._dbias = self.buffer("dbias", (G, C), dy.dtype)
        self._dgain = self.buffer("dgain", (G, C), dy.dtype)
        dx = self.buffer("dx", dy.shape, dy.dtype) if want_dx else None
        for g in range(G):
            self._sum_gradients(g, dy)
            if dx is not None:
                self._write_dx(g, dy, dx)
        self.bias.collect(lambda lo, hi, out: np.copyto(out, self._dbias[lo:hi]))
        self.gain.collect(lambda lo, hi, out: np.copyto(out, self._dgain[lo:hi]))
        return dx

    def _sum_gradients(self, g: int, dy: Array) -> None:
        """Write dbias and dgain of micro-batch g."""
        x_RL, dy_RL = self._rows(self._x, g), self._rows(dy, g)
        mean = repeated(self._mean_GC[g], self._fold)
        blocks = blocks_of_rows(*x_RL.shape)
        sums = self.buffer("gradient sums", (2, len(blocks), x_RL.shape[1]), dy.dtype)
        for block, of_dy, of_product in zip(blocks, *sums, strict=True):
            product = np.subtract(x_RL[block], mean, out=self._spare(x_RL[block]))
            np.multiply(product, dy_RL[block], out=product)
            sum_of_rows(dy_RL[block][None], of_dy[None])
            sum_of_rows(product[None], of_product[None])
        self._dbias[g] = self._of_channels(sums[0])
        np.multiply(self._of_channels(sums[1]), self._scale[g], out=self._dgain[g])

    def _write_dx(self, g: int, dy: Array, dx: Array) -> None:
        """Write dx of micro-batch g as dy a + (x - mean) b + c, with vectors of channels a, b, c."""
        x_RL, dy_RL, dx_RL = (self._rows(array, g) for array in (self._x, dy, dx))
        P = x_RL.size // len(self._scale[g])
        factor = self.gain.value * self._scale[g]
        mean, a = repeated(self._mean_GC[g], self._fold), repeated(factor, self._fold)
        b = repeated(-factor * self._scale[g] * self._dgain[g] * (1.0 / P), self._fold)
        c = repeated(-factor * self._dbias[g] * (1.0 / P), self._fold)
        for block in blocks_of_rows(*x_RL.shape):
            spare, out = self._spare(x_RL[block]), dx_RL[block]
            np.subtract(x_RL[block], mean, out=spare)
            np.multiply(spare, b, out=spare)
            np.multiply(dy_RL[block], a, out=out)
            np.add(out, spare, out=out)
            np.add(out, c, out=out)
