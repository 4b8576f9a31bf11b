"""From RUN or CHECKPOINT to a model that can be used, and from DATA to samples as that model wants them.

Shared by `evaluate`, `predict` and `inspect`.  A checkpoint of `distbp train` carries its configuration and
its preprocessing, so nothing else is needed to rebuild the model and to read another file as the training
data were read.

`Trainer.find_checkpoint` is not used, because it passes over damaged checkpoints of a run silently: here each
is named on stderr, and a checkpoint that the user named never falls back to another.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import checkpoint
from distbp import config as configuration
from distbp.cli.job import build_trainer
from distbp.config import Config
from distbp.data import ArrayDataset, Preprocessing, Rows, load, treated
from distbp.errors import CheckpointError, ConfigError, InputMissing
from distbp.nn import Network
from distbp.trainer import Trainer

__all__ = [
    "Samples",
    "TrainedModel",
    "checkpoints_of",
    "load_model",
    "predict",
    "read_samples",
    "root_mean_square",
]


@dataclass(frozen=True)
class TrainedModel:
    """A trainer that holds the parameters of the checkpoint at `path`, and what belongs to it."""

    path: Path
    step: int
    config: Config
    preprocessing: Preprocessing
    trainer: Trainer


@dataclass(frozen=True)
class Samples:
    """One part of a data set as the model sees it: "all" if there is one, else "train" or "validation".

    `targets` are those of the file, in the user's unit: class codes (N,) or float32 (N, O).  `note` says what
    else the data hold, or is empty.  Where `labelled` is false the targets are zeros that mean nothing.
    """

    dataset: ArrayDataset
    targets: NDArray[Any] | Rows
    part: str
    labelled: bool
    note: str


def load_model(path: str) -> TrainedModel:
    """Return the model in the checkpoint at `path`, or in the newest one that verifies of a run.

    Raises InputMissing if nothing is there, CheckpointError if it is damaged, ConfigError if the checkpoint
    does not describe its model, because a script defined it.
    """
    folder = _verified(path)
    snapshot = checkpoint.load(folder)
    missing = [key for key in ("config", "preprocessing") if key not in snapshot.metadata]
    if missing:
        raise ConfigError(
            f"{folder}: expected a checkpoint of `distbp train`, got one without {' and '.join(missing)}: a "
            "script defined its model; use it from Python: Trainer(model, ...).load(path), then evaluate or "
            "predict"
        )
    config = configuration.from_dict(snapshot.metadata["config"], origin=f"checkpoint {folder}")
    preprocessing = Preprocessing.from_dict(snapshot.metadata["preprocessing"])
    trainer = build_trainer(config, preprocessing)
    trainer.take(Network(trainer.model, preprocessing.sample_shape, trainer.loss), snapshot)
    return TrainedModel(folder, snapshot.step, config, preprocessing, trainer)


def checkpoints_of(path: str) -> list[Path]:
    """Return the checkpoints that `path` means, newest first, none of them verified: all of a run, or itself.

    Raises InputMissing if there is no such thing, or if it holds no checkpoint.
    """
    given = Path(path)
    if not given.is_dir():
        found = "found a file" if given.exists() else "found nothing"
        raise InputMissing(
            f"{path!r}: expected the directory of a run or of a checkpoint, {found}; check the path"
        )
    held = checkpoint.list_checkpoints(given / "checkpoints") or checkpoint.list_checkpoints(given)
    if held:
        return held
    # A damaged checkpoint may lack any one of its files, and is then still what the user means.
    if any((given / name).exists() for name in ("manifest.json", "metadata.json", "state.safetensors")):
        return [given]
    raise InputMissing(
        f"{path!r}: expected a run or a checkpoint, found a directory that holds no checkpoint; the run may "
        "not have saved yet"
    )


def read_samples(
    model: TrainedModel, data: str, *, part: str | None, target: str | None = None, labelled: bool = True
) -> Samples:
    """Read one part of `data` with the model's schema and normalise it as the training data were.

    `part` is "train", "validation", or None for the one that every data set has; `target` names the column of
    the labels where it is not called as in training.
    """
    schema = model.preprocessing.schema
    if target is not None and "columns" in schema:
        schema = _with_target(schema, target)
    sources = load(data, target=target, schema=schema, labelled=labelled)
    note = ""
    if sources.validation is None and part == "validation":
        raise ConfigError(
            f"--part validation: expected data with a part for validation, got {data!r}, which has one part; "
            "leave --part out"
        )
    if sources.validation is not None and part is None:
        note = (
            f"{data} also holds {len(sources.validation.x):,} samples for validation: --part validation uses "
            "those"
        )
    source = sources.validation if part == "validation" and sources.validation is not None else sources.train
    shown = "all" if sources.validation is None else part or "train"
    dataset = treated(source, model.preprocessing)
    return Samples(dataset, source.y, shown, source.labelled and labelled, note)


def predict(model: TrainedModel, samples: Samples) -> NDArray[Any]:
    """Return logits (N, C) float32 for classes, or numbers (N, O) float64 in the unit of the targets.

    One output for two classes is the logit of the second one, where that of the first is 0.
    """
    outputs = model.trainer.predict(samples.dataset.x)
    if model.preprocessing.task == "classification":
        one_for_two = outputs.shape[-1] == 1
        return np.concatenate([np.zeros_like(outputs), outputs], axis=-1) if one_for_two else outputs
    return model.preprocessing.restore_targets(outputs)


def root_mean_square(model: TrainedModel, samples: Samples, predicted: NDArray[Any]) -> dict[str, Any]:
    """Return `{"rmse": ...}` of what `predict` gave, in the user's unit; nothing for classes.

    It is one number, or a list with one for each output where there are several: these may have different
    units, so they are not averaged.  A number that is not finite is None, because JSON has no NaN.
    """
    if model.preprocessing.task == "classification":
        return {}
    targets = samples.targets[:].astype(np.float64)
    squares = np.square(predicted - targets)
    roots = [root if math.isfinite(root) else None for root in np.sqrt(squares.mean(axis=0)).tolist()]
    return {"rmse": roots[0] if len(roots) == 1 else roots}


def _verified(path: str) -> Path:
    """Return the checkpoint to load; one of a run is verified, and those passed over are named on stderr."""
    candidates = checkpoints_of(path)
    if candidates == [Path(path)]:
        return candidates[0]
    newest = checkpoint.newest_verified(candidates[0].parent, _report_damaged)
    if newest is None:
        raise CheckpointError(
            f"{path!r}: expected a checkpoint that verifies, found {len(candidates)}, all of them damaged; "
            f"see: distbp inspect --verify {path}"
        )
    return newest


def _report_damaged(path: Path, reason: str) -> None:
    """Say that a checkpoint of a run was passed over."""
    print(f"distbp: W_CHECKPOINT_DAMAGED {path.name}: {reason}; using the one before", file=sys.stderr)


def _with_target(schema: dict[str, Any], target: str) -> dict[str, Any]:
    """Return the schema with its labels in another column."""
    if any(column["name"] == target for column in schema["columns"]):
        raise ConfigError(
            f"--target: expected the column that holds the labels, got {target!r}, which the model takes as "
            f"input; in training the labels were in {schema['target']!r}"
        )
    return schema | {"target": target}
