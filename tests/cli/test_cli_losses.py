"""Losses by name from the command line, and how what they teach is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from .command_line import refuse, succeed
from .conftest import write_table


def table(folder: Path, num_classes: int) -> str:
    """Write a table with a column of texts and return its name."""
    values = np.random.default_rng(0).normal(size=(200, num_classes))
    names = [("no", "yes", "maybe")[code] for code in values.argmax(axis=1)]
    write_table(folder / "answers.csv", [*"abc"[:num_classes], "label"], [*values.T.tolist(), names])
    return "answers.csv"


def test_two_classes_with_one_output(tmp_path: Path) -> None:
    """Binary cross entropy trains one output, and predict writes both classes as it does for two outputs."""
    name = table(tmp_path, 2)
    options = ["-o", "loss.name=binary_cross_entropy", "-o", "model.name=linear", "--out", "run"]
    succeed("train", name, *options, cwd=tmp_path)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["num_outputs"] == 1
    found = json.loads(succeed("evaluate", "run", name, "--json", cwd=tmp_path))
    assert found["accuracy"] > 0.95
    succeed("predict", "run", name, "-o", "p.csv", cwd=tmp_path)
    with (tmp_path / "p.csv").open(newline="") as stream:
        predicted = list(csv.DictReader(stream))
    with (tmp_path / name).open(newline="") as stream:
        answers = [row["label"] for row in csv.DictReader(stream)]
    right = [row["prediction"] == answer for row, answer in zip(predicted, answers, strict=True)]
    assert np.mean(right) == found["accuracy"]
    for row in predicted:
        assert abs(float(row["p_no"]) + float(row["p_yes"]) - 1) < 1e-6
        assert (float(row["p_yes"]) > 0.5) == (row["prediction"] == "yes")


def test_losses_that_do_not_fit_the_targets(tmp_path: Path) -> None:
    """A loss for other targets is refused, and the message names those that fit."""
    name = table(tmp_path, 3)
    binary = ["-o", "loss.name=binary_cross_entropy"]
    assert "two classes" in refuse(2, "train", name, *binary, cwd=tmp_path)
    assert "'cross_entropy'" in refuse(2, "train", name, "-o", "loss.name=huber", cwd=tmp_path)
    assert "loss.delta" in refuse(2, "train", name, "-o", "loss.delta=2", cwd=tmp_path)
    numbers = ["--target", "a", "-o", "data.validation_fraction=0"]
    assert "data.normalize=none" in refuse(2, "train", name, *numbers, *binary, cwd=tmp_path)


def test_huber_for_numbers(tmp_path: Path) -> None:
    """Numbers can be learnt with Huber's loss, and its limit is part of the run."""
    name = table(tmp_path, 3)
    options = ["--target", "a", "-o", "loss.name=huber", "-o", "loss.delta=0.5", "--out", "run"]
    succeed("train", name, *options, cwd=tmp_path)
    assert "rmse" in succeed("evaluate", "run", name, cwd=tmp_path)
    message = refuse(2, "train", name, *options, "-o", "loss.delta=0.7", cwd=tmp_path)
    assert "0.5" in message
    assert "0.7" in message
