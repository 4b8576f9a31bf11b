"""`distbp evaluate` and `distbp predict`: the figures of training again, from files."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from distbp.data import load
from tests.data.data_files import write_idx

from .command_line import distbp, figures, refuse, succeed
from .conftest import COLOURS, write_table

HELD_OUT = 180


def raw_digits() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits as they stand in the package, before normalisation."""
    source = load("digits").train
    return source.x, source.y


@pytest.fixture(scope="module")
def held_out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the digits that were held out in training: an .npz, and train/t10k IDX files."""
    folder = tmp_path_factory.mktemp("held-out")
    x, y = raw_digits()
    np.savez(folder / "labelled.npz", x=x[-HELD_OUT:], y=y[-HELD_OUT:])
    np.savez(folder / "unlabelled.npz", x=x[-HELD_OUT:])
    np.savez(folder / "mislabelled.npz", x=x[-HELD_OUT:], y=y[-HELD_OUT:] + 5)
    np.save(folder / "samples.npy", x[-HELD_OUT:])
    (folder / "idx").mkdir()
    for name, part in (("train", slice(0, -HELD_OUT)), ("t10k", slice(-HELD_OUT, None))):
        write_idx(folder / "idx" / f"{name}-images-idx3-ubyte", x[part].astype(np.uint8))
        write_idx(folder / "idx" / f"{name}-labels-idx1-ubyte.gz", y[part].astype(np.uint8))
    return folder


@pytest.mark.parametrize("data", [["labelled.npz"], ["idx", "--part", "validation"]])
def test_evaluate_repeats_the_validation_of_training(
    digits_run: Path, validation: dict[str, float], held_out: Path, data: list[str]
) -> None:
    """The validation samples of a run, read from a file, give its figures to the last bit."""
    found = json.loads(succeed("evaluate", digits_run, *data, "--json", cwd=held_out))
    assert {name: found[name] for name in validation} == validation
    assert found["samples"] == HELD_OUT
    assert found["part"] == ("validation" if "--part" in data else "all")


@pytest.mark.parametrize("data", [["labelled.npz"], ["idx", "--part", "validation"]])
def test_predict_reports_the_accuracy_of_training(
    digits_run: Path, validation: dict[str, float], held_out: Path, data: list[str], tmp_path: Path
) -> None:
    """`predict` prints the accuracy that training reported, and the file it writes has that many right."""
    printed = succeed("predict", digits_run, *data, "-o", tmp_path / "p.npy", cwd=held_out)
    predicted = np.load(tmp_path / "p.npy", allow_pickle=False)
    assert float(figures(printed)["accuracy"]) == validation["accuracy"]
    assert np.sum(predicted == raw_digits()[1][-HELD_OUT:]) / HELD_OUT == validation["accuracy"]
    assert predicted.dtype == np.int64


def test_a_run_and_its_newest_checkpoint_are_the_same_model(digits_run: Path, held_out: Path) -> None:
    """RUN means its newest checkpoint, which can also be named itself."""
    newest = max((digits_run / "checkpoints").iterdir())
    reports = [succeed("evaluate", model, "labelled.npz", cwd=held_out) for model in (digits_run, newest)]
    assert reports[0] == reports[1]


def test_data_with_two_parts_are_named(digits_run: Path, held_out: Path) -> None:
    """Of data with a validation part the training part is used, and the other one is pointed out."""
    printed = succeed("evaluate", digits_run, "idx", cwd=held_out)
    assert figures(printed)["part"] == "train"
    assert "180 samples for validation: --part validation" in printed


def test_a_part_that_is_not_there_is_refused(digits_run: Path, held_out: Path) -> None:
    """`--part validation` of data without such a part is a usage error."""
    assert "which has one part" in refuse(
        2, "evaluate", digits_run, "labelled.npz", "--part", "validation", cwd=held_out
    )


@pytest.mark.parametrize("data", ["unlabelled.npz", "samples.npy", "mislabelled.npz"])
def test_labels_are_not_needed_to_predict(
    digits_run: Path, held_out: Path, data: str, tmp_path: Path
) -> None:
    """Without usable labels the predictions are the same bytes, and it is said why there is no accuracy."""
    succeed("predict", digits_run, "labelled.npz", "-o", tmp_path / "with.csv", cwd=held_out)
    done = distbp("predict", digits_run, data, "-o", tmp_path / "without.csv", cwd=held_out)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "with.csv").read_bytes() == (tmp_path / "without.csv").read_bytes()
    assert "accuracy" not in done.stdout
    assert "predictions without accuracy" in done.stderr


def test_evaluate_needs_labels(digits_run: Path, held_out: Path) -> None:
    """Data without labels cannot be evaluated: 65, and what was expected."""
    assert "'x' and 'y'" in refuse(65, "evaluate", digits_run, "unlabelled.npz", cwd=held_out)


def test_csv_predictions_hold_names_and_probabilities(tables: Path, tmp_path: Path) -> None:
    """A CSV of classes has the name of the most probable class, and probabilities that sum to one."""
    succeed("predict", "colours", "colours.csv", "-o", tmp_path / "p.csv", cwd=tables)
    with (tmp_path / "p.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["prediction", *(f"p_{name}" for name in COLOURS)]
    assert len(rows) == 60
    for row in rows:
        chances = {name: float(row[f"p_{name}"]) for name in COLOURS}
        assert row["prediction"] == max(chances, key=lambda name: chances[name])
        assert math.isclose(sum(chances.values()), 1.0, abs_tol=1e-8)  # Three numbers of nine digits.


@pytest.mark.parametrize(("name", "possible"), [("colours", {0, 1, 2}), ("numbers", {3, 5, 40})])
def test_npy_predictions_are_numbers(tables: Path, name: str, possible: set[int], tmp_path: Path) -> None:
    """An .npy of classes holds their names where these are whole numbers, else their codes."""
    succeed("predict", name, f"{name}.csv", "-o", tmp_path / "p.npy", cwd=tables)
    predicted = np.load(tmp_path / "p.npy", allow_pickle=False)
    assert predicted.dtype == np.int64
    assert predicted.shape == (60,)
    assert set(predicted.tolist()) <= possible


def test_regression_is_predicted_and_evaluated(tables: Path, tmp_path: Path) -> None:
    """A regression gives numbers in the targets' unit in both formats, and `evaluate` reports their error."""
    for name in ("p.csv", "p.npy"):
        printed = succeed("predict", "price", "price.csv", "-o", tmp_path / name, cwd=tables)
    values = np.load(tmp_path / "p.npy", allow_pickle=False)
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0] == "prediction"
    assert values.dtype == np.float32
    assert np.array_equal(np.array(lines[1:], np.float32).view(np.uint32), values.view(np.uint32))
    wanted = np.loadtxt(tables / "price.csv", delimiter=",", skiprows=1, usecols=3)
    found = json.loads(succeed("evaluate", "price", "price.csv", "--json", cwd=tables))
    assert found["accuracy"] is None
    # Targets and predictions are rounded to float32 once; the comparison is in float64.
    assert math.isclose(found["rmse"], np.sqrt(np.mean((values - wanted) ** 2)), rel_tol=1e-5)
    assert {name: float(figures(printed)[name]) for name in ("loss", "rmse")} == {
        name: found[name] for name in ("loss", "rmse")
    }
    # The loss is that in units of the variance of the training targets; it squares float32 differences.
    metadata = json.loads((tables / found["checkpoint"] / "metadata.json").read_text())
    (deviation,) = metadata["preprocessing"]["target_std"]
    assert math.isclose(found["loss"], (found["rmse"] / deviation) ** 2, rel_tol=1e-5)


