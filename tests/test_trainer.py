"""The Python API in one process, without the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import distbp
from distbp import nn
from distbp.errors import ConfigError, DataError, Diverged, InputMissing
from distbp.trainer import steps_of

README = Path(__file__).resolve().parents[1] / "README.md"


def line_data(samples=96, features=3, seed=0):
    """A linear function with a little noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, features))
    return x, x[:, :3] @ [1.0, -2.0, 0.5] + 0.01 * rng.standard_normal(samples)


def small_trainer(**options):
    """A trainer of a linear regression."""
    settings = {"loss": "mean_squared_error", "lr": 0.1, "batch_size": 16, "micro_batch": 4} | options
    return distbp.Trainer(nn.Sequential(nn.Linear(1)), **settings)


def test_a_regression_finds_the_line(tmp_path):
    """Plain arrays train a regression; predict, evaluate and load agree with what fit reported."""
    x, y = line_data()
    trainer = small_trainer()
    history = trainer.fit((x, y), val=line_data(40, seed=1), epochs=30, out=tmp_path / "run")
    assert history.validation[-1]["loss"] < 1e-3
    assert history.validation[-1]["accuracy"] is None
    assert len(history.train) == 30
    again = small_trainer().load(tmp_path / "run")
    val_x, val_y = line_data(40, seed=1)
    assert again.evaluate((val_x, val_y))["loss"] == history.validation[-1]["loss"]
    assert again.predict(val_x).tobytes() == trainer.predict(val_x).tobytes()


@pytest.mark.parametrize(
    ("samples", "batch_size", "epochs"), [(10, 16, 7), (16, 16, 3), (33, 16, 5), (5, 16, 1)]
)
def test_epochs_of_any_length(samples, batch_size, epochs, tmp_path):
    """Fewer samples than a batch, or a number that does not divide, still see each sample once per epoch."""
    x, y = line_data(samples)
    trainer = small_trainer(batch_size=batch_size)
    history = trainer.fit((x, y), epochs=epochs, out=tmp_path / "run", log_samples=True)
    assert (
        history.result["steps"] == steps_of(epochs, samples, batch_size) == -(-epochs * samples // batch_size)
    )
    lines = (tmp_path / "run" / "samples.log").read_text().splitlines()
    stream = [int(number) for line in lines for number in line.split("\t")[1].split()]
    for epoch in range(epochs):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
    assert history.validation == []


def test_a_model_that_diverges_says_where(tmp_path):
    """A huge learning rate ends with 79; micro-batch and samples are named; nothing broken is saved."""
    trainer = small_trainer(schedule=distbp.Schedule(lr=1e30, name="constant"))
    with pytest.raises(Diverged, match=r"micro-batch \d.*samples .*lower optimizer.lr"):
        trainer.fit(line_data(), epochs=50, out=tmp_path / "run", checkpoint_every_steps=1)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        tensors = distbp.trainer.checkpoint.load(path).tensors
        assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_one_poisoned_step_is_skipped(tmp_path):
    """A step whose gradient is not finite leaves the state as it was, and training goes on."""

    class Poisoned(distbp.ArrayDataset):
        def batch(self, indices, x_out=None, y_out=None):
            x, y = super().batch(indices, x_out, y_out)
            x[np.asarray(indices) == 7] = np.nan
            return x, y

    x, y = line_data(96)
    data = Poisoned(x.astype(np.float32), y.astype(np.float32)[:, None])
    history = small_trainer().fit(data, epochs=3, out=tmp_path / "run")
    assert history.result["skipped_steps"] == 3
    assert history.result["steps"] == 18


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 16, "micro_batch": 5}, ConfigError, "not a multiple"),
        ({"batch_size": 0}, ConfigError, "batch_size: expected a whole number >= 1, got 0"),
        ({"micro_batch": 0}, ConfigError, "micro_batch: expected a whole number >= 1, got 0"),
        ({"loss": "cross_entropy"}, ConfigError, "one output for each of at least two classes"),
        ({"loss": "cross_entrop"}, ConfigError, "did you mean"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, message, tmp_path):
    """Wrong combinations are found before anything is written."""
    with pytest.raises(error, match=message):
        small_trainer(**change).fit(line_data(), epochs=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_targets_of_the_wrong_kind_are_refused(tmp_path):
    """Numbers for a loss over classes are found before anything is written."""
    trainer = distbp.Trainer(nn.Sequential(nn.Linear(2)), batch_size=4)
    with pytest.raises(ConfigError, match="needs targets of type int64"):
        trainer.fit(line_data(), epochs=1, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_are_not_finite_are_refused(tmp_path):
    """NaN in arrays that are held in memory is found at once, with the sample."""
    x, y = line_data()
    x[5, 1] = np.inf
    with pytest.raises(DataError, match="sample 5"):
        small_trainer().fit((x, y), epochs=1, out=tmp_path / "run")


def test_a_model_that_was_never_trained_says_so():
    """Predicting needs a trained or loaded model."""
    with pytest.raises(ConfigError, match="nothing is trained yet"):
        small_trainer().predict(np.zeros((2, 3)))
    with pytest.raises(InputMissing, match="no such run"):
        small_trainer().load("nowhere")


def test_the_script_of_the_readme_runs(tmp_path, distbp):
    """The ten lines of the README print the same line alone and on three workers."""
    script = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    (tmp_path / "train.py").write_text(script)
    alone = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    (tmp_path / "runs").rename(tmp_path / "runs-alone")
    three = distbp("run", "--nproc", 3, "train.py", cwd=tmp_path)
    assert three.returncode == 0, three.stderr
    assert three.stdout == alone.stdout
    result = json.loads((tmp_path / "runs" / "script" / "result.json").read_text())
    assert result["validation"]["accuracy"] >= 0.95
    assert result["world_size"] == 3


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"epochs": 0}, ConfigError, "epochs: expected a whole number >= 1, got 0"),
        ({"epochs": 1.5}, ConfigError, "epochs: expected a whole number"),
        ({"keep": 1}, ConfigError, "keep: expected at least 2"),
        ({"metadata": {"x": object()}}, ConfigError, "metadata"),
        ({"metadata": {"x": float("nan")}}, ConfigError, "metadata"),
        ({"val": line_data(0)}, DataError, "the validation data are empty"),
        ({"val": line_data(5, features=4)}, DataError, "validation data have samples of shape"),
    ],
)
def test_arguments_of_fit_are_checked_first(arguments, error, message, tmp_path):
    """Wrong arguments are found before anything is written, not at the first save or epoch."""
    with pytest.raises(error, match=message):
        small_trainer().fit(line_data(), **{"epochs": 1, "out": tmp_path / "run"} | arguments)
    assert not (tmp_path / "run").exists()


