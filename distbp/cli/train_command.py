"""`distbp train`: everything is checked here, before any worker starts; then the backend takes over."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Callable

    from distbp.config import Config, Resolved
    from distbp.data import Prepared

__all__ = ["choose_workers", "command", "data_options", "read_config", "train"]

_FLAGS = {
    "nproc": "run.nproc",
    "backend": "run.backend",
    "epochs": "train.epochs",
    "batch_size": "train.batch_size",
    "micro_batch": "train.micro_batch",
    "seed": "seed",
    "target": "data.target",
    "out": "run.out",
    "resume": "run.resume",
}
"""Flag -> the configuration key that it sets."""


_DATA_OPTIONS = (
    click.argument("data", required=False),
    click.option("-c", "--config", "file", type=click.Path(), help="Configuration file, TOML or JSON."),
    click.option(
        "-o", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Set one configuration key."
    ),
    click.option("--nproc", help="Number of workers.  [default: cores, at most batch-size / micro-batch]"),
    click.option("--backend", metavar="serial|local|mpi|ray", help="Who starts the workers."),
    click.option("--epochs", help="Passes over the training data."),
    click.option("--batch-size", help="Samples of one step, over all workers."),
    click.option("--micro-batch", help="Samples computed at once; divides the batch size."),
    click.option("--seed", help="Selects initial weights, sample order and split."),
    click.option("--target", metavar="COLUMN", help="Column of a table that is to be predicted."),
)
"""What decides which training it is, for all commands that train."""


def data_options(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """Give a command the options that say what is trained on what, as a decorator."""
    for option in reversed(_DATA_OPTIONS):
        function = option(function)
    return function


@click.command(
    help="Train a model on DATA: a file, a directory, or the built-in name 'digits'.\n\n"
    "Everything else is a configuration key, as in -o optimizer.lr=0.01 -o model.hidden=[300,100]; "
    "distbp config show lists them all."
)
@data_options
@click.option("--out", metavar="DIR", help="Run directory.  [default: runs/DATA-MODEL-DATE-TIME]")
@click.option("--resume", metavar="auto|never|CHECKPOINT", help="What to begin from.  [default: auto]")
@click.option("--dry-run", is_flag=True, help="Check everything, print the plan, and start nothing.")
def command(
    data: str | None, file: str | None, overrides: tuple[str, ...], dry_run: bool, **flags: str | None
) -> int:
    """Resolve, check, and train."""

    def read() -> Config:
        return read_config(data, file, overrides, flags).config

    from distbp.backends.launcher import claim

    # `srun ray symmetric-run` leaves a launcher's variables to the driver of a Ray job.
    if claim() is not None and not _asks_for_ray(read):
        from distbp.cli.mpi_train import train_on_ranks

        return train_on_ranks(read, dry_run=dry_run)
    config = read()
    if config.run.backend == "ray":
        from distbp.cli.ray_train import train_on_ray

        return train_on_ray(config, dry_run=dry_run)
    from distbp.cli.job import load_data

    return train(config, load_data(config), dry_run=dry_run)


def _asks_for_ray(read: Callable[[], Config]) -> bool:
    """Return whether the configuration chooses Ray; what is wrong with it is said by whoever uses it."""
    from distbp.errors import DistbpError

    try:
        return read().run.backend == "ray"
    except DistbpError:
        return False


def read_config(
    data: str | None, file: str | None, overrides: tuple[str, ...], flags: dict[str, str | None]
) -> Resolved:
    """Join all sources of configuration; the values of flags are read as those of `-o` are."""
    from distbp.config import resolve
    from distbp.errors import ConfigError

    given: dict[str, object] = {
        _FLAGS[name]: int(value) if value.lstrip("+-").isdigit() and name not in ("target", "out") else value
        for name, value in flags.items()
        if value is not None
    }
    if data is not None:
        given["data.path"] = data
    resolved = resolve(
        file=Path(file) if file else None, environment=os.environ, flags=given, overrides=overrides
    )
    if not resolved.config.data.path:
        raise ConfigError("no data: name a file, a directory or 'digits', as in: distbp train digits")
    return resolved


def train(config: Config, prepared: Prepared, *, dry_run: bool) -> int:
    """Check what is left to check, start the workers, and say how it ended."""
    from distbp.cli.job import (
        build_trainer,
        completed,
        fit,
        fit_options,
        pack_job,
        packed_data,
        run_local,
        run_name,
    )
    from distbp.cli.outcome import describe_plan, report
    from distbp.environment import return_freed_memory
    from distbp.run_directory import RunDirectory

    config = completed(config, prepared)
    backend, nproc = choose_workers(config)
    trainer = build_trainer(config, prepared.preprocessing)
    options = fit_options(config, prepared.preprocessing, config.run.out)
    plan = trainer.plan(prepared.train, prepared.validation, workers=nproc, **options)
    if dry_run:
        describe_plan(config, backend, nproc, plan)
        return 0
    run = RunDirectory.open(plan.out, run_name(config))
    out = str(run.path)
    try:
        admission = run.admit(plan)
        if admission.result is not None:
            print(f"the run in {out} is already finished", file=sys.stderr)
            return report(Path(out))
        if backend == "serial":
            run.close()
            fit(config, prepared, out)
            return report(Path(out), prepared.validation)
        packed = pack_job(config, prepared, out)
        prepared = packed_data(packed)
        return_freed_memory()
        code = run_local(config, nproc, packed, (run, admission))
    finally:
        run.close()
    return report(Path(out), prepared.validation) if code == 0 else code


def choose_workers(config: Config) -> tuple[str, int]:
    """Return backend and number of workers; warn when there are more workers than cores."""
    from distbp.environment import available_cores
    from distbp.errors import ConfigError
    from distbp.partition import default_micro_batch

    backend = config.run.backend
    if backend == "mpi":
        raise ConfigError("run.backend 'mpi' needs a launcher, as in: mpirun -n 4 distbp train ...")
    if backend == "auto":
        backend = "local" if sys.platform == "linux" else "serial"
    micro_batch = config.train.micro_batch or default_micro_batch(config.train.batch_size)
    cores = max(1, available_cores() // config.run.threads)
    nproc = config.run.nproc or min(cores, config.train.batch_size // micro_batch)
    if backend == "serial":
        if config.run.nproc not in (None, 1):
            raise ConfigError(f"--backend serial is one worker, got --nproc {nproc}; use --backend local")
        nproc = 1
    if nproc * config.run.threads > available_cores():
        print(
            f"distbp: W_MORE_WORKERS_THAN_CORES {nproc} workers x {config.run.threads} threads on "
            f"{available_cores()} cores: they will take turns; --nproc {cores} is faster",
            file=sys.stderr,
        )
    return backend, nproc
