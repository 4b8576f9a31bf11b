"""Tables: columns, categories, targets, and reading another file by the schema of the first."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distbp.data import Options, Source, Sources, load, prepare
from distbp.errors import ConfigError, DataError


def read(tmp_path: Path, text: str, **options: object) -> Source:
    """Write `text` as a .csv file and return what is read from it."""
    (tmp_path / "t.csv").write_text(text)
    return load(str(tmp_path / "t.csv"), **options).train


def test_columns_and_categories(tmp_path: Path) -> None:
    """Numbers are one feature, texts one feature per sorted category, text targets sorted classes."""
    source = read(tmp_path, "a,town,label\n1,Rome,yes\n2.5,Bonn,no\n-3e2,Rome,no\n")
    assert source.x.tolist() == [[1, 0, 1], [2.5, 1, 0], [-300, 0, 1]]
    assert source.classes == ("no", "yes")
    assert source.y.tolist() == [1, 0, 0]


def test_whole_number_classes_sort_by_value(tmp_path: Path) -> None:
    """Class 10 comes after class 9, and 09 is class 9."""
    source = read(tmp_path, "a,y\n1,10\n2,9\n3,09\n")
    assert source.classes == ("9", "10")
    assert source.y.tolist() == [1, 0, 0]


@pytest.mark.parametrize("values", [["0.5", "1", "2"], [str(i) for i in range(21)]])
def test_regression_targets(tmp_path: Path, values: list[str]) -> None:
    """Numbers with a point, and more whole numbers than classes would have, are regression."""
    source = read(tmp_path, "a,y\n" + "".join(f"1,{v}\n" for v in values))
    assert source.task == "regression"
    assert source.y.ravel().tolist() == [float(v) for v in values]


def test_another_file_in_another_order(tmp_path: Path) -> None:
    """By the schema, columns are found by name, unknown categories are zeros, new columns not used."""
    schema = read(tmp_path, "a,town,label\n1,Rome,yes\n2,Bonn,no\n").schema
    source = read(tmp_path, "extra,town,a\n7,Oslo,5\n7,Bonn,6\n", schema=schema, labelled=False)
    assert source.x.tolist() == [[5, 0, 0], [6, 1, 0]]
    assert not source.labelled


def test_time_stamps_keep_their_differences(tmp_path: Path) -> None:
    """Neighbouring seconds stay different, although float32 cannot tell them apart."""
    source = read(tmp_path, "t,y\n1700000000,0\n1700000001,1\n")
    assert source.x[1, 0] - source.x[0, 0] == 1
    assert np.float32(1700000001) == np.float32(1700000000)


def test_quotes_blank_lines_and_byte_order_mark(tmp_path: Path) -> None:
    """A quoted comma is text, blank lines are left out, and Excel's mark is no part of a name."""
    source = read(tmp_path, '\ufeffa,y\n"x, y",0\n\nz,1\n')
    assert source.schema["columns"] == [{"name": "a", "kind": "category", "categories": ["x, y", "z"]}]


