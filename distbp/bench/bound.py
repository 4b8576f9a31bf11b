"""The least time of a step on this machine: its products and its bytes at the measured rates.

    bound = Σ time of each matrix product, at its shape, measured alone
          + Σ bytes / bandwidth, measured at the size of what is walked through

The products are those that the network really asks NumPy for, recorded while it makes one step.  The bytes
are the least that the step can move outside of the products:

    activations     a layer without products reads its input and writes its output, and the same backwards
    samples         a batch is copied out of the data
    micro-batches   with G on a worker, G - 1 gradients are read and added: 3 vectors each (sameness)
    reduce          a lane reads the blocks of all workers and writes one
    update          a lane reads gradient, parameters and momentum, and writes the last two

Everything is for one worker, with as many processes measuring at once as cores are busy.  Not in the bound:
biases, columns of convolutions, the softmax of attention, Python.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np

from distbp.bench.together import together
from distbp.bench.workloads import Workload
from distbp.environment import limit_threads
from distbp.nn import Context, Layer, Network, build_loss, build_model
from distbp.partition import split_range
from distbp.reduce import MicroBatchSum, aligned_blocks

__all__ = ["Bandwidth", "Demand", "bound", "demand", "measure_bandwidth", "measure_products"]

Product = tuple[tuple[int, ...], tuple[int, ...], tuple[bool, bool]]
"""Shapes of both operands, and whether each lies transposed in memory."""

FLOAT_BYTES = 4
COPY_SIZES = tuple(1 << power for power in (15, 17, 19, 21, 23, 25, 27, 28))
"""Bytes of both arrays of a copy: from the first cache to memory."""


@dataclass
class Demand:
    """What a step asks of one worker: products with how often each comes, and bytes with what they lie in."""

    products: Counter[Product] = field(default_factory=Counter)
    memory: list[tuple[str, int, int]] = field(default_factory=list)
    """`(what, bytes that are moved, bytes of the arrays they are moved in)`"""

    @property
    def flops(self) -> int:
        """Return multiplications and additions of all products."""
        return sum(flops_of(product) * count for product, count in self.products.items())


def flops_of(product: Product) -> int:
    """Return multiplications and additions of one product, stacks included."""
    left, right, _ = product
    stack = prod(np.broadcast_shapes(left[:-2], right[:-2]))
    return 2 * stack * left[-2] * left[-1] * right[-1]


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second of one core, by the size of what is walked through, between the measured sizes too."""

    sizes: tuple[int, ...]
    rates: tuple[float, ...]

    def at(self, size_bytes: int) -> float:
        """Return the rate for arrays of `size_bytes` bytes."""
        return float(np.interp(np.log(max(1, size_bytes)), np.log(self.sizes), self.rates))


def measure_bandwidth(processes: int) -> Bandwidth:
    """Return the bandwidth of a core beside busy ones; read and written bytes both count."""
    seconds = together("copy", COPY_SIZES, processes)
    rates = tuple(size / max(times) for size, times in zip(COPY_SIZES, seconds, strict=True))
    return Bandwidth(COPY_SIZES, rates)


def measure_products(products: list[Product], processes: int) -> dict[Product, float]:
    """Return the seconds of each product on a core beside busy ones; the slower process counts."""
    seconds = together("product", products, processes)
    return {product: max(times) for product, times in zip(products, seconds, strict=True)}


def bound(
    needed: Demand, seconds: dict[Product, float], bandwidth: Bandwidth
) -> tuple[float, dict[str, float]]:
    """Return the ms of the products, and those of each kind of memory traffic."""
    products = 1e3 * sum(seconds[product] * count for product, count in needed.products.items())
    memory: dict[str, float] = {}
    for what, moved, size in needed.memory:
        memory[what] = memory.get(what, 0.0) + 1e3 * moved / bandwidth.at(size)
    return products, memory


