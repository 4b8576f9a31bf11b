"""How the ranks of a collective group find each other: over a board that all of them can read and write.

Ray's internal key-value store is such a board.  Each rank writes an entry of its own; rank 0 reads all
entries and answers in its own, the plan:

    rank r                                     rank 0
    entry: nonce, beacon                  ->   all entries are there
                                          <-   plan: run key, nonces and beacons of all ranks
    tries which beacons it can open
    entry: + plan's number, whom it reached,
    + address of its listener             ->   all have agreed to this plan
                                          <-   plan: + nodes, addresses, "settled"

A board may hold what an earlier group of the same name left when its ranks were killed.  So a rank believes a
plan only if its own nonce of this minute is in it, and rank 0 makes a new plan whenever an entry changes.
Ranks share a node if each of them can open the others' beacons, whatever their addresses say.

Everybody removes its own entry: a rank as soon as the plan is settled, rank 0 in `finish`, when all have
seen it.  Contents are JSON; the run key proves to a listener that a connection belongs to the group.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec

import distbp
from distbp.backends.ray_collective.memory import Beacon, Neighbour, find_neighbour, name_ranks
from distbp.errors import ConfigError, DistbpError, EnvironmentMismatch, WorkerLost, error_for_code
from distbp.transports import wire

__all__ = ["Board", "Meeting"]

_FIRST_NAP_S, _LONGEST_NAP_S = 0.001, 0.05
_FAREWELL_S = 2.0
"""Seconds that rank 0 leaves a refusal on the board, for others to read, who wait so much longer for it."""


class Board(Protocol):
    """Where ranks leave notes for each other; a name is a rank's number, or "plan"."""

    def put(self, name: str, value: bytes) -> None:
        """Write a note, over an older one of that name."""

    def get(self, name: str) -> bytes | None:
        """Return a note, or None."""

    def remove(self, name: str) -> None:
        """Remove a note, if it is there."""


class Entry(msgspec.Struct, frozen=True):
    """What a rank says of itself; after agreeing to a plan also whom it can reach, and where it listens."""

    version: str
    world_size: int
    nonce: bytes
    process: int
    descriptor: int
    agreed: str = ""
    reached: tuple[int, ...] = ()
    address: tuple[str, int] = ("", 0)


class Plan(msgspec.Struct, frozen=True):
    """What rank 0 says; `nodes` is empty until it is settled."""

    number: str
    key: bytes
    members: tuple[Entry, ...]
    refused: str = ""
    exit_code: int = 0
    nodes: tuple[tuple[int, ...], ...] = ()
    addresses: tuple[tuple[str, int], ...] = ()


