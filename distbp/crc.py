"""CRC-32 as fast as memory: zlib-ng's, else the interpreter's own.

Both compute the same function (the one of zip, PNG and Ethernet), so frames and checkpoints of one are good
for the other.  Python's zlib takes 4 bytes a nanosecond at best, which is more than half the cost of a
message between hosts; zlib-ng multiplies without carries and takes 20 to 80 (docs/LOG.md, 2026-11-21).
"""

from __future__ import annotations

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:  # No wheel for this processor: slower, and otherwise the same.
    from zlib import crc32

__all__ = ["crc32"]
