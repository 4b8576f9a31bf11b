"""The memory that the ranks of one node share in a collective group, and how they wait for each other there.

How it works: every rank shows a *beacon*, an anonymous file (memfd) with a secret number in it, by process
and descriptor number.  Whoever can open it through /proc and reads that number is on the same node, in the
same process namespace, and the same user: this is found out by trying, never from names or addresses.  The
file of a node's lowest rank becomes the node's memory:

    gate: control words, a line for each rank | second gate | outbox lines | reasons | 3 areas | outboxes

* The **gate** is the barrier of `distbp/barrier.py`.  A rank that waits there leaves with an error as soon as
  a late rank is dead (its pidfd says so), has left the group, or any rank has failed (`fail`); and at the
  deadline in any case.  Errors name ranks of the group.
* An **area** is room for one piece of an operation; three of them let a rank fill one, add in another and
  empty the third between two barriers.  What lies where in it is the operation's business.
* In its line a rank **announces** what it is about to do; after the barrier everybody compares.  Without
  that, ranks in different operations would hand each other wrong numbers and no error.

Barriers count their rounds in 32 bits, which a busy group uses up within hours.  So when many rounds have
passed, all ranks meet at the second gate and begin to count the first one anew.

A group of one rank on its node, or in all, uses a private mapping and the same words.  The file has a name
nowhere, needs no room in /dev/shm, and is gone with its last process.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import select
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from distbp.barrier import FIRST_LINE_WORD, LINE_WORDS, PARK_WORD, Barrier, nap, wake
from distbp.errors import ConfigError, DistbpError, WorkerLost, error_for_code
from distbp.partition import round_up

__all__ = [
    "OUTBOX_BYTES",
    "Beacon",
    "Neighbour",
    "NodeMemory",
    "find_neighbour",
    "late",
    "memory_bytes",
    "mismatch",
    "name_ranks",
]

OUTBOX_BYTES = 1 << 18
"""Room for one part of a message between two ranks; every rank has two such rooms."""

MOST_ROUNDS = 1 << 31
"""Rounds of the gate after which it is counted anew."""

_NAME = "distbp-collective"
_NONCE_AT, _NONCE_BYTES = 64, 16
_PAGE = 4096
_AREAS = 3
_REASON_BYTES = 1024
_ANNOUNCED = 2
"""Place of the first of four 64-bit words in a rank's line: two announcements of two words, used in turns."""
_LEFT = 12
"""Place of the 32-bit word by which a rank says that it has left."""
_SPINS, _YIELDS = range(100), range(150)


