"""TensorBoard event files, written without TensorBoard.

A file is a row of TFRecords, each an `Event` message of protocol buffers:

    length (8)   masked CRC of those (4)   the message   masked CRC of the message (4)      little-endian

The CRC is CRC-32C (Castagnoli; RFC 3720, appendix B.4), rotated right by 15 bits and increased by a constant
("masked"), because a CRC over data that hold CRCs of their own says little.  Of `Event` the fields wall_time,
step, file_version, summary and session_log are used, of `Summary.Value` tag and simple_value: a dozen lines
encode them, so neither TensorBoard nor protobuf is needed to write.

Going back.  Records behind the step at which a run goes on are cut from `metrics.jsonl`; an event file only
grows.  TensorBoard has an answer to that: an event with the session log START at step s makes readers drop
whatever they hold of step s and later.  Each start of a run writes a file of its own, whose name sorts behind
those before it, and it begins with such an event.

An event is one `write` call, so a killed process leaves whole events; readers pass over a torn last one.
"""

from __future__ import annotations

import errno
import functools
import math
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["TensorBoard", "crc32c", "event", "record", "scalars_of"]

_POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bits reversed."""

_BLOCK = 256
"""Bytes that are taken at once."""

_MASK = 0xA282EAD8
_SESSION_START = 1
_LARGEST = 3.4e38
"""Near the largest number of 32 bits, in which simple_value is held."""


def _table() -> tuple[int, ...]:
    """Return the CRC of each byte."""
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_CRC_OF_BYTE = _table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C of `data`; of b"123456789" it is 0xE3069283."""
    crc, done = 0xFFFFFFFF, 0
    if len(data) >= _BLOCK:  # The norms of all layers are thousands of bytes.
        table, places = _block_table(), np.arange(_BLOCK)
        for done in range(0, len(data) - _BLOCK + 1, _BLOCK):
            block = np.frombuffer(data, np.uint8, _BLOCK, done).copy()
            block[:4] ^= np.array([crc], "<u4").view(np.uint8)
            crc = int(np.bitwise_xor.reduce(table[places, block]))
        done += _BLOCK
    for byte in data[done:]:
        crc = _CRC_OF_BYTE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


@functools.cache
def _block_table() -> NDArray[np.uint32]:
    """Return, for each place in a block and each byte there, what it adds to the CRC behind the block.

    A CRC is linear: that of a block is the exclusive or of what its bytes add, each by itself.
    """
    table = np.empty((_BLOCK, 256), np.uint32)
    single = np.array(_CRC_OF_BYTE, np.uint32)
    table[-1] = single
    for place in range(_BLOCK - 2, -1, -1):
        table[place] = single[table[place + 1] & 0xFF] ^ table[place + 1] >> 8
    return table


def _masked(data: bytes) -> bytes:
    """Return the masked CRC of `data`, as it stands in a file."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + _MASK) & 0xFFFFFFFF)


def record(message: bytes) -> bytes:
    """Return `message` framed as a TFRecord."""
    length = struct.pack("<Q", len(message))
    return length + _masked(length) + message + _masked(message)


def _varint(value: int) -> bytes:
    """Return a number that is not negative in seven bits a byte, the lowest first."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)


def _bytes_field(number: int, content: bytes) -> bytes:
    """Return a field of bytes, text or message."""
    return bytes((number << 3 | 2,)) + _varint(len(content)) + content


def event(
    step: int,
    wall_time: float,
    *,
    scalars: dict[str, float] | None = None,
    file_version: str = "",
    session_start: bool = False,
) -> bytes:
    """Return an encoded `Event` with the scalars, the version of the file, or the start of a session."""
    message = b"\x09" + struct.pack("<d", wall_time) + b"\x10" + _varint(step)
    if file_version:
        message += _bytes_field(3, file_version.encode())
    if scalars:
        values = (
            _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", value)
            for tag, value in scalars.items()
        )
        message += _bytes_field(5, b"".join(_bytes_field(1, value) for value in values))
    if session_start:
        message += _bytes_field(7, b"\x08" + _varint(_SESSION_START))
    return message


def scalars_of(metric: dict[str, Any]) -> dict[str, float]:
    """Return what TensorBoard shows of a record: tag -> number."""
    return dict(_tags(metric))


_NAMES = {"lr": "learning_rate", "samples_per_second": "samples_per_second", "noise_scale": "noise_scale"}
_CLOSER = ("layers", "workers")
_NOT_MEASURED = {"kind", "step", "epoch", "samples", "epoch_end"}


def _tags(metric: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield tag and number of every measurement in a record; numbers that are not finite come as texts.

    The mean of a whole epoch gets a tag of its own, or it would stand out of the curve of the steps.
    """
    part = str(metric.get("kind", ""))
    if part == "train" and metric.get("epoch_end"):
        part = "train_epoch"
    for name, value in metric.items():
        if name in _NOT_MEASURED or value is None:
            continue
        if isinstance(value, dict):
            members: Any = value.items()
            group = name
        elif isinstance(value, list):
            members = ((f"rank{rank}", entry) for rank, entry in enumerate(value))
            group = name
        elif part in _CLOSER:
            continue  # The step's own record has these.
        else:
            members = ((name, value),)
            group = part
        for member, entry in members:
            try:
                number = float(entry)
            except (TypeError, ValueError):
                continue
            if math.isfinite(number):
                number = min(max(number, -_LARGEST), _LARGEST)
            yield _NAMES.get(member, f"{group}/{member}"), number


class TensorBoard:
    """Writes the event file of one start of a run into `RUN/tensorboard/`."""

    def __init__(self, out: Path) -> None:
        folder = out / "tensorboard"
        if folder.is_symlink():
            raise OSError(errno.ELOOP, "it is a link, which may lead anywhere; remove it", str(folder))
        folder.mkdir(mode=0o700, exist_ok=True)
        # Readers take the files of a folder in the order of their names: a clock that was set back since the
        # last start must not put this one before it.
        last = max((_second_in(path.name) for path in folder.iterdir()), default=0)
        second = max(int(time.time()), last + 1)
        self._path = folder / f"events.out.tfevents.{second:010d}.{socket.gethostname()}.{os.getpid()}"
        self._file: int | None = None

    def write(self, metric: dict[str, Any]) -> None:
        """Append the numbers of a record."""
        scalars = scalars_of(metric)
        if scalars:
            self._append(event(int(metric["step"]), time.time(), scalars=scalars))

    def go_back(self, step: int) -> None:
        """Make readers drop what they hold of `step` and later."""
        self._append(event(step, time.time(), session_start=True))

    def close(self) -> None:
        """Close the file; idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, message: bytes) -> None:
        """Write one event; the first call makes the file."""
        if self._file is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(self._path, flags, 0o600)
            os.write(self._file, record(event(0, time.time(), file_version="brain.Event:2")))
        framed = record(message)
        before = os.fstat(self._file).st_size
        if os.write(self._file, framed) < len(framed):
            os.ftruncate(self._file, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))


def _second_in(name: str) -> int:
    """Return the time in the name of an event file, 0 if there is none."""
    parts = name.split(".")
    return int(parts[3]) if len(parts) > 3 and parts[3].isdigit() else 0
