"""NumPy arrays: one .npz file, or .npy files side by side.

The arrays are called `x` and `y`, or `x_train, y_train` with `x_val, y_val` or `x_test, y_test` as
validation, in either case; a directory holds them as `x.npy` and so on.  Integer `y` are class codes, float
`y` regression targets.

An array in an .npy file can stay there (`on_disk`; by itself where it is larger than half of the memory that
this process may use).  Its samples are then read when they are wanted, and looked at for values that are not
finite when their mean is taken.

Never unpickled: the header is parsed by NumPy's literal parser, object arrays are refused, and the bytes that
a header claims must be exactly the bytes that are there before anything is allocated (a 65 kB .npz can claim
1 GiB). `np.load` is not used, because it allocates first.
"""

from __future__ import annotations

import math
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from distbp.cgroups import memory_bytes
from distbp.data.base import Request, Source, Sources
from distbp.data.canonical import canonical, check_validation_labels
from distbp.data.disk_rows import DiskRows
from distbp.data.rows import Column
from distbp.errors import ConfigError, DataError, InputMissing

__all__ = ["matches", "read"]

NPY_MAGIC = b"\x93NUMPY"
ZIP_MAGIC = b"PK\x03\x04"
MAX_DIMENSIONS = 8
READ_BYTES = 1 << 20

# The longest match of deflate is 258 bytes for 2 bits (RFC 1951): 1032 to 1.
MOST_COMPRESSION = 1032

# What NumPy's header parser, and the literal parser and tokenizer below it, raise for strange headers.
HEADER_ERRORS = (
    ValueError,
    TypeError,
    SyntaxError,
    RecursionError,
    MemoryError,
    OverflowError,
    tokenize.TokenError,
)

SHARE_OF_MEMORY = 0.5
"""A file larger than this share of the memory stays where it is: sharing it with workers makes a copy."""

# A name in lower case, and how to read what it names.
Members = dict[str, Callable[[], Column]]


def matches(path: Path) -> bool:
    """Say whether `path` is an .npy or .npz file, or a directory with x.npy or x_train.npy."""
    if path.is_dir():
        return any(name in ("x", "x_train") for name in _directory_members(path))
    with path.open("rb") as stream:
        start = stream.read(len(NPY_MAGIC))
    return start.startswith((NPY_MAGIC, ZIP_MAGIC))


def read(request: Request) -> Sources:
    """Return the training arrays, and the validation arrays if there are any.

    Raises DataError for damaged or unusable content, InputMissing for a missing partner file.
    """
    path = request.path
    if path.is_dir():
        return _from_members(request, _directory_members(path, request.options.on_disk), "npy")
    with path.open("rb") as stream:
        if stream.read(len(NPY_MAGIC)) == NPY_MAGIC:
            return Sources(_read_npy_pair(request))
        if request.options.on_disk:
            raise ConfigError(
                f"data.on_disk: expected an .npy file, rows of which can be read alone, got {str(path)!r}"
            )
        try:
            with zipfile.ZipFile(stream) as archive:
                return _from_members(request, _archive_members(path, archive), "npz")
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise DataError(f"{path}: expected a whole .npz file, got: {error}; write it again") from error


def _from_members(request: Request, members: Members, format_name: str) -> Sources:
    """Return the sources that the named arrays make up."""
    name = str(request.path)
    prefix = "x_train" if "x_train" in members else "x"
    train = _pair(request, members, prefix, name, format_name)
    validation = next((v for v in ("x_val", "x_test") if v in members and prefix == "x_train"), None)
    if validation is None:
        return Sources(train)
    # Read like the training arrays, so that class codes mean the same.
    like_train = replace(request, schema=request.schema or train.schema)
    held_out = _pair(like_train, members, validation, f"{name} ({validation})", format_name)
    if request.labelled:
        check_validation_labels(train, held_out)
    return Sources(train, held_out)


def _pair(request: Request, members: Members, x_name: str, name: str, format_name: str) -> Source:
    """Return the source of array `x_name` and the `y` that goes with it."""
    y_name = "y" + x_name[1:]
    wanted = [x_name, y_name] if request.labelled else [x_name]
    missing = [w for w in wanted if w not in members]
    if missing:
        raise DataError(
            f"{request.path}: expected arrays called {' and '.join(map(repr, wanted))}, got "
            f"{sorted(members)!r}; "
            "name them x and y, or x_train, y_train, x_val, y_val"
        )
    y = _in_memory(members[y_name]()) if request.labelled else None
    return canonical(name, format_name, members[x_name](), y, request.schema)


