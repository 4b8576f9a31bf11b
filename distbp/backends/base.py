"""The contract of a backend: who starts the workers, and how a worker finds its place.

A backend has two sides.  The *launching side* starts processes, watches them, and carries out what
`coordinator.decide` says; each backend has its own, because a launcher, a Ray driver and an `mpirun` have
little in common.  The *worker's side* is a `Membership`: the one thing that the training
code sees.  It is the same for every backend, so the worker's loop is the same.

A call of `fit` goes like this on every worker:

    seat = membership.join(plan)       all meet, plans are compared; a finished call returns its result
    seat.gate()                        wait, parked, until the coordinator lets everybody begin an attempt
    ... train ...                      on `Parked` back to the gate
    membership.finish(seat, result)    rank 0 hands in the result, everybody gets it

This file holds no logic of a backend's own: the shapes that cross the border, and arithmetic on them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from distbp.arena import Arena, ArenaLayout
from distbp.partition import split_range
from distbp.reduce import aligned_blocks
from distbp.transports.base import Transport

__all__ = [
    "Admission",
    "CallFinished",
    "Membership",
    "Plan",
    "Seat",
    "compare_plans",
    "describe_difference",
    "differences",
    "host_layout",
    "host_ranks",
]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What one call of `fit` intends; all workers must bring the same one.

    `identity` holds whatever decides about bits (model, data, batch, seed, optimizer ...): it is compared
    between workers before step 1 and with a checkpoint at resume.  `free` may differ between two starts of
    a run, but not between workers.  The rest are sizes of the arena and where the run lies.
    """

    name: str
    out: str | None
    resume: str
    identity: dict[str, Any]
    free: dict[str, Any]
    micro_batches: int
    total_steps: int
    size: int
    vectors: tuple[str, ...]
    sums: int
    evaluation_rows: int
    tail: int
    scalars: int
    max_restarts: int = 10
    config_toml: str = ""
    environment: dict[str, Any] = {}


@dataclass(frozen=True)
class Admission:
    """What the keeper of the job found in the run directory: where it lies, and what to begin from."""

    out: Path
    restore: Path | None
    start: int
    result: dict[str, Any] | None = None


@dataclass(frozen=True)
class Seat:
    """A worker's place in one call of `fit`.

    `host_sizes[h]` counts the workers of host h; workers are numbered host by host.  `gate` waits parked and
    returns the attempt; `connect(attempt)` opens this worker's transport, None if it owns no lane or there is
    one host; `report` sends a record to whoever keeps the job; `broken` says that a connection of this
    attempt failed while nobody is known to be dead; `corrupted`, called by every worker, that the state was
    found to be corrupted in this attempt (`verify.Corruption.finding`), and it may end the job.  With
    `patience_s` a wait in a step ends with `WorkerLost` after that long, or after 5 times the slowest recent
    step if that is longer.  Where nobody `replaces_lost` workers or hosts, their loss ends the run.
    """

    rank: int
    host_sizes: tuple[int, ...]
    arena: Arena
    admission: Admission
    gate: Callable[[], int]
    connect: Callable[[int], Transport | None]
    report: Callable[[dict[str, Any]], None]
    broken: Callable[[int], None] = lambda attempt: None
    corrupted: Callable[[int, dict[str, Any]], None] = lambda attempt, finding: None
    patience_s: float | None = None
    replaces_lost: bool = True

    @functools.cached_property
    def size(self) -> int:
        """Return the number of workers."""
        return sum(self.host_sizes)

    @functools.cached_property
    def host(self) -> int:
        """Return the number of this worker's host."""
        return next(
            host for host in range(len(self.host_sizes)) if self.rank in host_ranks(self.host_sizes, host)
        )

    @functools.cached_property
    def local_rank(self) -> int:
        """Return this worker's number on its host."""
        return self.rank - host_ranks(self.host_sizes, self.host).start

    @functools.cached_property
    def lanes(self) -> int:
        """Return the number of lanes: the workers of the smallest host."""
        return min(self.host_sizes)


class Membership(Protocol):
    """The worker's side of a backend."""

    @property
    def backend(self) -> str:
        """Return the backend's name."""

    @property
    def rank(self) -> int:
        """Return this worker's number."""

    @property
    def size(self) -> int:
        """Return the number of workers."""

    def join(self, plan: Plan) -> Seat | dict[str, Any]:
        """Meet the others for the next call of `fit`; return the result if that call is already finished."""

    def finish(self, seat: Seat, result: dict[str, Any] | None) -> dict[str, Any]:
        """End the call: rank 0 brings the result, everybody returns it."""


class CallFinished(Exception):
    """A worker came to the gate of a call that is already over; carries the recorded result."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__("the call is already finished")
        self.result = result


def host_ranks(host_sizes: tuple[int, ...], host: int) -> range:
    """Return the ranks of a host's workers: hosts follow each other, so a host's micro-batches do too."""
    first = sum(host_sizes[:host])
    return range(first, first + host_sizes[host])


def host_layout(plan: Plan, host_sizes: tuple[int, ...], host: int) -> ArenaLayout:
    """Return the layout of the arena of one host."""
    size = sum(host_sizes)
    ranges = [split_range(plan.micro_batches, size, rank) for rank in host_ranks(host_sizes, host)]
    return ArenaLayout(
        size=plan.size,
        vectors=plan.vectors,
        blocks=tuple(len(aligned_blocks(start, stop)) for start, stop in ranges),
        sums=plan.sums,
        evaluation_rows=plan.evaluation_rows,
        tail=plan.tail,
        scalars=plan.scalars,
    )


def compare_plans(first: Plan, other: Plan) -> str:
    """Return what differs between two plans, or an empty text."""
    return compare_values(msgspec.to_builtins(first), msgspec.to_builtins(other))


def describe_difference(rank: int, differing: str) -> str:
    """Return the message about worker `rank`, whose plan is not that of the first worker."""
    return (
        f"worker {rank} brought another plan than the first worker: {differing}; "
        "every worker must run the same script with the same options, data, NumPy, BLAS kernel "
        "(OPENBLAS_CORETYPE) and CPU features (NPY_DISABLE_CPU_FEATURES)"
    )


def compare_values(first: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return 'a.b 1 and 2; ...' for the keys in which two trees of JSON values differ."""
    return "; ".join(f"{key} {one!r} and {two!r}" for key, one, two in differences(first, other))


def differences(
    first: Mapping[str, Any], other: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Yield path and both values of every key in which two trees of JSON values differ; None for no value."""
    for key in sorted({*first, *other}):
        one, two = first.get(key), other.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            yield from differences(one, two, f"{prefix}{key}.")
        elif one != two:
            yield f"{prefix}{key}", one, two
