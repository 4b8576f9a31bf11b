"""Networks on data made for them: each beats the simple baseline that its test states.

The data are generated here from a seed, so what is learnt can be known: how good the best possible answer is
and how good a simple one.
"""

from __future__ import annotations

import numpy as np
import pytest

from distbp import nn
from distbp.optim import Adam
from distbp.trainer import Trainer


def traffic(samples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return 24 hours of counts at a crossing as samples, and the hour after them as targets.

    A daily wave of unknown phase, a slow trend, and a jam in the last hour: a small one stays for an hour, a
    large one is led elsewhere and is gone.  Unit: about the deviation of the wave.
    """
    generator = np.random.default_rng(seed)
    hours = np.arange(25)
    phase = generator.uniform(0, 24, size=(samples, 1))
    wave = np.sin(2 * np.pi * (hours + phase) / 24) + 0.5 * np.sin(4 * np.pi * (hours + phase) / 24)
    trend = generator.normal(size=(samples, 1)) * hours / 24
    jam = np.zeros((samples, 25))
    jam[:, 23] = generator.uniform(0, 2, size=samples)
    jam[:, 24] = np.where(jam[:, 23] < 1, jam[:, 23], 0)
    series = wave + trend + jam + 0.05 * generator.normal(size=(samples, 25))
    return series[:, :24].astype(np.float32), series[:, 24:].astype(np.float32)


@pytest.mark.parametrize(("model", "epochs"), [(nn.gru, 30), (nn.lstm, 20)])
def test_a_series_is_foreseen(model, epochs, tmp_path):
    """GRU and LSTM leave 0.6 of the error of the better of two baselines: the last hour, linear regression.

    A line cannot tell a small jam from a large one; the noise alone makes an error of 0.05² = 0.0025.
    """
    x, y = traffic(3000, seed=1)
    test_x, test_y = traffic(500, seed=2)
    persistence = np.mean((test_x[:, -1:] - test_y) ** 2)
    with_bias = np.column_stack([x, np.ones(len(x))])
    weights = np.linalg.lstsq(with_bias, y, rcond=None)[0]
    regression = np.mean((np.column_stack([test_x, np.ones(len(test_x))]) @ weights - test_y) ** 2)
    trainer = Trainer(
        model(outputs=1, hidden=(32,)), loss="mean_squared_error", optimizer=Adam(), lr=0.01, clip_norm=1.0
    )
    trainer.fit((x, y), epochs=epochs, out=tmp_path / "run")
    error = trainer.evaluate((test_x, test_y))["loss"]
    assert error < 0.6 * min(persistence, regression)


def test_outliers_pull_less_with_huber(tmp_path):
    """With a tenth of the targets far off, Huber's line is nearer to the true one than that of squares."""
    generator = np.random.default_rng(3)
    x = generator.normal(size=(2000, 3))
    truth = x @ [1.0, -2.0, 0.5]
    y = truth + 0.1 * generator.normal(size=2000)
    y[:200] += 20.0
    errors = {}
    for loss in ("mean_squared_error", "huber"):
        trainer = Trainer(nn.linear(outputs=1), loss=loss, optimizer=Adam(), lr=0.05)
        trainer.fit((x, y), epochs=10, out=tmp_path / loss)
        errors[loss] = np.mean((trainer.predict(x)[:, 0] - truth) ** 2)
    assert errors["huber"] < 0.1 * errors["mean_squared_error"]


def test_yes_and_no_are_told_apart(tmp_path):
    """Binary cross entropy with one output learns what softmax with two learns: the same accuracy."""
    generator = np.random.default_rng(4)
    x = generator.normal(size=(1000, 2))
    y = (x[:, 0] * x[:, 1] > 0).astype(np.int64)
    accuracies = []
    for outputs, loss in ((1, "binary_cross_entropy"), (2, "cross_entropy")):
        trainer = Trainer(nn.mlp(outputs=outputs, hidden=(32,)), loss=loss, lr=0.1)
        trainer.fit((x, y), epochs=15, out=tmp_path / loss)
        accuracies.append(trainer.evaluate((x, y))["accuracy"])
    assert min(accuracies) > 0.95


def test_labels_that_hold_together(tmp_path):
    """Binary cross entropy with several outputs learns each label for itself."""
    generator = np.random.default_rng(5)
    x = generator.normal(size=(1000, 3))
    y = (x > 0).astype(np.float32)
    trainer = Trainer(nn.linear(outputs=3), loss="binary_cross_entropy", lr=0.5)
    trainer.fit((x, y), epochs=20, out=tmp_path / "run")
    assert np.mean((trainer.predict(x) > 0) == (y > 0.5)) > 0.98
