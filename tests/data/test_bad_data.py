"""Bad and hostile files: the error, what it names, and that nothing is allocated on a header's word."""

from __future__ import annotations

import contextlib
import gzip
import os
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distbp.data import load
from distbp.errors import ConfigError, DataError, InputMissing
from tests.data.data_files import idx_bytes, images, labels, write_idx


def npz(path: Path, **arrays: np.ndarray) -> Path:
    """Write arrays under their names."""
    np.savez(path / "a.npz", **arrays)
    return path / "a.npz"


def idx_pair(path: Path, content: bytes, y: np.ndarray | None = None, suffix: str = "") -> Path:
    """Write `content` as an images file and labels beside it."""
    (path / f"a-images{suffix}").write_bytes(content)
    write_idx(path / "a-labels", labels(3) if y is None else y)
    return path / f"a-images{suffix}"


def npy_header(text: str) -> bytes:
    """Return the start of an .npy file whose header is `text`."""
    padded = text.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(padded)) + padded


def npy_text(path: Path, header: str, content: bytes = b"") -> Path:
    """Write an .npy file with a header of our choice and labels beside it."""
    (path / "x.npy").write_bytes(npy_header(header) + content)
    np.save(path / "y.npy", labels(3))
    return path / "x.npy"


def npz_claim(path: Path, shape: str) -> Path:
    """Write an .npz whose header claims a shape that its 60,000 bytes do not have."""
    with zipfile.ZipFile(path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = npy_header(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}")
        archive.writestr("x.npy", header + bytes(60_000))
        archive.writestr("y.npy", header)
    return path / "a.npz"


def npz_damaged(path: Path) -> Path:
    """Flip one value of a stored member, which its CRC-32 must find."""
    file = npz(path, x=images(3), y=labels(3))
    content = bytearray(file.read_bytes())
    content[content.index(images(3).tobytes()) + 5] ^= 1
    file.write_bytes(content)
    return file


def with_nan(count: int, row: int) -> np.ndarray:
    """Return zeros with one NaN in sample `row`."""
    x = np.zeros((count, 2), np.float32)
    x[row, 1] = np.nan
    return x


HUGE_IDX = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**31, 2**15, 2**15)
WHOLE = idx_bytes(images(3))