def demand(workload: Workload, micro_batch: int, workers: int, batch: int | None = None) -> Demand:
    """Return what a step asks of the first of `workers` workers; `batch` stands in for the workload's."""
    batch = workload.batch if batch is None else batch
    first, last = split_range(batch // micro_batch, workers, 0)
    count = last - first
    name = workload.model["name"]
    options = {key: value for key, value in workload.model.items() if key != "name"}
    model = build_model(name, outputs=workload.outputs, **options)
    network = Network(model, workload.shape, build_loss("cross_entropy"))
    needed = Demand()
    limits = limit_threads(1)  # As in a worker: what may be joined depends on it (`nn/product.py`).
    try:
        _make_step(network, workload, first, last, micro_batch)  # Probes and allocates.
        with _watched(model, needed), _recorded_products(needed):
            samples = _make_step(network, workload, first, last, micro_batch)
    finally:
        limits.restore_original_limits()
    vector = network.layout.size * FLOAT_BYTES
    lane = vector // workers
    blocks = sum(
        len(aligned_blocks(*split_range(batch // micro_batch, workers, rank))) for rank in range(workers)
    )
    needed.memory.append(("samples", 2 * samples, 2 * samples))
    needed.memory.append(("micro-batches", 3 * (count - 1) * vector, 3 * vector))
    needed.memory.append(("reduce", (blocks + 1) * lane if blocks > 1 else 0, blocks * lane))
    needed.memory.append(("update", 5 * lane, 5 * lane))
    return needed


def _make_step(network: Network, workload: Workload, first: int, last: int, micro_batch: int) -> int:
    """Run forward and backward over micro-batches of noise; return the bytes of the samples."""
    rng = np.random.default_rng(0)
    shape = (last - first, micro_batch, *workload.shape)
    x: Any
    if workload.is_text:
        x = rng.integers(0, workload.outputs, shape)
        y = rng.integers(0, workload.outputs, shape)
    else:
        x = rng.standard_normal(shape, np.float32)
        y = rng.integers(0, workload.outputs, shape[:2])
    parameters = np.empty(network.layout.size, np.float32)
    network.initialise(parameters, 0)
    network.use(network.views(parameters))
    gradients = [np.empty_like(parameters) for _ in aligned_blocks(first, last)]
    total = MicroBatchSum(first, last, gradients)
    network.send_gradients_to(lambda p, leaf: total.collect(p.offset, p.shape, leaf))
    network.loss_and_gradient(x, y, Context(True, 0, 0, first))
    return int(x.nbytes)


@contextmanager
def _recorded_products(needed: Demand) -> Iterator[None]:
    """Count every call of `np.matmul`; products of vectors do not count."""
    matmul: Any = np.matmul

    def recorded(a: Any, b: Any, *arguments: Any, **options: Any) -> Any:
        if a.ndim > 1 and b.ndim > 1:
            needed.products[a.shape, b.shape, (_is_turned(a), _is_turned(b))] += 1
        return matmul(a, b, *arguments, **options)

    np.matmul = recorded  # type: ignore[assignment]
    try:
        yield
    finally:
        np.matmul = matmul


def _is_turned(array: Any) -> bool:
    """Return whether the rows of the matrices of a stack lie across memory."""
    return bool(array.strides[-1] != array.itemsize and array.strides[-2] == array.itemsize)


@contextmanager
def _watched(model: Layer, needed: Demand) -> Iterator[None]:
    """Note what every layer without products reads and writes."""
    watched = [layer for layer in _leaves(model) if not layer.multiply_adds()]
    for layer in watched:
        _watch(layer, "forward", needed)
        _watch(layer, "backward", needed)
    try:
        yield
    finally:
        for layer in watched:
            del layer.__dict__["forward"], layer.__dict__["backward"]


def _leaves(layer: Layer) -> Iterator[Layer]:
    """Yield the layers that are made of no others."""
    children = layer.children()
    if not children:
        yield layer
    for _, child in children:
        yield from _leaves(child)


def _watch(layer: Layer, method: str, needed: Demand) -> None:
    """Let one method of one layer say what it reads and writes; a view of its input costs nothing."""
    inner: Callable[..., Any] = getattr(layer, method)

    def watching(given: Any, *arguments: Any, **options: Any) -> Any:
        result = inner(given, *arguments, **options)
        if result is not None and not np.may_share_memory(result, given):
            moved = int(given.nbytes + result.nbytes)
            needed.memory.append(("activations", moved, moved))
        return result

    layer.__dict__[method] = watching
