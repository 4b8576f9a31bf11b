"""Checkpoints as an attacker would write them: each builder spoils one good folder, with valid hashes.

Damage is found by the hashes; here the hashes hold, so that only the checks of the content stand in the way.
A builder takes the path of a good checkpoint and changes it in place; its docstring says what is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distbp.checkpoint import manifest

STATE = "state.safetensors"
METADATA = "metadata.json"
ONE_BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def sign_again(path: Path, **fields: object) -> None:
    """Write a manifest that fits the files as they are now, with `fields` in place of its own."""
    old = json.loads((path / "manifest.json").read_bytes())
    del old["manifest_sha256"]
    for name in (STATE, METADATA):
        data = (path / name).read_bytes()
        old["files"][name] = {
            "size": len(data), "crc32": zlib.crc32(data), "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
    (path / "manifest.json").write_bytes(manifest.sign(old | fields))


def put_state(path: Path, header: bytes, payload: bytes, *, claim: int | None = None) -> None:
    """Replace the state file; `claim` is the length of the header that the file claims."""
    length = len(header) if claim is None else claim
    (path / STATE).write_bytes(length.to_bytes(8, "little") + header + payload)
    sign_again(path)


def put_file(path: Path, name: str, data: bytes, *, sign: bool = False) -> None:
    """Replace one file, and with `sign` the manifest too."""
    (path / name).write_bytes(data)
    if sign:
        sign_again(path)


def put_tensors(path: Path, tensors: dict[str, object], payload: bytes) -> None:
    """Replace the state file by one whose header lists `tensors` under the right step."""
    header = {"__metadata__": {"step": str(int(path.name[5:]))}, **tensors}
    put_state(path, json.dumps(header).encode(), payload)


def put_metadata(path: Path, data: bytes) -> None:
    """Replace the metadata, keeping the hash of the identity right for metadata that have none."""
    (path / METADATA).write_bytes(data)
    sign_again(path, config_sha256=hashlib.sha256(b'{\n  "identity": null\n}\n').hexdigest())


def put_nested(path: Path, depth: int) -> None:
    """Replace the metadata by an object that nests lists, `depth` brackets deep in all."""
    put_metadata(path, b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}")


def put_many_tensors(path: Path, count: int) -> None:
    """Replace the state by `count` empty tensors, written as briefly as JSON allows."""
    body = b",".join(
        b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % index for index in range(count)
    )
    put_state(path, b'{"__metadata__":{"step":"%d"},%s}' % (int(path.name[5:]), body), b"")


def put_padded_header(path: Path, length: int) -> None:
    """Replace the state by an empty one whose header is padded to `length` bytes."""
    put_state(path, (b'{"__metadata__":{"step":"%d"}}' % int(path.name[5:])).ljust(length), b"")


def one_tensor(**changes: object) -> Callable[[Path], None]:
    """Return a builder of a state with one tensor of one byte, with `changes` to its entry."""
    return lambda path: put_tensors(path, {"a": ONE_BYTE | changes}, b"\0")


def linked(name: str) -> Callable[[Path], None]:
    """Return a builder that moves a file outside and leaves a symbolic link to it."""

    def build(path: Path) -> None:
        outside = path.parent / f"outside-{name}"
        os.rename(path / name, outside)
        os.symlink(outside, path / name)

    return build


def piped(name: str) -> Callable[[Path], None]:
    """Return a builder that puts a named pipe in place of a file: opening one may wait for ever."""

    def build(path: Path) -> None:
        os.unlink(path / name)
        os.mkfifo(path / name)

    return build


def listed_files(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a builder that changes the list of files in the manifest and signs it."""

    def build(path: Path) -> None:
        files = json.loads((path / "manifest.json").read_bytes())["files"]
        change(files)
        fields = json.loads((path / "manifest.json").read_bytes()) | {"files": files}
        del fields["manifest_sha256"]
        (path / "manifest.json").write_bytes(manifest.sign(fields))

    return build


def renamed(new: str) -> Callable[[dict[str, Any]], object]:
    """Return a change that lists the state under another name."""
    return lambda files: files.update({new: files.pop(STATE)})


