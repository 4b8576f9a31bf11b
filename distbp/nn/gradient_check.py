"""A check of every derivative in a network, for whoever writes a layer or a loss.

In float64, for every parameter tensor and for the input, along random unit directions u, with f the loss sum
of one micro-batch and s = ∇f·u the slope that backward claims:

* **central difference**: (f(+h) - f(-h)) / 2h = s + O(h²), so the relative error must be near rounding;
* **Taylor remainder**: R(h) = f(h) - f(0) - h s = O(h²), so R(h) / R(h/2) must be near 4, which is an
  observed order of 2; a wrong slope leaves a term linear in h and the order falls towards 1.

The two see different things: the first says by how much backward is wrong, the second needs no tolerance for
how accurate a difference can be.  Where f is linear along u the remainder is rounding noise; then s is right
to that noise, and the order is reported as infinite.

Each measure is taken at several steps and the best one counts: a kink (ReLU, maximum) or an accidental
cancellation spoils one step size, a wrong derivative spoils all.  A network with thousands of kinks has one
inside every step but the shortest.  Micro-batches are checked one by one and never added.

Takes some 20 forward passes for each tensor and direction: meant for small networks, not for training sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distbp import random
from distbp.leaf import Leaf
from distbp.nn.layer import Array, Context, Parameter
from distbp.nn.network import Network

__all__ = ["Report", "TensorReport", "check_gradient"]

_DIFFERENCE_STEPS = (1e-5, 1e-6)
"""Truncation h² and rounding eps/h are both below 1e-9 of f here."""
_LEAST_SLOPE = 1e-3
"""Slopes below this part of the loss are judged as if they were that large: rounding may be all they are."""
_TAYLOR_STEPS = (2.0**-12, 2.0**-15, 2.0**-18)
_EPSILON = float(np.finfo(np.float64).eps)

_Line = Callable[[float], NDArray[np.float64]]
"""h -> the loss sums (G,) at the distance h along a direction."""


@dataclass(frozen=True)
class TensorReport:
    """The worst relative error and the lowest observed Taylor order for one tensor ("input" for dx)."""

    name: str
    error: float
    order: float


@dataclass(frozen=True)
class Report:
    """What was found for each tensor, and the limits that it is held against."""

    tensors: tuple[TensorReport, ...]
    tolerance: float
    least_order: float

    @property
    def worst_error(self) -> float:
        """Largest relative error of a directional derivative."""
        return max(tensor.error for tensor in self.tensors)

    @property
    def lowest_order(self) -> float:
        """Smallest observed order of a Taylor remainder; about 2, or more, when backward is right."""
        return min(tensor.order for tensor in self.tensors)

    @property
    def ok(self) -> bool:
        """Whether both methods are content with every tensor."""
        return all(map(self._holds, self.tensors))

    def _holds(self, tensor: TensorReport) -> bool:
        # Written so that NaN, from a forward pass that is not finite, does not hold.
        return tensor.error <= self.tolerance and tensor.order >= self.least_order

    def __str__(self) -> str:
        wanted = f"(wanted: <= {self.tolerance:g}, >= {self.least_order:g})"
        lines = [f"{'tensor':24} {'error':>9} {'order':>6}  {wanted}"]
        for tensor in self.tensors:
            verdict = "" if self._holds(tensor) else "  WRONG"
            lines.append(f"{tensor.name:24} {tensor.error:9.1e} {tensor.order:6.2f}{verdict}")
        return "\n".join(lines)


def check_gradient(
    network: Network,
    x: Array,
    y: Array,
    *,
    seed: int = 0,
    directions: int = 4,
    tolerance: float = 1e-6,
    least_order: float = 1.8,
) -> Report:
    """Compare what `network` returns as gradients with what its loss does.

    `x` (G, b, *input_shape) and `y` are a few stacked micro-batches; floats are taken as float64, and codes
    (integers) have no derivative, so that there is no report on them.  The
    parameters start as `seed` says and are moved off that start, so that zero biases are tested elsewhere
    than at zero.  Afterwards the network has the values and the sink that it had before.
    """
    assert x.size > 0, f"expected at least one sample, got x of shape {x.shape}"
    assert directions > 0, f"expected at least one direction, got {directions}"
    bindings = [(parameter, parameter._value, parameter._sink) for parameter in network.parameters]
    try:
        return Report(
            tuple(_check_tensors(network, x, y, seed, directions)),
            tolerance=tolerance,
            least_order=least_order,
        )
    finally:
        for parameter, value, sink in bindings:
            parameter.bind(value)
            parameter.send_to(sink)


def _check_tensors(network: Network, x: Array, y: Array, seed: int, directions: int) -> list[TensorReport]:
    """Return a report for the input and for each parameter."""
    context = Context(training=True, seed=seed)
    target = y.astype(np.float64) if y.dtype.kind == "f" else y
    vector = np.empty(network.layout.size)
    network.initialise(vector, seed)
    vector += 0.1 * random.normal(vector.size, seed, "gradient check: start")
    has_dx = x.dtype.kind == "f"
    values = [x.astype(np.float64) if has_dx else x, *network.views(vector)]
    gradients = _all_gradients(network, values, target, context)

    def loss_at(moved: list[Array]) -> NDArray[np.float64]:
        network.use(moved[1:])
        return network.loss.forward(network.forward(moved[0], context), target).loss

    reports = []
    for index, name in enumerate(["input", *network.layout.names]):
        if index == 0 and not has_dx:
            continue
        found = []
        for number in range(directions):
            direction = random.normal(values[index].size, seed, f"gradient check: {name}", step=number)
            direction = (direction / np.linalg.norm(direction)).reshape(values[index].shape)

            def line(h: float, index: int = index, direction: Array = direction) -> NDArray[np.float64]:
                moved = list(values)
                moved[index] = values[index] + h * direction
                return loss_at(moved)

            # The input differs from micro-batch to micro-batch and so does its direction; a parameter is one.
            per_batch = direction[np.newaxis] if index else direction
            slope = np.sum(gradients[index] * per_batch, axis=tuple(range(1, gradients[index].ndim)))
            typical = _norms(gradients[index]) / math.sqrt(values[index].size)
            found.append((_difference_error(line, slope, typical), _taylor_order(line, slope)))
        errors, orders = zip(*found, strict=True)
        # np.max and np.min, not max and min: they let NaN through.
        reports.append(TensorReport(name, float(np.max(errors)), float(np.min(orders))))
    return reports


def _all_gradients(network: Network, values: list[Array], target: Array, context: Context) -> list[Array]:
    """Return what backward says: dx, then the gradient of each parameter with a leading axis of G."""
    gradients = {id(p): np.zeros((values[0].shape[0], *p.shape)) for p in network.parameters}

    def keep(parameter: Parameter, leaf: Leaf) -> None:
        leaf(0, values[0].shape[0], gradients[id(parameter)])

    network.use(values[1:])
    network.send_gradients_to(keep)
    network.loss.forward(network.forward(values[0], context), target)
    dx = network.layer.backward(network.loss.backward(), want_dx=True)
    if values[0].dtype.kind != "f":
        assert dx is None, f"codes have no derivative, and the model returned dx of shape {dx.shape}"
        return [np.zeros(0), *gradients.values()]
    assert dx is not None, "the model was asked for dx and returned None"
    return [dx.copy(), *gradients.values()]


def _difference_error(line: _Line, slope: NDArray[np.float64], typical: NDArray[np.float64]) -> float:
    """Return the worst error of `slope` (G,) against central differences, relative to the gradient's size.

    `typical` (G,) is the root mean square of the slope over directions: it keeps a direction that happens to
    be orthogonal to the gradient from being judged by its tiny slope.
    """
    size = 1.0 + np.abs(line(0.0))
    errors = []
    for h in _DIFFERENCE_STEPS:
        numeric = (line(h) - line(-h)) / (2.0 * h)
        scale = np.maximum(np.maximum(np.abs(slope), np.abs(numeric)), typical)
        errors.append(np.abs(numeric - slope) / np.maximum(scale, _LEAST_SLOPE * size))
    return float(np.max(np.minimum(*errors)))


def _taylor_order(line: _Line, slope: NDArray[np.float64]) -> float:
    """Return the lowest order log2(R(h) / R(h/2)) over the micro-batches, infinite if R is only noise."""
    start = line(0.0)
    noise = 1000.0 * _EPSILON * (1.0 + np.abs(start))
    orders = []
    for h in _TAYLOR_STEPS:
        whole = np.abs(line(h) - start - h * slope)
        half = np.abs(line(h / 2.0) - start - h / 2.0 * slope)
        # Below the noise nothing is left to explain; NaN compares false and stays NaN.
        order = np.log2(np.maximum(whole, noise) / np.maximum(half, noise))
        orders.append(np.where((whole <= noise) & (half <= noise), np.inf, order))
    return float(np.min(np.maximum.reduce(orders)))


def _norms(stacked: Array) -> NDArray[np.float64]:
    """Return the Euclidean norm of each micro-batch's part."""
    norms: NDArray[np.float64] = np.linalg.norm(stacked.reshape(stacked.shape[0], -1), axis=1)
    return norms
