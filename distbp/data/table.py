"""Tables: CSV and TSV files with a header line, one sample a line.

A column whose values all are numbers becomes one feature.  A column of texts becomes one feature per distinct
text (1 where the sample has it), in sorted order; or, with the option `categories="codes"`, one feature that
holds the number of the text, counted from 1, for models that keep a row for each (`schema["codes_at"]` says
where, and how many rows).  The option `categorical` names columns of numbers that are to be read as texts: a
user's number is a name.  A column that is mostly numbers and has a text in it is a mistake in the file and is
refused with its line and column; so are empty values, NaN and lines of another length.

The target column holds texts or few distinct whole numbers (classification) or other numbers (regression).
What was found is the schema: with it another file is read alike, whatever the order of its columns; a text
that training did not have gives zeros in all features of its column; columns that training did not have are
not used.

Features are float64 here and become float32 after normalisation, so that a column of time stamps keeps its
differences.  The whole file is held as Python strings while it is parsed: fine below some 500 MB.
"""

from __future__ import annotations

import csv
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Options, Request, Schema, Source, Sources, Task
from distbp.errors import ConfigError, DataError

__all__ = ["Table", "check_header", "matches", "read", "sources_of"]

DELIMITERS = {".csv": ",", ".tsv": "\t"}
USUAL_TARGETS = ("target", "label", "class", "y")

# A column with more texts than this is a name or a key, and would become that many features.
MAX_CATEGORIES = {"category": 1000, "code": 2**24 - 1}

# Whole numbers are classes if there are at most this many of them, or one for so many samples.
FEW_CLASSES = 20
SAMPLES_PER_CLASS = 1000


@dataclass(frozen=True)
class Table:
    """The cells of a file by column, stripped, and the line in the file where each row ends.

    `unit` is the word for such a line.
    """

    path: Path
    columns: dict[str, list[str]]
    lines: Sequence[int]
    unit: str = "line"


def matches(path: Path) -> bool:
    """Say whether `path` is called like a table; text has no bytes to recognise it by."""
    return path.is_file() and path.suffix.lower() in DELIMITERS


def read(request: Request) -> Sources:
    """Return the table at `request.path`.

    Raises DataError for content that cannot be used, ConfigError if the target column is missing or not
    named.
    """
    return sources_of(_parse(request.path), request)


def sources_of(table: Table, request: Request) -> Sources:
    """Return a parsed table as samples and targets, by the request's schema or one that is learnt from it."""
    schema = request.schema
    if schema is None:
        schema = _learn_schema(table, request)
    elif "columns" not in schema:
        raise DataError(
            f"{table.path}: expected samples of shape {tuple(schema['sample_shape'])}, as the model was "
            "trained "
            "on, got a table; give arrays of that shape"
        )
    x = _features(table, schema)
    classes = None if schema["classes"] is None else tuple(schema["classes"])
    y = _target(table, schema) if request.labelled else _zeros(len(x), classes)
    return Sources(Source(str(table.path), schema["task"], x, y, classes, schema, request.labelled))


def _parse(path: Path) -> Table:
    """Return the cells of the file; blank lines are left out.  Raises DataError with the line."""
    rows: list[list[str]] = []
    lines: list[int] = []
    try:
        # utf-8-sig drops the mark that Excel puts in front; newline="" is what csv asks for.
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, delimiter=DELIMITERS[path.suffix.lower()], strict=True)
            header = [name.strip() for name in next(reader, [])]
            check_header(path, header)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path}: line {reader.line_num}: expected {len(header)} values as in the header, "
                        "got "
                        f"{len(row)}; repair the line (a text with a comma needs quotes)"
                    )
                rows.append(row)
                lines.append(reader.line_num)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x} ({error.reason}); "
            "convert it, "
            "for example with iconv -t UTF-8"
        ) from error
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: expected well-formed CSV, got: {error}") from error
    if not rows:
        raise DataError(f"{path}: expected at least one line of values below the header, got none")
    cells = {
        name: [value.strip() for value in column]
        for name, column in zip(header, zip(*rows, strict=True), strict=True)
    }
    return Table(path, cells, lines)