HOSTILE: dict[str, Callable[[Path], None]] = {
    "a pickle as the state": lambda path: put_state(path, pickle.dumps([1]), b""),
    "a pickle as the metadata": lambda path: put_metadata(path, pickle.dumps({"a": 1})),
    "a pickle as the manifest": lambda path: put_file(path, "manifest.json", pickle.dumps({})),
    "a shape of 2^60 elements": one_tensor(shape=[2**60]),
    "an empty shape beyond what NumPy can hold": one_tensor(shape=[0, 2**62, 2**62], data_offsets=[0, 0]),
    "a negative length": one_tensor(shape=[-1]),
    "a length that is true": one_tensor(shape=[True]),
    "a length that is a fraction": one_tensor(shape=[1.0]),
    "nine dimensions": one_tensor(shape=[1] * 9),
    "a shape that is not a list": one_tensor(shape="1"),
    "an unknown dtype": one_tensor(dtype="O"),
    "a dtype that is a list": one_tensor(dtype=["U8"]),
    "a field too many": one_tensor(extra=1),
    "an entry that is a number": lambda path: put_tensors(path, {"a": 1}, b"\0"),
    "one offset": one_tensor(data_offsets=[0]),
    "offsets outside of the file": one_tensor(data_offsets=[1 << 40, (1 << 40) + 1]),
    "offsets backwards": one_tensor(data_offsets=[1, 0]),
    "overlapping offsets": lambda path: put_tensors(path, {"a": ONE_BYTE, "b": ONE_BYTE}, b"\0"),
    "a hole between tensors": lambda path: put_tensors(
        path, {"a": ONE_BYTE, "b": ONE_BYTE | {"data_offsets": [2, 3]}}, b"\0\0\0"
    ),
    "a payload longer than its tensors": lambda path: put_tensors(path, {"a": ONE_BYTE}, b"\0\0"),
    "a payload shorter than its tensors": lambda path: put_tensors(path, {"a": ONE_BYTE}, b""),
    "a boolean of 2": lambda path: put_tensors(path, {"a": ONE_BYTE | {"dtype": "BOOL"}}, b"\2"),
    "a tensor name of 257 characters": lambda path: put_tensors(path, {"a" * 257: ONE_BYTE}, b"\0"),
    "an empty tensor name": lambda path: put_tensors(path, {"": ONE_BYTE}, b"\0"),
    "a tensor name with a newline": lambda path: put_tensors(path, {"a\n": ONE_BYTE}, b"\0"),
    "header metadata that are not text": lambda path: put_state(path, b'{"__metadata__":{"step":1}}', b""),
    "a state of another step": lambda path: put_state(path, b'{"__metadata__":{"step":"99"}}', b""),
    "a header length of 2^63": lambda path: put_state(path, b"{}", b"", claim=2**63),
    "a header longer than the file": lambda path: put_state(path, b"{}", b"", claim=3),
    "a header of 16 MiB and 1 byte": lambda path: put_padded_header(path, (16 << 20) + 1),
    "a state of 7 bytes": lambda path: put_file(path, STATE, b"1234567", sign=True),
    "100,001 tensors": lambda path: put_many_tensors(path, 100_001),
    "1,000,000 tensors": lambda path: put_many_tensors(path, 1_000_000),
    "millions of empty objects": lambda path: put_state(path, b"[" + b"{}," * (5 << 20) + b"{}]", b""),
    "a duplicate tensor": lambda path: put_state(path, b'{"a":1,"a":1}', b"\0"),
    "a duplicate key in the metadata": lambda path: put_metadata(path, b'{"a":1,"a":2}'),
    "a duplicate key under an escape": lambda path: put_metadata(path, b'{"a":1,"\\u0061":2}'),
    "NaN in the metadata": lambda path: put_metadata(path, b'{"a":NaN}'),
    "-Infinity in the metadata": lambda path: put_metadata(path, b'{"a":-Infinity}'),
    "a number that overflows": lambda path: put_metadata(path, b'{"a":1e999}'),
    "a number of 100,000 digits": lambda path: put_metadata(path, b'{"a":%s}' % (b"9" * 100_000)),
    "metadata 17 deep": lambda path: put_nested(path, 17),
    "metadata 1,000,000 deep": lambda path: put_nested(path, 1_000_000),
    "metadata that never end": lambda path: put_metadata(path, b"[" * 1_000_000),
    "a string of quotes that never ends": lambda path: put_metadata(path, b'"\\' * 1_000_000),
    "metadata that are not UTF-8": lambda path: put_metadata(path, b'{"a":"\xff"}'),
    "metadata that are a list": lambda path: put_metadata(path, b"[]"),
    "metadata of 4 MiB and 1 byte": lambda path: put_metadata(path, b"{}".ljust((4 << 20) + 1)),
    "an identity that the manifest does not name": lambda path: put_metadata(path, b'{"identity":1}'),
    "a symbolic link as the state": linked(STATE),
    "a symbolic link as the metadata": linked(METADATA),
    "a symbolic link as the manifest": linked("manifest.json"),
    "a pipe as the state": piped(STATE),
    "a pipe as the manifest": piped("manifest.json"),
    "a name that climbs out of the folder": listed_files(renamed("../../etc/passwd")),
    "an absolute name": listed_files(renamed("/etc/passwd")),
    "a file name of 129 characters": listed_files(renamed("a" * 129)),
    "a file too few": listed_files(lambda files: files.pop(STATE)),
    "a file that is not known": listed_files(lambda files: files.update({"b": files[STATE]})),
    "a negative size": listed_files(lambda files: files[STATE].update(size=-1)),
    "a size that is text": listed_files(lambda files: files[STATE].update(size="1")),
    "files that are a list": lambda path: sign_again(path, files=[]),
    "a negative step": lambda path: sign_again(path, step=-1),
    "a step that is true": lambda path: sign_again(path, step=True),
    "a config hash that is none": lambda path: sign_again(path, config_sha256="0"),
    "a manifest of 64 KiB and more": lambda path: sign_again(path, note="x" * (64 << 10)),
    "a manifest of another program": lambda path: sign_again(path, format="other"),
}  # fmt: skip

AT_THE_LIMIT: dict[str, Callable[[Path], None]] = {
    "eight dimensions": one_tensor(shape=[1] * 8),
    "a tensor name of 256 characters": lambda path: put_tensors(path, {"a" * 256: ONE_BYTE}, b"\0"),
    "a boolean of 1": lambda path: put_tensors(path, {"a": ONE_BYTE | {"dtype": "BOOL"}}, b"\1"),
    "an empty shape of 2^48": lambda path: put_tensors(
        path, {"a": ONE_BYTE | {"shape": [0, 2**48], "data_offsets": [0, 0]}}, b""
    ),
    "100,000 tensors": lambda path: put_many_tensors(path, 100_000),
    "a header of 16 MiB": lambda path: put_padded_header(path, 16 << 20),
    "metadata 16 deep": lambda path: put_nested(path, 16),
    "metadata of 4 MiB": lambda path: put_metadata(path, b"{}".ljust(4 << 20)),
    "brackets and quotes inside a string": lambda path: put_metadata(path, b'{"a":"[{[{[{\\"[[\\\\"}'),
}  # fmt: skip
