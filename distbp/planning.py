"""What is checked and written down before a call of `fit`: do the parts fit together, and what are they.

The descriptions decide whether two workers do the same, and whether a checkpoint belongs to this run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from distbp.checkpoint import Snapshot
from distbp.data import ArrayDataset, Blocks, Rows
from distbp.errors import ConfigError, DataError
from distbp.metrics.sinks import SINKS
from distbp.nn import Layer, Layout, Network
from distbp.optim import Averaged
from distbp.saver import AUTO

__all__ = [
    "Data",
    "as_dataset",
    "blocks_of",
    "check_data",
    "check_kind_of_samples",
    "check_metadata",
    "check_options",
    "check_saving",
    "check_sinks",
    "copy_tensors",
    "describe_blocks",
    "describe_layer",
    "describe_options",
    "sample_type",
    "too_many_workers",
]


Data: TypeAlias = ArrayDataset | tuple[Any, Any]
"""What `fit` and `evaluate` take: a data set, or samples and targets."""


def sample_type(model: Layer) -> type:
    """Return the type of samples that the model takes."""
    return np.int64 if model.takes_codes else np.float32


def as_dataset(data: Data, model: Layer) -> ArrayDataset:
    """Return `data` as a data set: samples float32, or codes where the model takes codes.

    Targets are int64 classes, (N,) or (N, *places), or float32 numbers (N, O).
    """
    if isinstance(data, ArrayDataset):
        return data
    x, y = (np.asarray(part) for part in data)
    if len(x) != len(y):
        raise DataError(f"expected as many targets as samples, got {len(x)} samples and {len(y)} targets")
    if y.dtype.kind in "iub":
        targets: NDArray[Any] = np.ascontiguousarray(y, np.int64)
    else:
        columns = y.shape[1] if y.ndim > 1 else 1
        targets = np.ascontiguousarray(y.reshape(len(y), columns), np.float32)
    if model.takes_codes and x.dtype.kind not in "iu":
        raise DataError(f"expected integer codes, which the model takes, got samples of type {x.dtype}")
    samples: NDArray[Any] = np.ascontiguousarray(x, sample_type(model))
    for name, part in (("x", samples), ("y", targets)):
        if part.dtype.kind == "f" and not np.isfinite(part).all():
            row = int(np.flatnonzero(~np.isfinite(part.reshape(len(part), -1)).all(axis=1))[0])
            raise DataError(f"{name} holds a value that is not finite, first in sample {row}; clean the data")
    return ArrayDataset(samples, targets)


def blocks_of(data: ArrayDataset, shuffle: str) -> Blocks | None:
    """Return the blocks in which samples are shuffled, or None if any may follow any."""
    if shuffle not in ("auto", "full", "block"):
        raise ConfigError(f"shuffle: expected 'auto', 'full' or 'block', got {shuffle!r}")
    on_disk = data.x.disk_row_bytes if isinstance(data.x, Rows) else 0
    if shuffle == "full" or (shuffle == "auto" and not on_disk):
        return None
    held = math.prod(data.x.shape[1:]) * data.x.dtype.itemsize
    return Blocks.of_rows(on_disk or max(1, held), len(data))


def describe_blocks(blocks: Blocks | None) -> dict[str, Any]:
    """Return what decides about the order; nothing where there are no blocks, as runs began that had none."""
    return {} if blocks is None else {"blocks": [blocks.block, blocks.window]}


def check_data(network: Network, train: ArrayDataset, validation: ArrayDataset | None) -> None:
    """Refuse data that the model or the loss cannot take, before anything starts."""
    wanted = np.int64 if network.loss.kind == "classification" else np.float32
    shape = train.x.shape[1:]
    for name, data in (("training", train), ("validation", validation)):
        if data is None:
            continue
        if len(data) == 0:
            raise DataError(f"the {name} data are empty; leave them away, or give at least one sample")
        if data.y.dtype != wanted:
            raise ConfigError(
                f"the loss is for {network.loss.kind} and needs targets of type {np.dtype(wanted)}, "
                f"the {name} data have {data.y.dtype}; choose another loss"
            )
        if data.x.shape[1:] != shape:
            got = data.x.shape[1:]
            raise DataError(f"the {name} data have samples of shape {got}, expected {shape}, as in training")
    for name, data in (("training", train), ("validation", validation)):
        if data is not None and wanted is np.int64:
            _check_classes(name, data, network.output_shape)


def check_kind_of_samples(model: Layer, data: ArrayDataset) -> None:
    """Refuse numbers where the model wants codes, and codes where it wants numbers."""
    if (data.x.dtype.kind == "i") != model.takes_codes:
        wanted, got = ("integer codes", "numbers") if model.takes_codes else ("numbers", "codes")
        raise ConfigError(
            f"the model takes {wanted}, the samples are {got}; a model for codes begins with an Embedding, "
            "and model.name = 'transformer' is one"
        )


def _check_classes(name: str, data: ArrayDataset, output_shape: tuple[int, ...]) -> None:
    """Refuse labels that are not one for each answer of the model, or are no class numbers."""
    *places, outputs = output_shape
    classes = max(outputs, 2)  # One output tells two classes apart, by its sign.
    if data.y.shape[1:] != tuple(places):
        raise ConfigError(
            f"the model puts out {output_shape} for a sample, so it wants classes of shape {tuple(places)}; "
            f"those of the {name} data have shape {data.y.shape[1:]}; a Flatten before the last layers makes "
            "one answer of many"
        )
    if isinstance(data.y, Rows):  # Its reader has checked what it makes.
        return
    if not 0 <= data.y.min() <= data.y.max() < classes:
        row = int(np.argwhere((data.y < 0) | (data.y >= classes))[0, 0])
        raise DataError(
            f"the {name} data have label {data.y[row]} in sample {row}, expected 0 to {classes - 1}"
        )


def copy_tensors(snapshot: Snapshot, vector: str, layout: Layout, target: NDArray[Any]) -> None:
    """Copy the tensors of a `vector` of the state from `snapshot` to `target`, laid out as `layout` says.

    Raises ConfigError if they are not those of the model.
    """
    for name, view in zip(layout.names, layout.views(target), strict=True):
        held = snapshot.tensors.get(f"{vector}/{name}")
        if held is None or held.shape != view.shape:
            got = "nothing" if held is None else f"shape {held.shape}"
            raise ConfigError(
                f"the model has {vector}/{name} of shape {view.shape}, the checkpoint has {got}: "
                "it belongs to another model"
            )
        np.copyto(view, held)


def check_metadata(metadata: dict[str, Any] | None) -> None:
    """Refuse what a checkpoint cannot hold, before the first step and not at the first save."""
    try:
        json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"metadata: expected JSON values, {error}") from error


def check_saving(every_steps: int | None, every_seconds: float | str | None) -> None:
    """Refuse a plan of checkpoints that cannot be followed."""
    is_count = isinstance(every_steps, int) and not isinstance(every_steps, bool) and every_steps > 0
    if every_steps is not None and not is_count:
        raise ConfigError(f"checkpoint_every_steps: expected a whole number > 0 or None, got {every_steps!r}")
    is_time = isinstance(every_seconds, int | float) and 0 < every_seconds < math.inf
    if every_seconds is not None and every_seconds != AUTO and (every_seconds is True or not is_time):
        raise ConfigError(
            f'checkpoint_every_seconds: expected seconds > 0, "{AUTO}" or None, got {every_seconds!r}'
        )


def check_options(
    metadata: dict[str, Any] | None,
    every_steps: int | None,
    every_seconds: float | str | None,
    records: Sequence[str],
) -> None:
    """Refuse options of `fit` that mean nothing."""
    check_metadata(metadata)
    check_saving(every_steps, every_seconds)
    check_sinks(records)


def check_sinks(names: Sequence[str]) -> None:
    """Refuse places for records that do not exist."""
    unknown = [names] if isinstance(names, str) else [name for name in names if name not in SINKS]
    if unknown:
        raise ConfigError(f"records: expected a list of names from {list(SINKS)}, got {unknown[0]!r}")


def too_many_workers(workers: int, batch_size: int, micro_batch: int) -> str:
    """Return the message for more workers than micro-batches, naming what would fit."""
    most = batch_size // micro_batch
    smaller = batch_size // workers
    fits = [f"--nproc {most} or less", f"--batch-size {workers * micro_batch}"]
    if smaller and batch_size % workers == 0:
        fits.insert(1, f"--micro-batch {smaller}")
    return (
        f"{workers} workers need at least {workers} micro-batches, but batch_size {batch_size} with "
        f"micro_batch {micro_batch} has {most}; take {', or '.join(fits)}"
    )


def describe_layer(layer: Layer) -> str:
    """Return the model as text: kinds, options and nesting; part of what decides about bits."""
    options = [f"{name}={value!r}" for name, value in _options(layer).items()]
    children = [describe_layer(child) for _, child in layer.children()]
    return f"{type(layer).__name__}({', '.join(options + children)})"


def describe_options(part: object) -> dict[str, Any]:
    """Return kind and public options of a loss, an optimizer or a schedule as JSON values."""
    described: dict[str, Any] = json.loads(json.dumps({"kind": type(part).__name__} | _options(part)))
    if isinstance(part, Averaged):
        described["inner"] = describe_options(part.inner)
    return described


def _options(part: object) -> dict[str, Any]:
    """Return the public attributes of a part that are plain values."""

    def is_plain(value: object) -> bool:
        if isinstance(value, tuple | list):
            return all(map(is_plain, value))
        return isinstance(value, bool | int | float | str | None)

    return {name: value for name, value in vars(part).items() if not name.startswith("_") and is_plain(value)}