def test_validation_labels_out_of_range_are_found_first(tmp_path):
    """A label that the model has no output for is named with its sample."""
    trainer = distbp.Trainer(nn.Sequential(nn.Linear(2)), batch_size=4)
    x = np.zeros((8, 3), np.float32)
    with pytest.raises(DataError, match="label 2 in sample 5, expected 0 to 1"):
        trainer.fit((x, np.arange(8) % 2), val=(x, np.array([0, 1, 0, 1, 0, 2, 0, 1])), out=tmp_path / "run")


def test_a_result_of_an_earlier_end_is_not_the_end(tmp_path):
    """A longer run that was killed goes on from its checkpoint and is not taken for finished."""
    run = tmp_path / "run"
    short = small_trainer().fit(line_data(), epochs=2, out=run)
    long = small_trainer().fit(line_data(), epochs=4, out=run)
    (run / "result.json").write_text(json.dumps(short.result))
    again = small_trainer().fit(line_data(), epochs=4, out=run)
    assert again.result["state_sha256"] == long.result["state_sha256"]
    (run / "result.json").write_text("")
    assert small_trainer().fit(line_data(), epochs=4, out=run).result["steps"] == 24


def test_a_finished_run_may_be_moved(tmp_path):
    """Asking again in the new place answers from there."""
    small_trainer().fit(line_data(), epochs=2, out=tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    trainer = small_trainer()
    history = trainer.fit(line_data(), epochs=2, out=tmp_path / "moved")
    assert history.out == tmp_path / "moved"
    assert len(history.train) == 2
    assert trainer.predict(line_data()[0]).shape == (96, 1)


def test_going_back_sets_later_checkpoints_aside(tmp_path):
    """Resuming from an older checkpoint of the run makes its later ones no longer count."""
    run = tmp_path / "run"
    schedule = distbp.Schedule(lr=0.1, name="constant")
    options = {"out": run, "checkpoint_every_steps": 6, "keep": 10}
    small_trainer(schedule=schedule).fit(line_data(), epochs=4, **options)
    older = run / "checkpoints" / "step-00000006"
    shorter = small_trainer(schedule=schedule).fit(line_data(), epochs=2, resume=str(older), **options)
    held = distbp.trainer.checkpoint.list_checkpoints(run / "checkpoints")
    assert held[0].name == "step-00000012"
    assert shorter.result["steps"] == 12


def test_broken_parameters_are_never_saved(tmp_path):
    """An update that overflows leaves the last good checkpoints and ends with 79."""
    trainer = small_trainer(schedule=distbp.Schedule(lr=1e38, name="constant"))
    with pytest.raises(Diverged):
        trainer.fit(line_data(), epochs=9, out=tmp_path / "run", checkpoint_every_steps=1, keep=2)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        tensors = distbp.trainer.checkpoint.load(path).tensors
        assert all(np.isfinite(tensor).all() for tensor in tensors.values())
    assert json.loads((tmp_path / "run" / "result.json").read_text())["exit_code"] == 79


def test_a_script_alone_ends_with_the_code(tmp_path):
    """`python train.py` ends with the exit code and the message of our errors, not with a traceback."""
    (tmp_path / "train.py").write_text(
        "import distbp\nfrom distbp import nn\n"
        "distbp.Trainer(nn.Sequential(nn.Linear(2)), batch_size=4).fit(([[1.0]], [0]), out='/dev/null/x')\n"
    )
    done = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 73
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("distbp: cannot create the run directory")
