"""`distbp evaluate --suspects`: labels that were changed on purpose are found."""

from __future__ import annotations

import json

import numpy as np

import distbp as api


def test_changed_labels_are_found(distbp, tmp_path):
    """Twenty of eight hundred labels are wrong: a linear model names nearly all of them among the first."""
    train, _ = api.load_data("digits")
    x, y = np.array(train.x[:800]), np.array(train.y[:800])
    wrong = np.random.default_rng(0).choice(800, 20, replace=False)
    y[wrong] = (y[wrong] + 1 + np.random.default_rng(1).integers(0, 8, 20)) % 10
    np.savez(tmp_path / "data.npz", x=x, y=y)
    options = ["-o", "model.name=linear", "-o", "optimizer.lr=0.01", "--epochs", 6, "--backend", "serial"]
    done = distbp("train", "data.npz", *options, "--out", "run")
    assert done.returncode == 0, done.stderr
    done = distbp("evaluate", "run", "data.npz", "--suspects", 25, "--json")
    assert done.returncode == 0, done.stderr
    suspects = json.loads(done.stdout)["suspects"]
    assert len({one["sample"] for one in suspects} & set(wrong.tolist())) >= 16
    losses = [one["loss"] for one in suspects]
    assert losses == sorted(losses, reverse=True)
    assert all(one["label"] == str(y[one["sample"]]) != one["predicted"] for one in suspects)
    done = distbp("evaluate", "run", "data.npz", "--suspects", 3)
    assert f"sample {suspects[0]['sample']} " in done.stdout
    assert len(done.stdout.split("the model says")) == 4


def test_numbers_have_no_suspects(distbp, tmp_path):
    """Refused with 2."""
    x = np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32)
    np.savez(tmp_path / "data.npz", x=x, y=x[:, :1])
    done = distbp("train", "data.npz", "--epochs", 1, "--backend", "serial", "--out", "run")
    assert done.returncode == 0, done.stderr
    done = distbp("evaluate", "run", "data.npz", "--suspects", 3)
    assert done.returncode == 2
    assert "--suspects: expected data with one class" in done.stderr
