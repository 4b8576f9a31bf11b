"""The state of a run in the arena: made, restored, shared between hosts, named for a checkpoint.

Beginning an attempt follows rules 3 and 4 of `coordinator.py`: the words already name one step on every host
that holds a state; whoever holds none gets it here, and stores its word last.

The done-word is agreed here as well.  Evaluation is an exchange, so hosts that disagree about what is done
would wait for different things; and rank 0 alone writes the records, so host 0's word says what is recorded,
and only while host 0 still holds it (found by the model checker, `tests/test_recovery_model.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import checkpoint
from distbp.arena import EMPTY, Arena
from distbp.backends.base import Admission
from distbp.job import SCALARS, Job
from distbp.transports.base import Transport

__all__ = ["begin", "named_tensors", "share"]

Array = NDArray[Any]


def begin(arena: Arena, job: Job, admission: Admission) -> None:
    """Fill an empty arena from the chosen checkpoint, or with initial values; the word comes last."""
    step = 0
    if admission.restore is None:
        for name, vector in arena.vectors(0).items():
            vector.fill(0)
            if name == "parameters":
                job.network.initialise(vector, job.seed)
        arena.scalars(0).fill(0)
        job.network.begin_statistics(arena.scalars(0)[SCALARS:])
    else:
        snapshot = checkpoint.load(admission.restore)
        step = snapshot.step
        for name, tensor in named_tensors(arena, job, step).items():
            np.copyto(tensor, snapshot.tensors[name], casting="no")
    arena.done = step
    arena.committed = step


def share(arena: Arena, job: Job, admission: Admission, transport: Transport) -> None:
    """Give hosts without a state the state of one that has it, and agree on the done-word."""
    words = _gather_words(arena, transport)
    if all(committed == EMPTY for committed, _ in words):
        if transport.rank == 0:
            begin(arena, job, admission)
        words = _gather_words(arena, transport)
    holding = [host for host, (committed, _) in enumerate(words) if committed != EMPTY]
    root = holding[0]
    step = words[root][0]
    if len(holding) < len(words):
        takes_part = arena.committed == EMPTY or transport.rank == root
        arrays: list[Array] = [*arena.vectors(step).values(), arena.scalars(step)]
        for array in arrays:
            transport.broadcast(array if takes_part else array.copy(), root)
    recorded = words[0][1] if words[0][0] != EMPTY else EMPTY
    arena.done = min(recorded, step)
    arena.committed = step


def named_tensors(arena: Arena, job: Job, step: int) -> dict[str, Array]:
    """Return every tensor of the state after `step` steps by the name it has in a checkpoint."""
    layout = job.network.layout
    tensors: dict[str, Array] = {
        f"{vector}/{name}": view
        for vector, flat in arena.vectors(step).items()
        for name, view in zip(layout.names, layout.views(flat), strict=True)
    }
    scalars = arena.scalars(step)
    watched = job.network.statistics_layout
    tensors |= {
        f"statistics/{name}": view
        for name, view in zip(watched.names, watched.views(scalars[SCALARS:]), strict=True)
    }
    return tensors | {"scalars": scalars[:SCALARS]}


def _gather_words(arena: Arena, transport: Transport) -> list[tuple[int, int]]:
    """Return `(committed, done)` of every host."""
    word = np.array([arena.committed, arena.done], np.int64)
    words = [np.empty_like(word) for _ in range(transport.size)]
    transport.allgather(word, words)
    return [(int(committed), int(done)) for committed, done in words]