# Name: how to make it, the parts of the message.
BAD: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "idx truncated": (lambda p: idx_pair(p, WHOLE[:-1]), ["expected 52 bytes", "51"]),
    "idx too long": (lambda p: idx_pair(p, WHOLE + b"!"), ["expected 52 bytes", "got more"]),
    "idx header cut": (lambda p: idx_pair(p, WHOLE[:9]), ["offset 4", "12 bytes of lengths", "got 5"]),
    "idx claims 2^61 bytes": (lambda p: idx_pair(p, HUGE_IDX), ["2147483648", "got at most 16"]),
    "gz claims 2^61 bytes": (lambda p: idx_pair(p, gzip.compress(HUGE_IDX)), ["2147483648", "got at most"]),
    "gz cut": (lambda p: idx_pair(p, gzip.compress(WHOLE)[:-9]), ["expected a whole gzip file"]),
    "gz bomb": (lambda p: idx_pair(p, gzip.compress(WHOLE + bytes(10**7))), ["52 bytes", "got more"]),
    "idx of no samples": (lambda p: idx_pair(p, idx_bytes(images(0)), labels(0)), ["at least one sample"]),
    "idx labels too few": (lambda p: idx_pair(p, WHOLE, labels(2)), ["expected 3 labels", "got 2"]),
    "idx negative label": (
        lambda p: idx_pair(p, WHOLE, np.array([0, 1, -1], np.int8)),
        ["sample 2", "label out of range", "got -1"],
    ),
    "idx nan": (lambda p: idx_pair(p, idx_bytes(with_nan(3, 1))), ["sample 1", "value 1", "nan", "finite"]),
    "npz without y": (lambda p: npz(p, x=images(3)), ["'x' and 'y'", "['x']"]),
    "npz twin names": (lambda p: npz(p, x=images(3), X=images(3)), ["expected each array once"]),
    "npz counts differ": (lambda p: npz(p, x=images(3), y=labels(4)), ["3 samples", "4 labels"]),
    "npz nan": (lambda p: npz(p, x=with_nan(9, 7), y=labels(9)), ["sample 7", "value 1", "nan"]),
    "npz infinite target": (lambda p: npz(p, x=images(2), y=np.array([1.0, np.inf])), ["y, sample 1", "inf"]),
    "npz beyond float32": (
        lambda p: npz(p, x=np.array([[1.0], [1e300]]), y=labels(2)),
        ["sample 1", "1e+300"],
    ),
    "npz object array": (
        lambda p: npz(p, x=np.array([{}, None]), y=labels(2)),
        ["object", "never unpickled"],
    ),
    "npz texts": (lambda p: npz(p, x=np.array(["a", "b"]), y=labels(2)), ["expected numbers", "<U1"]),
    "npz complex": (lambda p: npz(p, x=np.zeros((2, 2), complex), y=labels(2)), ["complex128"]),
    "npz empty": (lambda p: npz(p, x=np.zeros((0, 3)), y=np.zeros(0)), ["at least one sample"]),
    "npz huge label": (
        lambda p: npz(p, x=images(2), y=np.array([0, 10**9])),
        ["sample 1", "label out of range", "0..1000", "1000000000"],
    ),
    "npz one-hot labels": (lambda p: npz(p, x=images(3), y=np.eye(3, dtype=int)), ["(3, 3)", "argmax"]),
    "npz unknown validation label": (
        lambda p: npz(p, x_train=images(3), y_train=[0, 2, 0], x_val=images(2), y_val=[0, 1]),
        ["x_val", "sample 1", "got 1"],
    ),
    "npz claims 1 GiB": (lambda p: npz_claim(p, "(1073741824,)"), ["1073741824", "in its header, got"]),
    "npz negative shape": (lambda p: npz_claim(p, "(-1, 5)"), ["(-1, 5)", "0 or more"]),
    "npz flipped bit": (npz_damaged, ["whole .npz", "CRC-32"]),
    "npy code in header": (lambda p: npy_text(p, "__import__('os').system('true')"), ["npy header"]),
    "npy deep header": (lambda p: npy_text(p, "(" * 9000), ["npy header"]),
    "npy truncated": (
        lambda p: npy_text(p, "{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }", bytes(23)),
        ["for the shape (3,)", "truncated"],
    ),
}


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    """A bad file is a DataError that names the file, what was expected and what came, at little memory."""
    make, parts = BAD[case]
    path = make(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            load(str(path))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert type(caught.value) is DataError
    for part in [str(tmp_path), *parts]:
        assert part in str(caught.value)
    # No claim of a header is believed: 4 MB is above what parsing any of these small files needs.
    assert peak_bytes < 4_000_000


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["idx", "gz", "npz", "npy"]), st.data())
def test_truncated_anywhere(tmp_path: Path, kind: str, data: st.DataObject) -> None:
    """A file cut at any offset is refused with 65, never read short and never another exception."""
    path = tmp_path / {"npz": "x.npz", "npy": "x.npy"}.get(kind, "a-images")
    if kind == "npz":
        np.savez(path, x=images(3), y=labels(3))
    elif kind == "npy":
        np.save(path, images(3))
        np.save(tmp_path / "y.npy", labels(3))
    else:
        path.write_bytes(gzip.compress(WHOLE) if kind == "gz" else WHOLE)
        write_idx(tmp_path / "a-labels", labels(3))
    os.truncate(path, data.draw(st.integers(0, path.stat().st_size - 1)))
    with pytest.raises(DataError) as caught:
        load(str(path))
    assert caught.value.exit_code == 65


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.sampled_from([b"", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\0\0\x08\x01"]))
def test_any_bytes_end_in_an_error_of_ours(tmp_path: Path, content: bytes, start: bytes) -> None:
    """Arbitrary bytes give an error of distbp's own or labelled data, never another exception."""
    for name in ("x.npy", "t.csv"):
        (tmp_path / name).write_bytes(start + content)
        # Anything but an error of ours leaves the block and fails the test.
        with contextlib.suppress(ConfigError, DataError, InputMissing):
            load(str(tmp_path / name))


def test_missing_path_names_the_nearest(tmp_path: Path) -> None:
    """A path that does not exist is 66 and names similar files, built-in names, or the missing directory."""
    (tmp_path / "train.csv").write_text("a,y\n1,2\n")
    with pytest.raises(InputMissing, match=r"did you mean '.*train\.csv'"):
        load(str(tmp_path / "trian.csv"))
    with pytest.raises(InputMissing, match=r"built-in name .*did you mean 'digits'"):
        load("digist")
    with pytest.raises(InputMissing, match=r"no directory .*nowhere'"):
        load(str(tmp_path / "nowhere" / "train.csv"))


def test_missing_partner(tmp_path: Path) -> None:
    """Samples without their labels file are 66 with the name that is missing; to predict they are enough."""
    write_idx(tmp_path / "a-images", images(3))
    np.save(tmp_path / "x_a.npy", images(3))
    with pytest.raises(InputMissing, match="'a-labels'"):
        load(str(tmp_path / "a-images"))
    with pytest.raises(InputMissing, match=r"y_a\.npy"):
        load(str(tmp_path / "x_a.npy"))
    assert len(load(str(tmp_path / "a-images"), labelled=False).train.x) == 3
    assert len(load(str(tmp_path / "x_a.npy"), labelled=False).train.x) == 3


def test_things_that_are_no_data(tmp_path: Path) -> None:
    """An empty file, an empty directory, a pipe and a foreign file are 65 and say what is understood."""
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "photo").write_bytes(b"\xff\xd8\xff\xe0")
    os.mkfifo(tmp_path / "pipe")
    for name, part in [
        ("empty", "empty file"),
        ("folder", "an empty one"),
        ("photo", "IDX files"),
        ("pipe", "pipe"),
    ]:
        with pytest.raises(DataError, match=part):
            load(str(tmp_path / name))


def test_another_shape_than_trained_on(tmp_path: Path) -> None:
    """Samples of another shape, or a table in place of arrays, do not fit the schema of the training data."""
    schema = load(str(npz(tmp_path, x=images(3), y=labels(3)))).train.schema
    (tmp_path / "t.csv").write_text("a,y\n1,2\n2,3\n")
    with pytest.raises(DataError, match=r"expected samples of shape \(4, 3\).*got \(2, 2\)"):
        load(str(npz(tmp_path, x=np.ones((3, 2, 2)), y=labels(3))), schema=schema)
    with pytest.raises(DataError, match="got a table"):
        load(str(tmp_path / "t.csv"), schema=schema)
    table_schema = load(str(tmp_path / "t.csv")).train.schema
    with pytest.raises(DataError, match="named columns"):
        load("digits", schema=table_schema)
