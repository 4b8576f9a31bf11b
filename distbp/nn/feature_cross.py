"""FeatureCross: the products of every k of n inputs, by which a linear layer behind it sees interactions.

"Town A, and a Sunday" is a product of two inputs that no weighted sum of them can express.  The number of
products, n! / (k! (n - k)!), grows fast: of 100 inputs there are 4,950 pairs and 161,700 triples.  So more
than `MOST_PRODUCTS` are refused, with their number.

Legend: n inputs, k of them in a product, P products, R = k P / n products that hold a given input.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np

from distbp.errors import ConfigError
from distbp.nn.layer import Array, Context, Layer, Shape

__all__ = ["MOST_PRODUCTS", "FeatureCross"]

MOST_PRODUCTS = 20_000
"""More features than that are slower to make than a hidden layer is to learn them."""


class FeatureCross(Layer):
    """y_p = Π x_i over the inputs i of product p: (..., n) becomes (..., P), in lexicographic order."""

    def __init__(self, order: int = 2) -> None:
        if order < 2:
            raise ConfigError(f"FeatureCross: expected products of at least 2 inputs, got order {order!r}")
        self.order = order

    def build(self, input_shape: Shape) -> Shape:
        """List the products; ConfigError with their number if there are too many, or none."""
        if not input_shape:
            raise ConfigError("FeatureCross: expected samples with at least one axis, got shape ()")
        inputs = input_shape[-1]
        products = math.comb(inputs, self.order)
        if not 1 <= products <= MOST_PRODUCTS:
            raise ConfigError(
                f"FeatureCross: expected 1 to {MOST_PRODUCTS:,} products, got {products:,} of {self.order} "
                f"of {inputs} inputs; give it fewer inputs, or a lower order (model.cross; 0: no products)"
            )
        # (k, P): the inputs of each product.
        self._factors = np.array(list(combinations(range(inputs), self.order)), np.int64).T
        holding = np.argsort(self._factors, axis=None, kind="stable")
        place, product = np.divmod(holding, products)
        self._products = product  # (n R): the products that hold input 0, input 1, ...
        # (k - 1, n R): the other inputs of those products.
        others = [(place + step) % self.order for step in range(1, self.order)]
        self._partners = np.stack([self._factors[other, product] for other in others])
        return (*input_shape[:-1], products)

    def multiply_adds(self) -> int:
        """Return 0: the products are elementwise work."""
        return 0

    def forward(self, x: Array, context: Context) -> Array:
        """Return the products."""
        self._x = x
        y = self.buffer("y", (*x.shape[:-1], self._factors.shape[1]), x.dtype)
        return self._multiply(self._factors, y, "factor", first=True)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx_i = Σ dy_p Π x_j over the products p that hold i, with j the other inputs of p.

        A product is linear in each of its inputs, and its slope is the product of the others: ∂y_p/∂x_i =
        Π_{j ≠ i} x_j.  Each input is in R products, so the terms make a table (n, R), whose rows are added.
        """
        if not want_dx:
            return None
        x = self._x
        terms = self.buffer("terms", (*x.shape[:-1], len(self._products)), x.dtype)
        np.take(dy, self._products, axis=-1, out=terms, mode="clip")
        self._multiply(self._partners, terms, "partner", first=False)
        table = terms.reshape(*x.shape, -1)
        return np.add.reduce(table, axis=-1, out=self.buffer("dx", x.shape, x.dtype))

    def _multiply(self, inputs: Array, out: Array, name: str, *, first: bool) -> Array:
        """Multiply `out` by the inputs of every row of numbers, or with `first` begin with the first row."""
        factor = self.buffer(name, out.shape, out.dtype)
        for row, numbers in enumerate(inputs):
            # The numbers are in range, and with `out` "raise" would gather into a copy first.
            if first and row == 0:
                np.take(self._x, numbers, axis=-1, out=out, mode="clip")
            else:
                np.multiply(out, np.take(self._x, numbers, axis=-1, out=factor, mode="clip"), out=out)
        return out
