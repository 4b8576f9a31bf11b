"""The safetensors layout: where each tensor lies in `state.safetensors`; pure, bytes in and bytes out.

    8 bytes    length of the header, little-endian
    header     JSON: {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end]}},
               padded with spaces so that the payload begins at a multiple of 64 bytes
    payload    the tensors, C order, little-endian, one directly after the other in the order of the header

This is the format of github.com/huggingface/safetensors, with two freedoms less: offsets are contiguous in
header order, and tensors have at most 8 dimensions.  It knows nothing of files, hashes or NumPy values.

Aligning every tensor to 64 bytes was rejected: the format forbids holes, and loading copies into fresh
arrays.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.checkpoint.strict_json import parse_object, shown
from distbp.errors import CheckpointError
from distbp.partition import round_up

__all__ = ["PREFIX_BYTES", "TensorEntry", "decode_header", "decode_prefix", "encode_header"]

PREFIX_BYTES = 8
ALIGNMENT = 64
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 1 << 48  # Keeps an empty tensor such as (0, 2**62) inside what NumPy can represent.
NAME = re.compile(r"[A-Za-z0-9._/-]{1,256}")
METADATA_KEY = "__metadata__"

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the header; `begin` and `end` are bytes from the start of the payload."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_header(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Return prefix and header for `tensors`; CheckpointError if `decode_header` would refuse them."""
    code_of = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {METADATA_KEY: dict(metadata)}
    offset = 0
    for name, array in tensors.items():
        code = code_of.get(array.dtype.newbyteorder("<"))
        if code is None:
            raise CheckpointError(
                f"tensor {shown(name)}: expected one of {', '.join(DTYPES)}, got {array.dtype!r}"
            )
        end = offset + array.nbytes
        header[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode("ascii")
    text = text.ljust(round_up(PREFIX_BYTES + len(text), ALIGNMENT) - PREFIX_BYTES)
    prefix = len(text).to_bytes(PREFIX_BYTES, "little")
    decode_prefix(prefix, PREFIX_BYTES + len(text) + offset, where="state")
    decode_header(text, offset, where="state")
    return prefix + text


def decode_prefix(prefix: bytes | bytearray, file_bytes: int, *, where: str) -> int:
    """Return the length of the header in bytes, at most 16 MiB and inside a file of `file_bytes`."""
    length = int.from_bytes(prefix, "little")
    limit = min(MAX_HEADER_BYTES, file_bytes - PREFIX_BYTES)
    if length > limit:
        raise CheckpointError(
            f"{where}: expected a header of at most {limit} bytes, the file claims {length}"
        )
    return length


def decode_header(
    header: bytes | bytearray, payload_bytes: int, *, where: str
) -> tuple[list[TensorEntry], dict[str, str]]:
    """Return the tensors of `header` in order, and its metadata; they cover `payload_bytes` exactly once."""
    # No name may contain a brace, so that braces count the tensors before anything is built from them.
    braces = header.count(b"{") - 2
    if braces > MAX_TENSORS:
        raise CheckpointError(f"{where}: expected at most {MAX_TENSORS} tensors, found {braces}")
    # A tensor is at most 3 containers, 11 commas and 10 quotes; the rest is for the metadata.
    fields = parse_object(header, where=f"{where}: header", max_values=16 * MAX_TENSORS)
    metadata = fields.pop(METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CheckpointError(
            f"{where}: expected {METADATA_KEY} to map text to text, found {shown(metadata)}"
        )
    if len(fields) > MAX_TENSORS:
        raise CheckpointError(f"{where}: expected at most {MAX_TENSORS} tensors, found {len(fields)}")
    entries: list[TensorEntry] = []
    offset = 0
    for name, value in fields.items():
        problem = _problem_with(name, value, offset)
        if problem:
            raise CheckpointError(f"{where}: tensor {shown(name)}: {problem}")
        begin, end = value["data_offsets"]
        entries.append(TensorEntry(name, value["dtype"], tuple(value["shape"]), begin, end))
        offset = end
        if offset > payload_bytes:
            raise CheckpointError(
                f"{where}: tensor {shown(name)}: expected to end inside {payload_bytes} bytes of payload, "
                f"it claims to end at {offset}"
            )
    if offset != payload_bytes:
        raise CheckpointError(
            f"{where}: expected tensors of {payload_bytes} bytes, the header lists {offset}"
        )
    return entries, metadata


def _problem_with(name: str, value: object, offset: int) -> str:
    """Return what is wrong with one entry of the header that should begin at `offset`; "" if nothing is."""
    if not NAME.fullmatch(name):
        return "expected a name of 1 to 256 letters, digits and . _ / -"
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        return f"expected dtype, shape and data_offsets, found {shown(value)}"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        return f"expected a dtype of {', '.join(DTYPES)}, found {shown(dtype)}"
    if not _is_list_of_sizes(shape) or len(shape) > MAX_DIMENSIONS:
        return f"expected a shape of at most {MAX_DIMENSIONS} lengths, found {shown(shape)}"
    if math.prod(max(length, 1) for length in shape) > MAX_ELEMENTS:
        return f"expected a shape of at most {MAX_ELEMENTS} elements, found {shown(shape)}"
    if not _is_list_of_sizes(offsets) or len(offsets) != 2:
        return f"expected data_offsets [begin, end], found {shown(offsets)}"
    expected = [offset, offset + math.prod(shape) * DTYPES[dtype].itemsize]
    if offsets != expected:
        return f"expected contiguous data_offsets {expected}, found {shown(offsets)}"
    return ""


def _is_list_of_sizes(value: object) -> bool:
    """Return whether `value` is a list of integers >= 0; JSON's true is an int to Python and not to us."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)
