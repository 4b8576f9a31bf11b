"""IDX files, the format of MNIST (Y. LeCun, http://yann.lecun.com/exdb/mnist/), plain or gzip-compressed.

A file is: two zero bytes, a type code, the number of dimensions, one big-endian 32-bit length per dimension,
the values.  Recognised by these bytes, not by name.  Samples and labels are two files; they are partners when
their names differ only in `images`/`labels` and `idx3`/`idx1`.  In a directory a pair called `train` is the
training set and one called `t10k` or `test` is the validation set; a lone pair is the training set whatever
its name.

Hostile files: the sizes that a header claims are compared with the real size before anything is allocated.
The real size of compressed data is unknown, but deflate cannot shrink below 1/1032, and no more than the
claimed size plus one byte is ever decompressed.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Request, Source, Sources
from distbp.data.canonical import canonical, check_validation_labels
from distbp.errors import DataError, InputMissing

__all__ = ["matches", "read", "read_array"]

TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_DIMENSIONS = 8
GZIP_MAGIC = b"\x1f\x8b"

# The longest match of deflate is 258 bytes for 2 bits (RFC 1951): 1032 to 1.
MOST_COMPRESSION = 1032
READ_BYTES = 1 << 20


def matches(path: Path) -> bool:
    """Say whether `path` is an IDX file, or a directory that holds at least one."""
    return bool(_idx_files(path)) if path.is_dir() else _is_idx(path)


def read(request: Request) -> Sources:
    """Return the pair of files that `request.path` belongs to, or the pairs in that directory.

    Raises DataError for a file that is not what its header says, InputMissing for a missing partner.
    """
    if request.path.is_dir():
        return _read_directory(request)
    return Sources(_read_pair(request, request.path))


def read_array(path: Path) -> NDArray[Any]:
    """Return the array in an IDX file, in native byte order.  Raises DataError if the file is damaged."""
    with path.open("rb") as raw:
        file_size = raw.seek(0, 2)
        raw.seek(0)
        compressed = raw.read(2) == GZIP_MAGIC
        raw.seek(0)
        if not compressed:
            return _parse(path, raw, file_size)
        try:
            with gzip.open(raw) as stream:
                return _parse(path, cast(BinaryIO, stream), file_size * MOST_COMPRESSION)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise DataError(f"{path}: expected a whole gzip file, got: {error}; copy it again") from error


def _parse(path: Path, stream: BinaryIO, most_bytes: int) -> NDArray[Any]:
    """Read header and values from `stream`, which can hold at most `most_bytes`."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in TYPES or not 1 <= magic[3] <= MAX_DIMENSIONS:
        raise DataError(
            f"{path}: offset 0: expected an IDX header (00 00, type, dimensions 1 to {MAX_DIMENSIONS}), "
            f"got {magic.hex(' ')!r}"
        )
    dtype, num_dimensions = np.dtype(TYPES[magic[2]]), magic[3]
    lengths = stream.read(4 * num_dimensions)
    if len(lengths) < 4 * num_dimensions:
        raise DataError(
            f"{path}: offset 4: expected {4 * num_dimensions} bytes of lengths, got {len(lengths)}; "
            "the file is truncated"
        )
    shape = struct.unpack(f">{num_dimensions}I", lengths)
    header_bytes, value_bytes = 4 + len(lengths), math.prod(shape) * dtype.itemsize
    if header_bytes + value_bytes > most_bytes:
        raise DataError(
            f"{path}: expected {header_bytes + value_bytes} bytes for the shape {shape} in its header, got "
            "at "
            f"most {most_bytes}; the file is truncated, copy it again"
        )
    content = _read_at_most(stream, value_bytes + 1)
    if len(content) != value_bytes:
        got = f"{header_bytes + len(content)}" if len(content) < value_bytes else "more"
        raise DataError(
            f"{path}: expected {header_bytes + value_bytes} bytes for the shape {shape} in its header, got "
            f"{got}; "
            "copy the file again"
        )
    return np.frombuffer(content, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _read_at_most(stream: BinaryIO, limit: int) -> bytearray:
    """Return up to `limit` bytes of `stream`, growing with what really comes."""
    content = bytearray()
    while len(content) < limit:
        piece = stream.read(min(READ_BYTES, limit - len(content)))
        if not piece:
            break
        content += piece
    return content


def _is_idx(path: Path) -> bool:
    """Say whether the file begins like an IDX file, perhaps below gzip."""
    try:
        with path.open("rb") as raw:
            start = raw.read(4)
        if start[:2] == GZIP_MAGIC:
            with gzip.open(path) as stream:
                start = stream.read(4)
    except (OSError, EOFError, zlib.error):
        return False
    return len(start) == 4 and start[:2] == b"\0\0" and start[2] in TYPES


def _idx_files(directory: Path) -> list[Path]:
    """Return the IDX files of a directory, sorted; of a file and its .gz, the file."""
    found = [p for p in sorted(directory.iterdir()) if p.is_file() and p.name[0] != "." and _is_idx(p)]
    names = {p.name for p in found}
    return [p for p in found if not (p.suffix == ".gz" and p.stem in names)]


def _is_labels(path: Path) -> bool:
    return "labels" in path.name


def _read_directory(request: Request) -> Sources:
    """Return the training pair, and the validation pair if there is one."""
    images = [p for p in _idx_files(request.path) if not _is_labels(p)]
    training = [p for p in images if "train" in p.name]
    validation = [p for p in images if "train" not in p.name and ("t10k" in p.name or "test" in p.name)]
    if len(images) == 1:
        training, validation = images, []
    if len(training) != 1 or len(validation) > 1 or len(images) != len(training) + len(validation):
        raise DataError(
            f"{request.path}: expected one pair called train-* and at most one called t10k-* or test-*, got "
            f"{[p.name for p in images]!r}; give the images file itself"
        )
    train = _read_pair(request, training[0])
    if not validation:
        return Sources(train)
    held_out = _read_pair(replace(request, schema=request.schema or train.schema), validation[0])
    if request.labelled:
        check_validation_labels(train, held_out)
    return Sources(train, held_out)


def _read_pair(request: Request, images: Path) -> Source:
    """Return the source of an images file and the labels file that goes with it."""
    if _is_labels(images):
        raise DataError(f"{images}: expected samples, got a file of labels; give the images file beside it")
    x = read_array(images)
    if not request.labelled:
        return canonical(str(images), "idx", x, None, request.schema)
    labels = _partner(images)
    y = read_array(labels)
    if y.shape[:1] != x.shape[:1]:
        raise DataError(
            f"{labels}: expected {len(x)} labels for the images in {images.name}, got {len(y)}; "
            "are the two files of one data set?"
        )
    return canonical(str(images), "idx", x, y, request.schema)


def _partner(images: Path) -> Path:
    """Return the labels file of an images file, plain or .gz.  Raises InputMissing if there is none."""
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    candidates = [images.with_name(name), images.with_name(name + ".gz")]
    for candidate in candidates:
        if candidate != images and candidate.is_file():
            return candidate
    raise InputMissing(
        f"{images}: expected its labels in {candidates[0].name!r} or {candidates[1].name!r} beside it, found "
        "neither; put the labels file there"
    )
