"""A trained model as an ONNX file, with its normalisation, for programs that know nothing of distbp.

The file takes samples as they stand in the data, float32 (N, *sample_shape) or int64 codes, under the name
`samples`, and gives `scores` (N, ..., classes), the logits, or `numbers` (N, outputs) in the unit of the
targets.  N is free.  The arithmetic is float32, in another order than here: expect the last digits to differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distbp.data import Preprocessing
from distbp.errors import ConfigError, EnvironmentMismatch
from distbp.nn import Network
from distbp.onnx_graph import OPSET, Graph
from distbp.onnx_layers import add_layer

__all__ = ["export_onnx"]


def export_onnx(network: Network, preprocessing: Preprocessing | None = None) -> bytes:
    """Return the ONNX file of a network whose parameters and statistics are in place.

    Raises ConfigError for a layer that ONNX is not told of, or a model of more than 2 GiB, and
    EnvironmentMismatch without the package `onnx`.
    """
    try:
        from onnx import TensorProto, checker, helper
    except ImportError as error:
        raise EnvironmentMismatch(
            "export needs the package onnx, which is not installed: pip install onnx"
        ) from error
    graph = Graph()
    codes = network.layer.takes_codes
    sample = np.zeros((1, *network.input_shape), np.int64 if codes else np.float32)
    x = _normalised(graph, "samples", preprocessing)
    y, output = add_layer(graph, network.layer, x, sample)
    y = _in_the_unit_of_targets(graph, y, preprocessing)
    numbers = preprocessing is not None and preprocessing.task == "regression"
    name = "numbers" if numbers else "scores"
    graph.nodes.append(helper.make_node("Identity", [y], [name]))
    kind = TensorProto.INT64 if codes else TensorProto.FLOAT
    described = helper.make_graph(
        graph.nodes,
        "distbp",
        [helper.make_tensor_value_info("samples", kind, ["N", *network.input_shape])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *output.shape[1:]])],
        graph.constants,
    )
    # The oldest form of the file that has this set of operators, so that more programs can read it.
    model = helper.make_model(
        described, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9, producer_name="distbp"
    )
    if preprocessing is not None and preprocessing.classes is not None:
        helper.set_model_props(model, {"classes": "\n".join(preprocessing.classes)})
    if model.ByteSize() >= 2**31:
        raise ConfigError(f"expected a model below 2 GiB for one ONNX file, got {model.ByteSize():,} bytes")
    checker.check_model(model)
    content: bytes = model.SerializeToString()
    return content


def _normalised(graph: Graph, x: str, preprocessing: Preprocessing | None) -> str:
    """Return the samples as the model sees them."""
    if preprocessing is None or not preprocessing.mean:
        return x
    shape: tuple[Any, ...] = () if preprocessing.mode == "global" else preprocessing.sample_shape
    mean = np.array(preprocessing.mean).reshape(shape)
    scale = (1.0 / np.array(preprocessing.std)).reshape(shape)
    return graph.add("Mul", graph.add("Sub", x, graph.constant(mean)), graph.constant(scale))


def _in_the_unit_of_targets(graph: Graph, y: str, preprocessing: Preprocessing | None) -> str:
    """Return a regression's numbers in the unit of the targets; scores as they are."""
    if preprocessing is None or not preprocessing.target_mean:
        return y
    y = graph.add("Mul", y, graph.constant(np.array(preprocessing.target_std)))
    return graph.add("Add", y, graph.constant(np.array(preprocessing.target_mean)))