def check_header(path: Path, header: list[str]) -> None:
    """Raise DataError unless the first line names every column, each differently."""
    if not header:
        raise DataError(
            f"{path}: line 1: expected a header line with the names of the columns, got a blank line"
        )
    if "" in header:
        raise DataError(
            f"{path}: line 1: expected a name for every column, got none for column {header.index('') + 1}; "
            "name it (pandas: to_csv(..., index=False))"
        )
    # Names that are whole numbers are what pandas writes for unnamed columns, so these are believed.
    if all(_number(name) is not None for name in header) and not all(name.isdecimal() for name in header):
        raise DataError(
            f"{path}: line 1: expected the names of the columns, got values {header[:5]!r}; add a header"
        )
    twice = [name for name in header if header.count(name) > 1] if len(set(header)) < len(header) else []
    if twice:
        raise DataError(
            f"{path}: line 1: expected different names, got {twice[0]!r} more than once; rename one"
        )


def _learn_schema(table: Table, request: Request) -> Schema:
    """Return how to read this file and others of its kind."""
    target = request.target
    if request.labelled or target is not None:
        target = _target_name(table, target)
    task: Task = "classification"
    classes: list[str] | None = ["0"]
    if request.labelled and target is not None:
        task, classes = _learn_classes(table, target)
    _check_categorical(table, request.options.categorical, target)
    columns = [_learn_column(table, name, request.options) for name in table.columns if name != target]
    if not columns:
        raise DataError(f"{table.path}: expected columns beside the target {target!r}, got none")
    schema = {"format": "table", "target": target, "columns": columns, "task": task, "classes": classes}
    codes = _codes_at(columns)
    return schema | {"codes_at": codes} if codes else schema


def _check_categorical(table: Table, names: tuple[str, ...], target: str | None) -> None:
    """Raise ConfigError if a column that is to be read as texts is none, or is the target."""
    for name in names:
        if name not in table.columns or name == target:
            raise ConfigError(
                f"data.categorical: expected columns of {table.path} beside the target, got {name!r}; it has "
                f"{', '.join(list(table.columns)[:20])}"
            )


def _codes_at(columns: list[dict[str, Any]]) -> list[list[int]]:
    """Return pairs (feature, number of codes) of the features that hold codes; 0 is what is unknown."""
    found, feature = [], 0
    for column in columns:
        if column["kind"] == "code":
            found.append([feature, len(column["categories"]) + 1])
        feature += len(column["categories"]) if column["kind"] == "category" else 1
    return found


def _target_name(table: Table, wanted: str | None) -> str:
    """Return the name of the target column.  Raises ConfigError if it is missing or cannot be guessed."""
    names = list(table.columns)
    listed = ", ".join(names[:20]) + (" ..." if len(names) > 20 else "")
    if wanted is not None:
        if wanted in table.columns:
            return wanted
        near = difflib.get_close_matches(wanted, names, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"--target: expected a column of {table.path} ({listed}), got {wanted!r}{hint}")
    usual = [name for name in names if name.lower() in USUAL_TARGETS]
    if len(usual) == 1:
        return usual[0]
    raise ConfigError(
        f"{table.path}: expected one column called target, label, class or y, got the columns {listed}; "
        "say which one holds the labels: --target COLUMN"
    )


