"""What the user calls: a `Trainer` joins model, loss, optimizer, data and the workers.

Every worker executes the user's script, as under MPI or torchrun; `fit` is the meeting point and returns the
same history everywhere.  The same file runs on one worker (`python train.py`) or on more
(`distbp run --nproc 4 train.py`): who the workers are is found in the environment.

The trainer computes nothing: it builds the parts and the plan, and hands them to `worker.Worker`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import checkpoint, evaluation
from distbp.arena import Parked
from distbp.backends.base import CallFinished, Membership, Plan, Seat
from distbp.backends.launcher import claim
from distbp.data import ArrayDataset, Order, Rows, Transform, fingerprint
from distbp.environment import describe_environment, limit_threads
from distbp.errors import ConfigError, DataError, DistbpError, InputMissing, Stopped
from distbp.job import SCALARS, TAIL, Job
from distbp.metrics.records import Records
from distbp.nn import Layer, Loss, Network, build_loss
from distbp.optim import SGD, Optimizer, Schedule, norm
from distbp.partition import default_micro_batch
from distbp.planning import (
    Data,
    as_dataset,
    blocks_of,
    check_data,
    check_kind_of_samples,
    check_options,
    copy_tensors,
    describe_blocks,
    describe_layer,
    describe_options,
    sample_type,
    too_many_workers,
)
from distbp.worker import Worker

__all__ = ["History", "Trainer", "find_checkpoint", "membership", "steps_of"]

Array = NDArray[Any]


@dataclass(frozen=True)
class History:
    """How a call of `fit` went: one entry for each epoch, and the content of `result.json`."""

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    result: dict[str, Any]
    out: Path


@functools.cache
def membership() -> Membership:
    """Return this process's place among the workers; made once, when it is first asked for."""
    if os.environ.get("DISTBP_HOST") == "ray":
        from distbp.backends.ray_worker import RayMembership

        assert RayMembership.current is not None, "the actor made the membership before it ran the program"
        return RayMembership.current
    if "DISTBP_RANK" in os.environ:
        from distbp.backends.local_worker import join_local_job

        return join_local_job()
    if claim() is not None:
        from distbp.backends.mpi import MPIMembership

        return MPIMembership()
    from distbp.backends.serial import SerialMembership

    return SerialMembership()


