"""Data sets taken apart for other processes: arrays for shared memory, JSON values that say what they are.

`pack_datasets` and `unpack_datasets` are inverse.  An array that is used twice (a text gives samples and
targets) travels once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from distbp.data.bells import Bells
from distbp.data.disk_rows import DiskRows
from distbp.data.memory import ArrayDataset
from distbp.data.rows import Array, Column, Rows
from distbp.data.selected import Selected
from distbp.data.windows import TokenWindows

__all__ = ["ROW_KINDS", "pack_datasets", "unpack_datasets"]

ROW_KINDS: dict[str, type[Rows]] = {
    "bells": Bells,
    "disk": DiskRows,
    "selected": Selected,
    "windows": TokenWindows,
}
"""Name in descriptions -> the class."""


def pack_datasets(datasets: Mapping[str, ArrayDataset | None]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return arrays by name, and a JSON-able description of the data sets; None is left out."""
    packing = _Packing()
    described = {
        name: {"x": packing.column(dataset.x), "y": packing.column(dataset.y)}
        for name, dataset in datasets.items()
        if dataset is not None
    }
    return packing.arrays, described


def unpack_datasets(arrays: Mapping[str, Array], described: Mapping[str, Any]) -> dict[str, ArrayDataset]:
    """Return the data sets that `pack_datasets` described, by name."""
    unpacking = _Unpacking(arrays)
    return {
        name: ArrayDataset(unpacking.column(parts["x"]), unpacking.column(parts["y"]))
        for name, parts in described.items()
    }


class _Packing:
    """Collects arrays under numbers; see `Packer`."""

    def __init__(self) -> None:
        self.arrays: dict[str, Array] = {}

    def array(self, array: Array) -> str:
        for name, held in self.arrays.items():
            if held is array:
                return name
        name = f"data{len(self.arrays)}"
        self.arrays[name] = array
        return name

    def column(self, column: Column) -> dict[str, Any]:
        if isinstance(column, np.ndarray):
            return {"kind": "array", "array": self.array(column)}
        kind = next(name for name, known in ROW_KINDS.items() if type(column) is known)
        return {"kind": kind, **column.describe(self)}


class _Unpacking:
    """Finds arrays by name; see `Unpacker`."""

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def array(self, name: str) -> Array:
        return self._arrays[name]

    def column(self, description: Mapping[str, Any]) -> Column:
        if description["kind"] == "array":
            return self.array(description["array"])
        return ROW_KINDS[description["kind"]].restore(description, self)
