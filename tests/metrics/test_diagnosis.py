"""A training that goes wrong is told so, in words and early enough; a healthy one hears nothing."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

import distbp
from distbp import nn, optim
from distbp.metrics.diagnosis import RULES, batch_advice, diagnose
from distbp.metrics.history import Epoch, Facts, History, Look
from distbp.metrics.records import read_records
from distbp.optim import Schedule

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN, VALIDATION = distbp.load_data("digits")


class Constant:
    """The same rate in every step."""

    def __init__(self, lr):
        self.lr = lr

    def __call__(self, step, total_steps):
        return self.lr


class Broken:
    """Spoils the samples of some steps."""

    def __init__(self, first, last, factor):
        self.first, self.last, self.factor = first, last, factor

    def check(self, sample_shape):
        """Take any."""

    def __call__(self, x, seed, step, micro_batch):
        if self.first <= step < self.last:
            x *= self.factor


def samples(count, *, noise=0.0, data=TRAIN):
    """The first digits, some with another label."""
    x, y = np.array(data.x[:count]), np.array(data.y[:count])
    wrong = np.random.default_rng(0).random(len(y)) < noise
    return x, np.where(wrong, np.random.default_rng(1).integers(0, 10, len(y)), y)


def told(out, model, *, train=TRAIN, val=VALIDATION, epochs=8, **options):
    """Train, and return the diagnoses by name, and the history of the call."""
    settings = {"optimizer": distbp.SGD(momentum=0.9), "batch_size": 64} | options
    history = distbp.Trainer(model, **settings).fit(train, val=val, epochs=epochs, out=out)
    found = [event for event in read_records(out / "events.jsonl") if event["kind"] == "diagnosis"]
    assert len({event["name"] for event in found}) == len(found), "a diagnosis is said once"
    return {event["name"]: event for event in found}, history


def deep(activation):
    """Ten layers, the last one with the outputs."""
    return nn.mlp(outputs=10, hidden=[32] * 9, activation=activation)


def test_a_vanishing_gradient_is_named_and_the_advice_helps(tmp_path, capsys):
    """Ten sigmoid layers: the layers, the factor and the cure are said; the cure trains."""
    found, history = told(tmp_path / "sigmoid", deep("sigmoid"), epochs=4)
    assert history.validation[-1]["accuracy"] < 0.3
    assert list(found) == ["vanishing_gradient"]
    event = found["vanishing_gradient"]
    norms = event["evidence"]["gradient_norm"]
    assert event["evidence"]["factor"] > 1000
    assert event["evidence"]["factor"] == pytest.approx(norms["19.weight"] / norms["1.weight"], rel=0.9)
    assert event["evidence"]["layers"][:2] == ["1.weight", "3.weight"]
    assert event["step"] < 100
    assert "model.activation=relu" in event["remedy"]
    assert "optimizer.lr=0.01" in event["remedy"]
    assert "W_DIAGNOSIS vanishing_gradient" in capsys.readouterr().err
    cured, history = told(tmp_path / "relu", deep("relu"), epochs=8, lr=0.01)
    assert cured == {}
    assert history.validation[-1]["accuracy"] > 0.8


@pytest.mark.parametrize("optimizer", [distbp.SGD(momentum=0.9), optim.Adam()])
def test_ten_times_the_learning_rate_is_named(tmp_path, optimizer):
    """A rate ten times too high is named with a tenth of it as the cure, and what follows from it is not."""
    lr = 1.0 if isinstance(optimizer, distbp.SGD) else 0.1
    found, history = told(tmp_path, nn.mlp(outputs=10), optimizer=optimizer, lr=lr)
    assert history.validation[-1]["accuracy"] < 0.9
    assert list(found) == ["learning_rate_too_high"]
    assert found["learning_rate_too_high"]["remedy"].startswith(f"begin anew with optimizer.lr={lr / 10:g};")


def test_a_tiny_learning_rate_is_named(tmp_path):
    """A thousandth of the usual rate is named while the run is young."""
    found, _ = told(tmp_path, nn.mlp(outputs=10), lr=0.0001)
    assert list(found) == ["learning_rate_too_low"]
    assert found["learning_rate_too_low"]["step"] <= 100


def test_dead_units_are_named(tmp_path):
    """Weights that are all negative before samples that are not: the layer is named, with its share."""

    def negative(parameter, seed):
        return -np.abs(nn.initial.he_normal(parameter, seed))

    model = nn.Sequential(
        nn.Flatten(), nn.Linear(32), nn.ReLU(), nn.Linear(32, initial=negative), nn.ReLU(), nn.Linear(10)
    )
    found, _ = told(tmp_path, model)
    assert found["dead_units"]["evidence"]["inactive"] == {"4 ReLU": 1.0}


def test_saturated_units_are_named(tmp_path):
    """Weights a hundred times too large before a tanh."""
    large = nn.initial.scaled(nn.initial.glorot_uniform, 100.0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, initial=large), nn.Tanh(), nn.Linear(10))
    constant = np.zeros_like(TRAIN.x) + TRAIN.x.mean(axis=0, keepdims=True)
    found, _ = told(tmp_path, model, train=(constant, np.array(TRAIN.y)), val=None, lr=0.01)
    assert found["saturated_units"]["evidence"]["inactive"]["2 Tanh"] > 0.9


def test_a_step_that_is_not_finite_is_named(tmp_path):
    """One step overflows: it is skipped, and named with its number."""
    found, history = told(tmp_path, nn.mlp(outputs=10), augment=[Broken(120, 121, 1e38)])
    assert history.result["skipped_steps"] == 1
    assert found["exploding_gradient"]["evidence"] == {"skipped": [121]}


def test_a_spike_of_the_loss_is_named(tmp_path):
    """Ten broken steps after a hundred good ones."""
    found, _ = told(tmp_path, nn.mlp(outputs=10), lr=0.02, augment=[Broken(120, 130, -4.0)], clip_norm=0.1)
    assert "loss_spike" in found
    assert 121 <= found["loss_spike"]["step"] <= 130


@pytest.mark.parametrize(("count", "lr"), [(300, 0.01), (180, 0.03), (300, 0.05), (180, 0.1)])
def test_overfitting_is_told_in_time(tmp_path, count, lr):
    """It is said before the validation loss has risen by 10 % from its least value."""
    model = nn.mlp(outputs=10)
    found, history = told(
        tmp_path,
        model,
        train=samples(count, noise=0.2),
        val=samples(180, noise=0.2, data=VALIDATION),
        epochs=60,
        lr=lr,
    )
    losses = [record["loss"] for record in history.validation]
    best = int(np.argmin(losses))
    late = [record["step"] for record in history.validation[best:] if record["loss"] > 1.1 * losses[best]]
    assert late, "this run does overfit"
    assert found["overfitting"]["step"] < late[0]
    assert set(found) == {"overfitting"}


def test_underfitting_is_named(tmp_path):
    """One unit cannot tell ten classes apart."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1), nn.Tanh(), nn.Linear(10))
    found, _ = told(tmp_path, model, epochs=15, lr=0.02)
    assert list(found) == ["underfitting"]


