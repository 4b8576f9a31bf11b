"""Finds silent corruption of the state: bits that change in memory although nobody wrote there.

Theory of operation
-------------------
**Checksums.**  The state is cut into the blocks over which norms are summed (`optim/norm.py`), the padding
behind a tensor included.  A block's checksum is the sum of its 64-bit words, modulo 2^64.  Whatever changes
inside one word changes the sum, so every flip of a single bit is found; two flips escape if they hit the same
bit of two words in opposite directions.  It is the same on every machine of a job, and costs 2 us for a block
of 64 KiB that is in the cache, where CRC-32 needs 15 us.

**When.**  The state after c steps is *covered* if c is a multiple of `verify_every`, if it is about to be
saved, or if training begins with it.  The owner of a lane adds up what it has just written, and keeps the
sums in the arena beside that generation.  In the next step it adds up the same lane again, chunk by chunk,
right AFTER the update has read the chunk: at this place, and not before forward, because the generation is
read for the last time here.  What was flipped before, in whichever phase, is still there; what is flipped
later is not read any more.  Nothing has been committed by then: the step is given up, together with all that
forward made of a wrong parameter.  Where no update follows, or a checkpoint follows an evaluation, all
workers meet to check the state (`meet`): nobody goes back behind that checkpoint to evaluate again.

**Copies for a checkpoint** are added up after they were made (`accepts`), and not written if they differ.

**Several hosts** hold the same state.  Before a covered state is committed the owners of a lane swap hashes
of its checksums, so a host that differs is found before anything is saved, also if its state was flipped when
nobody looked.  Three hosts name the odd one; of two, nobody can say which one is right.  They compare as well
before a run ends as diverged: parameters of one host that are not finite spoil the gradient of all.

**Then** all workers of all hosts raise `Corruption` at the same place, and everybody goes back to the newest
checkpoint (`coordinator.py`).  Nothing is repaired in place: wrong gradients may have reached every host.

What it does not find: a flip in a state that is not covered, on one host; in gradients, activations or data;
in an optimizer's scratch between two instructions; in the state after the last meeting of a run.

Tried and rejected: `zlib.crc32` and `adler32` (4.4 and 3.0 GB/s here in the cache, the sum of words 33).  A
check before forward alone: what is flipped during the step would be read by the update, and covered again by
a new checksum.  One sum for a lane: it could not name the tensor.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.arena import NOTE_WORDS, Arena
from distbp.backends.base import Seat
from distbp.exchange import Piece, cut_pieces
from distbp.nn import Layout
from distbp.optim import norm
from distbp.optim.chunks import CHUNK
from distbp.transports.base import Transport

__all__ = ["Corruption", "StateCheck", "cover_state"]

Array = NDArray[Any]

_WORD_BYTES = 8
_NOTHING, _CHECKSUM, _HOSTS_DIFFER, _COPY = range(4)
_CAUSES = ("nothing", "checksum", "hosts differ", "copy")
_KIND, _STEP, _LANE, _PLACE, _HOST, _ODD = range(NOTE_WORDS)
"""Words of a note: what, after which step, in which lane, block and host; a bit for each odd host."""

_MASK_BITS = 62
"""Hosts beyond are not listed; the first one is named whatever its number."""

_HASH_WORDS = 2
_UNKNOWN = -1


class Corruption(Exception):
    """The state in memory is not what was written; raised by all workers of a job at the same place.

    `finding` says where: "step", "lane", "tensor" (None if only the lane is known), "host" (its number, None
    if nobody can say), "odd_hosts" (all that are known to be wrong), "cause".
    """

    def __init__(self, finding: dict[str, Any]) -> None:
        super().__init__(str(finding))
        self.finding = finding


@dataclass(frozen=True)
class Part:
    """A part of a lane: elements `[low, high)`, blocks `[first, last)`, and where these begin, in words."""

    low: int
    high: int
    first: int
    last: int
    starts: NDArray[np.intp]

    def sums(self, vector: Array) -> NDArray[np.uint64]:
        """Return the checksums of this part's blocks in a whole `vector`."""
        words = vector[self.low : self.high].view(np.uint64)
        sums: NDArray[np.uint64] = np.add.reduceat(words, self.starts)
        return sums


