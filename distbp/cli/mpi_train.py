"""`distbp train` under mpirun: every rank runs this; errors are agreed on before anybody starts to train."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distbp.backends.base import compare_values
from distbp.backends.mpi import MPIMembership
from distbp.cli.job import (
    PackedJob,
    build_trainer,
    completed,
    fit_job,
    fit_options,
    load_data,
    pack_job,
    run_name,
)
from distbp.cli.outcome import describe_plan, report
from distbp.config import Config, to_dict
from distbp.errors import ConfigError, DistbpError, EnvironmentMismatch
from distbp.run_directory import default_name
from distbp.trainer import membership

__all__ = ["train_on_ranks"]


def train_on_ranks(read_config: Callable[[], Config], *, dry_run: bool) -> int:
    """Train on all ranks; the first worker of each host reads the data and shares them with its mates."""
    members = membership()
    assert isinstance(members, MPIMembership), "a launcher started this process"
    config = _agree_on_config(members, read_config)
    out = members.broadcast(str(Path(config.run.out or default_name(run_name(config))).absolute()))
    packed, error, plan, validation = None, None, None, None
    try:
        if members.local_rank == 0:
            prepared = load_data(config)
            validation = prepared.validation
            config = completed(config, prepared)
            trainer = build_trainer(config, prepared.preprocessing)
            options = fit_options(config, prepared.preprocessing, out)
            plan = trainer.plan(prepared.train, prepared.validation, workers=members.size, **options)
            packed = pack_job(config, prepared, out)
    except DistbpError as found:
        error = found
    members.agree(error)
    if dry_run:
        if members.rank == 0:
            describe_plan(config, "mpi", members.size, plan)
        return 0
    fit_job(*_share_job(members, packed))
    return report(Path(out), validation) if members.rank == 0 else 0


def _agree_on_config(members: MPIMembership, read_config: Callable[[], Config]) -> Config:
    """Return the configuration, which must be right, and the same on every rank."""
    config, error = None, None
    try:
        config = read_config()
        if config.run.nproc not in (None, members.size):
            raise ConfigError(
                f"--nproc {config.run.nproc} disagrees with the launcher, which started {members.size} "
                "ranks; leave --nproc away under mpirun"
            )
        if config.run.backend not in ("auto", "mpi"):
            raise ConfigError(
                f"run.backend {config.run.backend!r} cannot be used under a launcher: every rank would train "
                "alone; leave --backend away"
            )
    except DistbpError as found:
        error = found
    members.agree(error)
    assert config is not None, "an error was agreed on"
    first = members.broadcast(to_dict(config))
    differing = compare_values(first, to_dict(config))
    if differing:
        error = EnvironmentMismatch(
            f"rank {members.rank} has another configuration than rank 0: {differing}; every rank must run "
            "the same command with the same DISTBP_* variables"
        )
    members.agree(error)
    return config


def _share_job(members: MPIMembership, packed: PackedJob | None) -> tuple[dict[str, Any], int]:
    """Hand the packed job of the host's first worker to its mates."""
    descriptor = members.share_descriptor(None if packed is None else packed.descriptor)
    if packed is not None:
        os.close(packed.descriptor)
    text = members.share_bytes(b"" if packed is None else json.dumps(packed.message).encode())
    message: dict[str, Any] = json.loads(text)
    return message, descriptor
