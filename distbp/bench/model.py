"""A model of the step on many hosts, fitted to measured points: what `distbp simulate` prints.

    step = compute + update + exchange - hidden

    exchange = max(processor, link) + 2 n l
    processor = n t0 + n (H - 1) a + B c
    link = B (e + (H - 2) q) / r
    B = (k + 1) V (H - 1) / H

for H hosts that swap V bytes of gradients in n exchanges (the buckets, and the tail), each an all-to-all of
slices and an all-gather of sums, with messages between every pair (`reduce.py`).  A host's micro-batches are
k aligned blocks, so B bytes leave it.  The levels: in a host, memory; between hosts, links.  The two work at
the same time, and the slower one counts.

    t0   s        what an exchange costs the processor however small it is
    a    s        a message to one other host and one from it, paid one after the other
    c    s/byte   a byte in memory: copied, handed to the system and back, added
    r    byte/s   the rate of a host's link, given
    e             bytes on the link for each byte of ours, and what keeps it from its rate
    q             the same for each sender into one link beside another: queues overflow, bytes go again
    l    s        latency of the link, given; messages to different hosts fly at the same time

t0, a, c, e and q are fitted by least squares of relative errors, none below 0, each to the points where its
side is the slower one; q counts for no more senders than were measured, because no queue was seen with more.
Tried: the sum of both sides in place of the slower one, with processors that emulated hosts share counted as
slower by their number (errors three times as large).

Emulated hosts share cores, and whatever else runs on the machine takes its part: t0, a and c are upper bounds
for hosts of their own, and who has measured better ones gives them.

What is hidden: an exchange may run while backprop goes on, from the last layer on; buckets and layers are
taken for equal, and backprop for two thirds of the computing (`exchange.py`).

Not in it: switches that have less than the links into them, losses on the way, hosts of different speed,
evaluations, checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fit", "Point", "Prediction", "exchange_s", "fit", "leave_one_out", "predict"]

BACKWARD_SHARE = 2 / 3
MOST_TURNS = 60

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Point:
    """One measured exchange: what was swapped, over which link, and how long it took, in seconds."""

    hosts: int
    vector_bytes: int
    exchanges: int
    blocks: int
    rate: float
    """Bytes a second of a host's link."""
    seconds: float

    @property
    def moved(self) -> float:
        """Return the bytes that leave a host: slices of its blocks, and its sums."""
        return (self.blocks + 1) * self.vector_bytes * (self.hosts - 1) / self.hosts


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


def processor_features(point: Point) -> list[float]:
    """Return what t0, a and c are multiplied with at this point."""
    return [point.exchanges, point.exchanges * (point.hosts - 1), point.moved]


def link_features(point: Point, most_hosts: int) -> list[float]:
    """Return what e and q are multiplied with at this point."""
    seconds = point.moved / point.rate
    return [seconds, seconds * max(0, min(point.hosts, most_hosts) - 2)]


def fit(points: Sequence[Point]) -> Fit:
    """Return the numbers that fit `points` best: at least six, some with a slow link, some with a fast one.

    Which side of a point is the slower one follows from the numbers, and they from it: both are found in
    turns, beginning with the links that are busy for more than half of the time.
    """
    assert len(points) >= 6, f"five numbers need at least six points, got {len(points)}"
    most_hosts = max(point.hosts for point in points)
    processor = np.array([processor_features(point) for point in points], float)
    link = np.array([link_features(point, most_hosts) for point in points])
    measured = np.array([point.seconds for point in points])
    link_is_slower = link[:, 0] > 0.5 * measured
    own, wire = np.zeros(3), np.array([1.0, 0.0])
    for _ in range(MOST_TURNS):
        own = _least_squares(processor[~link_is_slower], measured[~link_is_slower], own)
        wire = _least_squares(link[link_is_slower], measured[link_is_slower], wire)
        now = link @ wire > processor @ own
        if (now == link_is_slower).all():
            break
        link_is_slower = now
    t0, a, c, e, q = map(float, (*own, *wire))
    return Fit(t0, a, c, e, q, most_hosts)


def _least_squares(rows: Array, measured: Array, before: Array) -> Array:
    """Return numbers >= 0 for which the relative errors of `rows` times them are least.

    `before` where there are fewer rows than numbers.  Numbers that would be negative are left out, the
    worst first.
    """
    if len(rows) < rows.shape[1]:
        return before
    weighted, ones = rows / measured[:, np.newaxis], np.ones(len(rows))
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    kept = list(range(rows.shape[1]))
    while True:
        found = np.linalg.lstsq(weighted[:, kept] / scale[kept], ones, rcond=None)[0]
        if found.min() >= 0 or len(kept) == 1:
            break
        del kept[int(np.argmin(found))]
    values = np.zeros(rows.shape[1])
    values[kept] = np.maximum(found, 0) / scale[kept]
    return values


def exchange_s(fitted: Fit, point: Point, latency_s: float = 0.0) -> float:
    """Return the seconds of an exchange by the model; `point.seconds` is not read."""
    own = float(np.dot(processor_features(point), (fitted.t0, fitted.a, fitted.c)))
    wire = float(np.dot(link_features(point, fitted.most_hosts), (fitted.e, fitted.q)))
    flight = 2 * point.exchanges * latency_s if point.hosts > 1 else 0.0
    return max(own, wire) + flight


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
    point = Point(hosts, vector_bytes, buckets + 1, blocks, rate, 0.0)
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