class StateCheck:
    """One worker's part in verifying the state every `every` steps (0: never); `open` it in each attempt."""

    def __init__(self, seat: Seat, layout: Layout, every: int) -> None:
        self._seat = seat
        self._arena = seat.arena
        self._layout = layout
        self._every = every
        self._blocks = norm.blocks(layout.borders())
        self._notes = [seat.arena.note(worker) for worker in range(seat.arena.layout.workers)]
        self._note = self._notes[seat.local_rank]
        self._owns_scalars = seat.local_rank == 0
        self._step = 0
        self._reads = self._writes = False

    def open(
        self, pieces: Sequence[Piece], bucket_starts: Sequence[int], transport: Transport | None
    ) -> None:
        """Begin an attempt in which this worker owns `pieces`."""
        self._note[:] = 0
        self._bucket_starts = bucket_starts
        self._transport = transport
        none = np.empty(0, np.intp)
        self._whole = [Part(piece.low, piece.high, piece.first, piece.last, none) for piece in pieces]
        self._chunks = [
            part for piece in pieces for part in cut_parts(self._blocks, piece.first, piece.last, piece.high)
        ]

    # In a step.

    def begin(self, step: int, *, covered: bool) -> list[Part]:
        """Return the parts in which the update of `step` has to go; `covered`: its result must be."""
        self._step = step
        self._reads = self._every > 0 and self._arena.checked(step)
        self._writes = self._every > 0 and (covered or (step + 1) % self._every == 0)
        return self._chunks if self._reads or self._writes else self._whole

    def follow(self, part: Part) -> None:
        """Check what the update has just read and add up what it has written, while both are cached."""
        if self._reads:
            self._check(part)
        if self._writes:
            sums = self._arena.checks(self._step + 1)
            for row, vector in enumerate(self._arena.vectors(self._step + 1).values()):
                sums[row, part.first : part.last] = part.sums(vector)

    def follow_scalars(self) -> None:
        """Do the same for the scalars, after the host's first worker has written them."""
        if self._reads:
            self._check_scalars()
        if self._writes:
            self._arena.checks(self._step + 1)[-1, 0] = add_up(self._arena.scalars(self._step + 1))

    def agree(self) -> None:
        """Learn what the owners of the same lane on other hosts found, and compare the new state with theirs.

        Call it before the barrier that precedes the commit; `conclude` comes after it.
        """
        transport = self._transport
        if transport is None or not (self._reads or self._writes):
            return
        mine = np.zeros(NOTE_WORDS + _HASH_WORDS, np.int64)
        mine[:NOTE_WORDS] = self._note
        if self._writes:
            mine[NOTE_WORDS:] = self._hash_lane()
        rows = np.empty((transport.size, len(mine)), np.int64)
        transport.allgather(mine, list(rows))
        found = np.flatnonzero(rows[:, _KIND])
        if len(found):
            self._note[:] = rows[found[0], :NOTE_WORDS]
        else:
            self._compare_hosts([row[NOTE_WORDS:].tobytes() for row in rows])

    def conclude(self) -> None:
        """Raise `Corruption` if any worker has found something."""
        if not (self._reads or self._writes):
            return
        found = [note for note in self._notes if note[_KIND] != _NOTHING]
        if found:
            raise Corruption(self._describe(max(found, key=lambda note: int(note[_HOST]))))

    def commit(self) -> None:
        """Say whether the new state is covered; the host's first worker does, before it commits."""
        self._arena.set_checked(self._step + 1, valid=self._writes)

    def meet(self, step: int) -> None:
        """Check the state after `step` steps, as it is now, together with every worker of every host.

        It is a barrier of the host too, also where nothing is checked.
        """
        # Until the first worker of the host has committed, nobody knows what is covered.
        self._arena.barrier.wait()
        self.look_back(step)
        self.agree()
        self._arena.barrier.wait()
        self.conclude()

    def look_back(self, step: int) -> None:
        """Check this worker's lane; `agree` and `conclude` follow."""
        self._step, self._writes = step, False
        self._reads = self._every > 0 and self._arena.checked(step)
        if self._reads:
            for part in self._chunks:
                self._check(part)
            if self._owns_scalars:
                self._check_scalars()

    def accepts(self, step: int, copies: Mapping[str, Array]) -> bool:
        """Return whether `copies`, the tensors of the state after `step` steps, are what was written; rank 0.

        If not, the next `agree` and `conclude` tell everybody.
        """
        if not (self._every and self._arena.checked(step)):
            return True
        sums = self._arena.checks(step)
        for row, vector in enumerate(self._arena.layout.vectors):
            block = 0
            for name in self._layout.names:
                found = block_sums(copies[f"{vector}/{name}"])
                differing = np.flatnonzero(found != sums[row, block : block + len(found)])
                if len(differing):
                    self._take_note(_COPY, step, row, block + int(differing[0]))
                    return False
                block += len(found)
        # Statistics lie behind the scalars, and are tensors of their own in a checkpoint.
        behind = [tensor for name, tensor in copies.items() if name.startswith("statistics/")]
        small = [copies["scalars"], *behind]
        if sum(int(add_up(np.ravel(tensor))) for tensor in small) % 2**64 != int(sums[-1, 0]):
            self._take_note(_COPY, step, len(sums) - 1, 0)
            return False
        return True

    def _check(self, part: Part) -> None:
        """Add up one part of the state that was read, and note the first block that differs."""
        sums = self._arena.checks(self._step)
        for row, vector in enumerate(self._arena.vectors(self._step).values()):
            found, written = part.sums(vector), sums[row, part.first : part.last]
            if found.tobytes() != written.tobytes():
                block = part.first + int(np.flatnonzero(found != written)[0])
                self._take_note(_CHECKSUM, self._step, row, block)

    def _check_scalars(self) -> None:
        """Add up the scalars that were read."""
        sums = self._arena.checks(self._step)
        if add_up(self._arena.scalars(self._step)) != sums[-1, 0]:
            self._take_note(_CHECKSUM, self._step, len(sums) - 1, 0)

    def _take_note(self, kind: int, step: int, row: int, block: int) -> None:
        """Note what this worker found, if it is the first thing."""
        if self._note[_KIND] == _NOTHING:
            place = row * len(self._blocks) + block
            host = self._seat.host
            self._note[:] = kind, step, self._lane_of(row, block), place, host, 0

    def _lane_of(self, row: int, block: int) -> int:
        """Return the lane that a block belongs to; the scalars go with lane 0."""
        if row == len(self._arena.layout.vectors):
            return 0
        for lane in range(self._seat.lanes):
            pieces = cut_pieces(self._blocks, self._layout.size, self._bucket_starts, self._seat.lanes, lane)
            if any(piece.first <= block < piece.last for piece in pieces):
                return lane
        raise AssertionError(f"block {block} belongs to no lane")

    def _hash_lane(self) -> NDArray[np.int64]:
        """Return a hash of the checksums that this worker has written in this step."""
        sums = self._arena.checks(self._step + 1)
        digest = hashlib.sha256()
        for part in self._whole:
            digest.update(sums[:-1, part.first : part.last].tobytes())
        if self._owns_scalars:
            digest.update(sums[-1, :1].tobytes())
        return np.frombuffer(digest.digest(), np.int64, _HASH_WORDS)

    def _compare_hosts(self, hashes: Sequence[bytes]) -> None:
        """Note that hosts hold different states, and which ones are in the minority, if one can tell."""
        (common, times), *others = Counter(hashes).most_common()
        if not others:
            return
        odd = [host for host, other in enumerate(hashes) if other != common]
        known = 2 * times > len(hashes)
        bits = sum(1 << host for host in odd if known and host < _MASK_BITS)
        host = odd[0] if known else _UNKNOWN
        self._note[:] = _HOSTS_DIFFER, self._step + 1, self._seat.local_rank, _UNKNOWN, host, bits

    def _describe(self, note: NDArray[np.int64]) -> dict[str, Any]:
        """Return a note in words."""
        place, host, bits = int(note[_PLACE]), int(note[_HOST]), int(note[_ODD])
        odd = {host} | {other for other in range(_MASK_BITS) if bits >> other & 1}
        return {
            "step": int(note[_STEP]),
            "lane": int(note[_LANE]),
            "host": None if host == _UNKNOWN else host,
            "odd_hosts": sorted(odd - {_UNKNOWN}),
            "tensor": None if place == _UNKNOWN else self._name_of(place),
            "cause": _CAUSES[int(note[_KIND])],
        }

    def _name_of(self, place: int) -> str:
        """Return the name of the tensor in which a block lies, as a checkpoint names it."""
        row, block = divmod(place, len(self._blocks))
        vectors = self._arena.layout.vectors
        if row == len(vectors):
            return "scalars"
        tensor = int(np.searchsorted(self._layout.offsets, self._blocks[block][0], side="right")) - 1
        return f"{vectors[row]}/{self._layout.names[tensor]}"


