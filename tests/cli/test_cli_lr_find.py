"""`distbp lr-find`: the same suggestion from any number of workers, a useful one, and nothing left behind."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest

import distbp as api
from distbp import nn
from distbp.metrics.lr_range import RangeTest, has_exploded, smoothed, suggest


@pytest.fixture(scope="module")
def train_and_validation():
    """The digits."""
    return api.load_data("digits")


def test_workers_do_not_change_the_suggestion(distbp, tmp_path):
    """Two processes and one give the same losses to the last digit, and no directory stays."""
    work, spare = tmp_path / "work", tmp_path / "spare"
    work.mkdir()
    spare.mkdir()
    env = {"TMPDIR": str(spare)}
    found = []
    for options in (["--nproc", 2], ["--backend", "serial"]):
        done = distbp("lr-find", "digits", *options, "--steps", 120, "--json", cwd=work, env=env)
        assert done.returncode == 0, done.stderr
        assert "W_DIAGNOSIS" not in done.stderr
        found.append(json.loads(done.stdout))
    assert found[0] == found[1]
    assert os.listdir(work) == os.listdir(spare) == []
    assert found[0]["configured"] == 0.1
    assert 20 < len(found[0]["losses"]) <= 120


def test_the_suggestion_trains(distbp, tmp_path, train_and_validation):
    """For two optimizers: the rate that is suggested reaches nine of ten in eight epochs."""
    train, validation = train_and_validation
    for name, optimizer in (("sgd", api.SGD(momentum=0.9)), ("adam", api.optim.Adam())):
        done = distbp("lr-find", "digits", "-o", f"optimizer.name={name}", "--json")
        assert done.returncode == 0, done.stderr
        lr = json.loads(done.stdout)["lr"]
        trainer = api.Trainer(nn.mlp(outputs=10), optimizer=optimizer, lr=lr)
        history = trainer.fit(train, val=validation, epochs=8, out=tmp_path / name)
        assert history.validation[-1]["accuracy"] > 0.9


def test_it_is_said_in_words(distbp):
    """A curve, and the option to type."""
    done = distbp("lr-find", "digits", "--steps", 100)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["rate", "loss"]
    assert lines[-1].startswith("suggested: -o optimizer.lr=")
    rates = [float(line.split()[0]) for line in lines[1:-2]]
    assert rates == sorted(rates)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--backend", "ray"], "run.backend: lr-find trains on this machine"),
        (["--lowest", "1", "--highest", "0.1"], "expected 0 < lowest < highest"),
        (["-o", "optimizer.lrr=1"], "did you mean optimizer.lr"),
    ],
)
def test_what_cannot_be_done_is_refused(distbp, options, message):
    """With 2, before anything is trained."""
    done = distbp("lr-find", "digits", *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_rate_rises_by_equal_factors():
    """From the lowest to the highest."""
    test = RangeTest(1e-4, 1.0, 5)
    assert [test(step, 0) for step in range(5)] == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1, 1.0])


def test_a_tenth_of_the_best_is_suggested():
    """Losses that fall to a rate and explode behind it; noise that falls nowhere suggests nothing."""
    rates = np.logspace(-5, 1, 121).tolist()
    losses = [2.3 - 2 * min(1, max(0, math.log10(rate) + 4) / 3) + max(0, rate - 0.1) * 20 for rate in rates]
    found = suggest(rates, losses)
    assert found.lr is not None
    assert 0.005 <= found.lr <= 0.05
    assert found.turns_at is not None
    assert found.turns_at > found.least_at
    assert suggest(rates, [2.3] * 121).lr is None
    assert suggest(rates, [2.3, 2.2] + [math.inf] * 2).turns_at == rates[2]
    assert suggest([], []).lr is None


def test_an_explosion_ends_the_test():
    """Four times the least loss, or one that is not finite."""
    assert not has_exploded([2.0, 1.0, 1.5])
    assert has_exploded([2.0, 1.0, math.nan])
    assert has_exploded([0.1] * 20 + [10.0])
    assert smoothed([1.0, 1.0]) == pytest.approx([1.0, 1.0])
