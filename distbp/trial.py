"""Before the first step of an attempt: do all workers compute the same bits?

Every worker computes the gradient of micro-batch 0 of step 0 with the same parameters, and the hashes are
compared, on each host and then between hosts.  Another NumPy, BLAS kernel or CPU shows here, and not as a
result that nobody can repeat.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.backends.base import Seat
from distbp.errors import EnvironmentMismatch
from distbp.job import Job
from distbp.nn import Context
from distbp.reduce import MicroBatchSum
from distbp.transports.base import Transport
from distbp.verify import StateCheck

__all__ = ["compare_gradients"]

Array = NDArray[Any]

SAME_SOFTWARE = (
    "give every worker the same NumPy, BLAS kernel (OPENBLAS_CORETYPE) "
    "and CPU features (NPY_DISABLE_CPU_FEATURES)"
)


def compare_gradients(
    seat: Seat,
    job: Job,
    step: int,
    parameters: Sequence[Array],
    transport: Transport | None,
    check: StateCheck,
) -> None:
    """Compute the trial gradient, and raise `EnvironmentMismatch` where it differs; every worker calls this.

    `parameters` are the network's views of the state after `step` steps.  That state is checked first: a bit
    that has flipped there makes gradients differ as well.  Overwrites this worker's first slot, and leaves
    the network without a place for its gradients.
    """
    arena = seat.arena
    digest = hashlib.sha256(_trial_gradient(seat, job, parameters).tobytes()).digest()
    arena.digest(seat.local_rank)[:] = np.frombuffer(digest, np.uint8)
    arena.barrier.wait()  # Now nobody reads the state any more, so whatever was read wrongly is still there.
    check.meet(step)
    digests = [bytes(arena.digest(worker)) for worker in range(arena.layout.workers)]
    odd = [worker for worker, other in enumerate(digests) if other != digests[0]]
    if odd:
        first = arena.barrier.first_rank
        raise EnvironmentMismatch(
            f"workers {[first + worker for worker in odd]} and worker {first} of the same host compute "
            f"different bits for the same micro-batch; {SAME_SOFTWARE}"
        )
    if transport is not None and seat.local_rank == 0:
        _compare_hosts(transport, np.frombuffer(digests[0], np.uint8))
    arena.barrier.wait()


def _trial_gradient(seat: Seat, job: Job, parameters: Sequence[Array]) -> Array:
    """Return the flat gradient of micro-batch 0 of step 0."""
    vector = seat.arena.slots[seat.local_rank][0]
    trial = MicroBatchSum(0, 1, [vector])
    indices = job.order.indices(0, job.micro_batch)
    x, y = job.train.batch(indices)
    job.change(x[None], 0, 0)
    job.network.use(parameters)
    job.network.send_gradients_to(lambda p, leaf: trial.collect(p.offset, p.shape, leaf))
    job.network.loss_and_gradient(x[None], y[None], Context(True, job.seed, 0, 0))
    return vector


def _compare_hosts(transport: Transport, digest: NDArray[np.uint8]) -> None:
    """Compare this host's hash with those of the others."""
    digests = np.empty((transport.size, len(digest)), np.uint8)
    transport.allgather(digest.copy(), list(digests))
    odd = [host for host, other in enumerate(digests) if bytes(other) != bytes(digests[0])]
    if odd:
        raise EnvironmentMismatch(
            f"hosts {odd} compute other bits than host 0 for the same micro-batch; {SAME_SOFTWARE}"
        )
