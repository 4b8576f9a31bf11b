"""The exchange between hosts while backprop goes on: buckets, last layers first, on a helper thread.

Backprop finishes the gradients of the last layer first.  So the flat vector is cut into *buckets* at tensor
borders, numbered from its end, and each bucket into the host's lanes: a lane has one piece in every bucket.
As soon as all workers of the host have finished a bucket (they count in their arena lines), the helper thread
of each lane owner adds its piece over the slots, swaps it with the other hosts, and goes on to the next.

Nothing about the additions changes: every element is added in the same tree, alone or in a bucket, so the
bits are those without overlap.  Only the owner's piece of a slot is touched, and only after every worker of
the host has finished writing it.

On one host there is nothing to hide, since moving memory costs the same processor: there is one bucket, and
no thread.  Tried and rejected: `Iallreduce` and friends (MPI makes no progress by itself), one thread for
each bucket (they would compete with backprop for the interpreter).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np

from distbp.arena import Arena
from distbp.partition import split_blocks
from distbp.reduce import LaneReduction
from distbp.transports.base import Transport

__all__ = ["BucketExchange", "Piece", "bucket_starts", "cut_pieces", "probe_bucket_bytes"]

_NAP_S = 300e-6
_LOOK_S = 0.1

_SMALL_BYTES, _LARGE_BYTES, _TRIES = 64, 1 << 20, 3
_LEAST_BYTES, _MOST_BYTES = 1 << 18, 1 << 24
_LATENCY_SHARE = 0.05


@dataclass(frozen=True)
class Piece:
    """One lane's part of one bucket: elements `[low, high)`, norm blocks `[first, last)`."""

    low: int
    high: int
    first: int
    last: int


def bucket_starts(borders: Sequence[tuple[int, int]], bucket_elements: int) -> list[int]:
    """Return where buckets begin, from the end of the vector to 0.

    `borders` are `(offset, length)` of the tensors in order.  A bucket is closed as soon as it holds
    `bucket_elements`; a tensor is never cut, because all of it is finished at once.
    """
    starts: list[int] = []
    held = 0
    for offset, length in reversed(borders):
        held += length
        if held >= bucket_elements or offset == 0:
            starts.append(offset)
            held = 0
    return starts


def cut_pieces(
    blocks: Sequence[tuple[int, int]], size: int, starts: Sequence[int], lanes: int, lane: int
) -> list[Piece]:
    """Return the pieces of `lane`, one for each bucket, in the order in which buckets are finished."""
    pieces = []
    end, last_block = size, len(blocks)
    for start in starts:
        first_block = next(i for i, (low, _) in enumerate(blocks) if low >= start)
        inside = [(low - start, high - start) for low, high in blocks[first_block:last_block]]
        first, last, low, high = split_blocks(inside, end - start, lanes, lane)
        pieces.append(Piece(start + low, start + high, first_block + first, first_block + last))
        end, last_block = start, first_block
    return pieces


def probe_bucket_bytes(transport: Transport) -> int:
    """Measure the network and return the bucket size in bytes that all hosts use; all of them call this.

    The smallest bucket in which latency is at most `_LATENCY_SHARE` of the time: smaller ones waste the
    network, larger ones leave it idle at the beginning of backprop.  Host 0's figure counts.
    """
    seconds = {size: _time_swap(transport, size) for size in (_SMALL_BYTES, _LARGE_BYTES)}
    latency = seconds[_SMALL_BYTES]
    rate = _LARGE_BYTES / max(seconds[_LARGE_BYTES] - latency, 1e-9)
    wanted = int(min(max(latency * rate / _LATENCY_SHARE, _LEAST_BYTES), _MOST_BYTES))
    answer = np.array([wanted], np.int64)
    transport.broadcast(answer, 0)
    return int(answer[0])


def _time_swap(transport: Transport, size: int) -> float:
    """Return the least time of a few swaps of `size` bytes with every host, in seconds."""
    send = [np.zeros(size, np.uint8) for _ in range(transport.size)]
    receive = [np.empty(size, np.uint8) for _ in range(transport.size)]
    times = []
    for _ in range(_TRIES):
        transport.barrier()
        begun = time.perf_counter()
        transport.alltoall(send, receive)
        times.append(time.perf_counter() - begun)
    return min(times)


class BucketExchange:
    """One lane owner's side of the exchange in one attempt; `close` ends the helper thread.

    `reductions[k]` adds piece k.  Without a transport everything happens in `finish`, on the calling thread.
    `before` is called before each exchange with other hosts.
    """

    def __init__(
        self,
        arena: Arena,
        reductions: Sequence[LaneReduction],
        transport: Transport | None,
        *,
        overlap: bool,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self._arena = arena
        self._reductions = list(reductions)
        self._transport = transport
        self._pool = ThreadPoolExecutor(1, "distbp-exchange") if transport is not None and overlap else None
        self._running: Future[None] | None = None
        self._closing = False
        self._before = before
        self.busy_s = 0.0

    def begin(self, step: int) -> None:
        """Let the helper thread follow backprop through the buckets of `step`."""
        if self._pool is not None:
            self._running = self._pool.submit(self._follow, step)

    def finish(self) -> None:
        """Return when every piece is added; call it after the barrier that follows backprop."""
        if self._running is not None:
            running, self._running = self._running, None
            while not wait([running], _LOOK_S).done:
                self._arena.barrier.look()
            running.result()
        else:
            for reduction in self._reductions:
                if self._transport is not None:
                    self._before()
                reduction.run()

    def close(self) -> None:
        """End the helper thread, whatever it waits for; idempotent."""
        self._closing = True
        if self._pool is not None:
            if self._transport is not None and self._running is not None:
                self._transport.abort()
            self._pool.shutdown(wait=True)
            self._pool = None

    def _follow(self, step: int) -> None:
        """Add each piece as soon as all workers of the host have finished its bucket."""
        for bucket, reduction in enumerate(self._reductions):
            while not self._arena.is_ready(step, bucket):
                if self._closing:
                    return
                self._arena.barrier.check_parked()
                time.sleep(_NAP_S)
            self._before()
            begun = time.perf_counter()
            reduction.run()
            self.busy_s += time.perf_counter() - begun
