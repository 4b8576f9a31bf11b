"""From a file's arrays to the canonical form: every check that does not depend on the format.

Readers of formats parse bytes and hand their arrays to `canonical`, which decides the task, checks every
value once, and raises `DataError` that names the sample.  Samples are counted from 0, as the arrays are.

Rules.  Integer targets of shape (N,) or (N, 1) are class codes; float targets are regression.  With a schema
(the file is read like the training data) the schema's task decides.  Codes are classes `0..max`; gaps are
allowed, but a code that is larger than the number of samples and than 1000 is a mistake (a house number, a
time), and believing it would make a model with that many outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Schema, Source, Task
from distbp.data.rows import Column
from distbp.errors import DataError

__all__ = ["array_schema", "canonical", "check_validation_labels"]

# Codes up to this are believed however few samples there are.
CLASSES_BELIEVED = 1000

# Samples are checked in blocks of about this many values, to stay in the cache and not double the memory.
BLOCK_VALUES = 1 << 20


def array_schema(
    format_name: str, x: Column, task: Task, classes: tuple[str, ...] | None, num_outputs: int
) -> Schema:
    """Return the schema of an array format: shape of a sample, task, classes, numbers to put out."""
    return {
        "format": format_name,
        "sample_shape": list(x.shape[1:]),
        "task": task,
        "classes": None if classes is None else list(classes),
        "num_outputs": num_outputs,
    }


def canonical(
    name: str, format_name: str, x: Column, y: NDArray[Any] | None, schema: Schema | None = None
) -> Source:
    """Return the checked `Source` of a file's arrays; `y` is None where there are no labels.

    Samples that stay on a disk are checked for values that are not finite when their mean is taken.

    Raises DataError for empty data, wrong types or shapes, NaN, Inf, labels out of range, or a sample shape
    other than the schema's.
    """
    x = _features(name, x) if isinstance(x, np.ndarray) else x
    _check_shape(name, x, schema)
    if y is None:
        return _unlabelled(name, format_name, x, schema)
    if len(y) != len(x):
        raise DataError(
            f"{name}: expected one label for each of {len(x)} samples, got {len(y)} labels; "
            "are the two parts of one data set?"
        )
    known = None if schema is None or schema["classes"] is None else tuple(schema["classes"])
    task: Task = _task(name, y) if schema is None else schema["task"]
    if task == "regression":
        targets = _regression_targets(name, y, schema)
        learnt = array_schema(format_name, x, task, None, targets.shape[1])
        return Source(name, task, x, targets, None, learnt)
    codes = _class_codes(name, y, len(x), known)
    classes = known or tuple(str(code) for code in range(int(codes.max()) + 1))
    learnt = array_schema(format_name, x, task, classes, len(classes))
    return Source(name, task, x, codes, classes, learnt)


def check_validation_labels(train: Source, validation: Source) -> None:
    """Raise DataError if the validation set has another shape, task or a class that training never shows."""
    if train.x.shape[1:] != validation.x.shape[1:]:
        raise DataError(
            f"{validation.name}: expected samples of shape {train.x.shape[1:]} as in {train.name}, "
            f"got {validation.x.shape[1:]}"
        )
    if train.task != validation.task or train.y.shape[1:] != validation.y.shape[1:]:
        raise DataError(
            f"{validation.name}: expected {train.task} targets of shape {train.y.shape[1:]} as in "
            f"{train.name}, got {validation.task} of shape {validation.y.shape[1:]}"
        )
    if train.task != "classification":
        return
    labels = validation.y[:]
    unknown = np.flatnonzero(~np.isin(labels, np.unique(train.y[:])))
    if unknown.size:
        row = int(unknown[0])
        raise DataError(
            f"{validation.name}: sample {row}: expected a label that {train.name} has, got "
            f"{int(labels[row])}; {unknown.size} samples have labels that training never shows"
        )


def _features(name: str, x: NDArray[Any]) -> NDArray[Any]:
    """Return `x` as (N, *sample_shape), native byte order, C-contiguous, all finite in float32."""
    if x.dtype.kind not in "biuf":
        raise DataError(f"{name}: expected numbers, got an array of type {x.dtype}; convert it to float32")
    if x.ndim == 0 or x.size == 0:
        raise DataError(f"{name}: expected at least one sample, got an array of shape {x.shape}")
    if x.ndim == 1:
        x = x[:, np.newaxis]
    if x.dtype.kind == "b":
        x = x.view(np.uint8)
    elif x.dtype.itemsize == 2 and x.dtype.kind == "f":
        x = x.astype(np.float32)
    x = np.ascontiguousarray(x, dtype=x.dtype.newbyteorder("="))
    if x.dtype.kind == "f":
        _check_finite(name, x, "x")
    return x


def _check_finite(name: str, values: NDArray[Any], what: str) -> None:
    """Raise DataError naming the first sample with NaN, Inf, or a number too large for float32."""
    rows = max(1, BLOCK_VALUES // max(1, values[0].size))
    for start in range(0, len(values), rows):
        block = values[start : start + rows].reshape(len(values[start : start + rows]), -1)
        with np.errstate(over="ignore"):
            finite = np.isfinite(block.astype(np.float32, copy=False))
        if finite.all():
            continue
        row, column = (int(i) for i in np.argwhere(~finite)[0])
        raise DataError(
            f"{name}: {what}, sample {start + row}, value {column}: expected a finite float32 number, got "
            f"{float(block[row, column])!r}; repair or remove the sample"
        )


def _check_shape(name: str, x: Column, schema: Schema | None) -> None:
    """Raise DataError if the samples are not shaped like the training data's."""
    if schema is None:
        return
    if "sample_shape" not in schema:
        raise DataError(
            f"{name}: expected a table with named columns, as the model was trained on, got an array; "
            "give a CSV file with the same columns"
        )
    if list(x.shape[1:]) != list(schema["sample_shape"]):
        raise DataError(
            f"{name}: expected samples of shape {tuple(schema['sample_shape'])}, as the model was trained "
            "on, "
            f"got {x.shape[1:]}"
        )


