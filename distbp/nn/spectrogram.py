"""LogSpectrogram: from a sound, numbers in order of time, to a picture of its tones over time.

A window of `window` numbers is moved along the sound by `hop`, and in each place the strength of `bins` tones
is measured: with f_k the tone in cycles for each number, and w_k a bell curve (that of Hann) in the middle of
the window, long enough for `cycles` of the tone,

    a_k = Σ_n w_kn x_n cos 2π f_k n,   b_k = Σ_n w_kn x_n sin 2π f_k n,   y_k = log(a_k² + b_k² + floor)

The tones are spaced evenly in pitch, from `lowest` to `highest`, and each is told from its neighbours by the
same interval, so that a pattern of partials, higher or lower, is the same pattern elsewhere on the axis: what
convolutions are good at (Brown, "Calculation of a constant Q spectral transform", J. Acoust. Soc. Am. 89,
1991).  Low tones get no more than the window.

All tones are two matrix products with fixed matrices, which also gives the derivative; a fast Fourier
transform would have its tones evenly in frequency, most of them where hearing has few.  It has no parameters.

Legend: L numbers in a sound, N in a window, T places of the window, K tones.
"""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from distbp.errors import ConfigError
from distbp.nn.layer import Array, Context, Layer, Shape
from distbp.nn.product import rows_times_matrix, rows_times_transpose

__all__ = ["LogSpectrogram"]


class LogSpectrogram(Layer):
    """(L,) becomes (T, K, 1): an image of the strength of K tones in T places."""

    def __init__(
        self,
        window: int = 2048,
        hop: int = 1024,
        bins: int = 288,
        *,
        lowest: float = 0.0075,
        highest: float = 0.48,
        cycles: float = 64.0,
        floor: float = 1e-6,
    ) -> None:
        if not (window >= 2 and hop >= 1 and bins >= 2):
            raise ConfigError(
                f"LogSpectrogram: expected a window and bins >= 2 and a hop >= 1, got {window!r}, {bins!r}, "
                f"{hop!r}"
            )
        if not (0 < lowest < highest <= 0.5 and cycles >= 2 and floor > 0):
            raise ConfigError(
                "LogSpectrogram: expected 0 < lowest < highest <= 0.5 cycles for each number, cycles >= 2 "
                f"and floor > 0, got {lowest!r}, {highest!r}, {cycles!r}, {floor!r}"
            )
        self.window = window
        self.hop = hop
        self.bins = bins
        self.lowest = lowest
        self.highest = highest
        self.cycles = cycles
        self.floor = floor

    def build(self, input_shape: Shape) -> Shape:
        """Make the two matrices; ConfigError for samples that are no sounds, or shorter than the window."""
        if len(input_shape) != 1 or input_shape[0] < self.window:
            raise ConfigError(
                f"LogSpectrogram: expected sounds (length,) of at least {self.window} numbers, got samples "
                f"of shape {input_shape!r}"
            )
        self._length = input_shape[0]
        self._places = (self._length - self.window) // self.hop + 1
        self._made: dict[np.dtype[np.floating], Array] = {}
        return (self._places, self.bins, 1)

    def multiply_adds(self) -> int:
        """Return those of the two products with (N, K)."""
        return 2 * self._places * self.window * self.bins

    def forward(self, x: Array, context: Context) -> Array:
        """Return log(a² + b² + floor) in every place."""
        shape = (*x.shape[:2], self._places, self.window)
        frames = self.buffer("frames", shape, x.dtype)
        np.copyto(frames, sliding_window_view(x, self.window, axis=-1)[:, :, :: self.hop])
        rows = frames.reshape(x.shape[0], -1, self.window)
        parts = self.buffer("parts", (*rows.shape[:2], 2 * self.bins), x.dtype)
        self._parts = rows_times_matrix(rows, self.tones(x.dtype), parts)
        squares = self.buffer("squares", parts.shape, x.dtype)
        np.square(parts, out=squares)
        power = self.buffer("power", (*rows.shape[:2], self.bins), x.dtype)
        np.add(squares[..., : self.bins], squares[..., self.bins :], out=power)
        np.add(power, x.dtype.type(self.floor), out=power)
        self._power = power
        y = np.log(power, out=self.buffer("y", power.shape, x.dtype))
        return y.reshape(*x.shape[:2], self._places, self.bins, 1)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx, the frames of which are da Cᵀ + db Sᵀ, added where windows lie over each other.

        ∂y/∂a = 2 a / (a² + b² + floor), and the same for b; a = frame C and b = frame S, with the columns of
        C and S the windowed cosines and sines.
        """
        if not want_dx:
            return None
        G, b = dy.shape[:2]
        ratio = self.buffer("ratio", self._power.shape, dy.dtype)
        np.divide(dy.reshape(self._power.shape), self._power, out=ratio)
        np.multiply(ratio, dy.dtype.type(2), out=ratio)
        dparts = self.buffer("dparts", self._parts.shape, dy.dtype)
        for half in (slice(0, self.bins), slice(self.bins, None)):
            np.multiply(self._parts[..., half], ratio, out=dparts[..., half])
        rows = self.buffer("dframes", (G, b * self._places, self.window), dy.dtype)
        frames = rows_times_transpose(dparts, self.tones(dy.dtype), rows).reshape(G, b, self._places, -1)
        dx = self.buffer("dx", (G, b, self._length), dy.dtype)
        dx.fill(0)
        for place in range(self._places):
            dx[..., place * self.hop : place * self.hop + self.window] += frames[:, :, place]
        return dx

    def tones(self, dtype: np.dtype[np.floating]) -> Array:
        """Return the cosines under their bells, and behind them the sines: (N, 2 K)."""
        if dtype not in self._made:
            n = np.arange(self.window)[:, np.newaxis] - (self.window - 1) / 2
            tones = np.exp(np.linspace(np.log(self.lowest), np.log(self.highest), self.bins))
            lengths = np.minimum(self.cycles / tones, self.window)
            bells = np.where(np.abs(n) < lengths / 2, 0.5 + 0.5 * np.cos(2 * np.pi * n / lengths), 0.0)
            # A sine of height 1 at a tone gives a² + b² = 1.
            bells *= 2 / bells.sum(axis=0)
            angles = 2 * np.pi * n * tones
            matrix = np.concatenate([bells * np.cos(angles), bells * np.sin(angles)], axis=1)
            self._made[dtype] = np.ascontiguousarray(matrix.astype(dtype))
        return self._made[dtype]
