"""What is said when training diverges: which workers and samples gave a loss that is not finite.

Every worker of every host decides alike in the same step, so all of them meet here.  A host knows the bad
micro-batches of its own workers only, and which worker's message is read depends on the backend; so hosts
tell each other their first one before anybody speaks.
"""

from __future__ import annotations

import numpy as np

from distbp.backends.base import Seat
from distbp.errors import Diverged
from distbp.job import MAX_SKIPPED_IN_ROW, Job
from distbp.partition import split_range
from distbp.transports.base import Transport

__all__ = ["diverged"]

_SHOWN_SAMPLES = 8
_NONE = -1


def diverged(seat: Seat, job: Job, step: int, transport: Transport | None) -> Diverged:
    """Return the error that ends the run in `step`; all workers of all hosts call this."""
    bad = {micro_batch for _, micro_batch in seat.arena.bad_micro_batches()}
    if transport is not None and seat.local_rank == 0:
        mine = np.array([min(bad, default=_NONE)], np.int64)
        firsts = np.empty((transport.size, 1), np.int64)
        transport.allgather(mine, list(firsts))
        # This worker's own note may give way: the first one of all is what every host is to say.
        seat.arena.mark_bad(min((int(first) for (first,) in firsts if first != _NONE), default=_NONE))
    seat.arena.barrier.wait()
    bad = {micro_batch for _, micro_batch in seat.arena.bad_micro_batches()}
    where = "; ".join(_describe(seat, job, step, micro_batch) for micro_batch in sorted(bad))
    error = Diverged(
        f"the loss or the gradient was not finite {MAX_SKIPPED_IN_ROW} times in a row, "
        f"last in step {step} ({where or 'the gradient, while every loss is finite'}); lower optimizer.lr, "
        "set optimizer.clip_norm, or look at those samples"
    )
    error.agreed = True
    return error


def _describe(seat: Seat, job: Job, step: int, micro_batch: int) -> str:
    """Name a micro-batch, the worker that computed it, and its first samples."""
    ranges = (split_range(job.micro_batches, seat.size, rank) for rank in range(seat.size))
    worker = next(rank for rank, (first, last) in enumerate(ranges) if first <= micro_batch < last)
    samples = job.order.indices(step * job.batch_size + micro_batch * job.micro_batch, job.micro_batch)
    shown = ", ".join(str(sample) for sample in samples[:_SHOWN_SAMPLES].tolist())
    more = ", ..." if len(samples) > _SHOWN_SAMPLES else ""
    return f"worker {worker}, micro-batch {micro_batch}, samples {shown}{more}"
