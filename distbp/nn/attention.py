"""Multi-head self-attention (Vaswani et al., NeurIPS 2017), with a causal or any other fixed mask.

Legend: T positions, D width, H heads, K = D / H the width of a head; i counts queries, j keys.

Heads are views: q, k, v of all heads lie side by side in the output of one Linear, and the products read them
where they are.  Every product belongs to one sample and one head, so no stacking changes its shape.

The queries go in blocks, and each block stops at the last key that one of its queries sees: with a causal
mask that saves most of the upper triangle.  The weights of all heads are kept from forward to backward: T²
numbers for each head and sample, which is what bounds the context.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from distbp.errors import ConfigError
from distbp.nn import initial as start
from distbp.nn.channels import blocks_of_rows
from distbp.nn.layer import Array, Context, Initial, Layer, Parameter, Shape
from distbp.nn.linear import Linear
from distbp.nn.product import rows_times_matrix, rows_times_transpose, transpose_times_rows

__all__ = ["MultiHeadAttention"]

BLOCK = 64
"""Queries (and keys) in a block: smaller products cost more calls than they save work."""


class MultiHeadAttention(Layer):
    """y = concat_h(softmax(q_h k_hᵀ / √K) v_h) W_out for samples (T, D), where q, k, v = x W_qkv.

    With `causal`, position i sees the positions j <= i.  `mask[i][j]` says whether i may see j.  `initial`
    starts both weights, `initial_out` that of the output where it should be another.
    """

    def __init__(
        self,
        heads: int,
        *,
        causal: bool = False,
        mask: Sequence[Sequence[bool]] | None = None,
        initial: Initial = start.lecun_normal,
        initial_out: Initial | None = None,
    ) -> None:
        if heads < 1:
            raise ConfigError(f"MultiHeadAttention: expected at least one head, got {heads!r}")
        self.heads = heads
        self.causal = causal
        self.mask = None if mask is None else tuple(tuple(bool(seen) for seen in row) for row in mask)
        self.qkv = Linear(1, initial=initial)
        self.out = Linear(1, initial=initial_out or initial)

    def build(self, input_shape: Shape) -> Shape:
        """Create `qkv` (D, 3 D) and `out` (D, D), each with a bias."""
        if len(input_shape) != 2 or min(input_shape) < 1 or input_shape[1] % self.heads:
            raise ConfigError(
                f"MultiHeadAttention: expected samples of shape (positions, width) with a width that is a "
                f"multiple of {self.heads} heads, got {input_shape!r}"
            )
        T, D = self._shape = input_shape
        self._scale = 1.0 / math.sqrt(D // self.heads)
        self.qkv.outputs, self.out.outputs = 3 * D, D
        self.qkv.build(input_shape)
        seen_TT = self._seen(T)
        self._forbidden_TT = np.where(seen_TT, 0.0, -np.inf)
        self._query_blocks = _query_blocks(seen_TT)
        self._key_blocks = _key_blocks(seen_TT)
        return self.out.build(input_shape)

    def _seen(self, T: int) -> Array:
        """Return which position sees which, (T, T); ConfigError for a mask that does not fit."""
        seen = np.ones((T, T), np.bool_)
        if self.mask is not None:
            if len(self.mask) != T or any(len(row) != T for row in self.mask):
                raise ConfigError(
                    f"MultiHeadAttention: expected a mask of {T} rows of {T}, got {len(self.mask)} rows of "
                    f"{sorted({len(row) for row in self.mask})}"
                )
            seen &= np.array(self.mask, np.bool_)
        if self.causal:
            seen = np.tril(seen)
        blind = np.flatnonzero(~seen.any(axis=1))
        if blind.size:
            raise ConfigError(
                f"MultiHeadAttention: expected every position to see one, position {blind[0]} sees none"
            )
        return seen

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return those of `qkv`, then those of `out`."""
        return [
            (f"{child}.{name}", parameter)
            for child, layer in self.children()
            for name, parameter in layer.parameters()
        ]

    def children(self) -> list[tuple[str, Layer]]:
        """Return the two Linear layers."""
        return [("qkv", self.qkv), ("out", self.out)]

    def multiply_adds(self) -> int:
        """Return 4 T D² for the weights and, for attention, 2 K for each pair that a block computes."""
        pairs = sum((stop - first) * keys for first, stop, keys, _ in self._query_blocks)
        return self.qkv.multiply_adds() + self.out.multiply_adds() + 2 * pairs * self._shape[1]

    def forward(self, x: Array, context: Context) -> Array:
        """Return the attended values through the output weights."""
        self._qkv = self.qkv.forward(x, context)
        self._attended = self.buffer("attended", x.shape, x.dtype)
        q, k, v = self._heads_of(self._qkv)
        (o,) = self._heads_of(self._attended)
        P = self.buffer("P", (*q.shape[:3], q.shape[2]), x.dtype)
        for part in blocks_of_rows(len(P), P[0].size):
            self._attend(q[part], k[part], v[part], P[part], o[part])
        return self.out.forward(self._attended, context)

    def _attend(self, q: Array, k: Array, v: Array, P: Array, o: Array) -> None:
        """Write P and o of a few samples, (n, H, T, ...), which stay in the cache."""
        row = self.buffer(f"row of {len(P)}", (*P.shape[:3], 1), P.dtype)
        for first, stop, keys, masked in self._query_blocks:
            S, r = P[..., first:stop, :keys], row[..., first:stop, :]
            rows_times_transpose(q[..., first:stop, :], k[..., :keys, :], S)
            np.multiply(S, self._scale, out=S)
            if masked < keys:
                hidden = self._forbidden_TT[first:stop, masked:keys].astype(P.dtype)
                np.add(S[..., masked:], hidden, out=S[..., masked:])
            # The maximum is taken off first, so that no exponential overflows.
            np.maximum.reduce(S, axis=-1, keepdims=True, out=r)
            np.subtract(S, r, out=S)
            np.exp(S, out=S)
            np.add.reduce(S, axis=-1, keepdims=True, out=r)
            np.divide(S, r, out=S)
            rows_times_matrix(S, v[..., :keys, :], o[..., first:stop, :])

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect the leaves of both Linear layers, return dx.

        For one head, with S = q kᵀ / √K, P = softmax(S) by rows and o = P v:

            dv = Pᵀ do,   dP = do vᵀ,
            dS_ij = P_ij (dP_ij - Σ_l dP_il P_il) = P_ij (dP_ij - do_i · o_i),   as in Softmax,
            dq = dS k / √K,   dk = dSᵀ q / √K.

        The row sum is do_i · o_i because Σ_l P_il (do_i · v_l) = do_i · Σ_l P_il v_l.  Where attention is
        forbidden P is 0, and so is dS.
        """
        do_all = self.out.backward(dy)
        assert do_all is not None, "a Linear layer was asked for dx and returned None"
        q, k, v = self._heads_of(self._qkv)
        (do,), (o,) = self._heads_of(do_all), self._heads_of(self._attended)
        P = self.buffer("P", (*q.shape[:3], q.shape[2]), dy.dtype)
        dots = self.buffer("dots", (*P.shape[:3], 1), dy.dtype)
        np.vecdot(do, o, out=dots[..., 0])
        dqkv = self.buffer("dqkv", self._qkv.shape, dy.dtype)
        dq, dk, dv = self._heads_of(dqkv)
        for part in blocks_of_rows(len(P), P[0].size):
            given = q[part], k[part], v[part], do[part], dots[part]
            self._write_gradients(*given, P[part], (dq[part], dk[part], dv[part]))
        return self.qkv.backward(dqkv, want_dx)

    def _write_gradients(
        self, q: Array, k: Array, v: Array, do: Array, dots: Array, P: Array, out: tuple[Array, ...]
    ) -> None:
        """Write dq, dk, dv of a few samples, which stay in the cache; `dots` are the do_i · o_i."""
        dq, dk, dv = out
        dS = self.buffer(f"dS of {len(P)}", P.shape, P.dtype)
        for first, stop, keys, _ in self._query_blocks:
            d = dS[..., first:stop, :keys]
            rows_times_transpose(do[..., first:stop, :], v[..., :keys, :], d)
            np.subtract(d, dots[..., first:stop, :], out=d)
            np.multiply(d, P[..., first:stop, :keys], out=d)
            np.multiply(d, self._scale, out=d)
            rows_times_matrix(d, k[..., :keys, :], dq[..., first:stop, :])
        for first, stop, begin in self._key_blocks:
            at = (..., slice(begin, None), slice(first, stop))
            transpose_times_rows(dS[at], q[..., begin:, :], dk[..., first:stop, :])
            transpose_times_rows(P[at], do[..., begin:, :], dv[..., first:stop, :])

    def _heads_of(self, x: Array) -> tuple[Array, ...]:
        """Return views (G b, H, T, K) of x (G, b, T, n D), one for each n."""
        T, D = self._shape
        split = x.reshape(-1, T, x.shape[-1] // D, self.heads, D // self.heads)
        return tuple(split.transpose(2, 0, 3, 1, 4))


def _query_blocks(seen_TT: Array) -> list[tuple[int, int, int, int]]:
    """Return `(first, stop, keys, masked)`: queries [first, stop) see only keys below `keys`.

    All of them see all keys below `masked`.
    """
    T = len(seen_TT)
    blocks = []
    for first in range(0, T, BLOCK):
        rows = seen_TT[first : first + BLOCK]
        keys = int(np.flatnonzero(rows.any(axis=0))[-1]) + 1
        hidden = np.flatnonzero(~rows[:, :keys].all(axis=0))
        blocks.append((first, first + len(rows), keys, int(hidden[0]) if hidden.size else keys))
    return blocks


def _key_blocks(seen_TT: Array) -> list[tuple[int, int, int]]:
    """Return `(first, stop, begin)`: keys [first, stop) are seen by no query before `begin`.

    A block of keys that nobody sees begins at T: the sums over no queries are zeros.
    """
    T = len(seen_TT)
    blocks = []
    for first in range(0, T, BLOCK):
        seeing = np.flatnonzero(seen_TT[:, first : first + BLOCK].any(axis=1))
        blocks.append((first, min(first + BLOCK, T), int(seeing[0]) if seeing.size else T))
    return blocks
