"""Loading, verifying and describing a checkpoint: one examination, three ways to use what it found.

`_examine` reads manifest, metadata and state in this order, and notes what is wrong with each instead of
stopping.  `load` insists that nothing is wrong, `verify` returns the list, `describe` shows what can still be
shown.  One code path means that what `verify` calls good, `load` accepts.

It knows nothing of other checkpoints: falling back to an older one is `folders.newest_verified`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.checkpoint import layout, manifest
from distbp.checkpoint.files import BLOCK_BYTES, CheckedFile, no_pause, open_folder
from distbp.checkpoint.manifest import MANIFEST_FILE, FileRecord, Manifest
from distbp.checkpoint.snapshot import IDENTITY_KEY, Snapshot
from distbp.checkpoint.strict_json import dump_json, parse_object
from distbp.errors import CheckpointError, InputMissing

__all__ = ["METADATA_FILE", "STATE_FILE", "config_sha256", "decode_metadata", "describe", "load", "verify"]

STATE_FILE = "state.safetensors"
METADATA_FILE = "metadata.json"
# Room for 100,000 class names.  Longer lists belong into tensors.
MAX_METADATA_BYTES = 4 << 20
MAX_METADATA_VALUES = 1 << 18


@dataclass
class _Findings:
    """What one examination saw; `problems` maps the name of a file to what is wrong with it."""

    manifest: Manifest | None = None
    metadata: dict[str, Any] | None = None
    entries: list[layout.TensorEntry] = field(default_factory=list)
    tensors: dict[str, NDArray[Any]] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def load(path: Path) -> Snapshot:
    """Return the snapshot in the checkpoint folder `path`, every byte verified, arrays owned by the caller.

    CheckpointError (65) names the files and what is wrong with them; InputMissing (66) if there is no such
    folder.
    """
    found = _examine(path, keep_tensors=True)
    if found.problems:
        raise CheckpointError(
            f"{path}: expected a whole checkpoint, found {'; '.join(found.problems.values())}. "
            "Use another checkpoint of the run, or let --resume auto choose the newest that verifies"
        )
    assert found.manifest is not None, "an examination without problems has read the manifest"
    assert found.metadata is not None, "an examination without problems has read the metadata"
    return Snapshot(found.manifest.step, found.tensors, found.metadata)


def verify(path: Path, *, only_crc: bool = False, pause: Callable[[int], None] = no_pause) -> list[str]:
    """Return what is wrong with the checkpoint folder `path`, one sentence a file; [] if nothing is.

    `only_crc` leaves out the SHA-256 of the state: cheaper, and blind to tampering.  `pause` is called after
    each block of at most 1 MiB of the state with its number of bytes.
    """
    try:
        return list(_examine(path, only_crc=only_crc, pause=pause).problems.values())
    except (CheckpointError, InputMissing) as error:
        return [str(error)]


def describe(path: Path) -> dict[str, Any]:
    """Return what `distbp inspect` shows, as JSON-able values; of a damaged checkpoint, what is legible.

    Keys: path, step (None if the manifest is illegible), format_version, config_sha256, metadata, tensors (a
    list of name, dtype, shape, bytes), files (a list of name, bytes, crc32, sha256, problem: "" where every
    hash holds), problems.  InputMissing if there is no such folder, CheckpointError if it cannot be opened.
    """
    found = _examine(path)
    files: dict[str, FileRecord] = found.manifest.files if found.manifest else {}
    return {
        "path": str(path),
        "step": found.manifest.step if found.manifest else None,
        "format_version": manifest.FORMAT_VERSION if found.manifest else None,
        "config_sha256": found.manifest.config_sha256 if found.manifest else None,
        "metadata": found.metadata,
        "tensors": [
            {"name": e.name, "dtype": e.dtype, "shape": list(e.shape), "bytes": e.end - e.begin}
            for e in found.entries
        ],
        "files": [
            {
                "name": name,
                "bytes": record.size,
                "crc32": f"{record.crc32:08x}",
                "sha256": record.sha256,
                "problem": found.problems.get(name, ""),
            }
            for name, record in files.items()
        ],
        "problems": list(found.problems.values()),
    }


def config_sha256(metadata: dict[str, Any]) -> str:
    """Return the hash of the identity in `metadata`: two checkpoints of one configuration show the same."""
    return hashlib.sha256(dump_json({IDENTITY_KEY: metadata.get(IDENTITY_KEY)})).hexdigest()


def decode_metadata(data: bytes | bytearray) -> dict[str, Any]:
    """Return the metadata in `data`; CheckpointError if it is too large, too deep, or not JSON."""
    if len(data) > MAX_METADATA_BYTES:
        raise CheckpointError(
            f"{METADATA_FILE}: expected at most {MAX_METADATA_BYTES} bytes, found {len(data)}"
        )
    return parse_object(data, where=METADATA_FILE, max_values=MAX_METADATA_VALUES)


def _examine(
    path: Path,
    *,
    keep_tensors: bool = False,
    only_crc: bool = False,
    pause: Callable[[int], None] = no_pause,
) -> _Findings:
    """Read the whole folder and note what is wrong; memory: the kept tensors, or one block."""
    found = _Findings()
    with open_folder(path) as folder:
        try:
            found.manifest = _read_manifest(folder, path.name)
        except CheckpointError as error:
            found.problems[MANIFEST_FILE] = str(error)
            return found  # Without the manifest nothing else can be believed.
        try:
            found.metadata = _read_metadata(folder, found.manifest)
        except CheckpointError as error:
            found.problems[METADATA_FILE] = str(error)
        try:
            with CheckedFile(folder, STATE_FILE, only_crc=only_crc, pause=pause) as file:
                _read_state(file, found, keep_tensors=keep_tensors)
        except CheckpointError as error:
            found.problems[STATE_FILE] = str(error)
    return found


def _read_manifest(folder: int, folder_name: str) -> Manifest:
    """Return the manifest; a folder that is named for another step was renamed or swapped."""
    with CheckedFile(folder, MANIFEST_FILE) as file:
        if file.size > manifest.MAX_MANIFEST_BYTES:
            raise CheckpointError(
                f"{MANIFEST_FILE}: expected at most {manifest.MAX_MANIFEST_BYTES} bytes, found {file.size}"
            )
        result = manifest.decode(file.read(file.size), expected_files=frozenset({STATE_FILE, METADATA_FILE}))
    named_for = re.fullmatch(r"step-(\d{8,18})", folder_name)
    if named_for and int(named_for[1]) != result.step:
        raise CheckpointError(f"{MANIFEST_FILE}: expected step {int(named_for[1])}, found step {result.step}")
    return result


def _read_metadata(folder: int, listed: Manifest) -> dict[str, Any]:
    """Return the metadata, whose checksums hold."""
    record = listed.files[METADATA_FILE]
    with CheckedFile(folder, METADATA_FILE) as file:
        _expect_size(file, record)
        if file.size > MAX_METADATA_BYTES:
            raise CheckpointError(
                f"{METADATA_FILE}: expected at most {MAX_METADATA_BYTES} bytes, found {file.size}"
            )
        data = file.read(file.size)
        _expect_checksums(file, record)
    metadata = decode_metadata(data)
    if config_sha256(metadata) != listed.config_sha256:
        raise CheckpointError(f"{METADATA_FILE}: its identity is not the one that the manifest names")
    return metadata


def _read_state(file: CheckedFile, found: _Findings, *, keep_tensors: bool) -> None:
    """Read header and tensors into `found`; checksums are judged last, over the very bytes delivered.

    The header is parsed before its hash is known.  That is safe, because its parser trusts nothing, and it
    avoids reading the file twice.
    """
    assert found.manifest is not None, "the manifest is read first"
    record = found.manifest.files[STATE_FILE]
    _expect_size(file, record)
    length = layout.decode_prefix(file.read(layout.PREFIX_BYTES), file.size, where=STATE_FILE)
    payload = file.size - layout.PREFIX_BYTES - length
    entries, header_metadata = layout.decode_header(file.read(length), payload, where=STATE_FILE)
    strange: list[str] = []
    scratch = np.empty(0 if keep_tensors else min(payload, BLOCK_BYTES), np.uint8)
    for entry in entries:
        array: NDArray[Any] | None = None
        if keep_tensors:
            array = found.tensors[entry.name] = _new_array(entry)
        highest = _read_tensor(file, entry, array, scratch)
        if entry.dtype == "BOOL" and highest > 1:
            strange.append(entry.name)
    _expect_checksums(file, record)  # First, because damage explains everything else.
    if strange:
        raise CheckpointError(f"{STATE_FILE}: tensor {strange[0]!r}: expected booleans 0 and 1, found others")
    if header_metadata.get("step") != str(found.manifest.step):
        raise CheckpointError(
            f"{STATE_FILE}: expected the state of step {found.manifest.step}, "
            f"found that of step {header_metadata.get('step')!r:.40}"
        )
    found.entries = entries


def _new_array(entry: layout.TensorEntry) -> NDArray[Any]:
    """Return room for one tensor, whose size was checked against that of the file."""
    try:
        return np.empty(entry.shape, layout.DTYPES[entry.dtype])
    except MemoryError as error:
        raise CheckpointError(
            f"{STATE_FILE}: tensor {entry.name!r} needs {entry.end - entry.begin} bytes of memory, and the "
            "system gave none: load it on a larger machine"
        ) from error


def _read_tensor(
    file: CheckedFile, entry: layout.TensorEntry, array: NDArray[Any] | None, scratch: NDArray[np.uint8]
) -> int:
    """Read one tensor into `array`, or block by block over `scratch`, and return its highest boolean.

    For other types 0 is returned.
    """
    flat = None if array is None else array.reshape(-1).view(np.uint8)
    size = entry.end - entry.begin
    highest = 0
    for start in range(0, size, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, size)
        block = scratch[: stop - start] if flat is None else flat[start:stop]
        file.read_into(block.data)
        if entry.dtype == "BOOL":
            highest = max(highest, int(block.max()))
    return highest


def _expect_size(file: CheckedFile, record: FileRecord) -> None:
    if file.size != record.size:
        raise CheckpointError(f"{file.name}: expected {record.size} bytes, found {file.size}")


def _expect_checksums(file: CheckedFile, record: FileRecord) -> None:
    problem = file.problem(record)
    if problem:
        raise CheckpointError(f"{file.name}: {problem}")
