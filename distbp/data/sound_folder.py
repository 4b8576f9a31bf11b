"""Folders of WAV files, one sub-directory for each class (class_folders.py says how they lie).

Samples are float32 (L,) between -1 and 1, the mean of a file's channels; with a schema they are what the
training sounds were.  All files have one rate, because the same sound at another rate is another pitch, and
one length, or the option `length` says to which number they are cut at the end, or filled up with silence.
PCM of 8, 16, 24 and 32 bits is read, by the standard library; all sounds are held in memory.

A file's header is not believed: what counts is how many bytes there are.
"""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Request, Schema
from distbp.data.class_folders import FileKind
from distbp.errors import DataError

__all__ = ["SOUNDS", "read_sound"]

# What `wave` raises for damaged files, besides OSError.
DAMAGE = (wave.Error, EOFError, ValueError, OverflowError)


def read_sound(file: Path) -> tuple[NDArray[np.float32], int]:
    """Return the mean of a file's channels (L,), between -1 and 1, and its rate; DataError if it has none."""
    try:
        with wave.open(str(file), "rb") as stream:
            channels, width, rate = stream.getnchannels(), stream.getsampwidth(), stream.getframerate()
            content = stream.readframes(stream.getnframes())
    except DAMAGE as error:
        raise DataError(f"{file}: expected a WAV file of PCM, got: {error}; convert it") from error
    if not (channels >= 1 and 1 <= width <= 4 and rate >= 1 and len(content) >= channels * width):
        raise DataError(
            f"{file}: expected sound of 8, 16, 24 or 32 bits, got {len(content)} bytes in {channels} "
            f"channels of {8 * width} bits at a rate of {rate}"
        )
    whole = len(content) // (channels * width) * channels * width
    numbers = _numbers(content[:whole], width).reshape(-1, channels)
    return numbers.mean(axis=1).astype(np.float32), rate


def _numbers(content: bytes, width: int) -> NDArray[np.float64]:
    """Return PCM of `width` bytes as numbers from -1 to below 1; 8 bits are unsigned, the others signed."""
    if width == 1:
        return (np.frombuffer(content, np.uint8).astype(np.float64) - 128) / 128
    # Put the bytes into the upper end of 32 bits, which keeps the sign.
    padded = np.zeros((len(content) // width, 4), np.uint8)
    padded[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
    return padded.view("<i4")[:, 0].astype(np.float64) / 2**31


def _decode(request: Request, where: Path, files: list[Path]) -> tuple[NDArray[Any], Schema]:
    """Return the sounds of all files, (N, L), and their rate."""
    schema = request.schema
    sounds = []
    wanted_rate = None if schema is None else schema.get("rate")
    length = request.options.length if schema is None else int(schema["sample_shape"][0])
    may_fit = length is not None and (schema is None or schema.get("length") is not None)
    for file in files:
        sound, rate = read_sound(file)
        wanted_rate = wanted_rate or rate
        if rate != wanted_rate:
            raise DataError(
                f"{file}: expected {wanted_rate} numbers a second, as the others have, got {rate}; convert it"
            )
        length = length or len(sound)
        if len(sound) != length and not may_fit:
            raise DataError(
                f"{file}: expected {length} numbers, as the others have, got {len(sound)}; bring them to one "
                "length, or set data.length"
            )
        fitted = np.zeros(length, np.float32)
        fitted[: len(sound)] = sound[:length]
        sounds.append(fitted)
    chosen = request.options.length if schema is None else schema.get("length")
    return np.stack(sounds), {"sound": True, "rate": wanted_rate, "length": chosen}


SOUNDS = FileKind("sounds", "sound", frozenset({".wav"}), _decode)
