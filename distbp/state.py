"""The state of a run in the arena: made, restored, shared between hosts, named for a checkpoint.

Beginning an attempt follows rules 3 and 4 of `coordinator.py`: the words already name one step on every host
that holds a state; whoever holds none gets it here, and stores its word last.

The done-word is agreed here as well.  Evaluation is an exchange, so hosts that disagree about what is done
would wait for different things; and rank 0 alone writes the records, so host 0's word says what is recorded,
and only while host 0 still holds it (found by the model checker, `tests/test_recovery_model.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import checkpoint
from distbp.arena import EMPTY, RELOAD, WATCHED, Arena
from distbp.backends.base import Admission
from distbp.errors import StateCorrupted
from distbp.job import SCALARS, Job
from distbp.terminal import say
from distbp.transports.base import Transport
from distbp.verify import cover_state

__all__ = ["begin", "named_tensors", "share"]

Array = NDArray[Any]


def begin(arena: Arena, job: Job, admission: Admission) -> None:
    """Fill an empty arena from the chosen checkpoint, or with initial values; the word comes last.

    A state that was given up as corrupted is followed by the newest checkpoint, `StateCorrupted` without one.
    """
    step = 0
    restore = _newest(admission) if arena.source == RELOAD else admission.restore
    snapshot = None if restore is None else checkpoint.load(restore)
    if snapshot is not None:
        step = snapshot.step
    # Padding belongs to no tensor, so no checkpoint has it: it must not keep what was there.
    for vector in arena.vectors(step).values():
        vector.fill(0)
    arena.scalars(step).fill(0)
    if snapshot is None:
        job.network.initialise(arena.vectors(0)["parameters"], job.seed)
        job.network.begin_statistics(arena.scalars(0)[SCALARS:])
    else:
        for name, tensor in named_tensors(arena, job, step).items():
            np.copyto(tensor, snapshot.tensors[name], casting="no")
    arena.watched(step)[:] = _watched_of(snapshot)
    cover_state(arena, job.network.layout, step, job.verify_every)
    arena.done = step
    arena.committed = step


def share(arena: Arena, job: Job, admission: Admission, transport: Transport) -> None:
    """Give hosts without a state the state of one that has it, and agree on the done-word."""
    words = _gather_words(arena, transport)
    if all(committed == EMPTY for committed, _, _ in words):
        if transport.rank == 0:
            begin(arena, job, admission)
        words = _gather_words(arena, transport)
    holding = [host for host, (committed, _, _) in enumerate(words) if committed != EMPTY]
    root = holding[0]
    step = words[root][0]
    if len(holding) < len(words):
        takes_part = arena.committed == EMPTY or transport.rank == root
        arrays: list[Array] = [
            *arena.vectors(step).values(),
            arena.scalars(step),
            arena.checks(step),
            arena.watched(step),
        ]
        for array in arrays:
            transport.broadcast(array if takes_part else array.copy(), root)
    # Hosts that check different things would wait for each other.
    arena.set_checked(step, valid=all(words[host][2] for host in holding))
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


def _watched_of(snapshot: checkpoint.Snapshot | None) -> NDArray[np.float64]:
    """Return the watched numbers beside a checkpoint; zeros where there are none, as in older ones."""
    held = None if snapshot is None else snapshot.metadata.get("watched")
    numbers = isinstance(held, list) and len(held) == WATCHED and all(type(n) in (int, float) for n in held)
    return np.array(held, np.float64) if numbers else np.zeros(WATCHED)


def _newest(admission: Admission) -> Path:
    """Return the newest checkpoint of the run that verifies, or the one that it began from."""

    def pass_over(path: Path, reason: str) -> None:
        say(f"distbp: W_CHECKPOINT_DAMAGED {path.name}: {reason}; falling back to the one before")

    newest = checkpoint.newest_verified(admission.out / "checkpoints", pass_over) or admission.restore
    if newest is None:
        raise StateCorrupted(
            "the state in memory was corrupted, and there is no checkpoint to go back to; run the same "
            "command again to begin anew, and look at the memory of the host that E_CORRUPT_STATE names "
            "(checkpoint.every_steps and every_seconds decide how much is lost)"
        )
    return newest


def _gather_words(arena: Arena, transport: Transport) -> list[tuple[int, int, bool]]:
    """Return `(committed, done, checked)` of every host."""
    checked = arena.committed != EMPTY and arena.checked(arena.committed)
    word = np.array([arena.committed, arena.done, checked], np.int64)
    words = [np.empty_like(word) for _ in range(transport.size)]
    transport.allgather(word, words)
    return [(int(committed), int(done), bool(checked)) for committed, done, checked in words]
