"""Small states that the checkpoint tests save, and the comparison that decides whether they came back."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from distbp.checkpoint import Snapshot, load, save


def small_snapshot(step: int) -> Snapshot:
    """Return a state of a few hundred bytes whose every value depends on `step`."""
    weights = np.arange(24, dtype=np.float32).reshape(4, 6) + np.float32(step)
    tensors = {
        "parameters/0.weight": weights,
        "momentum/0.weight": -weights,
        "scalars": np.array([step, 0.5], np.float64),
        "flags": np.array([True, False, True]),
    }
    metadata = {"identity": {"seed": 7, "model": {"hidden": [4, 6]}}, "world_size": 3, "note": "a [bracket"}
    return Snapshot(step, tensors, metadata)


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    """Assert that two snapshots are equal: order, types, shapes, and every bit."""
    assert found.step == expected.step
    assert found.metadata == expected.metadata
    assert list(found.tensors) == list(expected.tensors)
    for name, array in expected.tensors.items():
        other = found.tensors[name]
        assert other.dtype == array.dtype.newbyteorder("<"), name
        assert other.shape == array.shape, name
        little = array.astype(array.dtype.newbyteorder("<"))
        assert other.tobytes() == little.tobytes(), name


def holds(path: Path) -> bool:
    """Return whether `path` loads as the small snapshot of the step it is named for."""
    snapshot = load(path)
    assert_same(snapshot, small_snapshot(int(path.name.removeprefix("step-"))))
    return True


def save_steps(directory: Path, *steps: int) -> list[Path]:
    """Save the small snapshots of `steps` and return their paths."""
    return [save(directory, small_snapshot(step), keep=0) for step in steps]