class Meeting:
    """One rank's way into a group; `attend` returns when all are there.

    `address` is the one that other nodes can reach this one at.  `listener` is None on a single node.  Who
    takes over a descriptor of `neighbours` sets it to -1 there.
    """

    def __init__(self, board: Board, world_size: int, rank: int, address: str, deadline_s: float) -> None:
        self.rank = rank
        self.beacon = Beacon()
        self.listener: wire.Listener | None = None
        self.neighbours: dict[int, Neighbour] = {}
        self._board = board
        self._notes: set[str] = set()
        self._world_size = world_size
        self._address = address
        self._deadline_s = deadline_s
        process, descriptor = self.beacon.place
        self._entry = Entry(distbp.__version__, world_size, self.beacon.nonce, process, descriptor)
        self._until = time.monotonic() + deadline_s + (0.0 if rank == 0 else _FAREWELL_S)

    def attend(self) -> Plan:
        """Return the settled plan; `WorkerLost` names those who did not come."""
        if self._world_size == 1:
            return Plan("alone", secrets.token_bytes(32), (self._entry,), nodes=((0,),), addresses=(("", 0),))
        self._post()
        plan = self._lead() if self.rank == 0 else self._follow()
        self._keep(next(ranks for ranks in plan.nodes if self.rank in ranks))
        if len(plan.nodes) == 1:
            self._stop_listening()
        if self.rank != 0:
            self._remove(str(self.rank))
        return plan

    def finish(self) -> None:
        """Give back what was needed until every rank has come out of `attend` and mapped its memory."""
        self._keep(())
        self.beacon.close()
        for name in list(self._notes):
            self._remove(name)

    def close(self) -> None:
        """Give back the listener too; idempotent."""
        self.finish()
        self._stop_listening()

    # ----- rank 0

    def _lead(self) -> Plan:
        """Make plans until everybody has agreed to one."""
        key, plan = secrets.token_bytes(32), None
        for _ in self._naps():
            entries = self._entries()
            members = tuple(entry for entry in entries if entry is not None)
            if len(members) < self._world_size:
                continue
            if plan is None or [e.nonce for e in members] != [e.nonce for e in plan.members]:
                if objection := self._objection(members):
                    raise self._refuse(key, ConfigError(objection))
                plan = Plan(secrets.token_hex(8), key, members)
                self._put("plan", plan)
            if self._entry.agreed != plan.number:
                self._agree(plan)
            elif all(entry.agreed == plan.number for entry in members):
                plan = msgspec.structs.replace(
                    plan,
                    nodes=group_nodes([entry.reached for entry in members]),
                    addresses=tuple(entry.address for entry in members),
                )
                self._put("plan", plan)
                return plan
        raise self._refuse(key, self._missing(plan))

    def _objection(self, members: Sequence[Entry]) -> str:
        """Return why these ranks cannot be a group, or nothing."""
        for rank, entry in enumerate(members):
            if entry.world_size != self._world_size:
                return (
                    f"expected a group of {self._world_size} ranks, as rank 0 says, and rank {rank} says "
                    f"{entry.world_size!r}; give every rank the same world_size"
                )
            if entry.version != distbp.__version__:
                return (
                    f"expected distbp {distbp.__version__} on every node, as on that of rank 0, and rank "
                    f"{rank} has {entry.version!r}; install the same version everywhere"
                )
        return ""

    def _refuse(self, key: bytes, error: DistbpError) -> DistbpError:
        """Tell those who are there why there will be no group, and give them time to read it."""
        present = tuple(entry for entry in self._entries() if entry is not None)
        plan = Plan(secrets.token_hex(8), key, present, refused=str(error), exit_code=error.exit_code)
        self._put("plan", plan)
        until = time.monotonic() + _FAREWELL_S
        while time.monotonic() < until and any(entry is not None for entry in self._entries()[1:]):
            time.sleep(_LONGEST_NAP_S)
        return error

    # ----- the others

    def _follow(self) -> Plan:
        """Agree to plans until one is settled."""
        plan: Plan | None = None
        for _ in self._naps():
            found: Plan | None = self._read("plan", Plan)
            if found is None or self.beacon.nonce not in [entry.nonce for entry in found.members]:
                self._post_again()
                continue  # The plan is not there yet, or was left by a group that is no more.
            plan = found
            if plan.refused:
                raise error_for_code(plan.exit_code, plan.refused)
            if self._entry.agreed != plan.number:
                self._agree(plan)
            elif plan.nodes:
                return plan
        raise self._missing(plan)

    # ----- everybody

    def _agree(self, plan: Plan) -> None:
        """Find out which ranks share memory with this one, listen, and say so."""
        self._keep(())
        self._stop_listening()
        for rank, entry in enumerate(plan.members):
            if rank != self.rank:
                neighbour = find_neighbour((entry.process, entry.descriptor), entry.nonce)
                if neighbour is not None:
                    self.neighbours[rank] = neighbour
        address = ("", 0)
        if len(self.neighbours) < self._world_size - 1:
            self.listener = wire.Listener(self._address, plan.key)
            address = self.listener.address
        self._entry = msgspec.structs.replace(
            self._entry, agreed=plan.number, reached=tuple(self.neighbours), address=address
        )
        self._post()

    def _post(self) -> None:
        """Write this rank's entry."""
        self._put(str(self.rank), self._entry)

    def _post_again(self) -> None:
        """Write this rank's entry once more if another's stands there: of one that died a moment ago."""
        entry: Entry | None = self._read(str(self.rank), Entry)
        if entry is None or entry.nonce != self.beacon.nonce:
            self._post()

    def _put(self, name: str, note: Entry | Plan) -> None:
        """Write a note, and remember to remove it."""
        self._notes.add(name)
        self._board.put(name, msgspec.json.encode(note))

    def _remove(self, name: str) -> None:
        """Remove a note of ours."""
        self._notes.remove(name)
        self._board.remove(name)

    def _read(self, name: str, kind: type[Any]) -> Any:
        """Return a note, or None when there is none."""
        note = self._board.get(name)
        if note is None:
            return None
        try:
            return msgspec.json.decode(note, type=kind)
        except msgspec.DecodeError as error:
            raise EnvironmentMismatch(
                f"expected a note of distbp {distbp.__version__} under {name!r}, and it cannot be read "
                f"({error}); install the same version of distbp on every node"
            ) from error

    def _entries(self) -> list[Entry | None]:
        """Return the entries of all ranks, this one's without asking."""
        return [
            self._entry if rank == self.rank else self._read(str(rank), Entry)
            for rank in range(self._world_size)
        ]

    def _naps(self) -> Iterator[None]:
        """Yield until the deadline, with pauses that grow."""
        nap = _FIRST_NAP_S
        while True:
            yield
            if time.monotonic() > self._until:
                return
            time.sleep(nap)
            nap = min(1.5 * nap, _LONGEST_NAP_S)

    def _missing(self, plan: Plan | None) -> WorkerLost:
        """Return the error that names who did not come."""
        entries = self._entries()
        absent = [rank for rank, entry in enumerate(entries) if entry is None]
        if plan is not None and not absent:
            absent = [rank for rank, entry in enumerate(entries) if entry and entry.agreed != plan.number]
        return WorkerLost(
            f"waited {self._deadline_s:g} s for {name_ranks(absent or [0])} to join the group of "
            f"{self._world_size}; every rank has to call register() and init_collective_group() with the "
            "same group name, in an actor that Ray has found a place for"
        )

    def _keep(self, ranks: Sequence[int]) -> None:
        """Let go of neighbours that are not among `ranks`."""
        for rank in [rank for rank in self.neighbours if rank not in ranks]:
            self.neighbours.pop(rank).close()

    def _stop_listening(self) -> None:
        """Close the listener."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None


def group_nodes(reached: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """Return the ranks of each node, when rank r could reach `reached[r]`: all of a node reach each other."""
    nodes: list[list[int]] = []
    for rank, others in enumerate(reached):
        for node in nodes:
            if all(mate in others and rank in reached[mate] for mate in node):
                node.append(rank)
                break
        else:
            nodes.append([rank])
    return tuple(map(tuple, nodes))
