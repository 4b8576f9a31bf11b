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
large.  One micro-batch is worked on at a time, because it is small enough for the cache.

Legend: G micro-batches, P values of a channel in each (samples times places), C channels, R rows of L numbers
(channels.py): R * L = P * C.
"""

from __future__ import annotations

import math

import numpy as np

from distbp.errors import ConfigError
from distbp.nn import initial as start
from distbp.nn.channels import channel_sums, fold, repeated
from distbp.nn.layer import Array, Context, Layer, Parameter, Shape, Statistic

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
        self._fold = fold(P, C)
        self._centred = self.buffer("centred", (G, P // self._fold, self._fold * C), x.dtype)
        mean = channel_sums(x.reshape(G, P, C), self.buffer("mean", (G, C), x.dtype))
        np.multiply(mean, 1.0 / P, out=mean)
        variance = self.buffer("variance", (G, C), x.dtype)
        self._scale = self.buffer("scale", (G, C), x.dtype)
        square = self.buffer("square", self._centred.shape[1:], x.dtype)
        x_GRL, y_GRL = x.reshape(self._centred.shape), y.reshape(self._centred.shape)
        for g in range(G):
            centred = self._centred[g]
            np.subtract(x_GRL[g], repeated(mean[g], self._fold), out=centred)
            np.multiply(centred, centred, out=square)
            channel_sums(square.reshape(1, P, C), variance[g : g + 1])
            variance[g] *= 1.0 / P
            self._scale[g] = 1.0 / np.sqrt(variance[g] + self.epsilon)
            np.multiply(centred, repeated(self.gain.value * self._scale[g], self._fold), out=y_GRL[g])
            np.add(y_GRL[g], repeated(self.bias.value, self._fold), out=y_GRL[g])
        self._mean.observe(mean)
        self._variance.observe(np.multiply(variance, P / (P - 1)))
        return y

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
        P = math.prod(dy.shape[1:-1])
        dy_GRL = dy.reshape(self._centred.shape)
        self._dbias = channel_sums(dy.reshape(G, P, C), self.buffer("dbias", (G, C), dy.dtype))
        self._dgain = self.buffer("dgain", (G, C), dy.dtype)
        product = self.buffer("square", self._centred.shape[1:], dy.dtype)
        dx = self.buffer("dx", dy.shape, dy.dtype) if want_dx else None
        for g in range(G):
            np.multiply(dy_GRL[g], self._centred[g], out=product)
            channel_sums(product.reshape(1, P, C), self._dgain[g : g + 1])
            self._dgain[g] *= self._scale[g]
            if dx is not None:
                self._write_dx(g, dy_GRL[g], dx[g].reshape(product.shape), product)
        self.bias.collect(lambda lo, hi, out: np.copyto(out, self._dbias[lo:hi]))
        self.gain.collect(lambda lo, hi, out: np.copyto(out, self._dgain[lo:hi]))
        return dx

    def _write_dx(self, g: int, dy_RL: Array, dx_RL: Array, spare_RL: Array) -> None:
        """Write dx of micro-batch g as dy a + (x - mean) b + c, with vectors of channels a, b, c."""
        P = dy_RL.size // len(self._scale[g])
        a = self.gain.value * self._scale[g]
        b = -a * self._scale[g] * self._dgain[g] * (1.0 / P)
        c = -a * self._dbias[g] * (1.0 / P)
        np.multiply(dy_RL, repeated(a, self._fold), out=dx_RL)
        np.multiply(self._centred[g], repeated(b, self._fold), out=spare_RL)
        np.add(dx_RL, spare_RL, out=dx_RL)
        np.add(dx_RL, repeated(c, self._fold), out=dx_RL)