def _learn_classes(table: Table, target: str) -> tuple[Task, list[str] | None]:
    """Return the task of the target column and, for classification, its classes in code order."""
    values = table.columns[target]
    _check_filled(table, target)
    if _is_text(table, target):
        return "classification", sorted(set(values))
    if all(_is_whole(value) for value in values):
        distinct = sorted({int(value) for value in values})
        if len(distinct) <= max(FEW_CLASSES, len(values) // SAMPLES_PER_CLASS):
            return "classification", [str(value) for value in distinct]
    return "regression", None


def _learn_column(table: Table, name: str, options: Options) -> dict[str, Any]:
    """Return the schema of one feature column."""
    _check_filled(table, name)
    if not _is_text(table, name) and name not in options.categorical:
        return {"name": name, "kind": "number"}
    categories = sorted(set(table.columns[name]))
    kind = "code" if options.categories == "codes" else "category"
    if len(categories) > MAX_CATEGORIES[kind]:
        raise DataError(
            f"{table.path}: column {name!r}: expected numbers or at most {MAX_CATEGORIES[kind]} different "
            f"texts, got {len(categories)}; remove the column if it is a name or a key, or take the model "
            "'tabular', which reads each as a code"
        )
    return {"name": name, "kind": kind, "categories": categories}


def _is_text(table: Table, name: str) -> bool:
    """Say whether a column holds texts: at most half of its values are numbers."""
    values = table.columns[name]
    return 2 * sum(_number(value) is not None for value in values) <= len(values)


def _features(table: Table, schema: Schema) -> NDArray[np.float64]:
    """Return the features as float64 (N, number of features), columns in the order of the schema."""
    missing = [column["name"] for column in schema["columns"] if column["name"] not in table.columns]
    if missing:
        raise DataError(
            f"{table.path}: expected the columns that the model was trained on, got a header without "
            f"{missing!r}"
        )
    blocks = []
    for column in schema["columns"]:
        name = column["name"]
        _check_filled(table, name)
        if column["kind"] == "number":
            blocks.append(_numbers(table, name)[:, np.newaxis])
        elif column["kind"] == "code":
            blocks.append(_codes(table.columns[name], column["categories"])[:, np.newaxis])
        else:
            blocks.append(_one_hot(table.columns[name], column["categories"]))
    return np.concatenate(blocks, axis=1)


def _one_hot(values: list[str], categories: list[str]) -> NDArray[np.float64]:
    """Return (N, number of categories) with a 1 where the sample has the category; all 0 for unknown ones."""
    positions = {category: index for index, category in enumerate(categories)}
    result = np.zeros((len(values), len(categories)))
    for row, value in enumerate(values):
        if value in positions:
            result[row, positions[value]] = 1
    return result


def _codes(values: list[str], categories: list[str]) -> NDArray[np.float64]:
    """Return the number of each value's category, counted from 1; 0 for unknown ones."""
    positions = {category: number for number, category in enumerate(categories, 1)}
    return np.array([positions.get(value, 0) for value in values], np.float64)


def _target(table: Table, schema: Schema) -> NDArray[Any]:
    """Return the targets: codes int64 (N,) into the schema's classes, or float32 (N, 1)."""
    name = schema["target"]
    if name not in table.columns:
        raise DataError(f"{table.path}: expected the target column {name!r}, got a header without it")
    _check_filled(table, name)
    if schema["classes"] is None:
        return _numbers(table, name).astype(np.float32)[:, np.newaxis]
    codes = {label: code for code, label in enumerate(schema["classes"])}
    result = np.empty(len(table.lines), np.int64)
    for row, value in enumerate(table.columns[name]):
        # Whole numbers were learnt in their shortest form: 03 and 3 are one class.
        code = codes.get(value, codes.get(str(int(value))) if _is_whole(value) else None)
        if code is None:
            raise DataError(
                f"{_cell(table, name, row)}: expected one of the classes {schema['classes'][:20]!r}, got "
                f"{value!r}"
            )
        result[row] = code
    return result


def _zeros(count: int, classes: tuple[str, ...] | None) -> NDArray[Any]:
    """Return targets that mean nothing."""
    return np.zeros((count, 1), np.float32) if classes is None else np.zeros(count, np.int64)


def _numbers(table: Table, name: str) -> NDArray[np.float64]:
    """Return a column as float64 (N,).  Raises DataError for texts, NaN, Inf and numbers beyond float32."""
    values = np.empty(len(table.lines))
    for row, text in enumerate(table.columns[name]):
        number = _number(text)
        if number is None:
            raise DataError(
                f"{_cell(table, name, row)}: expected a number as in the rest of the column, got {text!r}; "
                "repair it"
            )
        if not abs(number) <= float(np.finfo(np.float32).max):
            raise DataError(
                f"{_cell(table, name, row)}: expected a finite float32 number, got {text!r}; repair it or "
                "remove "
                "the line"
            )
        values[row] = number
    return values


def _check_filled(table: Table, name: str) -> None:
    """Raise DataError at the first empty value of a column."""
    if "" in table.columns[name]:
        row = table.columns[name].index("")
        raise DataError(
            f"{_cell(table, name, row)}: expected a value, got nothing; fill it or remove the line"
        )


def _cell(table: Table, name: str, row: int) -> str:
    """Return where a value stands, for messages."""
    return f"{table.path}: {table.unit} {table.lines[row]}, column {name!r}"


def _number(text: str) -> float | None:
    """Return the number that a text is, or None; Python's digit groups (1_000) are texts here."""
    try:
        return None if "_" in text else float(text)
    except ValueError:
        return None


def _is_whole(text: str) -> bool:
    """Say whether a text is a whole number written without a point, short enough to be one."""
    digits = text[1:] if text[:1] in ("+", "-") else text
    return digits.isascii() and digits.isdecimal() and len(digits) <= 18
