"""How fast hosts exchange messages: a rank of each host meets one of every other.

Pairs meet in rounds, as in a tournament: in a round no host is in two pairs, so that pairs do not share a
cable.  After each round rank 0 hears how it went, and stops if a pair could not exchange: its members may
still hold requests, and others would wait for them.

    latency     half of the median time in which 8 bytes go there and back
    bandwidth   best of three transfers of a buffer that doubles until one takes `LONG_ENOUGH_S`; in one
                direction, then in the other

Rejected: measuring both directions at once, as gradients travel.  Between emulated hosts with 1 Gbit/s MPICH
and Open MPI sometimes sent one message after the other, and the figure was half or whole by chance.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbp.backends.mpi_world import MPIWorld
from distbp.doctor import Verdict
from distbp.doctor_ranks import NAME_THE_NETWORK, say_list
from distbp.errors import TransportError

__all__ = ["MOST_HOSTS_IN_PAIRS", "Link", "judge_links", "measure_links", "measure_pair", "rounds"]

Array = NDArray[Any]

MOST_HOSTS_IN_PAIRS = 64
"""With more hosts only neighbours meet: all pairs would take as many rounds as there are hosts."""

ROUND_TRIPS = 100
LEAST_BYTES, MOST_BYTES = 1 << 16, 1 << 26
LONG_ENOUGH_S = 0.1
SLOW = 0.5
"""A link below this part of the median link is named."""


class Link(msgspec.Struct, frozen=True):
    """What was measured between two hosts, in bytes per second there and back; `error` is why it was not."""

    hosts: tuple[str, str]
    bytes_per_second: tuple[float, float] = (0.0, 0.0)
    latency_s: float = 0.0
    error: str = ""


def rounds(hosts: int) -> list[list[tuple[int, int]]]:
    """Return the pairs of each round: all pairs of hosts, or, of many hosts, the neighbours in a ring."""
    if hosts > MOST_HOSTS_IN_PAIRS:
        ring = [(host, host + 1) for host in range(hosts - 1)]
        return [ring[::2], ring[1::2], [(0, hosts - 1)]]
    seats: list[int | None] = [*range(hosts), *([None] if hosts % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        table = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in table if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def measure_links(
    world: MPIWorld, firsts: Sequence[int], names: Sequence[str], timeout_s: float
) -> list[Link]:
    """Let the ranks `firsts`, one of each host and called `names`, meet; return all links on rank 0.

    A pair has `timeout_s` for all that it does.  Raises `TransportError` on a rank that cannot reach rank 0,
    and on rank 0 for a host that does not say how it went.
    """
    me, links = firsts.index(world.rank), []
    for pairs in rounds(len(firsts)):
        mine = next((pair for pair in pairs if me in pair), None)
        link = None
        if mine is not None:
            partner = firsts[mine[1] if mine[0] == me else mine[0]]
            link = _measure(world, partner, (names[mine[0]], names[mine[1]]), timeout_s)
        answers, missing = world.gather(msgspec.to_builtins(link), 2 * timeout_s, firsts)
        if missing:
            silent = ", ".join(world.names[rank] for rank in missing)
            raise TransportError(f"{silent} fell silent while hosts exchanged messages in pairs")
        reports = [(pair, [answers.get(firsts[host]) for host in pair]) for pair in pairs] if answers else []
        for _, told in reports:
            both = [msgspec.convert(one, Link) for one in told]
            links.append(next((one for one in both if one.error), both[0]))
        if world.broadcast(any(link.error for link in links), firsts):
            break
    return links


def _measure(world: MPIWorld, partner: int, hosts: tuple[str, str], timeout_s: float) -> Link:
    """Return what this rank and `partner` measure."""
    until = time.monotonic() + timeout_s
    lower = world.rank < partner

    def move(array: Array, forth: bool) -> None:
        send, receive = (array, None) if forth == lower else (None, array)
        world.exchange(partner, send, receive, max(0.0, until - time.monotonic()))

    return measure_pair(hosts, move)


def measure_pair(hosts: tuple[str, str], move: Callable[[Array, bool], None]) -> Link:
    """Return what two hosts measure, both of which call this; the bandwidths are the sender's.

    `move(array, forth)` brings an array from the first host to the second one, or back.  A `TransportError`
    that it raises ends the measurement and is the link's error.
    """
    small = np.ones(8, np.uint8)

    def there_and_back() -> float:
        begin = time.perf_counter()
        move(small, True)
        move(small, False)
        return time.perf_counter() - begin

    def timed(size: int, forth: bool) -> float:
        """Return the seconds from the begin of a transfer to its confirmation, as its sender sees them."""
        array, took_s = np.ones(size, np.uint8), np.zeros(1)
        move(small, not forth)  # The receiver is ready.
        begin = time.perf_counter()
        move(array, forth)
        move(small, not forth)
        took_s[0] = time.perf_counter() - begin
        move(took_s, forth)
        return float(took_s[0])

    try:
        latency_s = statistics.median(there_and_back() for _ in range(ROUND_TRIPS)) / 2
        size = LEAST_BYTES
        while timed(size, True) < LONG_ENOUGH_S and size < MOST_BYTES:
            size *= 2
        there_s, back_s = (min(timed(size, forth) for _ in range(3)) for forth in (True, False))
    except TransportError as error:
        return Link(hosts, error=str(error))
    return Link(hosts, (size / there_s, size / back_s), latency_s)


def judge_links(
    links: Sequence[Link],
    hosts: int,
    *,
    open_it: str = NAME_THE_NETWORK,
    avoid_it: str = "leave the host that they share out of the host file",
) -> Verdict:
    """Say what links carry, and name those that are slow beside the others or carry nothing.

    `open_it` cures links that carry nothing, `avoid_it` is what else to do about slow ones.
    """
    if hosts == 1:
        return Verdict("ok", "one host: nothing crosses a network")
    broken = [link for link in links if link.error]
    if broken:
        one = broken[0]
        pairs = say_list([" and ".join(link.hosts) for link in broken], "; ")
        return Verdict("FAIL", f"{pairs} exchange nothing: {one.error}", open_it)
    rates = {link.hosts: min(link.bytes_per_second) for link in links}
    slowest, typical = min(rates, key=lambda pair: rates[pair]), statistics.median(rates.values())
    found = (
        f"{_span([rate * 8e-9 for rate in rates.values()])} Gbit/s, "
        f"latency {_span([link.latency_s * 1e6 for link in links])} us"
    )
    if len(links) == 1:
        return Verdict("ok", f"{' and '.join(slowest)}: {found}")
    which = "every pair of" if hosts <= MOST_HOSTS_IN_PAIRS else "only neighbours in a ring of"
    found = f"{which} {hosts} hosts: {found}; slowest {' and '.join(slowest)}"
    if rates[slowest] < SLOW * typical:
        slow = [" and ".join(pair) for pair, rate in rates.items() if rate < SLOW * typical]
        return Verdict(
            "warn",
            f"{found}; below {SLOW:g} of the median of {typical * 8e-9:.3g} Gbit/s: {say_list(slow)}",
            f"look at these links, or {avoid_it}",
        )
    return Verdict("ok", found)


def _span(numbers: Sequence[float]) -> str:
    """Return '3.1' or '3.1 to 4.2'."""
    least, most = f"{min(numbers):.3g}", f"{max(numbers):.3g}"
    return least if least == most else f"{least} to {most}"
