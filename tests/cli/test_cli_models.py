"""Every model by its name, from training to predictions, as a user types it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from distbp import nn
from distbp.data import load

from .command_line import refuse, succeed
from .conftest import write_table


def images(folder: Path) -> str:
    """Return 200 of the digits."""
    digits = load("digits").train
    np.savez(folder / "images.npz", x=digits.x[:200], y=digits.y[:200])
    return "images.npz"


def series(folder: Path) -> str:
    """Return numbers over time, two at once, and what comes next of the first."""
    x = np.random.default_rng(1).normal(size=(120, 7, 2)).cumsum(axis=1).astype(np.float32)
    np.savez(folder / "series.npz", x=x[:, :6], y=x[:, 6, 0])
    return "series.npz"


def sounds(folder: Path) -> str:
    """Return tones of two pitches."""
    generator = np.random.default_rng(2)
    y = np.arange(60) % 2
    x = np.sin((0.3 + 0.2 * y[:, None]) * np.arange(2048) + generator.normal(size=(60, 1)))
    np.savez(folder / "sounds.npz", x=x.astype(np.float32), y=y)
    return "sounds.npz"


def ratings(folder: Path) -> str:
    """Return a table of users, who are numbers, kinds and prices."""
    generator = np.random.default_rng(3)
    users, kinds = generator.integers(100, 108, 120), generator.choice(["book", "film", "song"], 120)
    prices = generator.normal(size=120)
    liked = np.where((users % 2 == 1) == (kinds == "book"), "yes", "no")
    columns = [users.tolist(), kinds.tolist(), prices.tolist(), liked.tolist()]
    write_table(folder / "ratings.csv", ["user", "kind", "price", "target"], columns)
    return "ratings.csv"


def text(folder: Path) -> str:
    """Return a text."""
    (folder / "story.txt").write_text("the cat sat on the mat, and the dog on the cat.\n" * 40)
    return "story.txt"


DATA = {"audio": sounds, "gru": series, "lstm": series, "tabular": ratings, "transformer": text}
OPTIONS = {
    "tabular": ['data.categorical=["user"]'],
    "transformer": ["data.context=16", "model.layers=1", "model.width=16", "model.heads=2"],
}
DEEP = ("resnet32", "resnet56")
"""Made as resnet20 is, of the same layers; they would take long."""


@pytest.mark.parametrize("name", [name for name in nn.MODELS if name not in DEEP])
def test_train_evaluate_predict(name: str, tmp_path: Path) -> None:
    """A trained model evaluates all its data with the figures by which its predictions agree with them."""
    data = DATA.get(name, images)(tmp_path)
    options = [word for option in OPTIONS.get(name, []) for word in ("-o", option)]
    options += ["-o", f"model.name={name}", "-o", "train.max_steps=3", "-o", "data.validation_fraction=0.2"]
    succeed("train", data, *options, "--nproc", 1, "--out", "run", cwd=tmp_path)
    found = json.loads(succeed("evaluate", "run", data, "--json", cwd=tmp_path))
    printed = succeed("predict", "run", data, "-o", "p.npy", cwd=tmp_path)
    predicted = np.load(tmp_path / "p.npy", allow_pickle=False)
    source = load(str(tmp_path / data), schema=None).train if name != "tabular" else None
    if name == "tabular":
        with (tmp_path / data).open(newline="") as stream:
            answers = np.array([row["target"] == "yes" for row in csv.DictReader(stream)], np.int64)
        assert found["accuracy"] == np.mean(predicted == answers)
    elif name == "transformer":
        source = load(str(tmp_path / data), schema=checkpoint_schema(tmp_path / "run")).train
        assert found["accuracy"] == np.mean(predicted == source.y[:])
    elif found["accuracy"] is None:
        error = np.sqrt(np.mean((predicted - source.y[:, 0].astype(np.float64)) ** 2))
        assert abs(found["rmse"] - error) <= 1e-6 * error  # Predictions in the file are float32.
    else:
        assert found["accuracy"] == np.mean(predicted == source.y[:])
    assert f"{len(predicted):,} predictions" in printed


def checkpoint_schema(run: Path) -> dict:
    """Return the schema that the newest checkpoint of a run holds."""
    newest = max((run / "checkpoints").iterdir())
    return json.loads((newest / "metadata.json").read_text())["preprocessing"]["schema"]


def test_the_tabular_model_reads_what_training_did_not_have(tmp_path: Path) -> None:
    """A user who is new gets a prediction; a column of codes is never taken for a number."""
    data = ratings(tmp_path)
    options = ["-o", "model.name=tabular", "-o", 'data.categorical=["user"]', "-o", "train.max_steps=2"]
    succeed("train", data, *options, "--nproc", 1, "--out", "run", cwd=tmp_path)
    write_table(tmp_path / "new.csv", ["user", "kind", "price"], [[999], ["poem"], [0.5]])
    succeed("predict", "run", "new.csv", "-o", "p.csv", cwd=tmp_path)
    assert len((tmp_path / "p.csv").read_text().splitlines()) == 2


def test_bells_by_their_name(tmp_path: Path) -> None:
    """The built-in sounds train the audio model, which is theirs, and can be predicted by their name."""
    options = ["-o", "data.samples=64", "-o", "train.max_steps=1"]
    succeed("train", "bells", *options, "--nproc", 1, "--out", "run", cwd=tmp_path)
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'name = "audio"' in config
    assert 'name = "adam"' in config
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["validation"]["accuracy"] is not None


def test_codes_are_for_the_tabular_model(tmp_path: Path) -> None:
    """Another model would take codes for amounts, so it is refused; one feature for each text is for all."""
    data = ratings(tmp_path)
    options = ["-o", "model.name=mlp", "-o", "data.categories=codes"]
    assert "needs 'tabular'" in refuse(2, "train", data, *options, cwd=tmp_path)
    assert "20,000 products" in refuse(
        2, "train", "digits", "-o", "model.name=tabular", "-o", "model.cross=4", cwd=tmp_path
    )


def test_samples_on_a_disk_are_those_of_memory(tmp_path: Path) -> None:
    """Left in their file, samples train two workers to the parameters of samples that are held."""
    digits = load("digits").train
    np.save(tmp_path / "x.npy", digits.x[:300])
    np.save(tmp_path / "y.npy", digits.y[:300])
    hashes = []
    for where in ("true", "false"):
        options = ["-o", f"data.on_disk={where}", "-o", "data.shuffle=block", "-o", "train.max_steps=7"]
        succeed("train", ".", *options, "--nproc", 2, "--out", f"run-{where}", cwd=tmp_path)
        hashes.append(json.loads((tmp_path / f"run-{where}" / "result.json").read_text())["state_sha256"])
    assert hashes[0] == hashes[1]
    found = json.loads(succeed("evaluate", "run-true", "x.npy", "--json", cwd=tmp_path))
    assert found["samples"] == 300
