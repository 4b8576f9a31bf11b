"""Small files of every format, written byte by byte or by NumPy itself."""

from __future__ import annotations

import gzip
import struct
import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}


def idx_bytes(array: NDArray) -> bytes:
    """Return `array` as the bytes of an IDX file."""
    code = CODES[array.dtype.str[1:]]
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def write_idx(path: Path, array: NDArray) -> Path:
    """Write an IDX file, compressed if its name ends in .gz."""
    content = idx_bytes(array)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Return `count` images of 4 x 3 pixels."""
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 3)).astype(np.uint8)


def labels(count: int) -> NDArray[np.uint8]:
    """Return labels 0, 1, 2, 0, 1, 2, ..."""
    return (np.arange(count) % 3).astype(np.uint8)


def write_wav(path: Path, content: bytes, *, width: int = 2, channels: int = 1, rate: int = 8000) -> None:
    """Write PCM of `width` bytes."""
    with wave.open(str(path), "wb") as stream:
        stream.setnchannels(channels)
        stream.setsampwidth(width)
        stream.setframerate(rate)
        stream.writeframes(content)
