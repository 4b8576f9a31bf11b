"""The transport between hosts under MPI: point-to-point messages of one lane's communicator.

Only upper-case buffer calls are used, so nothing is pickled, and no reduction of MPI's: it moves bytes.  An
operation posts all its sends and receives at once and waits for them together.

A wait polls with `Testall`.  MPI makes progress only inside its own calls, so the first polls follow each
other closely; after that each is followed by a nap, which leaves the interpreter to the training thread.  The
polls are what makes deadline and `abort` possible: MPI itself has neither.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distbp.deadline import Deadline
from distbp.errors import TransportError
from distbp.transports.base import TransportAborted

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["MPITransport"]

Array = NDArray[Any]

_CLOSE_POLLS = 50
_FIRST_NAP_S, _LONGEST_NAP_S, _NAP_GROWTH = 20e-6, 500e-6, 1.2
"""At 1 Gbit/s 64 KiB arrive in a longest nap, which socket buffers hold; each poll costs backprop time."""
_TAGS = 1 << 14
"""Operations are told apart by tags modulo this number; MPI promises at least 32767 tags."""


class MPITransport:
    """One host's end of a lane; `comm` has one rank for each host, in host order, and is used by nobody else.

    `names[h]` is what messages call host h.  The communicator is freed by `close`.
    """

    def __init__(self, comm: MPI.Intracomm, names: Sequence[str], deadline_s: float) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm: Any = comm
        self._names = list(names)
        self.deadline_s = deadline_s
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self._operation = 0
        self._aborted = False

    def alltoall(self, send: Sequence[Array], receive: Sequence[Array]) -> None:
        """Swap buffers with every host."""
        self._swap("alltoall", send, receive)

    def allgather(self, send: Array, receive: Sequence[Array]) -> None:
        """Give one buffer to every host and take theirs."""
        self._swap("allgather", [send] * self.size, receive)

    def broadcast(self, array: Array, root: int) -> None:
        """Fill `array` from host `root`."""
        tag = self._next_tag()
        others = [host for host in range(self.size) if host != root]
        if array.size == 0:
            return
        if self.rank == root:
            pending = [(host, self._comm.Isend(_bytes(array), host, tag)) for host in others]
        else:
            pending = [(root, self._comm.Irecv(_bytes(array), root, tag))]
        self._wait("broadcast", pending)

    def barrier(self) -> None:
        """Wait for every host."""
        token = np.zeros(1, np.uint8)
        self._swap("barrier", [token] * self.size, [token.copy() for _ in range(self.size)])

    def abort(self) -> None:
        """End this host's waits; the next poll sees it."""
        self._aborted = True

    def close(self) -> None:
        """Free the communicator; idempotent.  Not after an abort: freeing is collective."""
        if self._comm is not None and not self._aborted:
            self._comm.Free()
        self._comm = None

    def _next_tag(self) -> int:
        self._operation += 1
        return self._operation % _TAGS

    def _swap(self, name: str, send: Sequence[Array], receive: Sequence[Array]) -> None:
        tag = self._next_tag()
        pending: list[tuple[int, Any]] = []
        for host in range(self.size):
            if host == self.rank:
                np.copyto(receive[host], send[host])
                continue
            if receive[host].size:
                pending.append((host, self._comm.Irecv(_bytes(receive[host]), host, tag)))
        for step in range(1, self.size):
            host = (self.rank + step) % self.size
            if send[host].size:
                pending.append((host, self._comm.Isend(_bytes(send[host]), host, tag)))
        self._wait(name, pending)

    def _wait(self, name: str, pending: list[tuple[int, Any]]) -> None:
        """Poll until every request is complete."""
        requests = [request for _, request in pending]
        deadline = Deadline(self.deadline_s)
        nap = _FIRST_NAP_S
        for poll in range(1 << 62):
            if self._mpi.Request.Testall(requests):
                return
            if poll < _CLOSE_POLLS:
                continue
            if self._aborted:
                raise TransportAborted(f"{name} on host {self._names[self.rank]} was aborted")
            if deadline.is_over():
                waiting = {host for host, request in pending if not request.Test()}
                missing = ", ".join(f"host {self._names[host]}" for host in sorted(waiting))
                raise TransportError(
                    f"{name} on host {self._names[self.rank]}: waited {self.deadline_s:g} s for {missing}; "
                    "look at that host and its link, then run again: resuming is safe"
                )
            time.sleep(nap)
            nap = min(nap * _NAP_GROWTH, _LONGEST_NAP_S)


def _bytes(array: Array) -> list[Any]:
    """Return the buffer of an array as MPI takes it: bytes, so that the type never matters."""
    from mpi4py import MPI

    assert array.flags.c_contiguous, "a transport moves contiguous buffers"
    return [array, array.nbytes, MPI.BYTE]
