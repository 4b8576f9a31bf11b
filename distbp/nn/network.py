"""Network: a layer and a loss over one flat vector of parameters.

The network names the parameters, gives each its place in the vector, and runs forward, loss and backward
over stacked micro-batches.  The vectors belong to others: `use` points the parameters at the current
generation of the state, and gradients leave as leaves through the bound sink (layer.py), in the reverse
order of the parameters.  It knows nothing of steps, ranks, optimizers and how gradients are added.

Statistics (layer.py) have a vector of their own, float64, which exists once beside the parameters: training
never reads it, evaluation reads nothing else of what the layers have watched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from distbp.errors import ConfigError, DataError
from distbp.nn.layer import Array, Context, Layer, Parameter, Shape, Sink, Statistic
from distbp.nn.layout import Layout, arrange
from distbp.nn.losses import Loss, Sums
from distbp.nn.product import forget_probes

__all__ = ["Network", "walk"]

_EVALUATION = Context(training=False)


class Network:
    """A model for samples of `input_shape`, with its loss.

    `layout` places its parameters and `statistics_layout` its statistics, `num_parameters` counts the former
    without padding, `multiply_adds` is the forward cost of a sample, `output_shape` is that of a sample.  A
    layer belongs to the network that was built from it last.  ConfigError if shapes do not fit, or if one
    layer object stands in two places.
    """

    def __init__(self, layer: Layer, input_shape: Shape, loss: Loss) -> None:
        forget_probes()  # BLAS may have another number of threads by now.
        _tell_places(layer)
        self.layer = layer
        self.loss = loss
        self.input_shape = tuple(input_shape)
        self.output_shape = layer.build(self.input_shape)
        loss.build(self.output_shape)
        named = layer.parameters()
        self.parameters: list[Parameter] = [parameter for _, parameter in named]
        self.layout: Layout = arrange([(name, parameter.shape) for name, parameter in named])
        for (name, parameter), offset in zip(named, self.layout.offsets, strict=True):
            parameter.name = name
            parameter.offset = offset
        watched = [
            (f"{path}.{name}".lstrip("."), statistic)
            for path, part in walk(layer)
            for name, statistic in part.statistics()
        ]
        self.statistics: list[Statistic] = [statistic for _, statistic in watched]
        self.statistics_layout: Layout = arrange([(name, statistic.shape) for name, statistic in watched])
        self.num_parameters = sum(parameter.size for parameter in self.parameters)
        self.multiply_adds = layer.multiply_adds()

    def initialise(self, vector: Array, seed: int) -> None:
        """Write the initial values of all parameters into `vector` of shape (layout.size,), padding 0."""
        vector.fill(0)
        for parameter, view in zip(self.parameters, self.views(vector), strict=True):
            np.copyto(view, parameter.initial(parameter, seed), casting="same_kind")

    def views(self, vector: Array) -> list[Array]:
        """Return the view of each parameter in `vector` of shape (layout.size,)."""
        return self.layout.views(vector)

    def use(self, views: Sequence[Array]) -> None:
        """Point every parameter at its view; cheap, for it is called each step."""
        for parameter, view in zip(self.parameters, views, strict=True):
            parameter.bind(view)

    def begin_statistics(self, vector: NDArray[np.float64]) -> None:
        """Write what the averages begin with into `vector` of shape (statistics_layout.size,), padding 0."""
        vector.fill(0)
        for statistic, view in zip(self.statistics, self.statistics_layout.views(vector), strict=True):
            view.fill(statistic.start)

    def use_statistics(self, vector: NDArray[np.float64]) -> None:
        """Point every statistic at its average in `vector`, which evaluation then reads."""
        for statistic, view in zip(self.statistics, self.statistics_layout.views(vector), strict=True):
            statistic.bind(view)

    def write_statistics(self, rows: NDArray[np.float64]) -> None:
        """Write what the last training pass observed into `rows`, (G, statistics_layout.size)."""
        for statistic, (offset, length) in zip(
            self.statistics, self.statistics_layout.borders(), strict=True
        ):
            rows[:, offset : offset + length] = statistic.observed.reshape(len(rows), length)

    def move_statistics(self, vector: NDArray[np.float64], means: NDArray[np.float64]) -> None:
        """Move the averages in `vector` towards the `means` of a step, both (statistics_layout.size,)."""
        views = self.statistics_layout.views
        for statistic, average, mean in zip(self.statistics, views(vector), views(means), strict=True):
            average += statistic.rate * (mean - average)

    def send_gradients_to(self, sink: Sink) -> None:
        """Let every backward pass hand each leaf to `sink(parameter, leaf)`, last layers first."""
        for parameter in self.parameters:
            parameter.send_to(sink)

    def forward(self, x: Array, context: Context) -> Array:
        """Return the outputs for stacked micro-batches `x`: (G, b, *input_shape).

        They are float32 or float64, or integers where the model begins with an Embedding.
        """
        kinds, named = ("iu", "integers") if self.layer.takes_codes else ("f", "float32 or float64")
        if x.shape[2:] != self.input_shape or x.ndim < 2 or x.dtype.kind not in kinds:
            raise DataError(
                f"expected stacked micro-batches of shape (G, b, {', '.join(map(str, self.input_shape))}) in "
                f"{named}, got shape {x.shape!r} in {x.dtype}; the model was built for samples of "
                f"shape {self.input_shape!r}"
            )
        return self.layer.forward(x, context)

    def loss_and_gradient(self, x: Array, y: Array, context: Context, mask: Array | None = None) -> Sums:
        """Return the sums of each micro-batch, and send the gradients of its loss sum to the sink.

        `x` (G, b, *input_shape), `y` as the loss wants it, `mask` (G, b), 0 for samples that do not count.
        """
        sums = self.loss.forward(self.forward(x, context), y, mask)
        self.layer.backward(self.loss.backward(), want_dx=False)
        return sums

    def evaluate(self, x: Array, y: Array, mask: Array | None = None) -> Sums:
        """Return the sums of each micro-batch in evaluation mode; no gradients."""
        return self.loss.forward(self.forward(x, _EVALUATION), y, mask)


def walk(layer: Layer, path: str = "") -> Iterator[tuple[str, Layer]]:
    """Yield every layer with its path, in the order of the parameters."""
    yield path, layer
    for name, child in layer.children():
        yield from walk(child, f"{path}.{name}".lstrip("."))


def _tell_places(root: Layer) -> None:
    """Tell every layer its place; ConfigError if one object is met twice: it remembers one forward pass."""
    seen: dict[int, str] = {}
    for path, layer in walk(root):
        if id(layer) in seen:
            raise ConfigError(
                f"expected a layer of its own in every place, got one {type(layer).__name__} object both as "
                f"{seen[id(layer)]!r} and {path!r}; create a new one for each place"
            )
        seen[id(layer)] = path
        layer.stand_at(path)
