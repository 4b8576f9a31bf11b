"""All ranks of an MPI job, and messages between them that can be given up: how `distbp doctor` speaks.

A collective call of MPI waits for ever when one host cannot be reached, and the doctor is called when that
may be so.  So nothing here is collective: ranks send to rank 0, rank 0 sends to ranks, and two ranks
exchange buffers.  A wait polls, because MPI itself has no deadlines, and names whom it waited for.  Ranks
that did not answer rank 0 are a result of `gather`, not an error: they are what the doctor was asked for.

Values travel as JSON in buffers of bytes, their sizes before them; nothing is pickled.  It knows nothing of
checks, and training does not use it: `backends/mpi.py` and `transports/mpi.py` do that work.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from distbp.backends.mpi import check_launcher, import_mpi
from distbp.deadline import Deadline
from distbp.errors import TransportError

__all__ = ["MPIWorld", "loaded_library"]

Array = NDArray[Any]

_TALK, _PAIR = 1, 2
"""Tags: messages to and from rank 0, buffers between two ranks."""

_CLOSE_POLLS = 100
_FIRST_NAP_S, _LONGEST_NAP_S, _NAP_GROWTH = 20e-6, 2e-3, 1.2
"""Ranks that wait for rank 0 leave their core to those that are measured."""

_LAST_WORDS_S = 0.2
"""Seconds that a launcher gets to pass on a message before it is told to end."""


class MPIWorld:
    """The place of this process among the ranks; making one starts MPI.

    Ranks wait `patience_s` seconds for rank 0 to speak to them, or to take what they say.

    Raises `EnvironmentMismatch` if there is no MPI here, or the launcher does not belong to it.  `library` is
    what MPI calls itself, `thread_level` which threads may call it, as MPI_THREAD_... says.  `names[r]` is
    what messages call rank r; who learns more of it may write it there.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._mpi = import_mpi()
        self._comm: Any = self._mpi.COMM_WORLD
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        check_launcher(self.size)
        said = self._mpi.Get_library_version().split("\n")[0].split(",")[0].strip("\0")
        self.library = " ".join(said.replace("Version:", "").split())
        levels = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
        by_value = {getattr(self._mpi, f"THREAD_{level}"): level for level in levels}
        self.thread_level: str = by_value[self._mpi.Query_thread()]
        self._given_up: list[Any] = []
        """Requests without an answer; MPI may still write into their buffers, so these must stay."""
        self.names = [f"rank {rank}" for rank in range(self.size)]

    def gather(
        self, value: Any, timeout_s: float, ranks: Sequence[int]
    ) -> tuple[dict[int, Any], tuple[int, ...]]:
        """Return on rank 0, by rank, the values of `ranks`, and those that sent none within `timeout_s`.

        Every one of `ranks` calls this, rank 0 among them; the others get nothing back.
        """
        if self.rank != 0:
            self._send(value, [0])
            return {}, ()
        until = time.monotonic() + timeout_s
        sizes = {rank: np.empty(1, np.int64) for rank in ranks if rank != 0}
        texts: dict[int, Array] = {}
        waiting = {rank: self._receive(size, rank, _TALK) for rank, size in sizes.items()}
        values, nap = {0: value}, _FIRST_NAP_S
        while waiting and time.monotonic() < until:
            arrived = [rank for rank, request in waiting.items() if request.Test()]
            for rank in arrived:
                if rank in texts:
                    values[rank] = json.loads(texts[rank].tobytes())
                    del waiting[rank]
                else:
                    texts[rank] = np.empty(int(sizes[rank][0]), np.uint8)
                    waiting[rank] = self._receive(texts[rank], rank, _TALK)
            nap = _FIRST_NAP_S if arrived else min(nap * _NAP_GROWTH, _LONGEST_NAP_S)
            time.sleep(nap)
        self._given_up += waiting.values()
        return values, tuple(sorted(waiting))

    def broadcast(self, value: Any, ranks: Sequence[int]) -> Any:
        """Give rank 0's value to every one of `ranks`, which all call this."""
        if self.rank == 0:
            self._send(value, [rank for rank in ranks if rank != 0])
            return value
        size = np.empty(1, np.int64)
        self._wait({0: [self._receive(size, 0, _TALK)]}, self._patience_s, naps=True)
        text = np.empty(int(size[0]), np.uint8)
        self._wait({0: [self._receive(text, 0, _TALK)]}, self._patience_s, naps=True)
        return json.loads(text.tobytes())

    def exchange(self, partner: int, send: Array | None, receive: Array | None, timeout_s: float) -> None:
        """Give `send` to rank `partner` and fill `receive` from it, whichever are given.

        The wait does not sleep, so that its length is that of the link.
        """
        pending = [] if receive is None else [self._receive(receive, partner, _PAIR)]
        pending += [] if send is None else [self._start_sending(send, partner, _PAIR)]
        self._wait({partner: pending}, timeout_s, naps=False)

    def abort(self, code: int) -> NoReturn:
        """End every rank with `code`, whatever state MPI is in."""
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(_LAST_WORDS_S)
        self._comm.Abort(code)
        os._exit(code)

    def _send(self, value: Any, ranks: Sequence[int]) -> None:
        text = np.frombuffer(json.dumps(value).encode(), np.uint8)
        size = np.array([len(text)], np.int64)
        pending = {
            rank: [self._start_sending(size, rank, _TALK), self._start_sending(text, rank, _TALK)]
            for rank in ranks
        }
        self._wait(pending, self._patience_s, naps=True)

    def _start_sending(self, array: Array, rank: int, tag: int) -> Any:
        return self._comm.Isend([array, array.nbytes, self._mpi.BYTE], rank, tag)

    def _receive(self, array: Array, rank: int, tag: int) -> Any:
        return self._comm.Irecv([array, array.nbytes, self._mpi.BYTE], rank, tag)

    def _wait(self, pending: dict[int, list[Any]], timeout_s: float, *, naps: bool) -> None:
        """Poll until every request is complete; after the deadline, name the ranks whose requests are not."""
        requests = [request for several in pending.values() for request in several]
        deadline, nap = Deadline(timeout_s), _FIRST_NAP_S
        for poll in range(1 << 62):
            if self._mpi.Request.Testall(requests):
                return
            if poll < _CLOSE_POLLS:
                continue
            if deadline.is_over():
                self._given_up += requests
                late = [rank for rank, several in pending.items() if not self._mpi.Request.Testall(several)]
                whom = ", ".join(self.names[rank] for rank in late)
                raise TransportError(f"{self.names[self.rank]} waited {timeout_s:.3g} s for {whom}")
            # Nought leaves the core to whoever shares it and still comes back at once.
            time.sleep(nap if naps else 0)
            nap = min(nap * _NAP_GROWTH, _LONGEST_NAP_S)


def loaded_library() -> str | None:
    """Return the file of the MPI library that this process has loaded; None if the kernel does not tell."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    files = (line.split(maxsplit=5)[5] for line in mapped if len(line.split(maxsplit=5)) == 6)
    return next((file for file in files if Path(file).name.startswith("libmpi")), None)