def test_several_outputs_have_one_error_each(tmp_path: Path) -> None:
    """Of a regression with outputs of different units, each has its own `rmse` and unit in the file."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 3))
    y = np.stack([x.sum(axis=1) * 1e5 + 1e6, x[:, 0] * 1e-3], axis=1)
    np.savez(tmp_path / "two.npz", x=x, y=y)
    options = ("--nproc", 1, "-o", "model.name=linear", "-o", "data.split=tail")
    succeed("train", "two.npz", "--out", "run", *options, cwd=tmp_path)
    succeed("predict", "run", "two.npz", "-o", "p.npy", cwd=tmp_path)
    predicted = np.load(tmp_path / "p.npy", allow_pickle=False)
    wanted = np.sqrt(np.mean((predicted - y) ** 2, axis=0))
    # A linear model learns these to a small part of their deviation, so rounding to float32 shows.
    found = json.loads(succeed("evaluate", "run", "two.npz", "--json", cwd=tmp_path))
    assert np.allclose(found["rmse"], wanted, rtol=1e-3)
    assert (wanted < 0.1 * y.std(axis=0)).all()
    # The last 20 samples, read from a file, give the loss that training reported to the last bit.
    np.savez(tmp_path / "held-out.npz", x=x[-20:], y=y[-20:])
    again = json.loads(succeed("evaluate", "run", "held-out.npz", "--json", cwd=tmp_path))
    assert again["loss"] == json.loads((tmp_path / "run" / "result.json").read_text())["validation"]["loss"]


def test_tables_are_read_by_the_names_of_their_columns(tables: Path, tmp_path: Path) -> None:
    """Columns may come in another order, under another target, or without the target."""
    with (tables / "price.csv").open(newline="") as stream:
        _, *rows = csv.reader(stream)
    a, b, c, price = (list(column) for column in zip(*rows, strict=True))
    write_table(tmp_path / "moved.csv", ["cost", "c", "a", "b"], [price, c, a, b])
    write_table(tmp_path / "bare.csv", ["c", "a", "b"], [c, a, b])
    for name, path in (
        ("p", tables / "price.csv"),
        ("q", tmp_path / "moved.csv"),
        ("r", tmp_path / "bare.csv"),
    ):
        succeed("predict", tables / "price", path, "-o", f"{name}.npy", cwd=tmp_path)
    assert (tmp_path / "p.npy").read_bytes() == (tmp_path / "q.npy").read_bytes()
    assert (tmp_path / "p.npy").read_bytes() == (tmp_path / "r.npy").read_bytes()
    same = [
        json.loads(succeed("evaluate", tables / "price", *data, "--json", cwd=tmp_path))["loss"]
        for data in ([tables / "price.csv"], ["moved.csv", "--target", "cost"])
    ]
    assert same[0] == same[1]


def test_a_target_that_is_an_input_is_refused(tables: Path, digits_run: Path) -> None:
    """`--target` may name neither an input of the model nor a column of data that have none."""
    assert "takes as input" in refuse(2, "evaluate", "price", "price.csv", "--target", "a", cwd=tables)
    assert "has no columns" in refuse(2, "evaluate", digits_run, "digits", "--target", "a", cwd=tables)


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (2, "p.txt", "ends in .npy or .csv"),
        (73, "nowhere/p.csv", "existing directory"),
        (73, "taken.csv", "got:"),
    ],
)
def test_what_cannot_be_written_is_refused(
    tables: Path, tmp_path: Path, code: int, output: str, expected: str
) -> None:
    """A wrong suffix is 2, a place that cannot be written is 73, and nothing is left behind."""
    (tmp_path / "taken.csv").mkdir()
    assert expected in refuse(
        code, "predict", tables / "price", tables / "price.csv", "-o", output, cwd=tmp_path
    )
    assert [path.name for path in tmp_path.iterdir()] == ["taken.csv"]


def test_a_wrong_suffix_is_refused_before_any_work(tmp_path: Path) -> None:
    """The name of the output is judged before the model is looked for."""
    assert "-o" in refuse(2, "predict", "no-such-run", "digits", "-o", "p.json", cwd=tmp_path)


def test_what_is_missing_is_named(tables: Path, tmp_path: Path) -> None:
    """A run, a checkpoint or data that do not exist are 66, with the path."""
    (tmp_path / "empty").mkdir()
    assert "found nothing" in refuse(66, "evaluate", "no-such-run", "digits", cwd=tmp_path)
    assert "holds no checkpoint" in refuse(66, "evaluate", "empty", "digits", cwd=tmp_path)
    assert "gone.csv" in refuse(66, "evaluate", tables / "price", "gone.csv", cwd=tmp_path)
    assert "gone.csv" in refuse(66, "predict", tables / "price", "gone.csv", "-o", "p.npy", cwd=tmp_path)


def test_samples_of_another_shape_are_refused(tables: Path, digits_run: Path, tmp_path: Path) -> None:
    """Data that are not like the training data are 65, in both directions."""
    assert "got an array" in refuse(65, "predict", "price", "digits", "-o", tmp_path / "p.npy", cwd=tables)
    assert "got a table" in refuse(65, "evaluate", digits_run, "price.csv", cwd=tables)


def test_a_damaged_checkpoint_of_a_run_is_passed_over_and_named(
    digits_run: Path, held_out: Path, tmp_path: Path
) -> None:
    """A run falls back to the checkpoint before and says so; a checkpoint that was named never does."""
    run = tmp_path / "run"
    shutil.copytree(digits_run, run)
    newest, before, *_ = sorted((run / "checkpoints").iterdir(), reverse=True)
    flip(newest / "state.safetensors")
    done = distbp("evaluate", run, "labelled.npz", "--json", cwd=held_out)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["checkpoint"] == str(before)
    assert f"W_CHECKPOINT_DAMAGED {newest.name}" in done.stderr
    assert "state.safetensors" in refuse(65, "evaluate", newest, "labelled.npz", cwd=held_out)
    for path in (run / "checkpoints").iterdir():
        (path / "manifest.json").unlink()
    assert "all of them damaged" in refuse(65, "evaluate", run, "labelled.npz", cwd=held_out)


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


SCRIPT = """
import numpy as np
import distbp
x = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
model = distbp.nn.Sequential(distbp.nn.Linear(2))
distbp.Trainer(model, batch_size=8).fit((x, np.arange(16) % 2), epochs=1, out="run")
"""


def test_a_model_of_a_script_is_used_from_python(tmp_path: Path) -> None:
    """A checkpoint of a script's own model is refused with the way to use it, and can be inspected."""
    (tmp_path / "train.py").write_text(SCRIPT)
    succeed("run", "--nproc", 1, "train.py", cwd=tmp_path)
    assert "load(path)" in refuse(2, "evaluate", "run", "digits", cwd=tmp_path)
    assert "load(path)" in refuse(2, "predict", "run", "digits", "-o", "p.npy", cwd=tmp_path)
    assert "every hash holds" in succeed("inspect", "run", cwd=tmp_path)
