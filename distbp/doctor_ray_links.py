"""How the nodes of a Ray cluster reach the driver, and each other: over TCP connections as a job's are.

Every node connects to the driver first, and listens at the address that it did so from.  Then pairs meet in
the rounds of `doctor_links.py`, those of a round at the same time.  A pair that gets no connection does not
hold the others up; when all pairs together have taken too long, the rest is counted and not tried.

The driver's side is here, the nodes' side in `doctor_witness.py`.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from distbp.backends.ray_doctor import RayWitnesses
from distbp.doctor import Verdict
from distbp.doctor_links import Link, judge_links, rounds
from distbp.transports import wire
from distbp.transports.handshake import KEY_BYTES

__all__ = ["Deadlines", "call_driver", "judge_pairs", "measure_pairs"]

OPEN_PORTS = (
    "let all TCP ports through between the nodes, in both directions: workers listen at ports that the "
    "kernel chooses (sysctl net.ipv4.ip_local_port_range)"
)
AVOID = "end Ray on the node that they share, so that no worker is placed there"

Address = tuple[str, int]


@dataclass(frozen=True)
class Deadlines:
    """Seconds: to join the cluster, for actors to start, for their answers, to open a connection, for what a
    pair measures, for all pairs together, and for a trial of the token."""

    join_s: float = 180.0
    start_s: float = 120.0
    answer_s: float = 60.0
    connect_s: float = 5.0
    pair_s: float = 20.0
    pairs_s: float = 180.0
    trial_s: float = 20.0


@dataclass(frozen=True)
class Calls:
    """What came of calling the driver at `driver`: where nodes listen, and why some did not reach it."""

    driver: str
    addresses: dict[int, Address]
    unreached: dict[str, str]
    answered: int


def call_driver(witnesses: RayWitnesses, ip: str, deadlines: Deadlines) -> Calls:
    """Let every node connect to this process, which listens at `ip`.

    Raises `EnvironmentMismatch` if it cannot listen there.
    """
    key = secrets.token_bytes(KEY_BYTES)
    with _open_door(wire.Listener(ip, key)) as listener:
        arguments = {
            index: (listener.address, key, index, node.address, deadlines.connect_s)
            for index, node in enumerate(witnesses.nodes)
        }
        told = witnesses.ask("call", arguments, deadlines.connect_s + deadlines.answer_s)
    return Calls(
        driver=f"{listener.address[0]}:{listener.address[1]}",
        addresses={index: (one[0], int(one[1])) for index, (one, _) in told.items() if one is not None},
        unreached={witnesses.nodes[index].name: trouble for index, (_, trouble) in told.items() if trouble},
        answered=len(told),
    )


@contextlib.contextmanager
def _open_door(listener: wire.Listener) -> Iterator[wire.Listener]:
    """Let in whoever proves who it is, on a thread of its own, and send it away again, until the end."""
    closing = threading.Event()

    def let_in() -> None:
        while not closing.is_set():
            connection = listener.accept(0.2)
            if connection is not None:
                connection.close()

    doorman = threading.Thread(target=let_in, name="distbp-doorman", daemon=True)
    doorman.start()
    try:
        yield listener
    finally:
        closing.set()
        doorman.join(2.0)
        listener.close()


def measure_pairs(
    witnesses: RayWitnesses, addresses: Mapping[int, Address], deadlines: Deadlines
) -> tuple[list[Link], int]:
    """Let the nodes that listen at `addresses` meet; return the links, and how many were not tried."""
    until, members = time.monotonic() + deadlines.pairs_s, sorted(addresses)
    links: list[Link] = []
    untried = 0
    if not members:
        return links, untried
    for several in rounds(len(members)):
        pairs = [(members[a], members[b]) for a, b in several]
        if time.monotonic() > until:
            untried += len(pairs)
            continue
        told = witnesses.ask(
            "exchange",
            _arguments(witnesses, pairs, addresses, deadlines),
            2 * deadlines.connect_s + deadlines.pair_s + deadlines.answer_s,
        )
        links += [_join(witnesses, pair, told) for pair in pairs]
    return links, untried


def _arguments(
    witnesses: RayWitnesses,
    pairs: list[tuple[int, int]],
    addresses: Mapping[int, Address],
    deadlines: Deadlines,
) -> dict[int, tuple[Any, ...]]:
    """Return what each member of each pair is called with."""
    arguments: dict[int, tuple[Any, ...]] = {}
    for pair in pairs:
        names, label = _names(witnesses, pair), secrets.token_hex(8)
        for me in (0, 1):
            partner = addresses[pair[1 - me]]
            arguments[pair[me]] = (me, names, partner, label, deadlines.connect_s, deadlines.pair_s)
    return arguments


def _join(witnesses: RayWitnesses, pair: tuple[int, int], told: Mapping[int, Any]) -> Link:
    """Return the link that both members tell of; whom one did not reach says more than whom one awaited."""
    names = _names(witnesses, pair)
    for index, name in zip(pair, names, strict=True):
        if index not in told:
            return Link(names, error=f"{name}: {witnesses.silent[index]}")
    unreached = [told[index]["unreached"] for index in pair if told[index]["unreached"]]
    if unreached:
        return Link(names, error="; ".join(unreached))
    both = [msgspec.convert(told[index]["link"], Link) for index in pair]
    return next((one for one in both if one.error), both[0])


def _names(witnesses: RayWitnesses, pair: tuple[int, int]) -> tuple[str, str]:
    return witnesses.nodes[pair[0]].name, witnesses.nodes[pair[1]].name


def judge_pairs(links: list[Link], untried: int, nodes: int, pairs_s: float) -> Verdict:
    """Say what links between `nodes` nodes carry, and how many were not tried within `pairs_s` seconds."""
    if nodes > 1 and not links:
        return Verdict("FAIL", f"no pair of {nodes} nodes was measured", OPEN_PORTS)
    verdict = judge_links(links, max(nodes, 1), open_it=OPEN_PORTS, avoid_it=AVOID)
    if not untried:
        return verdict
    return Verdict(
        "warn" if verdict.status == "ok" else verdict.status,
        f"{verdict.finding}; {untried} pairs were not tried within {pairs_s:g} s",
        verdict.cure or "run the doctor again when the network is idle",
    )
