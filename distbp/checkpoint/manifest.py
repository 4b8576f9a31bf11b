"""The manifest: what the files of a checkpoint must be, and proof that the manifest itself is whole.

`manifest.json` ends with its own SHA-256, taken over its bytes without that last key.  The hash is over
bytes, not over parsed values, so that a changed space is found as surely as a changed digit.  The keys
`format`, `format_version` and `manifest_sha256` and that rule stay the same in every version of the format:
this is how an old distbp tells "damaged" from "newer than I am".

Pure: bytes in and bytes out.  It knows nothing of folders.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeGuard

from distbp.checkpoint.strict_json import dump_json, parse_object, shown
from distbp.errors import CheckpointError

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "MAX_MANIFEST_BYTES",
    "FileRecord",
    "Manifest",
    "decode",
    "encode",
]

MANIFEST_FILE = "manifest.json"
FORMAT = "distbp-checkpoint"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 64 << 10
FILE_NAME = re.compile(r"[A-Za-z0-9._-]{1,128}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LAST_KEY = re.compile(rb',\n  "manifest_sha256": "([0-9a-f]{64})"\n\}\n\Z')


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and both checksums of one file."""

    size: int
    crc32: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The step, the hash of the configuration it belongs to, and the files."""

    step: int
    config_sha256: str
    files: dict[str, FileRecord]


def encode(manifest: Manifest) -> bytes:
    """Return the bytes of `manifest.json`."""
    fields = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": manifest.step,
        "config_sha256": manifest.config_sha256,
        "files": {name: asdict(record) for name, record in manifest.files.items()},
    }
    return sign(fields)


def sign(fields: Mapping[str, Any]) -> bytes:
    """Return `fields` as JSON with the hash of that JSON as its last key."""
    body = dump_json(dict(fields))
    last_key = b',\n  "manifest_sha256": "%s"\n}\n' % hashlib.sha256(body).hexdigest().encode()
    return body.removesuffix(b"\n}\n") + last_key


def decode(data: bytes | bytearray, *, expected_files: frozenset[str]) -> Manifest:
    """Return the manifest in `data`, which lists `expected_files`; CheckpointError says what is wrong."""
    fields = parse_object(data, where=MANIFEST_FILE, max_values=1000)
    if fields.get("format") != FORMAT:
        raise _unexpected("format", repr(FORMAT), fields.get("format"))
    last_key = _LAST_KEY.search(data)
    body = data[: last_key.start()] + b"\n}\n" if last_key else data
    if last_key is None or hashlib.sha256(body).hexdigest().encode() != last_key[1]:
        raise CheckpointError(
            f"{MANIFEST_FILE}: its own SHA-256 does not hold: the file was damaged or edited"
        )
    version = fields.get("format_version")
    if version != FORMAT_VERSION or type(version) is not int:
        raise CheckpointError(
            f"{MANIFEST_FILE}: this distbp reads checkpoint format version {FORMAT_VERSION}, this one has "
            f"version {shown(version)}: read it with a distbp that writes format version {shown(version)}"
        )
    return _checked(fields, expected_files)


def _checked(fields: dict[str, Any], expected_files: frozenset[str]) -> Manifest:
    """Return the manifest that `fields` describe, every field checked for its type and range."""
    step, config_sha256, files = fields.get("step"), fields.get("config_sha256"), fields.get("files")
    if not _is_size(step):
        raise _unexpected("step", "a number >= 0", step)
    if not _is_sha256(config_sha256):
        raise _unexpected("config_sha256", "64 hexadecimal digits", config_sha256)
    if not isinstance(files, dict):
        raise _unexpected("files", "an object", files)
    for name, record in files.items():
        if not FILE_NAME.fullmatch(name):
            raise _unexpected("files", "names of 1 to 128 letters, digits and . _ -", name)
        if not isinstance(record, dict) or set(record) != {"size", "crc32", "sha256"}:
            raise _unexpected(f"files.{name}", "size, crc32 and sha256", record)
        if not (_is_size(record["size"]) and _is_size(record["crc32"]) and _is_sha256(record["sha256"])):
            raise _unexpected(f"files.{name}", "two numbers and 64 hexadecimal digits", record)
    if set(files) != expected_files:
        raise _unexpected("files", f"exactly {', '.join(sorted(expected_files))}", sorted(files))
    return Manifest(step, config_sha256, {name: FileRecord(**record) for name, record in files.items()})


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _is_sha256(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _unexpected(key: str, expected: str, found: object) -> CheckpointError:
    return CheckpointError(f"{MANIFEST_FILE}: {key}: expected {expected}, found {shown(found)}")
