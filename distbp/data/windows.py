"""Windows of a sequence of tokens: row i is the `length` tokens from position `i * stride + shift` on.

The tokens are held once, in the smallest type that fits, and windows are copied out of them when they are
asked for; so samples, and targets that are the samples shifted by one, cost one or two bytes for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from distbp.data.rows import Array, Packer, Rows, Unpacker

__all__ = ["TokenWindows"]


class TokenWindows(Rows):
    """All `count` windows of `tokens` (n,), as int64 (count, length)."""

    def __init__(self, tokens: Array, *, count: int, length: int, stride: int, shift: int) -> None:
        assert (count - 1) * stride + shift + length <= len(tokens), "a window would end behind the tokens"
        self._tokens = tokens
        self._stride = stride
        self._shift = shift
        self._windows = sliding_window_view(tokens, length)
        self.shape = (count, length)
        self.dtype = np.dtype(np.int64)

    def take(self, indices: NDArray[np.int64], out: Array | None = None) -> Array:
        """Return the windows; see `Rows.take`."""
        found = self._windows[indices * self._stride + self._shift]
        if out is None:
            return found.astype(np.int64)
        np.copyto(out, found)
        return out

    def describe(self, packer: Packer) -> dict[str, Any]:
        """Return the description; see `Rows.describe`."""
        return {
            "tokens": packer.array(self._tokens),
            "count": self.shape[0],
            "length": self.shape[1],
            "stride": self._stride,
            "shift": self._shift,
        }

    @classmethod
    def restore(cls, description: Mapping[str, Any], unpacker: Unpacker) -> TokenWindows:
        """Return what was described; see `Rows.restore`."""
        numbers = {name: description[name] for name in ("count", "length", "stride", "shift")}
        return cls(unpacker.array(description["tokens"]), **numbers)
