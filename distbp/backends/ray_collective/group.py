"""A group as `ray.util.collective` sees it.

Ray calls the methods of `CollectiveGroup` with lists of one array.  Here they are checked and flattened, and
one operation at a time is passed on.

A group that fails in the middle of an operation is of no more use: ranks may be in different places.  So
the first error is told to the ranks of the node, connections are closed so that other nodes notice at once,
and each later call raises again.  What is refused before an operation begins breaks nothing here; the other
ranks wait for this one until their deadline.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from distbp.backends.ray_collective.arrays import (
    bytes_of,
    checked,
    copy_back,
    flat,
    joining,
    only,
    root_of,
    same_sizes,
)
from distbp.backends.ray_collective.circle import BARRIER, Call
from distbp.backends.ray_collective.parts import Parts, join_group
from distbp.errors import ConfigError, WorkerLost

__all__ = ["NAME", "CollectiveGroup"]

NAME = "DISTBP"
"""The name of the backend; Ray compares names in upper case."""


class CollectiveGroup:
    """One rank's end of a group; Ray makes it and calls its methods, each with lists of one array."""

    deadline_s: ClassVar[float] = 30.0
    meeting_s: ClassVar[float] = 60.0

    def __init__(self, world_size: int, rank: int, group_name: str) -> None:
        super().__init__(world_size, rank, group_name)  # type: ignore[call-arg]  # Ray's.
        self._me, self._size, self._name = rank, world_size, group_name
        self._one_operation, self._one_send, self._one_receive = (threading.Lock() for _ in range(3))
        self._failure: BaseException | None = None
        self._parts: Parts | None = join_group(world_size, rank, group_name, self.deadline_s, self.meeting_s)

    @classmethod
    def backend(cls) -> str:
        """Return the name of the backend."""
        return NAME

    @classmethod
    def check_backend_availability(cls) -> bool:
        """Return whether this machine has what a group needs."""
        return hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")

    @property
    def nodes(self) -> list[tuple[int, ...]]:
        """The ranks of each node: those in one tuple share memory."""
        assert self._parts is not None, "the group was destroyed"
        return self._parts.circle.nodes

    def destroy_group(self) -> None:
        """Leave the group and give everything back; idempotent."""
        parts, self._parts = self._parts, None
        if parts is not None:
            parts.close()

    # ----- operations

    def allreduce(self, tensor: Sequence[Any], allreduce_options: Any = None) -> None:
        """Fill the array of every rank with the sum, product, minimum or maximum of all."""
        self._join("allreduce", tensor, allreduce_options, -1)

    def reduce(self, tensor: Sequence[Any], reduce_options: Any = None) -> None:
        """Do the same on the root only; the other arrays stay as they are."""
        self._join("reduce", tensor, reduce_options, root_of(reduce_options))

    def reducescatter(
        self, tensor: Sequence[Any], tensor_list: Sequence[Any], reducescatter_options: Any = None
    ) -> None:
        """Fill the array of rank r with the sum, or what else is asked for, of all `tensor_list[r]`."""
        out = checked(only(tensor), writable=True)
        parts = [checked(part) for part in only(tensor_list)]
        same_sizes(out, parts, self._size)
        call = joining("reducescatter", out, reducescatter_options, -1)
        with self._operation(self._one_operation) as own:
            total = flat(out)
            own.sums.reducescatter(total, [flat(part) for part in parts], call)
            copy_back(out, total)

    def broadcast(self, tensor: Sequence[Any], broadcast_options: Any = None) -> None:
        """Fill the array of every rank with the root's."""
        root = root_of(broadcast_options)
        x = checked(only(tensor), writable=root != self._me)
        call = Call("broadcast", "", x.dtype, x.size, root)
        with self._operation(self._one_operation) as own:
            elements = flat(x)
            own.moves.broadcast(bytes_of(elements), call)
            if root != self._me:
                copy_back(x, elements)

    def allgather(
        self, tensor_list: Sequence[Any], tensor: Sequence[Any], allgather_options: Any = None
    ) -> None:
        """Fill `tensor_list[r]` with the array of rank r, for every r, on every rank."""
        x = checked(only(tensor))
        outs = [checked(out, writable=True) for out in only(tensor_list)]
        same_sizes(x, outs, self._size)
        call = Call("allgather", "", x.dtype, x.size)
        with self._operation(self._one_operation) as own:
            gathered = [flat(out) for out in outs]
            own.moves.allgather([bytes_of(one) for one in gathered], bytes_of(flat(x)), call)
            for out, one in zip(outs, gathered, strict=True):
                copy_back(out, one)

    def barrier(self, barrier_options: Any = None) -> None:
        """Return when every rank has called this."""
        with self._operation(self._one_operation) as own:
            own.moves.barrier(BARRIER)

    def send(self, tensor: Sequence[Any], send_options: Any) -> None:
        """Send the array to one rank, which has to call `recv` with an array of the same type and size."""
        x, target = checked(only(tensor)), int(send_options.dst_rank)
        with self._operation(self._one_send) as own:
            own.pairs.send(bytes_of(flat(x)), Call("send to", "", x.dtype, x.size, target))

    def recv(self, tensor: Sequence[Any], recv_options: Any) -> None:
        """Fill the array with what one rank sends."""
        x, source = checked(only(tensor), writable=True), int(recv_options.src_rank)
        call = Call("send to", "", x.dtype, x.size, self._me)
        with self._operation(self._one_receive) as own:
            elements = flat(x)
            own.pairs.receive(bytes_of(elements), source, call)
            copy_back(x, elements)

    def _join(self, operation: str, tensor: Sequence[Any], options: Any, root: int) -> None:
        """Join the arrays of all ranks, for the root or for all."""
        x = checked(only(tensor), writable=root in (-1, self._me))
        call = joining(operation, x, options, root)
        with self._operation(self._one_operation) as own:
            elements = flat(x)
            own.sums.allreduce(elements, call)
            if root in (-1, self._me):
                copy_back(x, elements)

    @contextmanager
    def _operation(self, lock: threading.Lock) -> Iterator[Parts]:
        """Let one operation happen at a time; one that fails breaks the group."""
        with lock:
            if self._parts is None:
                raise ConfigError(
                    f"the group {self._name!r} was destroyed; init_collective_group makes a new one"
                )
            if self._failure is not None:
                raise WorkerLost(
                    f"the group {self._name!r} is broken: {self._failure}; destroy it and make a new one"
                )
            try:
                yield self._parts
            except BaseException as error:
                self._failure = error
                self._parts.fail(error)
                raise
