"""Every layer as nodes of an ONNX graph: what a trained one computes in evaluation.

A function takes the graph, the layer, the name of its input, and the input itself for one sample, (1, ...),
by which it knows shapes; it returns the name of the output.  Names and shapes flow side by side: what a layer
puts out for that sample is asked of the layer.

ONNX has channels before places where distbp has them last, so convolutions and pools stand between two
transpositions, which whoever runs the graph may fold away.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import nn
from distbp.errors import ConfigError
from distbp.nn import Context, Layer
from distbp.onnx_graph import Graph

__all__ = ["LAYERS", "add_layer"]

Array = NDArray[Any]
Emit = Callable[[Graph, Any, str, Array], str]
EVALUATION = Context(training=False)


def add_layer(graph: Graph, layer: Layer, x: str, sample: Array) -> tuple[str, Array]:
    """Add a layer, return the name of its output, and that output for the sample.

    Raises ConfigError for a layer that is not in `LAYERS`, because a script defined it.
    """
    if type(layer) not in LAYERS:
        raise ConfigError(
            f"{type(layer).__name__}: expected a layer of distbp.nn, which alone can be exported, got one "
            "that a script defines; list it in distbp.onnx_layers.LAYERS"
        )
    name = LAYERS[type(layer)](graph, layer, x, sample)
    return name, layer.forward(sample[np.newaxis], EVALUATION)[0].copy()


def _weights(layer: Layer) -> dict[str, Array]:
    """Return the values of a layer's own parameters by name."""
    return {name: parameter.value for name, parameter in layer.parameters()}


def _elementwise(kind: str, **attributes: Any) -> Emit:
    """Return what adds one node."""
    return lambda graph, layer, x, sample: graph.add(kind, x, **attributes)


def _same(graph: Graph, layer: Layer, x: str, sample: Array) -> str:
    """Dropout: in evaluation nothing happens."""
    return x


def _leaky_relu(graph: Graph, layer: nn.LeakyReLU, x: str, sample: Array) -> str:
    return graph.add("LeakyRelu", x, alpha=layer.slope)


def _silu(graph: Graph, layer: nn.SiLU, x: str, sample: Array) -> str:
    return graph.add("Mul", x, graph.add("Sigmoid", x))


def _shaped(graph: Graph, layer: Layer, x: str, sample: Array) -> str:
    """Flatten, AsImage, Reshape: another shape of the same numbers."""
    return graph.reshape(x, layer.forward(sample[np.newaxis], EVALUATION).shape[2:])


def _transpose(graph: Graph, layer: nn.Transpose, x: str, sample: Array) -> str:
    return graph.transpose(x, 0, *(1 + axis for axis in layer.axes))


def _linear(graph: Graph, layer: nn.Linear, x: str, sample: Array) -> str:
    weights = _weights(layer)
    y = graph.add("MatMul", x, graph.constant(weights["weight"]))
    return graph.add("Add", y, graph.constant(weights["bias"])) if layer.has_bias else y


def _channels_first(graph: Graph, x: str, rank: int) -> str:
    """Put the channels, the last of `rank` axes, before the places."""
    return graph.transpose(x, 0, rank - 1, *range(1, rank - 1))


def _channels_last(graph: Graph, x: str, rank: int) -> str:
    """Put the channels behind the places."""
    return graph.transpose(x, 0, *range(2, rank), 1)


def _convolution(graph: Graph, layer: nn.Conv2d | nn.Conv1d, x: str, sample: Array) -> str:
    weights, rank = _weights(layer), sample.ndim
    places = range(rank - 2)
    weight = weights["weight"].transpose(rank - 1, rank - 2, *places)  # (O, C / groups, places).
    inputs = [_channels_first(graph, x, rank), graph.constant(np.ascontiguousarray(weight))]
    if layer.has_bias:
        inputs.append(graph.constant(weights["bias"]))
    y = graph.add("Conv", *inputs, strides=layer.stride, pads=layer.padding * 2, group=layer.groups)
    return _channels_last(graph, y, rank)


def _pool(kind: str) -> Emit:
    """Return what adds a pool between two transpositions."""

    def emit(graph: Graph, layer: Any, x: str, sample: Array) -> str:
        x = _channels_first(graph, x, sample.ndim)
        y = graph.add(kind, x, kernel_shape=layer.size, strides=layer.stride)
        return _channels_last(graph, y, sample.ndim)

    return emit