class Beacon:
    """A rank's anonymous file with a secret number, for others to find; `close` is idempotent."""

    def __init__(self) -> None:
        self.nonce = secrets.token_bytes(_NONCE_BYTES)
        self.descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        os.pwrite(self.descriptor, self.nonce, _NONCE_AT)

    @property
    def place(self) -> tuple[int, int]:
        """Return the process and the descriptor number by which others open the file."""
        return os.getpid(), self.descriptor

    def close(self) -> None:
        """Give the descriptor back; the memory stays while somebody maps it."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


@dataclass
class Neighbour:
    """Another rank on this node: its file, and a pidfd, which becomes readable when its process ends."""

    descriptor: int
    process: int

    def close(self) -> None:
        """Give both descriptors back; idempotent."""
        for number in (self.descriptor, self.process):
            if number >= 0:
                os.close(number)
        self.descriptor = self.process = -1


def find_neighbour(place: tuple[int, int], nonce: bytes) -> Neighbour | None:
    """Return the rank that shows its beacon at `place`, or None when this process cannot open it.

    The link's name is looked at before anything is opened: elsewhere the same numbers may be a terminal or a
    pipe.  The process is taken hold of before the secret is read, so the numbers cannot change hands between.
    """
    pid, number = place
    path = f"/proc/{pid}/fd/{number}"
    found = Neighbour(-1, -1)
    try:
        found.process = os.pidfd_open(pid)
        if os.readlink(path).startswith(f"/memfd:{_NAME}"):
            found.descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            if os.pread(found.descriptor, _NONCE_BYTES, _NONCE_AT) == nonce:
                return found
    except OSError:
        pass  # Not there, not ours, or another machine's number: no neighbour.
    found.close()
    return None


class _Gate(Barrier):
    """The barrier of the ranks of a node; between naps it asks `watch(gate)` whether to go on waiting."""

    def __init__(
        self, words: memoryview, address: int, rank: int, size: int, watch: Callable[[_Gate], None]
    ) -> None:
        super().__init__(words, address, rank, size, deadline_s=float("inf"))
        self._watch = watch

    @property
    def round(self) -> int:
        """Return the number of the last round that this rank has arrived in."""
        return self._round

    def late(self) -> list[int]:
        """Return the local numbers of those who have not arrived in that round."""
        return [other for other, line in self._others if self._words[line] < self._round]

    def check_parked(self) -> None:
        """Raise whatever ends the wait; called every few milliseconds while a rank is late."""
        self._watch(self)


class NodeMemory:
    """One rank's view of its node's memory.  `ranks` are the group's ranks on the node, in order.

    `descriptor` is a file of `memory_bytes(...)` bytes, or -1 for a rank that is alone; it may be closed
    afterwards.  `processes` are the pidfds of the other ranks; they belong to the memory from now on.
    """

    def __init__(
        self,
        descriptor: int,
        ranks: Sequence[int],
        rank: int,
        processes: Mapping[int, int],
        area_bytes: int,
        deadline_s: float,
    ) -> None:
        self.ranks = tuple(ranks)
        self.local = self.ranks.index(rank)
        self.deadline_s = deadline_s
        self._processes = dict(processes)
        size = len(ranks)
        places = _places(size, area_bytes)
        self._map = mmap.mmap(descriptor, places["end"])
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        everything = memoryview(self._map)
        self.words = everything.cast("I")
        self.longs = everything.cast("q")
        self._reasons = everything[places["reasons"] :][: size * _REASON_BYTES]
        whole = np.frombuffer(self._map, np.uint8)
        self.areas = [whole[places["areas"] + i * area_bytes :][:area_bytes] for i in range(_AREAS)]
        self.outboxes = whole[places["outboxes"] : places["end"]].reshape(size, 2, OUTBOX_BYTES)
        self.outbox_words = [places["outbox lines"] // 4 + LINE_WORDS * i for i in range(size)]
        self._lines = [FIRST_LINE_WORD + LINE_WORDS * i for i in range(size)]
        self._gate = _Gate(self.words, self._address, self.local, size, self._watch)
        second = places["second gate"]
        self._second = _Gate(self.words[second // 4 :], self._address + second, self.local, size, self._watch)
        self._turn = 0
        self._waiting: tuple[_Gate, int] | None = None
        self._until = 0.0
        self._closed = False

    # ----- all ranks of the node

    def wait(self) -> None:
        """Return when every rank of the node has called this."""
        self._gate.wait()

    def meet(self, announced: tuple[int, int], tell: Callable[[int, int], str]) -> None:
        """Wait for every rank of the node and compare what they are about to do, two 64-bit numbers.

        `tell` turns the numbers into words for the error.  A rank may be one announcement ahead, never two.
        """
        longs, place = self.longs, _ANNOUNCED + 2 * self._turn
        self._turn ^= 1
        mine = self._lines[self.local] // 2 + place
        longs[mine], longs[mine + 1] = announced
        self._gate.wait()
        for rank, line in zip(self.ranks, self._lines, strict=True):
            word = line // 2 + place
            if (longs[word], longs[word + 1]) != announced:
                raise mismatch(tell(*announced), rank, tell(longs[word], longs[word + 1]))

    def begin(self) -> None:
        """Call this before each operation: all ranks look, in the same one, whether to count anew."""
        if self._gate.round > MOST_ROUNDS:
            self._second.wait()  # Nobody looks at the first gate's counters any more.
            self.words[self._lines[self.local]] = 0
            self._gate.begin_attempt(0)
            self._waiting = None
            self._second.wait()  # Nobody arrives there before all counters are back.

    # ----- two of them

    def order(self) -> None:
        """Order memory: what was written before is visible before, what is read after is read after."""
        self._gate.order_stores()

    def wake(self, word: int) -> None:
        """Wake whoever sleeps until `word` changes."""
        wake(self._address + 4 * word)

    def await_word(self, word: int, is_there: Callable[[], bool], peer: int) -> None:
        """Return when `is_there()`, which rank `peer` brings about by changing `word` and waking us."""
        for _ in _SPINS:
            if is_there():
                return
        for _ in _YIELDS:
            os.sched_yield()
            if is_there():
                return
        until = time.monotonic() + self.deadline_s
        while True:
            seen = self.words[word]
            if is_there():
                return
            nap(self._address + 4 * word, seen)
            self.check()
            if self.is_gone(peer) and not is_there():
                raise lost([peer])
            if time.monotonic() > until and not is_there():
                raise late([peer], self.deadline_s)

    # ----- what goes wrong

    def fail(self, error: BaseException) -> None:
        """Tell every rank of the node why this one gives up; they leave their waits with the same words."""
        if self._closed:
            return
        reason = self._reasons[self.local * _REASON_BYTES :][:_REASON_BYTES]
        text = str(error).encode()[: _REASON_BYTES - 1]
        reason[1 : 1 + len(text)] = text
        self.order()
        reason[0] = error.exit_code if isinstance(error, DistbpError) else WorkerLost.exit_code
        self.order()
        self.words[PARK_WORD] = 1
        self._wake_all()

    def check(self) -> None:
        """Raise what another rank of the node has failed with."""
        if not self.words[PARK_WORD]:
            return
        for local, rank in enumerate(self.ranks):
            reason = bytes(self._reasons[local * _REASON_BYTES :][:_REASON_BYTES])
            if reason[0]:
                text = reason[1:].rstrip(b"\0").decode(errors="replace")
                raise error_for_code(reason[0], f"{text} (found by rank {rank})")

    def is_gone(self, rank: int) -> bool:
        """Return whether another rank of the node has died or left the group."""
        if self.words[self._lines[self.ranks.index(rank)] + _LEFT]:
            return True
        poll = select.poll()
        poll.register(self._processes[rank], select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Leave the group and give the memory back; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.order()
        self.words[self._lines[self.local] + _LEFT] = 1
        self._wake_all()
        for number in self._processes.values():
            os.close(number)
        self._processes = {}
        self.areas = []
        # The mapping lives as long as a view of it: these are ours.
        del self.words, self.longs, self.outboxes, self._reasons, self._gate, self._second
        self._waiting = None
        with suppress(BufferError):  # An array of a caller's is a view too, and ends with it.
            self._map.close()

    def _wake_all(self) -> None:
        """Wake every rank of the node, wherever it sleeps."""
        for line in (*self._lines, *self.outbox_words):
            for word in (line, line + 1):
                self.wake(word)

    def _watch(self, gate: _Gate) -> None:
        """Raise when a wait at `gate` has become hopeless or too long."""
        self.check()
        missing = [self.ranks[local] for local in gate.late()]
        gone = {rank for rank in missing if self.is_gone(rank)}
        if gone:
            # Looked at again: a rank may arrive, and go, between the two looks above.
            gone &= {self.ranks[local] for local in gate.late()}
        if gone:
            raise lost(sorted(gone))
        if self._waiting != (gate, gate.round):
            self._waiting, self._until = (gate, gate.round), time.monotonic() + self.deadline_s
        if missing and time.monotonic() > self._until:
            raise late(missing, self.deadline_s)


def memory_bytes(ranks: int, area_bytes: int) -> int:
    """Return the size of the memory of a node with so many ranks; pages that are never used cost nothing."""
    return _places(ranks, area_bytes)["end"]


def _places(ranks: int, area_bytes: int) -> dict[str, int]:
    """Return where each part begins, in bytes."""
    gate = round_up(4 * (FIRST_LINE_WORD + LINE_WORDS * ranks), _PAGE)
    sizes = {
        "gate": gate,
        "second gate": gate,
        "outbox lines": round_up(4 * LINE_WORDS * ranks, _PAGE),
        "reasons": round_up(_REASON_BYTES * ranks, _PAGE),
        "areas": _AREAS * area_bytes,
        "outboxes": ranks * 2 * OUTBOX_BYTES,
    }
    places, position = {}, 0
    for name, size in sizes.items():
        places[name] = position
        position += size
    return places | {"end": position}


# ----- what errors say


def name_ranks(ranks: Sequence[int]) -> str:
    """Return "rank 3" or "ranks 2, 3"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def lost(ranks: Sequence[int]) -> WorkerLost:
    """Return the error for ranks whose process has ended or that have left the group."""
    return WorkerLost(
        f"{name_ranks(ranks)} of the group ended or left it before this operation was over; look at what Ray "
        "says of that actor, destroy the group, and make a new one"
    )


def late(ranks: Sequence[int], deadline_s: float) -> WorkerLost:
    """Return the error for ranks that live and do not come."""
    return WorkerLost(
        f"waited {deadline_s:g} s for {name_ranks(ranks)} of the group; every rank has to call the same "
        "operations in the same order, within the deadline that was given to register()"
    )


def mismatch(mine: str, rank: int, theirs: str) -> ConfigError:
    """Return the error for two ranks that are in different operations."""
    return ConfigError(
        f"expected every rank of the group in the same operation; this rank called {mine}, and rank {rank} "
        f"called {theirs}"
    )
