"""Saving a checkpoint durably: the order of system calls that the package docstring explains.

The state is streamed tensor by tensor from the caller's arrays: no second copy exists, except of one tensor
at a time where it is not C-contiguous or not little-endian.  Whether this happens in the background, and how
often, is not known here.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from distbp.checkpoint import layout, manifest
from distbp.checkpoint.files import error_name, no_pause, sync_folder, write_file
from distbp.checkpoint.folders import discard, prune, remove_path, step_name
from distbp.checkpoint.manifest import MANIFEST_FILE, Manifest
from distbp.checkpoint.reading import METADATA_FILE, STATE_FILE, config_sha256, decode_metadata, verify
from distbp.checkpoint.snapshot import Snapshot, little_endian_bytes
from distbp.checkpoint.strict_json import dump_json
from distbp.errors import CannotWrite, CheckpointError, ConfigError

__all__ = ["clean_up", "save"]


def save(
    directory: Path,
    snapshot: Snapshot,
    *,
    keep: int,
    attempt: int = 0,
    pause: Callable[[int], None] = no_pause,
) -> Path:
    """Write `snapshot` to `directory` (RUN/checkpoints) and return its path once it is durable.

    Args:
        directory: is created if it is missing; its parent must exist.
        snapshot: its arrays must not change until this returns.
        keep: how many verified checkpoints stay, at least 2; 0 keeps all.
        attempt: the number of this start of the job, so that two starts never share a temporary folder.
        pause: called after each block of at most 1 MiB that was written, or read for pruning, with its number
            of bytes; here a save in the background gives way to others.

    A checkpoint of the same step that verifies is kept and returned; a damaged one is replaced.

    Raises:
        ConfigError: the snapshot has a name, type or size that a checkpoint cannot hold.
        CannotWrite: the disk refused.  No new checkpoint exists and the older ones are whole; or, where the
            message says so, the new one is durable and an older one could not be removed.
    """
    assert snapshot.step >= 0, f"a step is a number >= 0, got {snapshot.step!r}"
    assert keep == 0 or keep >= 2, f"keep is 0 (all) or at least 2, got {keep!r}"
    header, metadata = _encode(snapshot)
    final = directory / step_name(snapshot.step)
    # The random part: after a failure the same step gets a new name, and so does a process that was taken for
    # dead and is not.
    temporary = directory / f"{final.name}.tmp-{attempt}-{secrets.token_hex(4)}"
    try:
        _make_directory(directory)
        if os.path.lexists(final) and not verify(final):
            sync_folder(directory)  # Its writer may have been killed between rename and fsync.
        else:
            _write_folder(temporary, snapshot, header, metadata, pause)
            _publish(temporary, final)
    except OSError as error:
        raise _cannot_write(error, final, len(header) + _payload_bytes(snapshot) + len(metadata)) from error
    clean_up(final, keep=keep, pause=pause)
    return final


def _encode(snapshot: Snapshot) -> tuple[bytes, bytes]:
    """Return header and metadata as bytes that the reading side has already accepted."""
    try:
        header = layout.encode_header(snapshot.tensors, {"format": "distbp", "step": str(snapshot.step)})
        metadata = dump_json(snapshot.metadata)
        decode_metadata(metadata)
    except CheckpointError as error:
        raise ConfigError(f"step {snapshot.step} cannot be saved: {error}") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"step {snapshot.step} cannot be saved: expected metadata that is JSON, without NaN: {error}"
        ) from error
    return header, metadata


def _make_directory(directory: Path) -> None:
    """Create `directory` for the owner alone, its name durable even if an earlier start made it."""
    with suppress(FileExistsError):
        os.mkdir(directory, 0o700)
    sync_folder(directory.parent)


def _write_folder(
    temporary: Path, snapshot: Snapshot, header: bytes, metadata: bytes, pause: Callable[[int], None]
) -> None:
    """Write the whole checkpoint under its temporary name; on any error the folder is removed again."""
    os.mkdir(temporary, 0o700)
    try:
        files = {
            STATE_FILE: write_file(temporary, STATE_FILE, _state_pieces(header, snapshot), pause),
            METADATA_FILE: write_file(temporary, METADATA_FILE, [metadata], pause),
        }
        listed = Manifest(snapshot.step, config_sha256(snapshot.metadata), files)
        write_file(temporary, MANIFEST_FILE, [manifest.encode(listed)], pause)
        sync_folder(temporary)
    except BaseException:
        _remove_after_error(temporary)
        raise


def _state_pieces(header: bytes, snapshot: Snapshot) -> Iterator[memoryview | bytes]:
    """Yield the bytes of `state.safetensors` in order, one tensor at a time."""
    yield header
    for array in snapshot.tensors.values():
        yield little_endian_bytes(array)


def _publish(temporary: Path, final: Path) -> None:
    """Give the checkpoint its complete name, durably.

    If the fsync of the parent fails, the name is taken back: a later save of this step would find it, sync
    again, and be told that all is well although the kernel has dropped the entry.
    """
    try:
        if os.path.lexists(final):
            remove_path(_damaged(final))
            os.rename(final, _damaged(final))
            sync_folder(final.parent)
        os.rename(temporary, final)
    except BaseException:
        _remove_after_error(temporary)
        raise
    try:
        sync_folder(final.parent)
    except BaseException:
        # The first error is the one to report; a name that cannot be taken back is complete at least.
        with suppress(OSError):
            discard(final, "unsynced")
        raise


def clean_up(final: Path, *, keep: int, pause: Callable[[int], None] = no_pause) -> None:
    """Remove what the new checkpoint replaces and outdates; CannotWrite says that it is safe nevertheless.

    `save` does this last; whoever wants to know at once when a checkpoint is durable saves with keep=0, and
    then calls this.
    """
    try:
        remove_path(_damaged(final))
        if keep:
            prune(final, keep=keep, pause=pause)
    except (OSError, CheckpointError) as error:
        reason = error_name(error) if isinstance(error, OSError) else str(error)
        raise CannotWrite(
            f"{final} is saved and durable, but older checkpoints in {final.parent} cannot be removed: "
            f"{reason}: remove them, or the disk will fill up"
        ) from error


def _damaged(final: Path) -> Path:
    """Return where a damaged checkpoint waits while the new one takes its name."""
    return final.with_name(f"{final.name}.tmp-damaged")


def _remove_after_error(temporary: Path) -> None:
    """Remove our own temporary folder; if the disk refuses this too, `remove_leftovers` will find it."""
    with suppress(OSError):
        remove_path(temporary)


def _payload_bytes(snapshot: Snapshot) -> int:
    return sum(array.nbytes for array in snapshot.tensors.values())


def _cannot_write(error: OSError, final: Path, needed: int) -> CannotWrite:
    """Return the error that says why, where, how much room there is, and what to do."""
    try:
        status = os.statvfs(final.parent)
        free = f"{status.f_bavail * status.f_frsize}"
    except OSError:
        free = "an unknown number"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        cure = "free some space"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        cure = "make the directory writable"
    else:
        cure = "see whether that disk works"
    return CannotWrite(
        f"cannot save {final}: {error_name(error)}; it needs {needed} bytes, {free} are free there; "
        f"older checkpoints are untouched: {cure}, or choose another --out"
    )
