"""Columns: what a convolution window sees, laid out as the rows of a matrix (im2col), and the way back.

For images (n, H, W, C) and a window of kh x kw, row (n, i, j) of the matrix holds the kh*kw*C numbers that
the window sees at output place (i, j), so that a convolution is one matrix product.  Channels come last, so a
window row is kw*C neighbouring numbers, and it is copied as one element of a NumPy void type: one memcpy
instead of a loop over short runs.

Grouped convolutions have a leading axis of groups, because each group has a matrix of its own.  Only a few
samples are laid out at a time, so many that the matrix stays in the second-level cache; how many depends on
shapes alone, and never reaches across micro-batches because the caller passes the samples of one.

It knows nothing of weights and derivatives; it is the linear map and its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import DTypeLike

from distbp.nn.layer import Array

__all__ = ["Columns"]

MATRIX_ELEMENTS = 1 << 18
"""Size that a matrix of columns should not exceed: 1 MiB of float32, half of a usual second-level cache."""

_Pair = tuple[int, int]


class Columns:
    """Columns of images (H, W, groups * C) under a window, with buffers that are made once.

    `windows` (Ho, Wo) are the places of the window.  `C` counts the channels of one group.
    """

    def __init__(
        self, image: _Pair, channels: int, *, window: _Pair, stride: _Pair, padding: _Pair, groups: int
    ) -> None:
        self.image = image
        self.channels = channels
        self.groups = groups
        self.window = window
        self.stride = stride
        self.padding = padding
        self.padded = (image[0] + 2 * padding[0], image[1] + 2 * padding[1])
        self.windows = (
            (self.padded[0] - window[0]) // stride[0] + 1,
            (self.padded[1] - window[1]) // stride[1] + 1,
        )
        self.width = math.prod(window) * channels
        per_sample = math.prod(self.windows) * self.width * groups
        self._most_samples = max(1, MATRIX_ELEMENTS // max(per_sample, 1))
        self._made: dict[tuple[int, np.dtype[np.generic]], _Buffers] = {}

    def parts(self, samples: int) -> Iterator[slice]:
        """Yield slices that cover `samples` samples in order, each small enough to be laid out at once."""
        for start in range(0, samples, self._most_samples):
            yield slice(start, min(start + self._most_samples, samples))

    def gather(self, x_nHWC: Array) -> Array:
        """Return the columns of a part, (groups, n * Ho * Wo, kh * kw * C); they hold until the next call."""
        made = self._buffers(len(x_nHWC), x_nHWC.dtype)
        np.copyto(made.inside, self._by_group(x_nHWC))
        for target, source in made.copies:
            np.copyto(target, source)
        return made.columns

    def scatter(self, columns: Array, out_nHWC: Array) -> None:
        """Write the transpose of `gather`: each place of the image gets the sum of what windows see there."""
        made = self._buffers(len(out_nHWC), out_nHWC.dtype)
        (kh, kw), (sh, sw), (Ho, Wo) = self.window, self.stride, self.windows
        seen = columns.reshape(self.groups, -1, Ho, Wo, kh, kw, self.channels)
        image = made.sums
        image.fill(0)
        for r in range(kh):
            for c in range(kw):
                places = image[:, :, r : r + sh * Ho : sh, c : c + sw * Wo : sw]
                np.add(places, seen[:, :, :, :, r, c], out=places)
        np.copyto(self._by_group(out_nHWC), self._inside(image))

    def _by_group(self, x_nHWC: Array) -> Array:
        """Return a view (groups, n, H, W, C) of images (n, H, W, groups * C)."""
        split = x_nHWC.reshape(len(x_nHWC), *self.image, self.groups, self.channels)
        return split.transpose(3, 0, 1, 2, 4)

    def _inside(self, padded: Array) -> Array:
        """Return the view of padded images without their margin."""
        (top, left), (height, width) = self.padding, self.image
        return padded[:, :, top : top + height, left : left + width]

    def _buffers(self, samples: int, dtype: DTypeLike) -> _Buffers:
        """Return the buffers for that many samples; there are two sizes at most in a steady step."""
        key = (samples, np.dtype(dtype))
        if key not in self._made:
            self._made[key] = _Buffers(self, samples, key[1])
        return self._made[key]


class _Buffers:
    """Padded images and their columns for a number of samples, and the copies from one to the other."""

    def __init__(self, shape: Columns, samples: int, dtype: np.dtype[np.generic]) -> None:
        (kh, kw), (sh, sw), (Ho, Wo) = shape.window, shape.stride, shape.windows
        (Hp, Wp), channels, width = shape.padded, shape.channels, shape.width
        self.padded = np.zeros((shape.groups, samples, Hp, Wp, channels), dtype)
        self.inside = shape._inside(self.padded)
        self.sums = np.zeros_like(self.padded)
        self.columns = np.zeros((shape.groups, samples * Ho * Wo, width), dtype)
        size = dtype.itemsize
        run = np.dtype(f"V{kw * channels * size}")
        places = (shape.groups * samples, Ho, Wo)
        # Strides in bytes.  Sources overlap each other, which reading allows.
        step_in = tuple(size * channels * step for step in (Hp * Wp, sh * Wp, sw))
        step_out = tuple(size * width * step for step in (Ho * Wo, Wo, 1))
        self.copies = [
            (
                np.ndarray(places, run, self.columns.data, row * run.itemsize, step_out),
                np.ndarray(places, run, self.padded.data, row * Wp * channels * size, step_in),
            )
            for row in range(kh)
        ]
