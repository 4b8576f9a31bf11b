"""How `distbp lr-find` trains: as `distbp train` does, with another schedule, in a directory that goes away.

Workers write the loss of each step into that directory; whoever launched them reads it in the end.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from distbp.metrics.lr_range import RangeTest
from distbp.metrics.records import read_records

if TYPE_CHECKING:
    from distbp.config import Config
    from distbp.data import Prepared

__all__ = ["measure"]


def measure(config: Config, prepared: Prepared, test: RangeTest) -> tuple[list[float], list[float]]:
    """Return the rate and the loss of each step that was made, up to the one that exploded."""
    from distbp.cli.train_command import choose_workers
    from distbp.errors import error_for_code

    with tempfile.TemporaryDirectory(prefix="distbp-lr-find-") as folder:
        out = str(Path(folder) / "run")
        config = _for_test(config, prepared, test, out)
        backend, nproc = choose_workers(config)
        with _said_in(Path(folder) / "said") as said:
            code = _train(config, prepared, test, backend, nproc)
        if code not in (0, 75):
            raise error_for_code(code, f"lr-find: {said().strip() or 'the workers ended'}")
        steps = [
            record for record in read_records(Path(out) / "metrics.jsonl") if record["kind"] == "lr_find"
        ]
        return [float(step["lr"]) for step in steps], [float(step["loss"]) for step in steps]


def _for_test(config: Config, prepared: Prepared, test: RangeTest, out: str) -> Config:
    """Return the configuration of a run that ends after the test and leaves nothing."""
    change = msgspec.structs.replace
    epochs = -(-test.steps * config.train.batch_size // len(prepared.train))
    return change(
        config,
        train=change(config.train, max_steps=test.steps, epochs=epochs),
        checkpoint=change(config.checkpoint, every_steps=None, every_seconds=86_400.0),
        run=change(config.run, out=out, resume="never", verify_every=0, log_samples=False, records=()),
    )


def _train(config: Config, prepared: Prepared, test: RangeTest, backend: str, nproc: int) -> int:
    """Make the steps; return the exit code, which is 75 where the loss exploded before the last step."""
    from distbp.cli.job import build_trainer, fit, fit_options, pack_job, run_local, run_name
    from distbp.errors import Stopped

    prepared = replace(prepared, validation=None)
    out = str(config.run.out)
    if backend == "serial":
        try:
            fit(config, prepared, out, test)
        except Stopped:
            return Stopped.exit_code
        return 0
    from distbp.run_directory import RunDirectory

    trainer = build_trainer(config, prepared.preprocessing)
    trainer.schedule = test
    options = fit_options(config, prepared.preprocessing, out)
    plan = trainer.plan(prepared.train, None, workers=nproc, **options)
    run = RunDirectory.open(plan.out, run_name(config))
    try:
        packed = pack_job(config, prepared, out, test)
        return run_local(config, nproc, packed, (run, run.admit(plan)))
    finally:
        run.close()


@contextlib.contextmanager
def _said_in(path: Path) -> Iterator[Callable[[], str]]:
    """Let everything that this process and its workers say go to a file; yields how to read it."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(path, "wb") as file:
            os.dup2(file.fileno(), 2)
        yield lambda: path.read_text(errors="replace")
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