def test_a_settled_training_is_told_to_stop(tmp_path):
    """A linear model that weight decay holds where it is has most of its epochs before it."""
    optimizer = distbp.SGD(momentum=0.9, weight_decay=0.1)
    options = {"train": samples(640), "val": None, "epochs": 60, "schedule": Constant(0.01)}
    found, history = told(tmp_path, nn.linear(outputs=10), optimizer=optimizer, **options)
    assert list(found) == ["settled"]
    assert found["settled"]["step"] < 0.75 * history.result["steps"]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (lambda: nn.mlp(outputs=10), {"epochs": 20}),
        (lambda: nn.mlp(outputs=10), {"epochs": 20, "seed": 2}),
        (lambda: nn.mlp(outputs=10, activation="tanh"), {}),
        (lambda: nn.mlp(outputs=10, activation="sigmoid"), {}),
        (lambda: nn.mlp(outputs=10), {"optimizer": optim.Adam()}),
        (lambda: nn.linear(outputs=10), {}),
        (lambda: nn.lenet(outputs=10), {"optimizer": optim.Adam(), "lr": 0.002, "epochs": 10}),
        (lambda: nn.mlp(outputs=10), {"schedule": Schedule(lr=0.1, name="one_cycle")}),
        (lambda: nn.mlp(outputs=10), {"batch_size": 8, "micro_batch": 8, "lr": 0.01, "epochs": 3}),
    ],
)
def test_healthy_runs_hear_nothing(tmp_path, model, options):
    """No rule speaks of a run that learns."""
    found, history = told(tmp_path, model(), **options)
    assert history.validation[-1]["accuracy"] > 0.9
    assert found == {}


