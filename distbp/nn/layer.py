"""The contract of a layer, and the parameter through which its gradients leave.

Legend of the shapes in this package: G micro-batches are stacked, each has b samples, a sample has features
(I inputs, O outputs, F any features, C classes).  Activations are arrays of shape (G, b, *features).

The rule that binds every layer: **the bits that belong to micro-batch g do not depend on G**.  Elementwise
functions keep it by themselves; matrix products keep it when they are stacked (product.py); reductions keep
it when they run inside one micro-batch.  Gradients of different micro-batches are never added here: a layer
hands a *leaf*, a function that writes the gradients of some micro-batches where it is told to, and whoever
bound the sink adds them in the order that makes all runs equal.

A layer knows neither rank nor optimizer nor how gradients are reduced, nor where its parameters lie: the
Network tells the parameters.  Of its own place in the model it knows a name, for keys of random numbers only.

What a layer learns by watching and not by gradients, the running statistics of BatchNorm, is a `Statistic`:
each training pass leaves a value for each micro-batch, whoever runs the steps averages them over
micro-batches and over time, and evaluation reads the average.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from distbp.leaf import Leaf

__all__ = [
    "Array",
    "Buffered",
    "Context",
    "Initial",
    "Layer",
    "Parameter",
    "Shape",
    "Sink",
    "Statistic",
]

Array: TypeAlias = NDArray[Any]
Shape: TypeAlias = tuple[int, ...]

Sink: TypeAlias = "Callable[[Parameter, Leaf], None]"
"""Receives each parameter's leaf once per backward pass and calls it before it returns."""

Initial: TypeAlias = "Callable[[Parameter, int], NDArray[np.float64]]"
"""`initial(parameter, seed)` returns the first values in `parameter.shape`, keyed by `parameter.name`."""


@dataclass(frozen=True)
class Context:
    """What a forward pass may depend on besides its input: the mode and the key of its random numbers.

    `first_micro_batch` is the global number of the first of the G stacked micro-batches, so that a layer
    that draws random numbers keys them by `first_micro_batch + g` and not by where g was computed.
    """

    training: bool
    seed: int = 0
    step: int = 0
    first_micro_batch: int = 0


class Parameter:
    """One trainable tensor: its shape and how it starts; the values live in a vector that others own.

    `fan_in` and `fan_out` are the numbers of inputs and outputs that one weight connects (initial.py).
    `name` and `offset` (elements into the flat vector) are set by the Network.
    """

    __slots__ = ("_sink", "_value", "fan_in", "fan_out", "initial", "name", "offset", "shape")

    def __init__(self, shape: Shape, initial: Initial, *, fan_in: int, fan_out: int) -> None:
        self.shape = shape
        self.initial = initial
        self.fan_in = fan_in
        self.fan_out = fan_out
        self.name = ""
        self.offset = -1
        self._value: Array | None = None
        self._sink: Sink | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def value(self) -> Array:
        """View of the current parameter vector, never to be written to."""
        assert self._value is not None, f"parameter {self.name!r} has no value: call Network.use(views) first"
        return self._value

    def bind(self, value: Array | None) -> None:
        """Point `value` at a view; called every step, so it checks nothing."""
        self._value = value

    def send_to(self, sink: Sink | None) -> None:
        """Let `collect` hand its leaves to `sink`."""
        self._sink = sink

    def collect(self, leaf: Leaf) -> None:
        """Hand `leaf` to the bound sink, which calls it before this returns."""
        assert self._sink is not None, f"{self.name!r}: call Network.send_gradients_to(sink) before backward"
        self._sink(self, leaf)


class Buffered:
    """Whatever keeps arrays from step to step, so that a steady step allocates nothing large."""

    def buffer(self, name: str, shape: Shape, dtype: DTypeLike) -> Array:
        """Return this object's array called `name`; the same one as long as shape and dtype stay the same.

        Its content is what was left there.  A fresh large array costs page faults in every step, a reused
        one does not; a change of G or b pays once.
        """
        # Made here and not in __init__, so that a layer need not remember to call super().__init__().
        buffers: dict[str, Array] = self.__dict__.setdefault("_buffers", {})
        array = buffers.get(name)
        if array is None or array.shape != shape or array.dtype != dtype:
            array = buffers[name] = np.zeros(shape, dtype)
        return array


class Statistic:
    """A number or vector that describes each micro-batch, and its average over the steps so far.

    The average begins at `start` and moves by `rate` of the distance to the mean of a step's micro-batches:
    average + rate * (mean - average).
    """

    __slots__ = ("_average", "_observed", "rate", "shape", "start")

    def __init__(self, shape: Shape, *, start: float, rate: float) -> None:
        self.shape = shape
        self.start = start
        self.rate = rate
        self._average: Array | None = None
        self._observed: Array | None = None

    @property
    def average(self) -> Array:
        """View of the current average, float64 of `shape`, never to be written to."""
        assert self._average is not None, (
            "a statistic has no average: call Network.use_statistics(vector) first"
        )
        return self._average

    def bind(self, average: Array) -> None:
        """Point `average` at a view."""
        self._average = average

    @property
    def observed(self) -> Array:
        """The values of the micro-batches of the last training pass, shape (G, *shape)."""
        assert self._observed is not None, "no training pass has left a value"
        return self._observed

    def observe(self, values: Array) -> None:
        """Leave a value for each micro-batch, shape (G, *shape); referenced until the next training pass."""
        self._observed = values


class Layer(Buffered, ABC):
    """One differentiable function of stacked micro-batches.

    A layer never writes into `x` or `dy`.  What it returns is its own (or a view of its argument, as from
    Flatten) and holds until its next forward or backward call; it may keep `x` from forward to backward for
    the same reason.  The dtype of all results follows the input: float32 in training, float64 when gradients
    are checked.  An instance stands in one place of one model, because it remembers one forward pass.

    A layer with `takes_codes` (Embedding) takes integers, which have no derivative: it returns None for dx.
    """

    _place = ""

    @property
    def takes_codes(self) -> bool:
        """Whether samples are integer codes and not numbers."""
        return False

    @abstractmethod
    def build(self, input_shape: Shape) -> Shape:
        """Create the parameters for samples of `input_shape` (without G, b) and return the output shape.

        Raises ConfigError for a shape that this layer cannot take.
        """

    @abstractmethod
    def forward(self, x: Array, context: Context) -> Array:
        """Return the output for stacked micro-batches `x` of shape (G, b, *input_shape)."""

    @abstractmethod
    def backward(self, dy: Array, want_dx: bool = True) -> Array | None:
        """Collect a leaf for each parameter, return dx, the gradient for the input of the last forward pass.

        `dy` is the gradient for the output of the last forward pass with `context.training`.  Without
        `want_dx` nobody needs dx: the layer skips its cost where there is one and returns None.
        """

    def parameters(self) -> list[tuple[str, Parameter]]:
        """Return the parameters made by `build` with names relative to this layer, in a fixed order."""
        return []

    def children(self) -> list[tuple[str, Layer]]:
        """Return the layers that this one contains, by relative name."""
        return []

    def statistics(self) -> list[tuple[str, Statistic]]:
        """Return the statistics made by `build` of this layer itself, without those of its children."""
        return []

    def stand_at(self, place: str) -> None:
        """Take a name that no other layer of the model has; it tells random numbers of two layers apart."""
        self._place = place

    def multiply_adds(self) -> int:
        """Return the multiply-adds of the products of one sample's forward pass; 0 for elementwise work."""
        return 0
