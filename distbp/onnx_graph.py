"""An ONNX graph under construction: nodes, constants, and names for what flows between them.

It knows the format's helpers and nothing of layers (`onnx_layers.py`).  The package `onnx` is imported here
and in `onnx_export.py` only, when a model is exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["OPSET", "Graph"]

OPSET = 20
"""The first with Gelu; onnxruntime reads it from 1.17 on."""


class Graph:
    """Nodes in the order of their computation; every value has a name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> str:
        """Add a node and return the name of its last output; the others have none."""
        from onnx import helper

        name = f"v{len(self.nodes)}"
        names = [""] * (outputs - 1) + [name]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return name

    def constant(self, values: NDArray[Any] | Sequence[int] | float) -> str:
        """Add a constant, floats as float32 and integers as int64, and return its name."""
        from onnx import numpy_helper

        array = np.asarray(values)
        array = np.ascontiguousarray(array, np.int64 if array.dtype.kind in "iu" else np.float32)
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array.reshape(np.shape(values)), name))
        return name

    def reshape(self, x: str, shape: Sequence[int]) -> str:
        """Give every sample another shape; the axis of samples stays."""
        return self.add("Reshape", x, self.constant([-1, *shape]))

    def transpose(self, x: str, *axes: int) -> str:
        """Put the axes into another order."""
        return self.add("Transpose", x, perm=axes)