BAD = {
    "mixed": ("a,y\n1,0\n2,1\nn/a,0\n", DataError, ["line 4", "'a'", "'n/a'", "number"]),
    "empty value": ("a,y\n1,0\n,1\n", DataError, ["line 3", "'a'", "got nothing"]),
    "empty target": ("a,y\n1,0\n2,\n", DataError, ["line 3", "'y'", "got nothing"]),
    "nan": ("a,y\n1,0\nnan,1\n", DataError, ["line 3", "'a'", "'nan'", "finite"]),
    "infinite": ("a,y\n1,0\n-inf,1\n", DataError, ["line 3", "'-inf'"]),
    "too large": ("a,y\n1,0\n1e300,1\n", DataError, ["line 3", "'1e300'", "float32"]),
    "short line": ("a,b,y\n1,2,0\n1,2\n", DataError, ["line 3", "expected 3 values", "got 2"]),
    "long line": ("a,y\n1,0\n1,2,3\n", DataError, ["line 3", "expected 2 values", "got 3"]),
    "header only": ("a,y\n", DataError, ["at least one line", "got none"]),
    "blank": ("\n\n", DataError, ["line 1", "header"]),
    "no header": ("1.5,2\n1.6,3\n", DataError, ["line 1", "names of the columns", "1.5"]),
    "twin names": ("a,a,y\n1,2,3\n", DataError, ["'a' more than once"]),
    "unnamed column": (",a,y\n0,1,2\n", DataError, ["column 1", "index=False"]),
    "open quote": ('a,y\n"1,0\n', DataError, ["well-formed"]),
    "target only": ("y\n1\n2\n", DataError, ["beside the target 'y'"]),
    "no usual target": ("a,price\n1,2\n", ConfigError, ["a, price", "--target COLUMN"]),
    "two usual targets": ("label,y\n1,2\n", ConfigError, ["label, y", "--target COLUMN"]),
    "key column": (
        "a,y\n" + "".join(f"name{i},0\n" for i in range(1001)),
        DataError,
        ["'a'", "1001", "remove the column"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_tables(tmp_path: Path, case: str) -> None:
    """A bad table is refused with its line, its column, what was expected and what came."""
    text, kind, parts = BAD[case]
    with pytest.raises(kind) as caught:
        read(tmp_path, text)
    assert type(caught.value) is kind
    for part in ["t.csv", *parts]:
        assert part in str(caught.value)


def test_unknown_target_names_the_nearest(tmp_path: Path) -> None:
    """A mistyped target is a usage error that names the columns and the nearest one."""
    with pytest.raises(ConfigError, match=r"\(a, price\), got 'prise'; did you mean 'price'"):
        read(tmp_path, "a,price\n1,2\n", target="prise")


def test_missing_column_and_unknown_class(tmp_path: Path) -> None:
    """A file without a column of the training data, or with a class that it did not have, is refused."""
    schema = read(tmp_path, "a,b,y\n1,2,no\n3,4,yes\n").schema
    with pytest.raises(DataError, match=r"without \['b'\]"):
        read(tmp_path, "a,y\n1,no\n", schema=schema)
    with pytest.raises(DataError, match=r"line 2, column 'y'.*got 'perhaps'"):
        read(tmp_path, "a,b,y\n1,2,perhaps\n", schema=schema)


def test_not_utf8(tmp_path: Path) -> None:
    """Text in another encoding is refused with the byte and a cure."""
    (tmp_path / "t.csv").write_bytes(b"a,y\ncaf\xe9,1\n")
    with pytest.raises(DataError, match=r"UTF-8 text, got byte 0xe9.*iconv"):
        load(str(tmp_path / "t.csv"))


CODES = Options(categories="codes", categorical=("user",))


def test_columns_of_codes(tmp_path: Path) -> None:
    """With codes a column of texts is one feature that counts them from 1, and the schema says where."""
    source = read(tmp_path, "a,town,user,label\n1,Rome,7,x\n2,Bonn,30,y\n3,Rome,7,y\n", options=CODES)
    assert source.x.tolist() == [[1, 2, 2], [2, 1, 1], [3, 2, 2]]
    assert source.schema["codes_at"] == [[1, 3], [2, 3]]
    again = read(tmp_path, "a,town,user\n5,Oslo,7\n6,Bonn,8\n", schema=source.schema, labelled=False)
    assert again.x.tolist() == [[5, 0, 2], [6, 1, 0]]


def test_numbers_that_are_names(tmp_path: Path) -> None:
    """A column of numbers can be read as texts, one feature for each, and must be one of the table."""
    text = "user,a,y\n7,1,0\n30,2,1\n7,3,1\n"
    source = read(tmp_path, text, options=Options(categorical=("user",)))
    assert source.x.tolist() == [[0, 1, 1], [1, 0, 2], [0, 1, 3]]
    assert "codes_at" not in source.schema
    for wrong in ("usr", "y"):
        with pytest.raises(ConfigError, match=rf"data\.categorical: .*got '{wrong}'"):
            read(tmp_path, text, options=Options(categorical=(wrong,)))


def test_codes_are_not_normalised(tmp_path: Path) -> None:
    """Numbers get mean 0, codes beside them stay what they are; one mean for all is refused."""
    sources = load_sources(tmp_path, "a,town,y\n1,Rome,0\n3,Bonn,1\n", CODES_ONLY)
    made = prepare(sources, validation_fraction=0, split="auto", normalize="auto", seed=0)
    assert made.train.x.tolist() == [[-1, 2], [1, 1]]
    with pytest.raises(ConfigError, match="columns of codes"):
        prepare(sources, validation_fraction=0, split="auto", normalize="global", seed=0)


CODES_ONLY = Options(categories="codes")


def load_sources(tmp_path: Path, text: str, options: Options) -> Sources:
    """Write a table and load it."""
    (tmp_path / "t.csv").write_text(text)
    return load(str(tmp_path / "t.csv"), options=options)
