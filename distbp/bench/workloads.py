"""The six networks on which speed is measured, their made-up data, and the options that train them.

Samples are noise and labels are drawn beside them: the time of a step does not depend on what is learnt.  All
come from one seed, so a workload is the same arrays, and the same bits after n steps, wherever it is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distbp.errors import ConfigError

__all__ = ["WORKLOADS", "Workload", "chosen", "make_data", "options"]

SYMBOLS = "".join(map(chr, range(ord("A"), ord("A") + 65)))


@dataclass(frozen=True)
class Workload:
    """One network with the shape of its samples; `steps` take a few seconds on two cores."""

    name: str
    shape: tuple[int, ...]
    """Shape of one sample: (features,), (height, width[, channels]), or (tokens,)."""
    outputs: int
    batch: int
    model: dict[str, Any]
    steps: int
    samples: int
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def is_text(self) -> bool:
        """Return whether samples are windows of a text."""
        return bool(self.model["name"] == "transformer")


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mlp-s", (784,), 10, 64, {"name": "mlp", "hidden": [128]}, 4000, 8192),
        Workload("mlp-m", (784,), 10, 256, {"name": "mlp", "hidden": [1024, 1024]}, 160, 8192),
        Workload("mlp-l", (784,), 10, 128, {"name": "mlp", "hidden": [4096, 4096]}, 30, 8192),
        Workload("cnn", (28, 28), 10, 128, {"name": "cnn", "hidden": [1024]}, 40, 4096),
        Workload("resnet20", (32, 32, 3), 10, 128, {"name": "resnet20"}, 16, 2048),
        Workload(
            "charlm",
            (128,),
            65,
            32,
            {"name": "transformer", "layers": 4, "heads": 4, "width": 256},
            8,
            2048,
            {"context": 128},
        ),
    )
}


def chosen(names: str) -> list[Workload]:
    """Return the workloads that `names`, with commas between them, stands for; 'all' is all of them."""
    if names == "all":
        return list(WORKLOADS.values())
    wanted = names.split(",")
    for name in wanted:
        if name not in WORKLOADS:
            raise ConfigError(f"workloads: expected some of {', '.join(WORKLOADS)}, or all, got {name!r}")
    return [WORKLOADS[name] for name in wanted]


def make_data(workload: Workload, folder: Path) -> Path:
    """Write the samples of `workload` into `folder`, unless they are there; return the file."""
    rng = np.random.default_rng(0)
    if workload.is_text:
        path = folder / f"{workload.name}.txt"
        if not path.exists():
            count = workload.samples * workload.shape[0] + 1
            codes = np.concatenate([np.arange(65), rng.integers(0, 65, count - 65)])
            path.write_text("".join(SYMBOLS[code] for code in codes.tolist()))
        return path
    path = folder / f"{workload.name}.npz"
    if not path.exists():
        x = rng.standard_normal((workload.samples, *workload.shape), np.float32)
        np.savez(path, x=x, y=rng.integers(0, workload.outputs, workload.samples))
    return path


def options(workload: Workload, steps: int, micro_batch: int | None = None) -> list[str]:
    """Return the options of `distbp train` for `steps` steps; `micro_batch` None is the default one."""
    settings: dict[str, Any] = {f"model.{key}": value for key, value in workload.model.items()}
    settings |= {f"data.{key}": value for key, value in workload.data.items()}
    settings |= {
        "data.validation_fraction": 0,
        "train.batch_size": workload.batch,
        "train.epochs": 1_000_000,
        "train.max_steps": steps,
        "optimizer.name": "sgd",
        "optimizer.momentum": 0.9,
        "optimizer.lr": 0.01,
    }
    if micro_batch is not None:
        settings["train.micro_batch"] = micro_batch
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
