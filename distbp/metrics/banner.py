"""The three lines that a run begins with: who works, on what, with which libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distbp.environment import available_cores
from distbp.partition import split_range
from distbp.reduce import aligned_blocks

if TYPE_CHECKING:
    from distbp.backends.base import Seat
    from distbp.job import Job

__all__ = ["banner"]


def banner(job: Job, seat: Seat) -> str:
    """Return the banner of a run as rank 0 prints it."""
    identity, environment = job.metadata["identity"], job.metadata["environment"]
    blas, hosts, threads = environment["blas"], len(seat.host_sizes), identity["threads"]
    most = max(
        len(aligned_blocks(*split_range(job.micro_batches, seat.size, rank))) for rank in range(seat.size)
    )
    idle = available_cores() - seat.size * threads if hosts == 1 else 0
    cores = f", {idle} idle core{'s' if idle > 1 else ''}" if idle > 0 else ""
    validation = f" + {len(job.validation):,} to validate" if job.validation is not None else ""
    where = "the same bits for 1 to" if job.micro_batches > 1 else "bounded to"
    return (
        f"{_count(seat.size, 'worker')} x {_count(threads, 'thread')} on {_count(hosts, 'host')}{cores}, "
        f"{blas['name']} {blas['version']} ({blas['kernel']}), NumPy {environment['numpy']}\n"
        f"{len(job.train):,} samples{validation}; {job.network.num_parameters:,} parameters, "
        f"{6 * job.network.multiply_adds / 1e6:.3g} MFLOP a sample; {job.total_steps:,} steps of "
        f"{job.batch_size} samples\n"
        f"{_count(job.micro_batches, 'micro-batch', 'micro-batches')} of {job.micro_batch} "
        f"({where} {_count(job.micro_batches, 'worker')}), {_count(most, 'block')} of gradients a worker\n"
        f"run directory {seat.admission.out}{_resumed(seat)}"
    )


def _resumed(seat: Seat) -> str:
    """Return what the run begins from, if it is a checkpoint."""
    restore = seat.admission.restore
    return "" if restore is None else f", resumed from {restore.name}"


def _count(number: int, singular: str, plural: str | None = None) -> str:
    """Return '1 worker' or '4 workers'."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