def cover_state(arena: Arena, layout: Layout, step: int, every: int) -> None:
    """Add up the whole state after `step` steps, with which training is about to begin."""
    if every:
        sums = arena.checks(step)
        blocks = norm.blocks(layout.borders())
        for part in cut_parts(blocks, 0, len(blocks), layout.size):
            for row, vector in enumerate(arena.vectors(step).values()):
                sums[row, part.first : part.last] = part.sums(vector)
        sums[-1, 0] = add_up(arena.scalars(step))
    arena.set_checked(step, valid=every > 0)


def cut_parts(blocks: Sequence[tuple[int, int]], first: int, last: int, high: int) -> Iterator[Part]:
    """Yield parts, of at most `CHUNK` elements or one block, of blocks `[first, last)`, which end at `high`.

    A block reaches to the beginning of the next one, so padding belongs to the block on its left.
    """
    edges = [start for start, _ in blocks[first:last]] + [high]
    begun = 0
    for end in range(1, len(edges)):
        if end == len(edges) - 1 or edges[end + 1] - edges[begun] > CHUNK:
            starts = (np.array(edges[begun:end]) - edges[begun]) * 4 // _WORD_BYTES
            yield Part(edges[begun], edges[end], first + begun, first + end, starts.astype(np.intp))
            begun = end


def block_sums(tensor: Array) -> NDArray[np.uint64]:
    """Return the checksums of the blocks of one contiguous tensor, as if zeros followed it."""
    flat = tensor.reshape(-1)
    whole = len(flat) // norm.BLOCK
    sums = np.zeros(-(-len(flat) // norm.BLOCK), np.uint64)
    words = (
        flat[: whole * norm.BLOCK].view(np.uint64).reshape(whole, norm.BLOCK * flat.itemsize // _WORD_BYTES)
    )
    np.add.reduce(words, axis=1, out=sums[:whole])
    if len(sums) > whole:
        sums[whole] = add_up(
            np.concatenate([flat[whole * norm.BLOCK :], np.zeros(len(flat) % 2, flat.dtype)])
        )
    return sums


def add_up(array: Array) -> np.uint64:
    """Return the checksum of a contiguous array whose bytes are a multiple of 8."""
    total: np.uint64 = np.add.reduce(array.view(np.uint64))
    return total
