"""Layers made of layers: Sequential, Residual, Parallel.

Composition is how models are made here; there is no graph and no tape.  Each block is a function of its
inner functions, and its `backward` is the chain rule written out once for that shape.
"""

from __future__ import annotations

import numpy as np

from distbp.errors import ConfigError
from distbp.nn.layer import Array, Context, Layer, Parameter, Shape

__all__ = ["Parallel", "Residual", "Sequential"]


class Sequential(Layer):
    """Apply layers one after the other; their parameters are named "0.weight", "0.bias", "1.weight", ..."""

    def __init__(self, *layers: Layer) -> None:
        self.layers = layers

    @property
    def takes_codes(self) -> bool:
        """Whether the first layer takes codes."""
        return bool(self.layers) and self.layers[0].takes_codes

    def build(self, input_shape: Shape) -> Shape:
        """Build each layer for the output of the one before, and find out which of them need a dx.

        A dx is wanted from layer i when a layer before it has parameters; below the first layer with
        parameters nothing is wanted at all, unless the caller wants the dx of the whole.
        """
        shape = input_shape
        self._wanted: list[bool] = []
        self._first = len(self.layers)
        for index, layer in enumerate(self.layers):
            shape = layer.build(shape)
            self._wanted.append(self._first < index)
            if layer.parameters() and self._first == len(self.layers):
                self._first = index
        return shape

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return the parameters of the first layer, then of the second, ..."""
        return _named_parameters(self.children())

    def children(self) -> list[tuple[str, Layer]]:
        """Return the layers, named by position."""
        return [(str(index), layer) for index, layer in enumerate(self.layers)]

    def multiply_adds(self) -> int:
        """Return the sum over the layers."""
        return sum(layer.multiply_adds() for layer in self.layers)

    def forward(self, x: Array, context: Context) -> Array:
        """Return f_n(... f_1(x))."""
        for layer in self.layers:
            x = layer.forward(x, context)
        return x

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return J_1ᵀ ... J_nᵀ dy, the last layer's Jacobian first (the chain rule for f_n ∘ ... ∘ f_1)."""
        stop = 0 if want_dx else self._first
        gradient: Array | None = dy
        for index in range(len(self.layers) - 1, stop - 1, -1):
            assert gradient is not None, f"layer {index + 1} was asked for dx and returned None"
            gradient = self.layers[index].backward(gradient, want_dx or self._wanted[index])
        return gradient if want_dx else None


