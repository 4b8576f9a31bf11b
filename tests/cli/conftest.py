"""Runs that the tests of this folder look at; each is trained once."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from .command_line import succeed

COLOURS = ("blue, dark", "green", "red")


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on the digits whose validation samples are the last 180, with several checkpoints."""
    folder = tmp_path_factory.mktemp("digits")
    options = ("-o", "data.split=tail", "-o", "checkpoint.every_steps=20", "-o", "model.hidden=[16]")
    succeed("train", "digits", "--epochs", 2, "--nproc", 2, "--out", "run", *options, cwd=folder)
    return folder / "run"


@pytest.fixture(scope="session")
def validation(digits_run: Path) -> dict[str, float]:
    """Return loss and accuracy that the training on the digits reported for its validation samples."""
    found: dict[str, float] = json.loads((digits_run / "result.json").read_text())["validation"]
    return found


@pytest.fixture(scope="session")
def tables(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with runs `colours`, `numbers` and `price`, and the table that each was trained on."""
    folder = tmp_path_factory.mktemp("tables")
    values = np.random.default_rng(0).normal(size=(60, 3))
    codes = values.argmax(axis=1)
    targets = {
        "colours": [COLOURS[code] for code in codes],
        "numbers": [str((3, 5, 40)[code]) for code in codes],
        "price": [f"{row.sum():.6f}" for row in values],
    }
    for name, target in targets.items():
        write_table(folder / f"{name}.csv", ["a", "b", "c", name], [*values.T.tolist(), target])
        options = ("--target", name, "--epochs", 1, "--nproc", 1, "-o", "model.name=linear")
        succeed("train", f"{name}.csv", "--out", name, *options, "-o", "optimizer.lr=0.01", cwd=folder)
    return folder


def write_table(path: Path, header: list[str], columns: list[list[object]]) -> Path:
    """Write a CSV file."""
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *zip(*columns, strict=True)])
    return path
