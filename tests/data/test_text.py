"""Texts: alphabets, windows, targets, what is refused, and the way to training data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbp.data import Options, load, prepare
from distbp.data.text import decode, encode
from distbp.data.windows import TokenWindows
from distbp.errors import ConfigError, DataError

TEXT = "to be, or not to be: \u00e4\n" * 5


def write(folder: Path, text: str | bytes, name: str = "a.txt") -> str:
    """Write a text and return its path."""
    content = text if isinstance(text, bytes) else text.encode()
    (folder / name).write_bytes(content)
    return str(folder / name)


def test_targets_are_what_follows(tmp_path: Path) -> None:
    """Window i begins at i * stride, and each target is the token one further on."""
    source = load(write(tmp_path, TEXT), options=Options(context=8, stride=3)).train
    tokens = encode(source.schema, TEXT.encode(), "")
    x, y = source.x[:], source.y[:]
    assert len(x) == (len(TEXT) - 1 - 8) // 3 + 1
    for number, (row, following) in enumerate(zip(x, y, strict=True)):
        assert np.array_equal(row, tokens[3 * number : 3 * number + 8])
        assert np.array_equal(following, tokens[3 * number + 1 : 3 * number + 9])


def test_windows_lie_end_to_end_by_default(tmp_path: Path) -> None:
    """Without a stride an epoch sees each token once."""
    source = load(write(tmp_path, TEXT), options=Options(context=8)).train
    assert decode(source.schema, source.x[:].reshape(-1)) == TEXT.encode()[: len(source.x[:].reshape(-1)) + 4]
    assert source.schema["stride"] == 8


def test_the_alphabet_is_sorted_and_complete(tmp_path: Path) -> None:
    """Characters are numbered by code point; tokens take one byte each while they fit."""
    source = load(write(tmp_path, TEXT), options=Options(context=8)).train
    assert source.classes == tuple(sorted(set(TEXT)))
    assert encode(source.schema, TEXT.encode(), "").dtype == np.uint8


def test_bytes_need_no_alphabet(tmp_path: Path) -> None:
    """At the level of bytes any file is a text of 256 symbols, and comes back as it was."""
    content = bytes(range(256)) * 2
    source = load(write(tmp_path, content), options=Options(context=16, level="byte")).train
    assert source.num_outputs == 256
    tokens = encode(source.schema, content, "")
    assert decode(source.schema, tokens.astype(np.int64)) == content


@given(st.text(min_size=1, max_size=200))
def test_characters_come_back(text: str) -> None:
    """Whatever is encoded with its own alphabet is decoded to itself."""
    schema = {"level": "char", "classes": sorted(set(text.removeprefix("\ufeff")) | {"a"})}
    content = text.encode("utf-8", "ignore")
    shown = content.decode("utf-8-sig")
    schema["classes"] = sorted({*shown, "a"})
    assert decode(schema, encode(schema, content, "").astype(np.int64)).decode() == shown


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        (b"abc\nde\xff", {}, ["line 2", "0xff", "data.level=byte"]),
        (b"abcabc", {}, ["more than 64 tokens", "got 6", "data.context"]),
        (b"a" * 100, {}, ["two different characters"]),
    ],
)
def test_what_is_refused(
    tmp_path: Path, content: bytes, options: dict[str, object], words: list[str]
) -> None:
    """A file that is no text, or too short, is a DataError that names place and cure."""
    with pytest.raises(DataError) as caught:
        load(write(tmp_path, content), options=Options(**options))
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_unknown_character_names_its_line(tmp_path: Path) -> None:
    """Another text is read with the alphabet of training; a stranger in it is an error, not a guess."""
    schema = load(write(tmp_path, TEXT), options=Options(context=8)).train.schema
    other = write(tmp_path, "to be\nor no\u00f6" * 5, "b.txt")
    with pytest.raises(DataError, match=r"b\.txt: line 2: .*'\u00f6'.*5 characters are unknown"):
        load(other, schema=schema)


def test_a_text_is_not_normalised(tmp_path: Path) -> None:
    """Codes stay codes: int64 samples, and a wish to normalise them is refused."""
    path = write(tmp_path, TEXT)
    made = prepare(
        load(path, options=Options(context=8)),
        validation_fraction=0.2,
        split="auto",
        normalize="auto",
        seed=0,
    )
    x, y = made.train.batch(np.arange(2))
    assert (x.dtype, y.dtype, x.shape, y.shape) == (np.int64, np.int64, (2, 8), (2, 8))
    assert np.array_equal(x[0, 1:], y[0, :-1])
    sources = load(path, options=Options(context=8))
    with pytest.raises(ConfigError, match="codes"):
        prepare(sources, validation_fraction=0.2, split="auto", normalize="global", seed=0)


def test_the_last_windows_validate(tmp_path: Path) -> None:
    """By default validation is the end of the text: neighbours do not end on both sides."""
    source = load(write(tmp_path, TEXT), options=Options(context=8)).train
    made = prepare(
        load(write(tmp_path, TEXT), options=Options(context=8)),
        validation_fraction=0.25,
        split="auto",
        normalize="auto",
        seed=0,
    )
    assert made.validation is not None
    together = np.concatenate([made.train.x[:], made.validation.x[:]])
    assert np.array_equal(together, source.x[:])


def test_windows_are_copied_where_they_are_wanted() -> None:
    """Windows go into the caller's array, and every type of token gives int64."""
    for kind in (np.uint8, np.uint16, np.uint32):
        windows = TokenWindows(np.arange(20, dtype=kind), count=4, length=5, stride=5, shift=0)
        out = np.empty((2, 5), np.int64)
        assert windows.take(np.array([3, 1]), out) is out
        assert out.tolist() == [[15, 16, 17, 18, 19], [5, 6, 7, 8, 9]]