def test_the_command_says_nothing_of_its_defaults(distbp, tmp_path):
    """`distbp train digits`, as everybody begins."""
    done = distbp("train", "digits", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "W_" not in done.stderr.replace("W_MORE_WORKERS_THAN_CORES", "")
    assert {event["kind"] for event in read_records(tmp_path / "run" / "events.jsonl")} == {
        "start",
        "checkpoint",
    }


def test_a_diagnosis_takes_the_place_of_a_guess(distbp, tmp_path):
    """Where a cause is named, the end does not name another one."""
    options = ["-o", "optimizer.lr=1.0", "--epochs", 6, "--backend", "serial", "--out", tmp_path / "run"]
    done = distbp("train", "digits", *options)
    assert done.returncode == 0, done.stderr
    assert "W_DIAGNOSIS learning_rate_too_high" in done.stderr
    assert "W_NOT_LEARNING" not in done.stderr


# The rules alone, on histories that no training needs to make.

FACTS = Facts(
    total_steps=1000, batch_size=10, samples=100, classes=10, weights=("a", "b", "c"),
    kinds=frozenset({"ReLU"}), answers=1000, peak_lr=0.1,
)  # fmt: skip


def history_of(norms=(1.0, 1.0, 1.0), losses=(2.3, 1.5, 1.0, 0.8), ratio=0.005, inactive=None):
    """A history with a look for each loss, the same gradients in all."""
    looks = [
        Look(
            25 * n,
            loss,
            0.1,
            dict(zip("abc", norms, strict=True)),
            dict.fromkeys("abc", ratio),
            inactive or {},
        )
        for n, loss in enumerate(losses)
    ]
    return History(FACTS, looks)


@pytest.mark.parametrize(
    ("norms", "names"),
    [
        ((1e-3, 1e-2, 1.1), ["vanishing_gradient"]),
        ((2e-3, 1e-2, 1.0), []),
        ((0.0, 0.0, 1.0), []),  # Cut off, by dead units: that has a rule of its own.
        ((1100.0, 10.0, 1.0), ["exploding_gradient"]),
        ((math.nan, 1.0, 1.0), []),
    ],
)
def test_the_factor_decides(norms, names):
    """A thousand is named, less is not."""
    assert [found.name for found in diagnose(history_of(norms), ())] == names


def test_a_gradient_that_grows_is_named():
    """A hundred times the norm of the first looks."""
    history = history_of()
    history.looks.append(Look(100, 0.8, 0.1, dict.fromkeys("abc", 120.0), dict.fromkeys("abc", 0.005), {}))
    assert [found.name for found in diagnose(history, ())] == ["exploding_gradient"]


@pytest.mark.parametrize(
    ("epochs", "names"),
    [
        # One epoch before the loss rises: it stays, and the answers grow surer than they are right.
        ([(1.8, 1.6, 1.47, 1.04), (1.07, 0.85, 1.46, 0.73)], ["overfitting"]),
        ([(1.8, 1.6, 1.47, 1.04), (1.07, 0.85, 1.42, 0.73)], []),  # It falls.
        ([(1.8, 1.6, 1.47, 1.04), (1.07, 0.85, 1.46, 1.02)], []),  # They are nearly as right as sure.
        ([(1.8, 1.6, 1.47, 1.04), (1.20, 0.85, 1.46, 0.73)], []),  # Training costs nearly as much.
        ([(1.8, 1.6, 1.47, 1.04), (1.07, 0.60, 1.46, 0.73)], []),  # It is surer than right there, too.
        ([(9.0, 0.1, 8.0, 0.1), (5.0, 0.1, 9.0, 0.1)], []),  # Worse than knowing nothing: nothing is learned.
    ],
)
def test_answers_surer_than_right_are_told_before_the_loss_rises(epochs, names):
    """What the answers' entropy promises is held against what they cost."""
    history = History(FACTS, epochs=[Epoch(10 * n, *values) for n, values in enumerate(epochs, 1)])
    assert [found.name for found in diagnose(history, ())] == names
    assert diagnose(history, {"learning_rate_too_high"}) == []


@pytest.mark.parametrize(("lr", "names"), [(0.1, ["underfitting"]), (0.01, [])])
def test_a_loss_that_stands_still_with_its_rate_is_no_underfitting(lr, names):
    """At the end of a schedule nothing moves, whatever the model could learn."""
    history = history_of(losses=(2.3, 2.0, 1.9, 1.9))
    history.looks[-1] = dataclasses.replace(history.looks[-1], lr=lr)
    history.epochs = [Epoch(100 * n, 1.9, 1.9, None, None) for n in range(2, 8)]
    assert [found.name for found in diagnose(history, ())] == names


@pytest.mark.parametrize(
    ("first", "losses", "cure"),
    [
        (0.6, (4.0, 2.0, 1.95, 1.94), "optimizer.lr=0.01;"),  # It knows how common each class is, no more.
        (60.0, (4.0, 2.0, 1.95, 1.94), "optimizer.lr=2e-05;"),  # A tenth would be far too high as well.
        (0.6, (4.0, 1.5, 1.2, 1.1), None),
        (0.05, (4.0, 2.0, 1.95, 1.94), None),
    ],
)
def test_a_first_step_that_breaks_the_network_is_named(first, losses, cure):
    """Weights that one step changed by more than half, and a loss that stands still ever after."""
    history = history_of(losses=losses)
    history.looks[0] = dataclasses.replace(history.looks[0], update_ratio=dict.fromkeys("abc", first))
    found = diagnose(history, ())
    assert [one.name for one in found] == (["learning_rate_too_high"] if cure else [])
    assert all(one.remedy.startswith(f"begin anew with {cure}") for one in found)


def test_a_linear_model_may_have_small_weights():
    """What noise moves them by is no matter of the rate, which the loss bears."""
    history = history_of(losses=(0.8, 0.6, 0.55, 0.52), ratio=0.1)
    assert [found.name for found in diagnose(history, ())] == ["learning_rate_too_high"]
    linear = History(dataclasses.replace(FACTS, weights=("a",)), history.looks)
    assert diagnose(linear, ()) == []


def test_nothing_is_said_twice_or_after_its_cause():
    """What was said, and what follows from it, is not said."""
    history = history_of(inactive={"2 ReLU": 0.7})
    assert [found.name for found in diagnose(history, ())] == ["dead_units"]
    assert diagnose(history, {"dead_units"}) == []
    assert diagnose(history, {"learning_rate_too_high"}) == []


def test_an_empty_history_says_nothing():
    """Every rule bears a run that has only begun."""
    assert diagnose(History(FACTS), ()) == []
    assert diagnose(History(FACTS, epochs=[Epoch(10, 2.0, None, None, None)]), ()) == []


def test_every_name_is_explained():
    """Each name stands in the document."""
    text = (REPOSITORY / "docs" / "DIAGNOSIS.md").read_text()
    assert [name for name in RULES if f"| `{name}` |" not in text] == []


@pytest.mark.parametrize(
    ("scale", "says"), [(None, ""), (64.0, ""), (500.0, ""), (5000.0, "up to about 4096"), (4.0, "about 4")]
)
def test_a_batch_size_is_suggested_where_it_matters(scale, says):
    """Eight times off, and no advice before that."""
    advice = batch_advice(scale, 64)
    assert (says in advice) if says else advice is None
    json.dumps(advice)