class Residual(Layer):
    """y = shortcut(x) + inner(x) (He et al., CVPR 2016); without a shortcut y = x + inner(x)."""

    def __init__(self, inner: Layer, shortcut: Layer | None = None) -> None:
        self.inner = inner
        self.shortcut = shortcut

    def build(self, input_shape: Shape) -> Shape:
        """Build the inner layers; ConfigError if their outputs do not have one shape."""
        output_shape = self.inner.build(input_shape)
        expected = input_shape if self.shortcut is None else self.shortcut.build(input_shape)
        if output_shape != expected:
            what = f"keeps the shape {expected!r}" if self.shortcut is None else f"makes {expected!r}, too,"
            raise ConfigError(
                f"Residual: expected an inner layer that {what} of samples of shape {input_shape!r}, "
                f"got one that makes {output_shape!r}"
            )
        return output_shape

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return the inner layer's parameters under "inner.", then those of the shortcut."""
        return _named_parameters(self.children())

    def children(self) -> list[tuple[str, Layer]]:
        """Return the inner layer, and the shortcut if there is one."""
        inner: list[tuple[str, Layer]] = [("inner", self.inner)]
        return inner if self.shortcut is None else [*inner, ("shortcut", self.shortcut)]

    def multiply_adds(self) -> int:
        """Return the sum over both paths."""
        return sum(layer.multiply_adds() for _, layer in self.children())

    def forward(self, x: Array, context: Context) -> Array:
        """Return shortcut(x) + inner(x)."""
        inner = self.inner.forward(x, context)
        past = x if self.shortcut is None else self.shortcut.forward(x, context)
        return np.add(past, inner, out=self.buffer("y", inner.shape, inner.dtype))

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = dy + Jᵀ dy, because ∂(x + f(x))/∂x = 1 + J; a shortcut has a J of its own for the 1."""
        past = dy if self.shortcut is None else self.shortcut.backward(dy, want_dx)
        through_inner = self.inner.backward(dy, want_dx)
        if not want_dx:
            return None
        assert past is not None, "the shortcut was asked for dx and returned None"
        assert through_inner is not None, "the inner layer was asked for dx and returned None"
        return np.add(past, through_inner, out=self.buffer("dx", past.shape, past.dtype))


class Parallel(Layer):
    """Give the same input to every branch and join the outputs along the last feature axis."""

    def __init__(self, *branches: Layer) -> None:
        if not branches:
            raise ConfigError("Parallel: expected at least one branch, got none")
        if len({branch.takes_codes for branch in branches}) > 1:
            raise ConfigError("Parallel: expected branches that all take codes, or all numbers, got both")
        self.branches = branches

    @property
    def takes_codes(self) -> bool:
        """Whether the branches take codes."""
        return self.branches[0].takes_codes

    def build(self, input_shape: Shape) -> Shape:
        """Build the branches; ConfigError if their outputs differ in more than the last axis."""
        shapes = [branch.build(input_shape) for branch in self.branches]
        if any(not shape or shape[:-1] != shapes[0][:-1] for shape in shapes):
            raise ConfigError(
                f"Parallel: expected branches whose outputs differ in the last axis at most, "
                f"got shapes {shapes!r}"
            )
        stops = np.cumsum([shape[-1] for shape in shapes]).tolist()
        self._ranges = list(zip([0, *stops[:-1]], stops, strict=True))
        return (*shapes[0][:-1], stops[-1])

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return the parameters of the first branch, then of the second, ..."""
        return _named_parameters(self.children())

    def children(self) -> list[tuple[str, Layer]]:
        """Return the branches, named by position."""
        return [(str(index), branch) for index, branch in enumerate(self.branches)]

    def multiply_adds(self) -> int:
        """Return the sum over the branches."""
        return sum(branch.multiply_adds() for branch in self.branches)

    def forward(self, x: Array, context: Context) -> Array:
        """Return the outputs f_1(x), f_2(x), ... side by side."""
        outputs = [branch.forward(x, context) for branch in self.branches]
        y = self.buffer("y", (*outputs[0].shape[:-1], self._ranges[-1][1]), x.dtype)
        return np.concatenate(outputs, axis=-1, out=y)

    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Return dx = Σ_k J_kᵀ dy_k, with dy_k the part of dy that belongs to branch k.

        The last branch comes first, so that gradients leave in the reverse order of the parameters
        everywhere; the order of this sum is as fixed as any, and the sum stays inside one micro-batch.
        """
        dx: Array | None = None
        for index in range(len(self.branches) - 1, -1, -1):
            start, stop = self._ranges[index]
            # A contiguous copy: a branch may reshape its dy, which would allocate for a strided one.
            part = self.buffer(f"dy{index}", (*dy.shape[:-1], stop - start), dy.dtype)
            np.copyto(part, dy[..., start:stop])
            from_branch = self.branches[index].backward(part, want_dx)
            if not want_dx:
                continue
            assert from_branch is not None, f"branch {index} was asked for dx and returned None"
            if dx is None:
                dx = from_branch
            else:
                dx = np.add(dx, from_branch, out=self.buffer("dx", dx.shape, dx.dtype))
        return dx


def _named_parameters(children: list[tuple[str, Layer]]) -> list[tuple[str, Parameter]]:
    return [
        (f"{child}.{name}", parameter) for child, layer in children for name, parameter in layer.parameters()
    ]
