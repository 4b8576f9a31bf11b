"""The contract of a transport: what moves bytes between hosts, and nothing else.

A transport joins the owners of one lane, one on every host: `size` is the number of hosts and `rank` this
host's number.  It never adds, compares or looks at what it moves; `distbp/reduce.py` does that.

Rules that every implementation keeps, and that `tests/transports/` runs over all of them:

- Buffers are C-contiguous NumPy arrays of any dtype.  Both sides compute the sizes; none is sent.  The caller
  owns its buffers again when the call returns.
- Every member calls the same operations in the same order.  An empty buffer is allowed and moves nothing.
- Every wait has a deadline and raises `TransportError`, naming the operation and the hosts it waited for.
- `abort`, called from another thread, ends every wait of this member at once with `TransportAborted`; the
  transport is useless afterwards and is opened again under a new attempt number.
- Waits block in the kernel: a Python loop that spins would hold the interpreter against the training thread.
- `close` is idempotent.

The cost of an operation in messages and bytes, for n hosts and b bytes a buffer: alltoall and allgather n - 1
messages and (n - 1) b bytes a host, broadcast (n - 1) b bytes from the root, barrier n - 1 empty messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from distbp.errors import TransportError

__all__ = ["Transport", "TransportAborted"]

Array = NDArray[Any]


class TransportAborted(TransportError):
    """The wait was ended from outside because a worker or host was lost elsewhere."""


class Transport(Protocol):
    """One member's end of the connection between hosts; `deadline_s` may be changed between operations."""

    deadline_s: float

    @property
    def rank(self) -> int:
        """Return this host's number."""

    @property
    def size(self) -> int:
        """Return the number of hosts."""

    def alltoall(self, send: Sequence[Array], receive: Sequence[Array]) -> None:
        """Give `send[h]` to host h and take `receive[h]` from it, for every h, this host included."""

    def allgather(self, send: Array, receive: Sequence[Array]) -> None:
        """Give `send` to every host and take `receive[h]` from host h, this host included."""

    def broadcast(self, array: Array, root: int) -> None:
        """Fill `array` on every host with its content on host `root`."""

    def barrier(self) -> None:
        """Return when every host has called this."""

    def abort(self) -> None:
        """End every wait of this member; callable from any thread."""

    def close(self) -> None:
        """Give back what the transport holds."""
