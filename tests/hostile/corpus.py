"""Checkpoints as an attacker would write them: each builder spoils one good folder, with valid hashes.

Damage is found by the hashes; here the hashes hold, so that only the checks of the content stand in the way.
A builder takes the path of a good checkpoint of step 7 and changes it in place.

    python -m tests.hostile.corpus write DIR    make every one of them: DIR/NAME
    python -m tests.hostile.corpus measure      how long each takes to be refused, and how much memory
    python -m tests.hostile.corpus readme       bring the tables of README.md up to date
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import socket
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distbp.checkpoint import Snapshot, load, manifest, save
from distbp.errors import DistbpError
from tests.checkpoint.checkpoint_states import small_snapshot

STATE = "state.safetensors"
METADATA = "metadata.json"
MANIFEST = "manifest.json"
ONE_BYTE = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}
README = Path(__file__).with_name("README.md")

Builder = Callable[[Path], object]


# ----- tools of the builders


def sign_again(path: Path, **fields: object) -> None:
    """Write a manifest that fits the files as they are now, with `fields` in place of its own."""
    old = json.loads((path / MANIFEST).read_bytes())
    del old["manifest_sha256"]
    for name in (STATE, METADATA):
        data = (path / name).read_bytes()
        old["files"][name] = {
            "size": len(data), "crc32": zlib.crc32(data), "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
    (path / MANIFEST).write_bytes(manifest.sign(old | fields))


def put_state(path: Path, header: bytes, payload: bytes = b"", *, claim: int | None = None) -> None:
    """Replace the state file; `claim` is the length of the header that the file claims."""
    length = len(header) if claim is None else claim
    (path / STATE).write_bytes(length.to_bytes(8, "little") + header + payload)
    sign_again(path)


def put_file(path: Path, name: str, data: bytes, *, sign: bool = False) -> None:
    """Replace one file, and with `sign` the manifest too."""
    (path / name).write_bytes(data)
    if sign:
        sign_again(path)


def put_tensors(path: Path, tensors: dict[str, object], payload: bytes = b"\0") -> None:
    """Replace the state file by one whose header lists `tensors` under the right step."""
    put_state(path, json.dumps({"__metadata__": {"step": "7"}, **tensors}).encode(), payload)


def put_metadata(path: Path, data: bytes) -> None:
    """Replace the metadata, keeping the hash of the identity right for metadata that have none."""
    (path / METADATA).write_bytes(data)
    sign_again(path, config_sha256=hashlib.sha256(b'{\n  "identity": null\n}\n').hexdigest())


def put_nested(path: Path, depth: int) -> None:
    """Replace the metadata by an object that nests lists, `depth` brackets deep in all."""
    put_metadata(path, b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}")


def put_many_tensors(path: Path, count: int) -> None:
    """Replace the state by `count` empty tensors, written as briefly as JSON allows."""
    body = b",".join(b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(count))
    put_state(path, b'{"__metadata__":{"step":"7"},%s}' % body)


def put_padded_header(path: Path, length: int) -> None:
    """Replace the state by an empty one whose header is padded to `length` bytes."""
    put_state(path, b'{"__metadata__":{"step":"7"}}'.ljust(length))


def put_many_values(path: Path, brackets_and_commas: int) -> None:
    """Replace the metadata by a list with this many brackets and commas in all."""
    put_metadata(path, b'{"a":[0' + b",0" * (brackets_and_commas - 2) + b"]}")


def put_header_values(path: Path, brackets_and_commas: int) -> None:
    """Replace the header by one whose text has so many commas that it is as rich in values as asked."""
    commas = brackets_and_commas - 3  # Two brackets, and the comma between the two texts.
    put_state(path, b'{"__metadata__":{"step":"7","a":"%s"}}' % (b"," * commas))


def put_manifest_values(path: Path, brackets_and_commas: int) -> None:
    """Add a list to the manifest, so that it has this many brackets and commas in all."""
    held = json.loads((path / MANIFEST).read_bytes())
    text = json.dumps(held).encode()
    missing = (
        brackets_and_commas - text.count(b"{") - text.count(b",") - 2
    )  # A list, and the comma before it.
    sign_again(path, note=[0] * (missing + 1))


def put_manifest_bytes(path: Path, size: int) -> None:
    """Pad the manifest to `size` bytes."""
    sign_again(path, note="")
    sign_again(path, note="x" * (size - (path / MANIFEST).stat().st_size))


def one_tensor(**changes: object) -> Builder:
    """Return a builder of a state with one tensor of one byte, with `changes` to its entry."""
    return lambda path: put_tensors(path, {"a": ONE_BYTE | changes})


def named_tensor(name: str) -> Builder:
    """Return a builder of a state with one tensor of that name."""
    return lambda path: put_tensors(path, {name: ONE_BYTE})


def empty_tensor(*shape: int) -> Builder:
    """Return a builder of a state with one tensor without elements."""
    return lambda path: put_tensors(path, {"a": ONE_BYTE | {"shape": shape, "data_offsets": [0, 0]}}, b"")


def with_metadata(data: bytes) -> Builder:
    """Return a builder of these metadata."""
    return lambda path: put_metadata(path, data)


def with_header(data: bytes, payload: bytes = b"") -> Builder:
    """Return a builder of a state with this header."""
    return lambda path: put_state(path, data, payload)


def linked(name: str) -> Builder:
    """Return a builder that moves a file outside and leaves a symbolic link to it."""

    def build(path: Path) -> None:
        outside = path.parent / f"outside-{path.name}-{name}"
        os.rename(path / name, outside)
        os.symlink(outside, path / name)

    return build


def piped(name: str) -> Builder:
    """Return a builder that puts a named pipe in place of a file: opening one may wait for ever."""

    def build(path: Path) -> None:
        os.unlink(path / name)
        os.mkfifo(path / name)

    return build


def as_socket(path: Path) -> None:
    """Put a unix socket in place of the state."""
    os.unlink(path / STATE)
    here = os.open(".", os.O_RDONLY)
    os.chdir(path)  # The address of a socket is at most 108 bytes long.
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(STATE)
    finally:
        os.fchdir(here)
        os.close(here)


def as_folder(path: Path) -> None:
    """Put a folder in place of the state."""
    os.unlink(path / STATE)
    os.mkdir(path / STATE)


def listed_files(change: Callable[[dict[str, Any]], object]) -> Builder:
    """Return a builder that changes the list of files in the manifest and signs it."""

    def build(path: Path) -> None:
        fields = json.loads((path / MANIFEST).read_bytes())
        change(fields["files"])
        del fields["manifest_sha256"]
        (path / MANIFEST).write_bytes(manifest.sign(fields))

    return build


def renamed(new: str) -> Callable[[dict[str, Any]], object]:
    """Return a change that lists the state under another name."""
    return lambda files: files.update({new: files.pop(STATE)})


def swapped_metadata(path: Path) -> None:
    """Take the metadata of another run, and sign the files but not what they say."""
    other = small_snapshot(7)
    other = Snapshot(7, other.tensors, other.metadata | {"identity": {"seed": 8}})
    folder = save(path.parent / f"other-{path.name}", other, keep=0)
    shutil.copyfile(folder / METADATA, path / METADATA)
    shutil.rmtree(folder.parent)
    sign_again(path)


# ----- the corpus: name -> what it is, and how it is made

HOSTILE: dict[str, tuple[str, Builder]] = {
    # Other formats in place of ours.
    "pickle-as-state": ("a pickle as the state", lambda path: put_state(path, pickle.dumps([1]))),
    "pickle-as-metadata": ("a pickle as the metadata", with_metadata(pickle.dumps({"a": 1}))),
    "pickle-as-manifest": (
        "a pickle as the manifest",
        lambda path: put_file(path, MANIFEST, pickle.dumps({})),
    ),
    "other-program": ("a manifest of another program", lambda path: sign_again(path, format="other")),
    # Shapes and types.
    "shape-2-60": ("a shape of 2^60 elements over one byte of payload", one_tensor(shape=[2**60])),
    "shape-overflow": (
        "no elements, but lengths whose product NumPy cannot hold",
        empty_tensor(0, 2**62, 2**62),
    ),
    "shape-negative": ("a length of -1", one_tensor(shape=[-1])),
    "shape-true": ("a length that is `true`, which Python takes for 1", one_tensor(shape=[True])),
    "shape-fraction": ("a length of 1.0", one_tensor(shape=[1.0])),
    "shape-text": ("a shape that is a text", one_tensor(shape="1")),
    "dtype-object": ("the type O: Python objects", one_tensor(dtype="O")),
    "dtype-list": ("a type that is a list", one_tensor(dtype=["U8"])),
    "boolean-2": (
        "a boolean of 2",
        lambda path: put_tensors(path, {"a": ONE_BYTE | {"dtype": "BOOL"}}, b"\2"),
    ),
    "entry-extra": ("a field too many in a tensor's entry", one_tensor(extra=1)),
    "entry-number": ("a tensor's entry that is a number", lambda path: put_tensors(path, {"a": 1})),
    # Offsets.
    "offsets-one": ("one offset instead of two", one_tensor(data_offsets=[0])),
    "offsets-outside": (
        "offsets a terabyte behind the file's end",
        one_tensor(data_offsets=[1 << 40, (1 << 40) + 1]),
    ),
    "offsets-backwards": ("an end before the beginning", one_tensor(data_offsets=[1, 0])),
    "offsets-overlap": (
        "two tensors over the same byte",
        lambda path: put_tensors(path, {"a": ONE_BYTE, "b": ONE_BYTE}),
    ),
    "offsets-hole": (
        "a byte between two tensors that belongs to none",
        lambda path: put_tensors(path, {"a": ONE_BYTE, "b": ONE_BYTE | {"data_offsets": [2, 3]}}, b"\0\0\0"),
    ),
    "payload-long": (
        "a payload longer than its tensors",
        lambda path: put_tensors(path, {"a": ONE_BYTE}, b"\0\0"),
    ),
    "payload-short": (
        "a payload shorter than its tensors",
        lambda path: put_tensors(path, {"a": ONE_BYTE}, b""),
    ),
    # Names.
    "name-empty": ("a tensor without a name", named_tensor("")),
    "name-newline": ("a tensor's name with a newline", named_tensor("a\n")),
    "name-escape": ("a tensor's name that moves the cursor of a terminal", named_tensor("\x1b[2J")),
    "name-surrogate": ("a tensor's name that is half a character", with_header(b'{"\\ud800":1}')),
    "name-traversal": ("a tensor's name of dots and a backslash", named_tensor("..\\..\\a")),
    # The header.
    "header-claims-2-63": (
        "a header that claims 2^63 bytes",
        lambda path: put_state(path, b"{}", claim=2**63),
    ),
    "header-claims-one-more": (
        "a header longer than the file by one byte",
        lambda path: put_state(path, b"{}", claim=3),
    ),
    "header-not-text": ("header metadata that are not text", with_header(b'{"__metadata__":{"step":1}}')),
    "header-nan": ("NaN in the header", with_header(b'{"a":NaN}')),
    "header-deep": ("a header 1,000,000 deep", with_header(b'{"a":' + b"[" * 1_000_000)),
    "header-duplicate": ("a tensor twice", with_header(b'{"a":1,"a":1}')),
    "header-other-step": ("the state of another step", with_header(b'{"__metadata__":{"step":"99"}}')),
    "header-empty-objects": ("five million empty objects", with_header(b"[" + b"{}," * (5 << 20) + b"{}]")),
    "header-10-6-tensors": ("1,000,000 tensors", lambda path: put_many_tensors(path, 1_000_000)),
    "state-7-bytes": (
        "a state too short for the length of its header",
        lambda path: put_file(path, STATE, b"1234567", sign=True),
    ),
    # The metadata.
    "json-duplicate": ("a key twice", with_metadata(b'{"a":1,"a":2}')),
    "json-duplicate-escaped": ("a key twice, once under an escape", with_metadata(b'{"a":1,"\\u0061":2}')),
    "json-nan": ("NaN, which Python reads and JSON does not know", with_metadata(b'{"a":NaN}')),
    "json-infinity": ("-Infinity", with_metadata(b'{"a":-Infinity}')),
    "json-overflow": ("the number 1e999", with_metadata(b'{"a":1e999}')),
    "json-long-number": ("a number of 100,000 digits", with_metadata(b'{"a":%s}' % (b"9" * 100_000))),
    "json-deep": ("1,000,000 brackets that match", lambda path: put_nested(path, 1_000_000)),
    "json-deep-open": ("1,000,000 brackets that never close", with_metadata(b"[" * 1_000_000)),
    "json-quotes": (
        "a million quotes and backslashes, for parsers that look back",
        with_metadata(b'"\\' * 1_000_000),
    ),
    "json-not-utf8": ("a byte that is not UTF-8", with_metadata(b'{"a":"\xff"}')),
    "json-utf16": ("UTF-16 in place of UTF-8", with_metadata('{"a":1}'.encode("utf-16"))),
    "json-list": ("a list in place of an object", with_metadata(b"[]")),
    "identity-other": ("an identity that the manifest does not name", with_metadata(b'{"identity":1}')),
    "identity-swapped": ("the metadata of another run, signed", swapped_metadata),
    # What is no file.
    "symlink-as-state": ("a symbolic link as the state", linked(STATE)),
    "symlink-as-metadata": ("a symbolic link as the metadata", linked(METADATA)),
    "symlink-as-manifest": ("a symbolic link as the manifest", linked(MANIFEST)),
    "pipe-as-state": ("a named pipe as the state: its open would wait for ever", piped(STATE)),
    "pipe-as-manifest": ("a named pipe as the manifest", piped(MANIFEST)),
    "socket-as-state": ("a unix socket as the state", as_socket),
    "folder-as-state": ("a folder as the state", as_folder),
    # The manifest.
    "file-traversal": (
        "a file name that climbs out of the folder",
        listed_files(renamed("../../etc/passwd")),
    ),
    "file-absolute": ("an absolute file name", listed_files(renamed("/etc/passwd"))),
    "file-dot": ("a file name that is `..`", listed_files(renamed(".."))),
    "file-missing": ("a file too few in the list", listed_files(lambda files: files.pop(STATE))),
    "file-unknown": (
        "a file in the list that is not known",
        listed_files(lambda files: files.update({"b": files[STATE]})),
    ),
    "file-negative-size": ("a file size of -1", listed_files(lambda files: files[STATE].update(size=-1))),
    "file-2-80-bytes": ("a file size of 2^80", listed_files(lambda files: files[STATE].update(size=2**80))),
    "file-size-text": (
        "a file size that is a text",
        listed_files(lambda files: files[STATE].update(size="1")),
    ),
    "files-list": ("a list of files that is a list", lambda path: sign_again(path, files=[])),
    "step-negative": ("a step of -1", lambda path: sign_again(path, step=-1)),
    "step-true": ("a step that is `true`", lambda path: sign_again(path, step=True)),
    "config-hash": (
        "a hash of the configuration that is none",
        lambda path: sign_again(path, config_sha256="0"),
    ),
}

LIMITS: dict[str, tuple[str, Builder, Builder]] = {
    "header-bytes": (
        "16 MiB of header",
        lambda path: put_padded_header(path, 16 << 20),
        lambda path: put_padded_header(path, (16 << 20) + 1),
    ),
    "tensors": (
        "100,000 tensors",
        lambda path: put_many_tensors(path, 100_000),
        lambda path: put_many_tensors(path, 100_001),
    ),
    "header-values": (
        "1,600,000 brackets and commas in the header",
        lambda path: put_header_values(path, 1_600_000),
        lambda path: put_header_values(path, 1_600_001),
    ),
    "dimensions": ("8 dimensions", one_tensor(shape=[1] * 8), one_tensor(shape=[1] * 9)),
    "elements": (
        "2^48 for the product of all lengths but 0",
        empty_tensor(0, 2**48),
        empty_tensor(0, 2**48 + 1),
    ),
    "tensor-name": ("256 characters of a tensor's name", named_tensor("a" * 256), named_tensor("a" * 257)),
    "boolean": (
        "1 as the byte of a boolean",
        lambda path: put_tensors(path, {"a": ONE_BYTE | {"dtype": "BOOL"}}, b"\1"),
        lambda path: put_tensors(path, {"a": ONE_BYTE | {"dtype": "BOOL"}}, b"\2"),
    ),
    "depth": (
        "16 brackets deep",
        lambda path: put_nested(path, 16),
        lambda path: put_nested(path, 17),
    ),
    "metadata-bytes": (
        "4 MiB of metadata",
        with_metadata(b"{}".ljust(4 << 20)),
        with_metadata(b"{}".ljust((4 << 20) + 1)),
    ),
    "metadata-values": (
        "262,144 brackets and commas in the metadata",
        lambda path: put_many_values(path, 1 << 18),
        lambda path: put_many_values(path, (1 << 18) + 1),
    ),
    "manifest-bytes": (
        "64 KiB of manifest",
        lambda path: put_manifest_bytes(path, 64 << 10),
        lambda path: put_manifest_bytes(path, (64 << 10) + 1),
    ),
    "manifest-values": (
        "1,000 brackets and commas in the manifest",
        lambda path: put_manifest_values(path, 1000),
        lambda path: put_manifest_values(path, 1001),
    ),
}
"""name -> the limit, a builder of what stands at it and is accepted, and one of what lies one beyond."""


def build(name: str, folder: Path) -> Path:
    """Make the hostile checkpoint `name`, or `NAME-at` or `NAME-beyond` for a limit, in `folder`."""
    made = save(folder / f"good-{name}", small_snapshot(7), keep=0)
    path = made.rename(folder / name)
    made.parent.rmdir()
    builder_of(name)(path)
    return path


def builder_of(name: str) -> Builder:
    """Return the builder of one name that `build` knows."""
    if name in HOSTILE:
        return HOSTILE[name][1]
    limit, _, side = name.rpartition("-")
    return LIMITS[limit][{"at": 1, "beyond": 2}[side]]


REFUSED = [*HOSTILE, *(f"{name}-beyond" for name in LIMITS)]
ACCEPTED = [f"{name}-at" for name in LIMITS]


# ----- the commands


def refuse(path: Path) -> str:
    """Load what is hostile and return the message of the refusal; "" if it was accepted."""
    try:
        load(path)
    except DistbpError as error:
        return str(error)
    return ""


def size_of(path: Path) -> int:
    """Return the bytes of all files in a folder; links and pipes count as what they are."""
    return sum(file.lstat().st_size for file in path.iterdir())


def peak_of(path: Path) -> int:
    """Return the most bytes that loading `path` allocated at a time."""
    tracemalloc.start()
    try:
        refuse(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measure() -> None:
    """Print time and memory of every refusal, the slowest first."""
    rows = []
    for name in [*REFUSED, *ACCEPTED]:
        with tempfile.TemporaryDirectory() as folder:
            path = build(name, Path(folder))
            begun = time.perf_counter()
            refuse(path)
            rows.append((time.perf_counter() - begun, peak_of(path), size_of(path), name))
    for seconds, peak, size, name in sorted(rows, reverse=True):
        print(f"{seconds * 1e3:8.1f} ms  {peak:>11,} bytes at most, {size:>11,} in the files  {name}")


def tables() -> str:
    """Return the two tables of README.md."""
    rows = [
        "| name | what it is |",
        "|---|---|",
        *(f"| `{name}` | {what} |" for name, (what, _) in HOSTILE.items()),
    ]
    limits = [
        "| name | the limit |",
        "|---|---|",
        *(f"| `{name}` | {what} |" for name, (what, *_) in LIMITS.items()),
    ]
    return "\n".join([*rows, "", *limits])


def readme() -> str:
    """Return README.md with the tables of today."""
    text = README.read_text()
    begin, end = "<!-- generated: python -m tests.hostile.corpus readme -->\n", "\n<!-- end -->"
    head, _, rest = text.partition(begin)
    return head + begin + tables() + end + rest.partition(end)[2]


def main() -> None:
    """Run one command."""
    command, *arguments = sys.argv[1:] or ["help"]
    if command == "write" and len(arguments) == 1:
        folder = Path(arguments[0])
        folder.mkdir(parents=True)
        for name in [*REFUSED, *ACCEPTED]:
            build(name, folder)
    elif command == "measure":
        measure()
    elif command == "readme":
        README.write_text(readme())
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
