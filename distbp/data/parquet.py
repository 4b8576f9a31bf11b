"""Parquet files: tables with types, read by pyarrow (the extra `parquet`), one row group after the other.

What a column means is decided as for a CSV file with the same values (`table.py`), so the two give the same
samples: numbers and truth values are numbers, texts are categories.  Other types, such as times and lists,
are refused by name, and so is a missing value, with its row, counted from 1.

A row group is decoded at a time; the cells of the whole file are then held as Python strings, as those of a
CSV file are: fine below some 500 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from distbp.data.base import Request, Sources
from distbp.data.table import Table, check_header, sources_of
from distbp.errors import DataError, EnvironmentMismatch

__all__ = ["matches", "read"]

MAGIC = b"PAR1"


def matches(path: Path) -> bool:
    """Say whether `path` is a file that begins as Parquet files do."""
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


def read(request: Request) -> Sources:
    """Return the table at `request.path`.

    Raises DataError for content that cannot be used, ConfigError if the target column is missing or not
    named, EnvironmentMismatch without pyarrow.
    """
    return sources_of(_parse(request.path), request)


def _parse(path: Path) -> Table:
    """Return the cells of the file as text."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise EnvironmentMismatch(
            "Parquet files need pyarrow, which is not installed: pip install pyarrow"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            names = [name.strip() for name in schema.names]
            check_header(path, names)
            as_text = [_converter(path, field) for field in schema]
            cells: list[list[str]] = [[] for _ in names]
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group)
                for column, convert, values in zip(cells, as_text, rows.columns, strict=True):
                    column += map(convert, values.to_pylist())
    except (arrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: expected a whole Parquet file, got: {error}; write it again") from error
    if not cells[0]:
        raise DataError(f"{path}: expected at least one row, got none")
    columns = dict(zip(names, cells, strict=True))
    return Table(path, columns, range(1, len(cells[0]) + 1), unit="row")


def _converter(path: Path, field: Any) -> Callable[[Any], str]:
    """Return what makes a cell of a column as a CSV file would hold it; DataError for another type."""
    from pyarrow import types

    kind = field.type.value_type if types.is_dictionary(field.type) else field.type
    if types.is_boolean(kind) or types.is_integer(kind):
        return lambda value: "" if value is None else str(int(value))
    if types.is_floating(kind):
        # The shortest text that is this number and no other.
        return lambda value: "" if value is None else repr(float(value))
    if types.is_string(kind) or types.is_large_string(kind):
        return lambda value: "" if value is None else value.strip()
    raise DataError(
        f"{path}: column {field.name!r}: expected numbers, truth values or texts, got {field.type}; leave it "
        "out, or convert it"
    )
