"""What the environment says about who started this process: claims, to be compared with the truth.

A launcher that does not belong to the MPI library starts N processes that each believe to be alone, and exits
with 0.  So a claim is never believed: `backends/mpi.py` compares it with the communicator's size.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Claim", "claim"]

_LAUNCHERS = (
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("Cray PALS", "PALS_NUM_RANKS", "PALS_RANKID"),
    ("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    ("LSF jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    ("Flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    ("MPICH or Intel MPI (Hydra)", "PMI_SIZE", "PMI_RANK"),
)
"""Launcher -> the variables in which it claims size and rank.  Cray PALS sets PMI_SIZE too and comes first;
so does Slurm's PMI, which `claim` tells apart."""


@dataclass(frozen=True)
class Claim:
    """What a launcher says: its name, how many processes it started, and which one this is."""

    launcher: str
    size: int
    rank: int


def claim(environment: Mapping[str, str] | None = None) -> Claim | None:
    """Return the claim of the launcher that started this process, None if there is none.

    `SLURM_NTASKS` is also set in the shell of a batch script, where one process runs; only a numeric step
    with more than one task counts for Slurm.
    """
    known = os.environ if environment is None else environment
    slurm = _slurm(known)
    for launcher, size, rank in _LAUNCHERS:
        if known.get(size, "").isdigit() and known.get(rank, "").isdigit():
            name = slurm.launcher if slurm is not None and size == "PMI_SIZE" else launcher
            return Claim(name, int(known[size]), int(known[rank]))
    return slurm


def _slurm(known: Mapping[str, str]) -> Claim | None:
    """Return the claim of `srun`."""
    size, rank = known.get("SLURM_STEP_NUM_TASKS", ""), known.get("SLURM_PROCID", "")
    step = known.get("SLURM_STEP_ID", "")
    if size.isdigit() and int(size) > 1 and rank.isdigit() and step.isdigit():
        return Claim("Slurm (srun)", int(size), int(rank))
    return None