def _task(name: str, y: NDArray[Any]) -> Task:
    """Return the task that the type of the targets stands for."""
    if y.dtype.kind not in "biuf":
        raise DataError(f"{name}: expected numeric labels, got type {y.dtype}; number the classes from 0")
    if y.dtype.kind == "f":
        return "regression"
    if y.ndim == 2 and y.shape[1] > 1:
        raise DataError(
            f"{name}: expected class codes of shape (N,) or float targets of shape (N, outputs), got "
            "integers "
            f"of shape {y.shape}; for one-hot labels store their argmax, for regression convert to float32"
        )
    return "classification"


def _regression_targets(name: str, y: NDArray[Any], schema: Schema | None) -> NDArray[np.float32]:
    """Return targets as float32 (N, O)."""
    if y.dtype.kind not in "biuf" or y.ndim not in (1, 2) or y.size == 0:
        raise DataError(f"{name}: expected targets of shape (N,) or (N, outputs), got {y.dtype} {y.shape}")
    targets = y.reshape(len(y), -1)
    if schema is not None and targets.shape[1] != schema["num_outputs"]:
        raise DataError(
            f"{name}: expected {schema['num_outputs']} targets a sample, as the model was trained on, got "
            f"{targets.shape[1]}"
        )
    if targets.dtype.kind == "f":
        _check_finite(name, targets, "y")
    return np.ascontiguousarray(targets, dtype=np.float32)


def _class_codes(
    name: str, y: NDArray[Any], num_samples: int, known: tuple[str, ...] | None
) -> NDArray[np.int64]:
    """Return class codes as int64 (N,), each in range; `known` are the classes of the training data."""
    if y.dtype.kind not in "biuf" or y.size != len(y):
        raise DataError(f"{name}: expected class codes of shape (N,), got {y.dtype} {y.shape}")
    flat = y.reshape(len(y))
    limit = len(known) if known is not None else max(num_samples, CLASSES_BELIEVED) + 1
    # Written so that NaN, which compares false with everything, is out of range too.
    good = (flat >= 0) & (flat < limit)
    if flat.dtype.kind == "f":
        good &= np.floor(flat) == flat
    bad = np.flatnonzero(~good)
    if bad.size:
        row = int(bad[0])
        raise DataError(
            f"{name}: sample {row}: label out of range: expected a whole number in 0..{limit - 1}, got "
            f"{flat[row].item()!r}; number the classes from 0, or store targets of a regression as float32"
        )
    return np.ascontiguousarray(flat, dtype=np.int64)


def _unlabelled(name: str, format_name: str, x: Column, schema: Schema | None) -> Source:
    """Return a source whose targets are zeros that mean nothing."""
    task: Task = "classification" if schema is None else schema["task"]
    listed = ["0"] if schema is None else schema["classes"]
    classes = None if listed is None else tuple(listed)
    num_outputs = 1 if schema is None else schema["num_outputs"]
    y: NDArray[Any] = np.zeros(len(x), np.int64) if classes else np.zeros((len(x), num_outputs), np.float32)
    learnt = array_schema(format_name, x, task, classes, num_outputs)
    return Source(name, task, x, y, classes, learnt, labelled=False)
