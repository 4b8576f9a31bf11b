"""Parquet files: the same samples as a CSV file of the same values, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distbp.data import load
from distbp.errors import DataError

arrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'distbp[parquet]'")
parquet = pytest.importorskip("pyarrow.parquet")


def columns(rows: int = 50) -> dict[str, list[object]]:
    """Return a table of every type that is read."""
    generator = np.random.default_rng(1)
    return {
        "size": generator.normal(size=rows).tolist(),
        "count": generator.integers(-5, 10**12, rows).tolist(),
        "new": (generator.random(rows) < 0.5).tolist(),
        "town": generator.choice(["Bonn", "Rome", "Oslo"], rows).tolist(),
        "label": generator.choice(["no", "yes"], rows).tolist(),
    }


def write_csv(path: Path, table: dict[str, list[object]]) -> str:
    """Write the same values as text."""
    lines = [",".join(table)]
    for row in zip(*table.values(), strict=True):
        lines.append(",".join(str(int(v)) if isinstance(v, bool) else str(v) for v in row))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("group", [7, 50])
def test_the_samples_of_a_csv_file(tmp_path: Path, group: int) -> None:
    """The same values give the same schema and bytes, in one row group or many."""
    table = columns()
    made = arrow.table(table)
    made = made.set_column(3, "town", made["town"].dictionary_encode())
    parquet.write_table(made, tmp_path / "t.parquet", row_group_size=group)
    one = load(str(tmp_path / "t.parquet")).train
    other = load(write_csv(tmp_path / "t.csv", table)).train
    assert one.schema == other.schema
    assert one.x.tobytes() == other.x.tobytes()
    assert one.y.tobytes() == other.y.tobytes()
    again = load(str(tmp_path / "t.csv"), schema=one.schema).train
    assert again.x.tobytes() == one.x.tobytes()


def test_single_floats_keep_their_value(tmp_path: Path) -> None:
    """A float32 column has the numbers that it had in the file."""
    values = np.float32([0.1, 1e-30, 16777217, -3.5])
    parquet.write_table(arrow.table({"a": values, "y": [0, 1, 0, 1]}), tmp_path / "t.parquet")
    assert load(str(tmp_path / "t.parquet")).train.x[:, 0].tolist() == values.astype(float).tolist()


def test_missing_values_are_named_by_row(tmp_path: Path) -> None:
    """A null is refused with its row and column, as an empty cell of a CSV file is."""
    parquet.write_table(arrow.table({"a": [1.0, None, 2.0], "y": [0, 1, 0]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"row 2, column 'a': expected a value, got nothing"):
        load(str(tmp_path / "t.parquet"))


def test_other_types_are_named(tmp_path: Path) -> None:
    """A column of lists or times is refused by its name and type."""
    parquet.write_table(arrow.table({"a": [[1], [2]], "y": [0, 1]}), tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"column 'a': expected numbers, truth values or texts, got list"):
        load(str(tmp_path / "t.parquet"))


@pytest.mark.parametrize("keep", [4, 60, 300])
def test_a_damaged_file_is_an_error(tmp_path: Path, keep: int) -> None:
    """A file that is cut short is refused by its name."""
    parquet.write_table(arrow.table(columns()), tmp_path / "t.parquet")
    content = (tmp_path / "t.parquet").read_bytes()
    (tmp_path / "t.parquet").write_bytes(content[:keep])
    with pytest.raises(DataError, match=r"t\.parquet: expected a whole Parquet file"):
        load(str(tmp_path / "t.parquet"))
