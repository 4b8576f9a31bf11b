"""From a configuration to a trainer, its data, and the call of `fit`: shared by `train` and its workers.

The launching process reads and checks the data once and packs them into one sealed memory file; workers map
it.  The configuration and the preprocessing travel in the same file, so a message never outgrows a packet.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from distbp import config as configuration
from distbp.config import Config
from distbp.config_check import conflicts
from distbp.config_schema import OPTIONS_OF
from distbp.data import (
    Options,
    Prepared,
    Preprocessing,
    Sources,
    attach,
    has_columns,
    load,
    pack,
    pack_datasets,
    prepare,
    transforms,
    unpack_datasets,
)
from distbp.errors import ConfigError
from distbp.metrics.banner import banner
from distbp.metrics.lr_range import RangeTest
from distbp.nn import BinaryCrossEntropy, Loss, build_loss, build_model
from distbp.optim import OPTIMIZERS, Averaged, Optimizer, Schedule
from distbp.trainer import History, Trainer

if TYPE_CHECKING:
    from distbp.backends.base import Admission
    from distbp.run_directory import RunDirectory

__all__ = [
    "PackedJob",
    "build_optimizer",
    "build_schedule",
    "build_trainer",
    "completed",
    "fit",
    "fit_job",
    "load_data",
    "pack_job",
    "packed_data",
    "run_name",
    "with_task_defaults",
]

CLIP_NORM_FOR_NUMBERS = 1.0
"""`optimizer.clip_norm` where none was given and the targets are numbers, whose deviation is 1 by then.

The gradient of a squared error grows with the error, unlike that of cross entropy: without a limit most of
the problems in tests/test_regression_defaults.py diverge or end far off at the default learning rate with an
mlp.  Rejected: a lower learning rate for numbers.  At 0.01 features with outliers still diverged.
"""

WARMUP_EPOCHS = 5
"""Epochs of it with `schedule.scaling = "linear"` where nothing else was said (P. Goyal et al., 2017)."""

LOSSES_FOR = {
    "classification": ("cross_entropy", "binary_cross_entropy"),
    "regression": ("mean_squared_error", "huber", "binary_cross_entropy"),
}
"""Task -> the losses that fit it, the natural one first."""

OPTIMIZER_OF = {"audio": "adam", "lenet": "adam", "tabular": "adamw", "transformer": "adamw"}
"""`optimizer.name` where none was given, for the models that another than SGD suits (docs/LOG.md)."""

LR_OF = {
    ("cnn", "sgd"): 0.01,
    ("lenet", "adam"): 0.002,
    ("lenet", "sgd"): 0.03,
    ("tabular", "adamw"): 0.003,
}
"""`optimizer.lr` where none was given, for models and update rules that want another than the rule's own.

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
    data = config.data
    categories = data.categories
    if categories == "auto":
        takes_codes = config.model.name == "tabular" and has_columns(data.path)
        categories = "codes" if takes_codes else "one_hot"
    options = Options(
        categorical=data.categorical,
        categories=categories,
        context=data.context,
        image_size=data.image_size,
        length=data.length,
        level=data.level,
        on_disk=data.on_disk,
        samples=data.samples,
        stride=data.stride,
    )
    sources = load(data.path, target=data.target, options=options)
    if data.validation is not None:
        other = load(data.validation, target=data.target, schema=sources.train.schema)
        sources = Sources(sources.train, other.train)
    return prepare(
        sources,
        validation_fraction=data.validation_fraction,
        split=data.split,
        normalize=data.normalize,
        seed=config.seed,
    )


def completed(config: Config, prepared: Prepared) -> Config:
    """Return the configuration with every value that the data decide where none was given.

    Raises ConfigError if something that was given does not fit what was decided.
    """
    config = with_task_defaults(config, prepared.preprocessing)
    schedule = config.schedule
    epochs = schedule.warmup_epochs
    if epochs is None and schedule.scaling == "linear" and not schedule.warmup_steps:
        epochs = WARMUP_EPOCHS
    if epochs is not None:
        steps = math.ceil(epochs * len(prepared.train) / config.train.batch_size)
        schedule = msgspec.structs.replace(schedule, warmup_epochs=None, warmup_steps=steps)
    return msgspec.structs.replace(config, schedule=schedule)