def steps_of(epochs: int, samples: int, batch_size: int, max_steps: int | None = None) -> int:
    """Return the number of steps: `ceil(epochs * samples / batch_size)`, at most `max_steps`."""
    steps = -(-epochs * samples // batch_size)
    return steps if max_steps is None else min(steps, max_steps)


class Trainer:
    """Trains `model` by synchronous data-parallel SGD.

    `loss` is "cross_entropy", "mean_squared_error" or a `Loss`; `batch_size` is global, whatever the number
    of workers; `micro_batch` (default: batch_size / k, k at most 8) is the unit of work and of sameness, and
    bounds the workers.  `lr` is the rate of the default cosine schedule (None: that of the optimizer);
    `schedule` replaces both.  `threads` are BLAS threads of each worker, part of what decides about bits.
    `shuffle` is "full", "block", or "auto": block for samples that are read from a disk (`data.Blocks`).
    `augment` changes samples before they are trained on, as in `[distbp.data.Crop(4), distbp.data.Flip()]`.
    """

    def __init__(
        self,
        model: Layer,
        *,
        loss: str | Loss = "cross_entropy",
        optimizer: Optimizer | None = None,
        lr: float | None = None,
        schedule: Callable[[int, int], float] | None = None,
        clip_norm: float | None = None,
        batch_size: int = 64,
        micro_batch: int | None = None,
        seed: int = 0,
        threads: int = 1,
        shuffle: str = "auto",
        augment: Sequence[Transform] = (),
    ) -> None:
        self.model = model
        self.loss = build_loss(loss) if isinstance(loss, str) else loss
        self.optimizer = SGD() if optimizer is None else optimizer
        peak = self.optimizer.default_lr if lr is None else lr
        self.schedule: Callable[[int, int], float] = Schedule(lr=peak) if schedule is None else schedule
        self.clip_norm = clip_norm
        self.batch_size = batch_size
        usable = isinstance(batch_size, int) and batch_size > 0
        default = default_micro_batch(batch_size) if usable else batch_size
        self.micro_batch = default if micro_batch is None else micro_batch
        for option, value in (("batch_size", batch_size), ("micro_batch", self.micro_batch)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{option}: expected a whole number >= 1, got {value!r}")
        if batch_size % self.micro_batch:
            raise ConfigError(
                f"batch_size {batch_size} is not a multiple of micro_batch {self.micro_batch}; "
                f"take {batch_size // self.micro_batch * self.micro_batch or self.micro_batch}"
            )
        self.seed = seed
        self.threads = threads
        self.shuffle = shuffle
        self.augment = tuple(augment)
        self.observer: Callable[[int, float], bool] | None = None
        self.network: Network | None = None
        self.parameters: NDArray[np.float32] | None = None
        self.statistics: NDArray[np.float64] | None = None

    def fit(
        self,
        train: Data,
        *,
        val: Data | None = None,
        epochs: int = 20,
        max_steps: int | None = None,
        out: str | Path | None = None,
        resume: str = "auto",
        checkpoint_every_steps: int | None = None,
        checkpoint_every_seconds: float | str | None = "auto",
        keep: int = 3,
        log_samples: bool = False,
        records: Sequence[str] = ("tensorboard",),
        max_restarts: int = 10,
        overlap: bool = True,
        bucket_bytes: int | None = None,
        verify_every: int = 100,
        name: str = "fit",
        metadata: dict[str, Any] | None = None,
        config_toml: str = "",
        banner: Callable[[Job, Seat], str] | None = None,
        members: Membership | None = None,
    ) -> History:
        """Train on `train`, an `ArrayDataset` or `(x, y)`, and return the history; all workers call this.

        A run that `out` already holds goes on from its newest checkpoint (`resume="auto"`); `metadata` is
        stored in every checkpoint; `checkpoint_every_seconds` is a time, None, or "auto": at most a minute is
        lost and 3.5 % of the time spent (`saver.py`).  With several hosts gradients are exchanged while
        backprop goes on (`overlap`), in buckets of at least `bucket_bytes` (None: measured); neither changes
        a bit.  The state in memory is checked every `verify_every` steps (0: never; `verify.py`).  `records`
        says where measurements go besides `metrics.jsonl` (`metrics/sinks.py`).  Raises `Stopped` when the
        run was asked to stop (its state is saved).
        """
        members = membership() if members is None else members
        train_data = as_dataset(train, self.model)
        validation = None if val is None else as_dataset(val, self.model)
        limits = limit_threads(self.threads)
        try:
            plan = self.plan(
                train_data,
                validation,
                workers=members.size,
                epochs=epochs,
                max_steps=max_steps,
                out=out,
                resume=resume,
                max_restarts=max_restarts,
                log_samples=log_samples,
                name=name,
                config_toml=config_toml,
                keep=keep,
                verify_every=verify_every,
                checkpoint_every_steps=checkpoint_every_steps,
            )
            check_options(metadata, checkpoint_every_steps, checkpoint_every_seconds, records)
            seat = members.join(plan)
            if isinstance(seat, dict):
                return self._replay(seat)
            job = Job(
                network=self._build(train_data),
                optimizer=self.optimizer,
                schedule=lambda step: self.schedule(step, plan.total_steps),
                clip_norm=self.clip_norm,
                train=train_data,
                validation=validation,
                order=Order(len(train_data), self.seed, blocks_of(train_data, self.shuffle)),
                seed=self.seed,
                batch_size=self.batch_size,
                micro_batch=self.micro_batch,
                total_steps=plan.total_steps,
                checkpoint_every_steps=checkpoint_every_steps,
                checkpoint_every_seconds=checkpoint_every_seconds,
                keep=keep,
                log_samples=log_samples,
                overlap=overlap,
                bucket_bytes=bucket_bytes,
                augment=self.augment,
                verify_every=verify_every,
                records=tuple(records),
                metadata=dict(metadata or {}) | {"identity": plan.identity, "environment": plan.environment},
                banner=(lambda job, seat: "") if banner is None else banner,
            )
            return self._train(members, seat, job)
        except DistbpError as error:
            note = getattr(members, "note_failure", None)
            if note is not None and not isinstance(error, Stopped):
                note(error)
            raise
        finally:
            limits.restore_original_limits()
            close = getattr(members, "close", None)
            if close is not None:
                close()

    def plan(
        self,
        train: ArrayDataset,
        validation: ArrayDataset | None,
        *,
        workers: int,
        epochs: int,
        max_steps: int | None = None,
        out: str | Path | None = None,
        resume: str = "auto",
        max_restarts: int = 10,
        log_samples: bool = False,
        name: str = "fit",
        config_toml: str = "",
        keep: int = 3,
        verify_every: int = 100,
        checkpoint_every_steps: int | None = None,
        **ignored: Any,
    ) -> Plan:
        """Return the plan of a call of `fit` with these arguments, for all workers to compare.

        Raises `ConfigError` for what does not fit together.
        """
        if not isinstance(epochs, int) or epochs < 1:
            raise ConfigError(f"epochs: expected a whole number >= 1, got {epochs!r}")
        if not isinstance(verify_every, int) or verify_every < 0:
            raise ConfigError(f"verify_every: expected a whole number >= 0 (0: never), got {verify_every!r}")
        if 0 < keep < 2 or keep < 0:
            raise ConfigError(f"keep: expected at least 2, or 0 for all, got {keep!r}")
        network = self._build(train)
        check_data(network, train, validation)
        if self.augment and self.model.takes_codes:
            raise ConfigError(
                "augmentation changes numbers, and the model takes codes; leave data.augment_* out"
            )
        for transform in self.augment:
            transform.check(network.input_shape)
        micro_batches = self.batch_size // self.micro_batch
        if workers > micro_batches:
            raise ConfigError(too_many_workers(workers, self.batch_size, self.micro_batch))
        limits = limit_threads(self.threads)
        environment = describe_environment()
        limits.restore_original_limits()
        return Plan(
            name=name,
            out=None if out is None else str(Path(out).absolute()),
            resume=resume,
            identity=self._identity(network)
            | describe_blocks(blocks_of(train, self.shuffle))
            | {
                "train_data": fingerprint(train),
                "validation_data": None if validation is None else fingerprint(validation),
            },
            free={
                "epochs": epochs,
                "max_steps": max_steps,
                "log_samples": log_samples,
                "verify_every": verify_every,
                "checkpoint_every_steps": checkpoint_every_steps,
            },
            micro_batches=micro_batches,
            total_steps=steps_of(epochs, len(train), self.batch_size, max_steps),
            size=network.layout.size,
            vectors=("parameters", *self.optimizer.vectors),
            sums=len(norm.blocks(network.layout.borders())) * (1 + self.optimizer.num_sums),
            evaluation_rows=0 if validation is None else evaluation.num_batches(validation),
            tail=TAIL + network.statistics_layout.size,
            scalars=SCALARS + network.statistics_layout.size,
            max_restarts=max_restarts,
            config_toml=config_toml,
            environment=environment,
        )

    def _identity(self, network: Network) -> dict[str, Any]:
        """Return all options that decide about bits, as JSON values."""
        # Only where there is any, so that runs from before there was augmentation can be resumed.
        augment = {"augment": [describe_options(part) for part in self.augment]} if self.augment else {}
        return augment | {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "micro_batch": self.micro_batch,
            "input_shape": list(network.input_shape),
            "model": describe_layer(self.model),
            "layout": network.layout.digest(),
            "loss": describe_options(self.loss),
            "optimizer": describe_options(self.optimizer),
            "schedule": describe_options(self.schedule),
            "clip_norm": self.clip_norm,
            "threads": self.threads,
        }

    def evaluate(self, data: Data) -> dict[str, float | None]:
        """Return `{"loss", "accuracy"}` of the trained model over `data`; every worker computes it alone."""
        dataset = as_dataset(data, self.model)
        return evaluation.evaluate(self._ready_for(dataset), dataset)

    def predict(self, x: Array | Rows) -> Array:
        """Return the outputs of the trained model, shape (N, *output_shape): logits for classes."""
        samples: Array | Rows = x if isinstance(x, Rows) else np.ascontiguousarray(x, sample_type(self.model))
        dataset = ArrayDataset(samples, np.zeros(len(samples), np.int64))
        return np.concatenate(list(evaluation.predict(self._ready_for(dataset), dataset)))

    def load(self, path: str | Path) -> Trainer:
        """Take the parameters of a checkpoint, or of the newest one of a run; returns itself.

        The input shape is the checkpoint's, so a model that a script defines can be evaluated without data.
        """
        snapshot = checkpoint.load(find_checkpoint(path))
        shape = tuple(snapshot.metadata["identity"]["input_shape"])
        network = Network(self.model, shape, self.loss)
        self.take(network, snapshot)
        return self

    def take(self, network: Network, snapshot: checkpoint.Snapshot) -> None:
        """Copy parameters and statistics of `snapshot` for `network`; `ConfigError` if they do not fit.

        Where the optimizer keeps an average of the parameters, it is the average that is taken.
        """
        parameters = np.zeros(network.layout.size, np.float32)
        statistics = np.zeros(network.statistics_layout.size)
        copy_tensors(snapshot, self.optimizer.evaluated, network.layout, parameters)
        copy_tensors(snapshot, "statistics", network.statistics_layout, statistics)
        self.network, self.parameters, self.statistics = network, parameters, statistics

    def _train(self, members: Membership, seat: Seat, job: Job) -> History:
        """Run the worker to the end of the call, through losses that happen while it ends."""
        job.observer = self.observer
        worker = Worker(seat, job)
        try:
            while True:
                try:
                    worker.run()
                    mine = worker.result() if seat.rank == 0 else None
                    result = members.finish(seat, mine)
                    break
                except Parked:
                    continue
                except CallFinished as finished:
                    result = finished.result
                    break
            self.network = job.network
            self.parameters = seat.arena.vectors(result["steps"])[self.optimizer.evaluated]
            self.statistics = seat.arena.scalars(result["steps"])[SCALARS:]
        finally:
            worker.close()
        return _history(result)

    def _replay(self, result: dict[str, Any]) -> History:
        """Return what a finished call returned, with the parameters from its last checkpoint."""
        self.load(result["out"])
        return _history(result)

    def ready(self) -> Network:
        """Return the network with the trained parameters in place."""
        if self.network is None or self.parameters is None or self.statistics is None:
            raise ConfigError("nothing is trained yet; call fit, or load a checkpoint with Trainer.load")
        self.network.use(self.network.views(self.parameters))
        self.network.use_statistics(self.statistics)
        return self.network

    def _ready_for(self, dataset: ArrayDataset) -> Network:
        """Return the network with the trained parameters in place; DataError if it takes other samples."""
        network = self.ready()
        if dataset.x.shape[1:] != network.input_shape:
            raise DataError(
                f"the model takes samples of shape {network.input_shape}, got {dataset.x.shape[1:]}"
            )
        return network

    def _build(self, data: ArrayDataset) -> Network:
        """Build the network for samples like those of `data`."""
        check_kind_of_samples(self.model, data)
        return Network(self.model, data.x.shape[1:], self.loss)


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that `path` means: itself, or the newest verified one of a run directory."""
    given = Path(path)
    if not given.exists():
        raise InputMissing(f"{given}: no such run or checkpoint")
    if (given / "manifest.json").exists():
        return given
    folder = given / "checkpoints" if (given / "checkpoints").is_dir() else given
    newest = checkpoint.newest_verified(folder, lambda damaged, reason: None)
    if newest is None:
        raise InputMissing(f"{given} holds no checkpoint that verifies")
    return newest


def _history(result: dict[str, Any]) -> History:
    """Read the records of the epochs; raise `Stopped` if the run ended because it was asked to."""
    out = Path(result["out"])
    if result["exit_code"] in (75, 130):
        stopped = Stopped(
            f"stopped on request after step {result['steps']}; the checkpoint is safe in {out}; "
            "run the same command again to go on"
        )
        stopped.exit_code = result["exit_code"]
        stopped.agreed = True
        raise stopped
    records = Records(out).history()
    return History(
        train=[record for record in records if record["kind"] == "train"],
        validation=[record for record in records if record["kind"] == "validation"],
        result=result,
        out=out,
    )
