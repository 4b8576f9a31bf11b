"""A transport between threads of one process: the shipped fake, for tests of everything above it.

A `Hub` stands for the network of one attempt: mailboxes keyed by (operation number, sender, receiver) under
one lock.  Messages are copied when they are sent, so a sender may reuse its buffer at once, as with a real
network.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.errors import TransportError
from distbp.transports.base import TransportAborted

__all__ = ["Hub", "ThreadsTransport"]

Array = NDArray[Any]


class Hub:
    """The network that `size` hosts share; `connect(rank)` gives each its end."""

    def __init__(self, size: int, deadline_s: float = 60.0) -> None:
        self.size = size
        self.deadline_s = deadline_s
        self.bytes_sent = [0] * size
        self._changed = threading.Condition()
        self._mail: dict[tuple[int, int, int], Array] = {}
        self._aborted = [False] * size

    def connect(self, rank: int) -> ThreadsTransport:
        """Return the end of host `rank`."""
        return ThreadsTransport(self, rank)

    def send(self, operation: int, sender: int, receiver: int, array: Array) -> None:
        """Leave a copy of `array` for `receiver`."""
        with self._changed:
            self._mail[operation, sender, receiver] = array.copy()
            self.bytes_sent[sender] += array.nbytes if sender != receiver else 0
            self._changed.notify_all()

    def receive(self, operation: int, name: str, sender: int, receiver: int, deadline_s: float) -> Array:
        """Wait for what `sender` leaves for `receiver` and take it."""
        key = (operation, sender, receiver)
        until = time.monotonic() + deadline_s
        with self._changed:
            while key not in self._mail:
                if self._aborted[receiver]:
                    raise TransportAborted(f"{name} on host {receiver} was aborted")
                if not self._changed.wait(max(0.0, until - time.monotonic())):
                    raise TransportError(
                        f"{name} on host {receiver}: waited {deadline_s} s for host {sender}; "
                        "look at that host's log, then run again: resuming is safe"
                    )
            return self._mail.pop(key)

    def abort(self, rank: int) -> None:
        """End every wait of host `rank`, now and later."""
        with self._changed:
            self._aborted[rank] = True
            self._changed.notify_all()

    def abort_all(self) -> None:
        """End every wait of every host."""
        for rank in range(self.size):
            self.abort(rank)


class ThreadsTransport:
    """One host's end of a `Hub`; the contract stands in `base.py`."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self._hub = hub
        self.rank = rank
        self.size = hub.size
        self.deadline_s = hub.deadline_s
        self._operation = 0

    def alltoall(self, send: Sequence[Array], receive: Sequence[Array]) -> None:
        """Swap buffers with every host."""
        self._swap("alltoall", send, receive)

    def allgather(self, send: Array, receive: Sequence[Array]) -> None:
        """Give one buffer to every host and take theirs."""
        self._swap("allgather", [send] * self.size, receive)

    def broadcast(self, array: Array, root: int) -> None:
        """Fill `array` from host `root`."""
        self._begin()
        if self.rank == root:
            for host in range(self.size):
                if host != root:
                    self._hub.send(self._operation, root, host, array)
        else:
            self._take("broadcast", root, array)

    def barrier(self) -> None:
        """Wait for every host."""
        token = np.empty(0, np.uint8)
        self._swap("barrier", [token] * self.size, [token] * self.size)

    def abort(self) -> None:
        """End this host's waits."""
        self._hub.abort(self.rank)

    def close(self) -> None:
        """Do nothing: the hub belongs to the test."""

    def _swap(self, name: str, send: Sequence[Array], receive: Sequence[Array]) -> None:
        self._begin()
        for host, array in enumerate(send):
            self._hub.send(self._operation, self.rank, host, array)
        for host, array in enumerate(receive):
            self._take(name, host, array)

    def _begin(self) -> None:
        self._operation += 1

    def _take(self, name: str, sender: int, array: Array) -> None:
        message = self._hub.receive(self._operation, name, sender, self.rank, self.deadline_s)
        if message.shape != array.shape or message.dtype != array.dtype:
            raise TransportError(
                f"{name} on host {self.rank}: expected {array.dtype}{array.shape} from host {sender}, "
                f"got {message.dtype}{message.shape}; both sides must compute the same sizes"
            )
        np.copyto(array, message)