def with_task_defaults(config: Config, preprocessing: Preprocessing) -> Config:
    """Return the configuration with the values that task and model decide where none was given."""
    model, optimizer = config.model, config.optimizer
    if model.name == "auto":
        model = msgspec.structs.replace(model, name=natural_model(preprocessing))
    if optimizer.name == "auto":
        optimizer = msgspec.structs.replace(optimizer, name=OPTIMIZER_OF.get(model.name, "sgd"))
    if optimizer.lr is None:
        lr = LR_OF.get((model.name, optimizer.name), OPTIMIZERS[optimizer.name].default_lr)
        optimizer = msgspec.structs.replace(optimizer, lr=lr)
    if optimizer.clip_norm is None and preprocessing.task != "classification":
        optimizer = msgspec.structs.replace(optimizer, clip_norm=CLIP_NORM_FOR_NUMBERS)
    decided = msgspec.structs.replace(config, model=model, optimizer=optimizer)
    for (key, *_), message in conflicts(decided):
        raise ConfigError(f"{key}: {message}")
    return decided


def natural_model(preprocessing: Preprocessing) -> str:
    """Return the name of the model that fits the data where none was named."""
    if preprocessing.schema.get("codes"):
        return "transformer"
    return "audio" if preprocessing.schema.get("sound") else "mlp"


def build_trainer(config: Config, preprocessing: Preprocessing) -> Trainer:
    """Return the trainer that the configuration describes, for data like those that were prepared."""
    config = with_task_defaults(config, preprocessing)
    loss = _loss(config, preprocessing)
    # Two classes have one output if yes and no are what is asked for.
    yes_or_no = isinstance(loss, BinaryCrossEntropy) and preprocessing.task == "classification"
    options = msgspec.structs.asdict(config.model)
    codes = preprocessing.schema.get("codes_at", [])
    if codes and config.model.name != "tabular":
        raise ConfigError(
            f"model.name: the data have columns of codes, which needs 'tabular', got {config.model.name!r}; "
            "or set data.categories=one_hot"
        )
    options["codes"] = codes or None
    outputs = 1 if yes_or_no else preprocessing.num_outputs
    return Trainer(
        build_model(options.pop("name"), outputs=outputs, **options),
        loss=loss,
        optimizer=build_optimizer(config),
        schedule=build_schedule(config),
        clip_norm=config.optimizer.clip_norm,
        batch_size=config.train.batch_size,
        micro_batch=config.train.micro_batch,
        seed=config.seed,
        threads=config.run.threads,
        shuffle=config.data.shuffle,
        augment=transforms(
            crop=config.data.augment_crop, flip=config.data.augment_flip, noise=config.data.augment_noise
        ),
    )


def build_optimizer(config: Config) -> Optimizer:
    """Return the optimizer; options that were not given are its own."""
    settings = config.optimizer
    given = {option: getattr(settings, option) for option in OPTIONS_OF[settings.name]}
    options = {option: value for option, value in given.items() if value is not None}
    optimizer = OPTIMIZERS[settings.name](**options)
    return optimizer if settings.average is None else Averaged(optimizer, decay=settings.average)


def build_schedule(config: Config) -> Schedule:
    """Return the schedule, its rate scaled with the batch size where that is asked for."""
    options = msgspec.structs.asdict(config.schedule) | {"lr": config.optimizer.lr}
    scaling, scaling_batch = options.pop("scaling"), options.pop("scaling_batch")
    del options["warmup_epochs"]  # `completed` made steps of them.
    if scaling == "none":
        return Schedule(**options)
    return Schedule.scaled(batch_size=config.train.batch_size, scaling_batch=scaling_batch, **options)


def run_name(config: Config) -> str:
    """Return `<data>-<model>`, the first part of a run's default name; only `<data>` before it is decided."""
    stem = Path(config.data.path).name.split(".")[0] or "data"
    return stem if config.model.name == "auto" else f"{stem}-{config.model.name}"


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
        "records": config.run.records,
        "overlap": config.run.overlap,
        "bucket_bytes": None if config.run.bucket_kib is None else config.run.bucket_kib * 1024,
        "verify_every": config.run.verify_every,
        "max_restarts": config.run.max_restarts,
        "name": run_name(config),
        "metadata": {"config": settings, "preprocessing": preprocessing.to_dict()},
        "config_toml": configuration.to_toml(config),
        "banner": banner,
    }