def _global_pool(graph: Graph, layer: nn.GlobalAvgPool, x: str, sample: Array) -> str:
    return graph.add("ReduceMean", x, graph.constant(range(1, sample.ndim - 1)), keepdims=0)


def _batch_norm(graph: Graph, layer: nn.BatchNorm, x: str, sample: Array) -> str:
    """One factor and one summand for each channel, of the running averages."""
    weights = _weights(layer)
    averages = {name: statistic.average for name, statistic in layer.statistics()}
    scale = weights["gain"] / np.sqrt(averages["variance"] + layer.epsilon)
    shift = weights["bias"] - averages["mean"] * scale
    return graph.add("Add", graph.add("Mul", x, graph.constant(scale)), graph.constant(shift))


def _layer_norm(graph: Graph, layer: nn.LayerNorm, x: str, sample: Array) -> str:
    constants = [graph.constant(value) for value in _weights(layer).values()]
    return graph.add("LayerNormalization", x, *constants, axis=-1, epsilon=layer.epsilon)


def _rms_norm(graph: Graph, layer: nn.RMSNorm, x: str, sample: Array) -> str:
    squares = graph.add("ReduceMean", graph.add("Mul", x, x), graph.constant([-1]), keepdims=1)
    length = graph.add("Sqrt", graph.add("Add", squares, graph.constant(layer.epsilon)))
    return graph.add("Mul", graph.add("Div", x, length), graph.constant(_weights(layer)["weight"]))


def _embedding(graph: Graph, layer: nn.Embedding, x: str, sample: Array) -> str:
    return graph.add("Gather", graph.constant(_weights(layer)["weight"]), x)


def _positions(graph: Graph, layer: nn.PositionalEmbedding, x: str, sample: Array) -> str:
    return graph.add("Add", x, graph.constant(_weights(layer)["weight"]))


def _attention(graph: Graph, layer: nn.MultiHeadAttention, x: str, sample: Array) -> str:
    T, D = sample.shape[1:]
    K = D // layer.heads
    qkv = graph.reshape(_linear(graph, layer.qkv, x, sample), (T, 3, layer.heads, K))
    parts = graph.transpose(qkv, 2, 0, 3, 1, 4)  # (3, batch, heads, T, K).
    q, k, v = (graph.add("Gather", parts, graph.constant(np.array(part)), axis=0) for part in range(3))
    scores = graph.add("MatMul", q, graph.transpose(k, 0, 1, 3, 2))
    scores = graph.add("Mul", scores, graph.constant(1 / math.sqrt(K)))
    seen = np.ones((T, T), np.bool_) if layer.mask is None else np.array(layer.mask)
    seen = np.tril(seen) if layer.causal else seen
    if not seen.all():
        scores = graph.add("Add", scores, graph.constant(np.where(seen, 0.0, -1e9)))
    attended = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
    joined = graph.reshape(graph.transpose(attended, 0, 2, 1, 3), (T, D))
    return _linear(graph, layer.out, joined, sample)


def _recurrent(kind: str, order: tuple[int, ...], **attributes: Any) -> Emit:
    """Return what adds a GRU or LSTM; `order` says which of distbp's blocks of columns come one by one."""

    def emit(graph: Graph, layer: Any, x: str, sample: Array) -> str:
        H, weights = layer.units, _weights(layer)

        def blocks(array: Array) -> Array:
            """Return columns as rows, block by block in ONNX's order, (1, blocks H, ...)."""
            turned = array.T.reshape(len(order), H, *array.shape[:-1])
            return np.ascontiguousarray(turned[list(order)].reshape(1, -1, *array.shape[:-1]))

        of_input = weights["bias_x"] if "bias_x" in weights else weights["bias"]
        of_state = weights.get("bias_h", np.zeros_like(of_input))
        bias = np.concatenate([blocks(of_input), blocks(of_state)], axis=1)
        T, inputs = (*sample.shape[1:], 1)[:2]
        steps = graph.transpose(graph.reshape(x, (T, inputs)), 1, 0, 2)
        constants = [blocks(weights["weight_x"]), blocks(weights["weight_h"]), bias]
        given = [steps, *map(graph.constant, constants)]
        if layer.last:
            state = graph.add(kind, *given, outputs=2, hidden_size=H, **attributes)  # (1, batch, H).
            return graph.reshape(state, (H,))
        states = graph.add(kind, *given, hidden_size=H, **attributes)  # (T, 1, batch, H).
        return graph.reshape(graph.transpose(states, 2, 0, 1, 3), (T, H))

    return emit


