"""Frames of the tcp transport: how the bytes of one operation travel to one host.

    operation (4 bytes), its number (8), the length n (8);  n bytes;  CRC-32 of them (4);  all little-endian

`Outgoing` and `Incoming` each move one frame over a socket that does not block, a part at a time, straight
from and into the caller's memory.  The checksum is taken over each part while it is in the cache.  The header
needs none of its own: the receiver compares it with the one that it expects.  A small frame goes and comes in
one system call.

The checksum costs about as much processor time as moving the bytes over the loopback interface does.  Over a
link that is slower than that it is computed while the link is busy.
"""

from __future__ import annotations

import select
import socket
import struct

from distbp.crc import crc32
from distbp.transports.connection import skip_sent

__all__ = ["BadFrame", "Incoming", "Outgoing"]

CHUNK_BYTES = 1 << 20

_HEADER = struct.Struct("<4sQQ")
_TRAILER = struct.Struct("<I")
_TAGS = {"alltoall": b"atoa", "allgather": b"gath", "broadcast": b"cast", "barrier": b"barr"}


class BadFrame(Exception):
    """What came is not the frame that was expected."""


class Outgoing:
    """A frame on its way to `host`; `blocked` is for the caller to keep."""

    event = select.POLLOUT

    def __init__(self, sock: socket.socket, host: int, name: str, number: int, data: memoryview) -> None:
        self.host = host
        self.descriptor = sock.fileno()
        self.blocked = False
        self._socket = sock
        self._data = data
        self._loaded = 0
        self._crc = 0
        self._parts = [memoryview(_HEADER.pack(_TAGS[name], number, len(data)))]
        self._load()

    def advance(self) -> bool:
        """Send what the kernel takes at once; return whether that was all.

        Raises `BlockingIOError` when it takes nothing.
        """
        if not skip_sent(self._parts, self._socket.sendmsg(self._parts)):
            return False
        if self._loaded == len(self._data):
            return True
        self._load()
        return False

    def _load(self) -> None:
        """Take the next chunk; with the last one goes the checksum."""
        chunk = self._data[self._loaded : self._loaded + CHUNK_BYTES]
        self._loaded += len(chunk)
        self._crc = crc32(chunk, self._crc)
        self._parts.append(chunk)
        if self._loaded == len(self._data):
            self._parts.append(memoryview(_TRAILER.pack(self._crc)))


class Incoming:
    """A frame that is expected from `host`; `blocked` is for the caller to keep."""

    event = select.POLLIN

    def __init__(self, sock: socket.socket, host: int, name: str, number: int, data: memoryview) -> None:
        self.host = host
        self.descriptor = sock.fileno()
        self.blocked = False
        self._socket = sock
        self._data = data
        self._expected = _HEADER.pack(_TAGS[name], number, len(data))
        self._header, self._trailer = bytearray(_HEADER.size), bytearray(_TRAILER.size)
        self._header_got = self._data_got = self._trailer_got = 0
        self._crc = 0

    def advance(self) -> bool:
        """Take what has come; return whether that was all, raise `BlockingIOError` for nothing.

        Raises `BadFrame` as soon as it is known to be one, and `EOFError` when there is no more to come.
        """
        room = self._data[self._data_got : self._data_got + CHUNK_BYTES]
        parts: list[memoryview] = []
        if self._header_got < _HEADER.size:
            parts.append(memoryview(self._header)[self._header_got :])
        parts.append(room)
        if self._data_got + len(room) == len(self._data):
            parts.append(memoryview(self._trailer)[self._trailer_got :])
        count = self._socket.recvmsg_into(parts)[0]
        if count == 0:
            raise EOFError
        count -= self._take_header(count)
        count -= self._take_data(room[:count])
        self._trailer_got += count
        return self._trailer_got == _TRAILER.size and self._is_whole()

    def _take_header(self, count: int) -> int:
        """Note how many of `count` bytes belong to the header; check it when it is complete."""
        took = min(count, _HEADER.size - self._header_got)
        if took:
            self._header_got += took
            if self._header_got == _HEADER.size and self._header != self._expected:
                raise BadFrame(f"expected {_described(self._expected)}, got {_described(self._header)}")
        return took

    def _take_data(self, data: memoryview) -> int:
        """Note the bytes that have come."""
        self._crc = crc32(data, self._crc)
        self._data_got += len(data)
        return len(data)

    def _is_whole(self) -> bool:
        """Return True if the checksum is right."""
        (crc,) = _TRAILER.unpack(self._trailer)
        if crc != self._crc:
            raise BadFrame(
                f"the {len(self._data)} bytes were damaged: expected CRC-32 {crc:#x}, got {self._crc:#x}"
            )
        return True


def _described(header: bytes | bytearray) -> str:
    """Return a header in words."""
    tag, number, length = _HEADER.unpack(header)
    name = next((name for name, known in _TAGS.items() if known == tag), repr(tag))
    return f"{name} {number} with {length} bytes"
