"""From a configuration to a trainer, its data, and the call of `fit`: shared by `train` and its workers.

The launching process reads and checks the data once and packs them into one sealed memory file; workers map
it.  The configuration and the preprocessing travel in the same file, so a message never outgrows a packet.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from distbp import config as configuration
from distbp.config import Config
from distbp.data import (
    ArrayDataset,
    Prepared,
    Preprocessing,
    Sources,
    attach,
    load,
    pack,
    prepare,
    transforms,
)
from distbp.errors import ConfigError
from distbp.metrics.banner import banner
from distbp.nn import Loss, build_loss, build_model
from distbp.optim import OPTIMIZERS, Schedule
from distbp.trainer import History, Trainer

__all__ = [
    "PackedJob",
    "build_trainer",
    "fit",
    "fit_job",
    "load_data",
    "pack_job",
    "run_name",
    "with_task_defaults",
]

CLIP_NORM_FOR_NUMBERS = 1.0
"""`optimizer.clip_norm` where none was given and the targets are numbers, whose deviation is 1 by then.

The gradient of a squared error grows with the error, unlike that of cross entropy: without a limit most of
the problems in tests/test_regression_defaults.py diverge or end far off at the default learning rate with an
mlp.  Rejected: a lower learning rate for numbers.  At 0.01 features with outliers still diverged.
"""

LR = 0.1
LR_OF = {"cnn": 0.01, "lenet": 0.03}
"""`optimizer.lr` where none was given: that of SGD with momentum 0.9, and the models that need a lower one.

Convolutions share their weights over all places of an image, so their gradients add up, and without a norm
behind them nothing takes that back: cnn learns nothing at 0.03, and lenet ends worse at 0.1 (docs/LOG.md).
"""


@dataclass(frozen=True)
class PackedJob:
    """A job in a form that workers can be handed: a message, and the descriptor that goes with it."""

    message: dict[str, Any]
    descriptor: int


def load_data(config: Config) -> Prepared:
    """Read, check, split and normalise the data that the configuration names."""
    sources = load(config.data.path, target=config.data.target, image_size=config.data.image_size)
    if config.data.validation is not None:
        other = load(config.data.validation, target=config.data.target, schema=sources.train.schema)
        sources = Sources(sources.train, other.train)
    return prepare(
        sources,
        validation_fraction=config.data.validation_fraction,
        split=config.data.split,
        normalize=config.data.normalize,
        seed=config.seed,
    )


def with_task_defaults(config: Config, preprocessing: Preprocessing) -> Config:
    """Return the configuration with the values that task and model decide where none was given."""
    optimizer = config.optimizer
    if optimizer.lr is None:
        optimizer = msgspec.structs.replace(optimizer, lr=LR_OF.get(config.model.name, LR))
    if optimizer.clip_norm is None and preprocessing.task != "classification":
        optimizer = msgspec.structs.replace(optimizer, clip_norm=CLIP_NORM_FOR_NUMBERS)
    return msgspec.structs.replace(config, optimizer=optimizer)


def build_trainer(config: Config, preprocessing: Preprocessing) -> Trainer:
    """Return the trainer that the configuration describes, for data like those that were prepared."""
    config = with_task_defaults(config, preprocessing)
    model = build_model(
        config.model.name,
        outputs=preprocessing.num_outputs,
        hidden=config.model.hidden,
        activation=config.model.activation,
    )
    options = msgspec.structs.asdict(config.optimizer)
    lr, clip_norm = options.pop("lr"), options.pop("clip_norm")
    return Trainer(
        model,
        loss=_loss(config, preprocessing),
        optimizer=OPTIMIZERS[options.pop("name")](**options),
        schedule=Schedule(lr=lr, **msgspec.structs.asdict(config.schedule)),
        clip_norm=clip_norm,
        batch_size=config.train.batch_size,
        micro_batch=config.train.micro_batch,
        seed=config.seed,
        threads=config.run.threads,
        augment=transforms(
            crop=config.data.augment_crop, flip=config.data.augment_flip, noise=config.data.augment_noise
        ),
    )


def run_name(config: Config) -> str:
    """Return `<data>-<model>`, the first part of a run's default name."""
    stem = Path(config.data.path).name.split(".")[0] or "data"
    return f"{stem}-{config.model.name}"


def fit_options(config: Config, preprocessing: Preprocessing, out: str | None) -> dict[str, Any]:
    """Return the keywords of `Trainer.fit` that the configuration decides."""
    config = with_task_defaults(config, preprocessing)
    settings = configuration.to_dict(config)
    return {
        "epochs": config.train.epochs,
        "max_steps": config.train.max_steps,
        "out": out,
        "resume": config.run.resume,
        "checkpoint_every_steps": config.checkpoint.every_steps,
        "checkpoint_every_seconds": config.checkpoint.every_seconds,
        "keep": config.checkpoint.keep,
        "log_samples": config.run.log_samples,
        "overlap": config.run.overlap,
        "bucket_bytes": None if config.run.bucket_kib is None else config.run.bucket_kib * 1024,
        "max_restarts": config.run.max_restarts,
        "name": run_name(config),
        "metadata": {"config": settings, "preprocessing": preprocessing.to_dict()},
        "config_toml": configuration.to_toml(config),
        "banner": banner,
    }


def fit(config: Config, prepared: Prepared, out: str | None) -> History:
    """Train in this process as the only worker."""
    trainer = build_trainer(config, prepared.preprocessing)
    options = fit_options(config, prepared.preprocessing, out)
    return trainer.fit(prepared.train, val=prepared.validation, **options)


def pack_job(config: Config, prepared: Prepared, out: str) -> PackedJob:
    """Put data, configuration and preprocessing into one memory file for the workers of this host."""
    settings = {
        "config": configuration.to_dict(config),
        "preprocessing": prepared.preprocessing.to_dict(),
        "out": out,
    }
    arrays: dict[str, Any] = {"job": np.frombuffer(json.dumps(settings).encode(), np.uint8)}
    for name, part in (("train", prepared.train), ("validation", prepared.validation)):
        if part is not None:
            arrays |= {f"{name}_x": part.x, f"{name}_y": part.y}
    descriptor, description = pack(arrays)
    return PackedJob({"kind": "job", "data": description}, descriptor)


def fit_job(message: dict[str, Any], descriptor: int) -> History:
    """Do the worker's part of a packed job; takes over the descriptor."""
    arrays = attach(descriptor, message["data"])
    os.close(descriptor)
    settings = json.loads(arrays["job"].tobytes())
    config = configuration.from_dict(settings["config"])
    parts = [
        ArrayDataset(arrays[f"{name}_x"], arrays[f"{name}_y"]) if f"{name}_x" in arrays else None
        for name in ("train", "validation")
    ]
    assert parts[0] is not None, "a job without training data"
    prepared = Prepared(parts[0], parts[1], Preprocessing.from_dict(settings["preprocessing"]))
    return fit(config, prepared, settings["out"])


def _loss(config: Config, preprocessing: Preprocessing) -> Loss:
    """Return the loss, checked against what the data are."""
    natural = "cross_entropy" if preprocessing.task == "classification" else "mean_squared_error"
    name = natural if config.loss.name == "auto" else config.loss.name
    if name != natural:
        kind = "classes" if natural == "cross_entropy" else "numbers"
        raise ConfigError(f"loss.name: the targets are {kind}, which needs {natural!r}, got {name!r}")
    return build_loss(
        name, label_smoothing=config.loss.label_smoothing, class_weights=config.loss.class_weights
    )