def _read_npy_pair(request: Request) -> Source:
    """Return the source of one .npy file of samples and, where labels are wanted, its partner."""
    path = request.path
    x = _samples(path, request.options.on_disk)
    if not request.labelled:
        return canonical(str(path), "npy", x, None, request.schema)
    partner = path.with_name({"x": "y", "X": "Y"}.get(path.name[0], "y_") + path.name[1:])
    if path.name[0] not in "xX" or not partner.is_file():
        raise InputMissing(
            f"{path}: expected samples in x*.npy with labels in y*.npy beside it, found no {partner.name!r}; "
            "name the two files so, or put x and y into one .npz"
        )
    return canonical(str(path), "npy", x, _read_npy_file(partner), request.schema)


def _directory_members(directory: Path, on_disk: bool | None = None) -> Members:
    """Return the .npy files of a directory by lower-case name; those of samples may stay on the disk."""
    files = [p for p in sorted(directory.iterdir()) if p.suffix == ".npy" and p.is_file()]
    return {
        p.stem.lower(): lambda p=p: _samples(p, on_disk) if p.stem[0] in "xX" else _read_npy_file(p)  # type: ignore[misc]
        for p in files
    }


def _samples(path: Path, on_disk: bool | None) -> Column:
    """Return the array in an .npy file, held, or as rows that stay in the file (None: if it is large)."""
    if on_disk is None:
        on_disk = path.stat().st_size > SHARE_OF_MEMORY * memory_bytes()
    if not on_disk:
        return _read_npy_file(path)
    with path.open("rb") as stream:
        shape, fortran_order, dtype = _read_header(str(path), stream)
        if fortran_order or len(shape) < 2 or 0 in shape or dtype.kind == "b" or dtype.str[1:] == "f2":
            raise DataError(
                f"{path}: expected two dimensions or more in C order, of integers, float32 or float64, to "
                f"read rows from the disk, got shape {shape!r} of {dtype}; write it again"
            )
        return DiskRows(str(path), stream.tell(), shape, dtype.str)


def _in_memory(column: Column) -> NDArray[Any]:
    """Return an array that is held: targets always are."""
    assert isinstance(column, np.ndarray), "only samples stay on a disk"
    return column


def _archive_members(path: Path, archive: zipfile.ZipFile) -> Members:
    """Return the arrays of an .npz by lower-case name; nothing is read yet.  Raises DataError for twins."""
    members: Members = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(".npy").lower()
        if name in members:
            raise DataError(f"{path}: expected each array once, got {info.filename!r} twice; write it again")
        members[name] = lambda info=info: _read_member(path, archive, info)  # type: ignore[misc]
    return members


def _read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NDArray[Any]:
    """Return one array of an .npz after checking that its sizes are possible."""
    where = f"{path} ({info.filename})"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 1:
        raise DataError(
            f"{where}: expected a stored or deflated array, got another method; write it with np.savez"
        )
    possible = min(info.compress_size, path.stat().st_size) * MOST_COMPRESSION
    if info.file_size > possible:
        raise DataError(
            f"{where}: expected at most {possible} bytes from {info.compress_size} compressed ones, got a "
            "claim "
            f"of {info.file_size}; the file is damaged or hostile"
        )
    with archive.open(info) as stream:
        return _parse_npy(where, stream, info.file_size)


def _read_npy_file(path: Path) -> NDArray[Any]:
    """Return the array in one .npy file."""
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        return _parse_npy(str(path), stream, size)


def _parse_npy(where: str, stream: IO[bytes], size_bytes: int) -> NDArray[Any]:
    """Return the array in a stream of `size_bytes`; the header must account for every one of them."""
    shape, fortran_order, dtype = _read_header(where, stream)
    value_bytes = math.prod(shape) * dtype.itemsize
    expected = stream.tell() + value_bytes
    if expected != size_bytes:
        raise DataError(
            f"{where}: expected {expected} bytes for the shape {shape} of {dtype} in its header, got "
            f"{size_bytes}; "
            "the file is truncated or damaged, write it again"
        )
    content = bytearray(value_bytes)
    view, done = memoryview(content), 0
    while done < value_bytes:
        piece = stream.read(min(READ_BYTES, value_bytes - done))
        if not piece:
            raise DataError(
                f"{where}: expected {value_bytes} bytes of values, got {done}; the file is truncated"
            )
        view[done : done + len(piece)] = piece
        done += len(piece)
    # Reading past the end makes zipfile compare the member's CRC-32.
    stream.read(1)
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")


def _read_header(where: str, stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, order and type that the .npy header states, all of them checked."""
    try:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
        else:
            raise ValueError(f"format version {version}")
    except HEADER_ERRORS as error:
        raise DataError(f"{where}: expected an .npy header of version 1 or 2, got: {error}") from error
    if dtype.kind not in "biuf":
        raise DataError(
            f"{where}: expected numbers, got an array of type {dtype}; Python objects are never unpickled, "
            "store float32 or integers"
        )
    if len(shape) > MAX_DIMENSIONS or any(isinstance(n, bool) or n < 0 for n in shape):
        raise DataError(
            f"{where}: expected up to {MAX_DIMENSIONS} lengths of 0 or more, got the shape {shape!r}"
        )
    return shape, fortran_order, dtype