def fit(config: Config, prepared: Prepared, out: str | None, test: RangeTest | None = None) -> History:
    """Train in this process as one worker; with `test` the rate is that of a range test (`lr_find.py`)."""
    trainer = build_trainer(config, prepared.preprocessing)
    options = fit_options(config, prepared.preprocessing, out)
    if test is not None:
        assert out is not None, "a range test has a directory of its own"
        trainer.schedule, trainer.observer = test, test.observer(Path(out) / "metrics.jsonl")
    return trainer.fit(prepared.train, val=prepared.validation, **options)


def pack_job(config: Config, prepared: Prepared, out: str, test: RangeTest | None = None) -> PackedJob:
    """Put data, configuration and preprocessing into one memory file for the workers of this host."""
    settings = {
        "config": configuration.to_dict(config),
        "preprocessing": prepared.preprocessing.to_dict(),
        "out": out,
        "test": None if test is None else asdict(test),
    }
    arrays, described = pack_datasets({"train": prepared.train, "validation": prepared.validation})
    content = json.dumps(settings | {"datasets": described}).encode()
    descriptor, description = pack({"job": np.frombuffer(content, np.uint8), **arrays})
    return PackedJob({"kind": "job", "data": description}, descriptor)


def run_local(config: Config, nproc: int, packed: PackedJob, admitted: tuple[RunDirectory, Admission]) -> int:
    """Let `nproc` local workers do a packed job; return the exit code."""
    from distbp.backends.local import LocalJob

    return LocalJob(
        [],
        nproc,
        threads=config.run.threads,
        max_restarts=config.run.max_restarts,
        join_timeout_s=config.run.join_timeout_s,
        job=packed.message,
        descriptor=packed.descriptor,
        admitted=admitted,
    ).run()


def fit_job(message: dict[str, Any], descriptor: int) -> History:
    """Do the worker's part of a packed job; takes over the descriptor."""
    settings, prepared = _unpack(message, descriptor)
    os.close(descriptor)
    config = configuration.from_dict(settings["config"])
    test = None if settings["test"] is None else RangeTest(**settings["test"])
    return fit(config, prepared, settings["out"], test)


def packed_data(packed: PackedJob) -> Prepared:
    """Return the data of a packed job where they lie, so that whoever packed them can let his own go."""
    return _unpack(packed.message, packed.descriptor)[1]


def _unpack(message: dict[str, Any], descriptor: int) -> tuple[dict[str, Any], Prepared]:
    """Return the settings and the data of a packed job; the descriptor may be closed."""
    arrays = attach(descriptor, message["data"])
    settings = json.loads(arrays["job"].tobytes())
    datasets = unpack_datasets(arrays, settings["datasets"])
    preprocessing = Preprocessing.from_dict(settings["preprocessing"])
    return settings, Prepared(datasets["train"], datasets.get("validation"), preprocessing)


def _loss(config: Config, preprocessing: Preprocessing) -> Loss:
    """Return the loss, checked against what the data are."""
    fitting = LOSSES_FOR[preprocessing.task]
    name = fitting[0] if config.loss.name == "auto" else config.loss.name
    if name not in fitting:
        kind = "classes" if preprocessing.task == "classification" else "numbers"
        raise ConfigError(
            f"loss.name: the targets are {kind}, which needs {' or '.join(map(repr, fitting))}, got {name!r}"
        )
    if name == "binary_cross_entropy":
        _check_yes_and_no(preprocessing)
    return build_loss(
        name,
        label_smoothing=config.loss.label_smoothing,
        class_weights=config.loss.class_weights,
        delta=config.loss.delta,
    )


def _check_yes_and_no(preprocessing: Preprocessing) -> None:
    """Refuse binary cross entropy for targets that are not yes and no."""
    classes = preprocessing.classes
    if classes is not None and len(classes) != 2:
        raise ConfigError(
            f"loss.name: expected two classes with 'binary_cross_entropy', got {len(classes)}; "
            "'cross_entropy' takes any number"
        )
    if classes is None and preprocessing.mode != "none":
        raise ConfigError(
            "loss.name: 'binary_cross_entropy' wants numbers from 0 to 1 as they are; set data.normalize=none"
        )