def _cross(graph: Graph, layer: nn.FeatureCross, x: str, sample: Array) -> str:
    factors = np.array(list(itertools.combinations(range(sample.shape[-1]), layer.order))).T
    y = graph.add("Gather", x, graph.constant(factors[0]), axis=-1)
    for row in factors[1:]:
        y = graph.add("Mul", y, graph.add("Gather", x, graph.constant(row), axis=-1))
    return y


def _columns(graph: Graph, layer: nn.ColumnEmbedding, x: str, sample: Array) -> str:
    coded = [column for column, _ in layer.codes]
    numbers = [column for column in range(sample.shape[-1]) if column not in coded]
    parts = [graph.add("Gather", x, graph.constant(numbers), axis=1)] if numbers else []
    for column, table in zip(coded, _weights(layer).values(), strict=True):
        values = graph.add("Gather", x, graph.constant(np.array(column)), axis=1)
        codes = graph.add("Cast", graph.add("Round", values), to=7)  # 7 is int64.
        parts.append(graph.add("Gather", graph.constant(table), codes))
    return graph.add("Concat", *parts, axis=1)


def _spectrogram(graph: Graph, layer: nn.LogSpectrogram, x: str, sample: Array) -> str:
    places = (sample.shape[1] - layer.window) // layer.hop + 1
    which = layer.hop * np.arange(places)[:, np.newaxis] + np.arange(layer.window)
    frames = graph.add("Gather", x, graph.constant(which), axis=1)
    tones = layer.tones(np.dtype(np.float32))
    powers = []
    for half in (tones[:, : layer.bins], tones[:, layer.bins :]):
        part = graph.add("MatMul", frames, graph.constant(np.ascontiguousarray(half)))
        powers.append(graph.add("Mul", part, part))
    power = graph.add("Add", graph.add("Add", *powers), graph.constant(layer.floor))
    return graph.reshape(graph.add("Log", power), (places, layer.bins, 1))


def _sequential(graph: Graph, layer: nn.Sequential, x: str, sample: Array) -> str:
    for child in layer.layers:
        x, sample = add_layer(graph, child, x, sample)
    return x


def _residual(graph: Graph, layer: nn.Residual, x: str, sample: Array) -> str:
    inner, _ = add_layer(graph, layer.inner, x, sample)
    past = x if layer.shortcut is None else add_layer(graph, layer.shortcut, x, sample)[0]
    return graph.add("Add", past, inner)


def _parallel(graph: Graph, layer: nn.Parallel, x: str, sample: Array) -> str:
    return graph.add("Concat", *(add_layer(graph, b, x, sample)[0] for b in layer.branches), axis=-1)


LAYERS: dict[type[Layer], Emit] = {
    nn.AsImage: _shaped,
    nn.AvgPool1d: _pool("AveragePool"),
    nn.AvgPool2d: _pool("AveragePool"),
    nn.BatchNorm: _batch_norm,
    nn.ColumnEmbedding: _columns,
    nn.Conv1d: _convolution,
    nn.Conv2d: _convolution,
    nn.Dropout: _same,
    nn.Embedding: _embedding,
    nn.FeatureCross: _cross,
    nn.Flatten: _shaped,
    nn.GELU: _elementwise("Gelu", approximate="tanh"),
    nn.GRU: _recurrent("GRU", (1, 0, 2), linear_before_reset=1),
    nn.GlobalAvgPool: _global_pool,
    nn.LSTM: _recurrent("LSTM", (0, 2, 1, 3)),
    nn.LayerNorm: _layer_norm,
    nn.LeakyReLU: _leaky_relu,
    nn.Linear: _linear,
    nn.LogSpectrogram: _spectrogram,
    nn.MaxPool1d: _pool("MaxPool"),
    nn.MaxPool2d: _pool("MaxPool"),
    nn.MultiHeadAttention: _attention,
    nn.Parallel: _parallel,
    nn.PositionalEmbedding: _positions,
    nn.RMSNorm: _rms_norm,
    nn.ReLU: _elementwise("Relu"),
    nn.Reshape: _shaped,
    nn.Residual: _residual,
    nn.Sequential: _sequential,
    nn.SiLU: _silu,
    nn.Sigmoid: _elementwise("Sigmoid"),
    nn.Softmax: _elementwise("Softmax", axis=-1),
    nn.Tanh: _elementwise("Tanh"),
    nn.Transpose: _transpose,
}
"""Layer -> how it is written; a new layer of distbp.nn adds a line."""
