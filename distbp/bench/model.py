"""A model of the step on many hosts, fitted to measured points: what `distbp simulate` prints.

    step = compute + update + exchange - hidden

    exchange = t0 + n (H - 1) a + (k + 1) V (H - 1) / H ((e + (H - 2) q) / r + c) + 2 n l

for H hosts that swap V bytes of gradients in n exchanges (the buckets, and the tail), each an all-to-all of
slices and an all-gather of sums, with messages between every pair (`reduce.py`).  A host's micro-batches are
k aligned blocks.  The levels: in a host, memory; between hosts, links.

    t0   s        what an exchange costs however small it is
    a    s        a message to one other host and one from it: the processor's part, paid one after the other
    c    s/byte   a byte in memory: copied, handed to the system and back, added
    r    byte/s   the rate of a host's link, given
    e             bytes on the link for each byte of ours, and what keeps it from its rate
    q             the same for each sender into one link beside another: queues overflow, bytes go again
    l    s        latency of the link, given; messages to different hosts fly at the same time

t0, a, c, e and q are fitted by least squares of relative errors, none below 0; q counts for no more senders
than were measured, because no queue was seen with more.  Points may come from emulated
hosts, which share cores: with more hosts than cores they take turns, so everything that a processor does
counts H / cores times there.

What is hidden: an exchange may run while backprop goes on, from the last layer on; buckets and layers are
taken for equal, and backprop for two thirds of the computing (`exchange.py`).

Not in it: switches that have less than the links into them, losses on the way, hosts of different speed,
evaluations, checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Fit", "Point", "Prediction", "exchange_s", "fit", "leave_one_out", "predict"]

BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Point:
    """One measured exchange: what was swapped, over which link, and how long it took, in seconds."""

    hosts: int
    vector_bytes: int
    exchanges: int
    blocks: int
    rate: float
    """Bytes a second of a host's link."""
    turns: float
    """How many processes shared a core; 1 on hosts of their own."""
    seconds: float


@dataclass(frozen=True)
class Fit:
    """The fitted numbers of the module docstring, and how many hosts the largest point had."""

    t0: float
    a: float
    c: float
    e: float
    q: float
    most_hosts: int


@dataclass(frozen=True)
class Prediction:
    """A step on `hosts` hosts, in seconds."""

    hosts: int
    exchange: float
    hidden: float
    step: float


def features(point: Point, most_hosts: int) -> list[float]:
    """Return what t0, a, c, e and q are multiplied with at this point."""
    others = point.hosts - 1
    moved = (point.blocks + 1) * point.vector_bytes * others / point.hosts
    return [
        point.turns * point.exchanges,
        point.turns * point.exchanges * others,
        point.turns * moved,
        moved / point.rate,
        moved / point.rate * max(0, min(point.hosts, most_hosts) - 2),
    ]


def fit(points: Sequence[Point]) -> Fit:
    """Return the numbers that fit `points` best, at least five of them; relative errors count."""
    assert len(points) >= 5, f"five numbers need at least five points, got {len(points)}"
    most_hosts = max(point.hosts for point in points)
    rows = np.array([features(point, most_hosts) for point in points])
    measured = np.array([point.seconds for point in points])
    weighted, ones = rows / measured[:, np.newaxis], np.ones(len(points))
    kept = list(range(rows.shape[1]))
    while True:
        scale = np.maximum(np.abs(weighted[:, kept]).max(axis=0), 1e-300)
        found = np.linalg.lstsq(weighted[:, kept] / scale, ones, rcond=None)[0] / scale
        if found.min() >= 0 or len(kept) == 1:
            break
        del kept[int(np.argmin(found * scale))]
    values = np.zeros(rows.shape[1])
    values[kept] = np.maximum(found, 0)
    t0, a, c, e, q = map(float, values)
    return Fit(t0, a, c, e, q, most_hosts)


def exchange_s(fitted: Fit, point: Point, latency_s: float = 0.0) -> float:
    """Return the seconds of an exchange by the model; `point.seconds` is not read."""
    numbers = (fitted.t0, fitted.a, fitted.c, fitted.e, fitted.q)
    flight = 2 * point.exchanges * latency_s if point.hosts > 1 else 0.0
    return sum(n * f for n, f in zip(numbers, features(point, fitted.most_hosts), strict=True)) + flight


def leave_one_out(points: Sequence[Point]) -> list[float]:
    """Return the relative error at each point of a fit to all the others."""
    errors = []
    for index, point in enumerate(points):
        others = [*points[:index], *points[index + 1 :]]
        errors.append(exchange_s(fit(others), point) / point.seconds - 1)
    return errors


def predict(
    fitted: Fit, hosts: int, *, compute_s: float, update_s: float, vector_bytes: int, buckets: int,
    rate: float, latency_s: float, blocks: int = 1,
) -> Prediction:  # fmt: skip
    """Return the step on `hosts` hosts with cores of their own; `compute_s` is that of one host."""
    if hosts == 1:
        return Prediction(1, 0.0, 0.0, compute_s + update_s)
    point = Point(hosts, vector_bytes, buckets + 1, blocks, rate, 1.0, 0.0)
    exchange = exchange_s(fitted, point, latency_s)
    hidden = exchange - unhidden(exchange, BACKWARD_SHARE * compute_s, buckets)
    return Prediction(hosts, exchange, hidden, compute_s + update_s + exchange - hidden)


def unhidden(exchange: float, backward: float, buckets: int) -> float:
    """Return how long after backprop the last of equal buckets has been exchanged.

    Bucket i is ready after i / n of backprop and waits for the bucket before it.
    """
    one, ends = exchange / buckets, 0.0
    for bucket in range(1, buckets + 1):
        ends = max(ends, backward * bucket / buckets) + one
    return ends - backward
