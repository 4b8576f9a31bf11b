"""Split, normalisation and the data set in memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbp.data import ArrayDataset, Preprocessing, Source, Sources, fingerprint, load, prepare, split
from distbp.data.preprocessing import learn
from distbp.errors import ConfigError, DataError


def source_of(x: np.ndarray) -> Source:
    """Return samples as a source of one class."""
    schema = {"format": "npz", "sample_shape": list(x.shape[1:]), "task": "classification", "classes": ["0"]}
    return Source("test", "classification", x, np.zeros(len(x), np.int64), ("0",), schema)


def regression(y: np.ndarray, shape: tuple[int, ...] = (2,)) -> Source:
    """Return a source with targets `y` (N, O) and samples of zeros."""
    schema = {"format": "npz", "sample_shape": list(shape), "task": "regression", "classes": None}
    return Source("test", "regression", np.zeros((len(y), *shape)), y.astype(np.float32), None, schema)


def everything(x: np.ndarray) -> np.ndarray:
    """Return the numbers of all samples."""
    return np.arange(len(x))


@given(st.integers(2, 300), st.floats(0, 0.45), st.sampled_from(["random", "tail"]), st.integers(0, 9))
def test_split_is_a_partition(size: int, fraction: float, how: str, seed: int) -> None:
    """Each sample is in exactly one part, in ascending order, and the held out part has the asked size."""
    train, held_out = split(source_of(np.zeros((size, 1))), fraction, how, seed)
    assert sorted([*train, *held_out]) == list(range(size))
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    # Rounded to the nearest whole number, but a wish for validation gives at least one sample.
    assert len(held_out) == (max(1, int(fraction * size + 0.5)) if fraction else 0)
    if how == "tail" and len(held_out):
        assert train[-1] < held_out[0]


def test_split_depends_on_the_seed() -> None:
    """The random split is the same for the same seed and another one for another."""
    source = source_of(np.zeros((500, 1)))
    first, again, other = (split(source, 0.1, "random", seed)[1].tolist() for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(
    ("size", "fraction", "how"),
    [
        (1, 0.1, "random"),
        (3, 0.9, "tail"),
        (9, 1.0, "tail"),
        (9, -0.1, "tail"),
        (9, 0.1, "head"),
        (9, np.nan, "tail"),
    ],
)
def test_bad_splits(size: int, fraction: float, how: str) -> None:
    """A split that leaves no training data or does not exist is an error that names its key."""
    with pytest.raises(ConfigError, match=r"data\.(validation_fraction|split)"):
        split(source_of(np.zeros((size, 1))), fraction, how, 0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
@pytest.mark.parametrize("mode", ["global", "feature"])
def test_normalised_data_have_mean_0_and_deviation_1(dtype: type, mode: str) -> None:
    """After normalisation the training samples have mean 0 and deviation 1 over what was asked."""
    x = (np.random.default_rng(0).gamma(2.0, 20.0, (3000, 5, 4)) % 250).astype(dtype)
    made = learn(source_of(x), everything(x), mode)
    axis = None if mode == "global" else 0
    got = made.apply(x).astype(np.float64)
    # Float32 rounding of 3,000 values of size 1: their mean is off by less than one rounding, 1.2e-7 of the
    # largest.
    assert np.abs(got.mean(axis=axis)).max() < 1e-6
    assert np.abs(got.std(axis=axis) - 1).max() < 1e-6
    oracle = x.astype(np.float64)
    # Both sums are float64 over at most 60,000 values; the orders of addition differ.
    assert np.allclose(made.mean, oracle.mean(axis=axis).ravel(), rtol=1e-12)
    assert np.allclose(made.std, oracle.std(axis=axis).ravel(), rtol=1e-12)


def test_only_training_samples_are_learnt_from() -> None:
    """What is held out does not change the normalisation by a single bit."""
    x = np.random.default_rng(1).normal(size=(100, 3))
    changed = x.copy()
    changed[80:] = 1e6
    chosen = np.arange(80)
    assert learn(source_of(x), chosen) == learn(source_of(changed), chosen)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e9 + 0.1])
def test_constant_feature_is_only_shifted(value: float) -> None:
    """A feature that never changes has deviation 1, also where rounding makes its mean inexact."""
    made = learn(source_of(np.full((997, 1), value)), np.arange(997))
    assert made.std == (1.0,)
    assert np.abs(made.apply(np.full((3, 1), value))).max() < 1e-5


@pytest.mark.parametrize("shape", [(7,), (4, 4)])
def test_auto_mode(shape: tuple[int, ...]) -> None:
    """Images get one mean for everything, tables one for each feature; "none" changes nothing."""
    x = np.random.default_rng(2).integers(0, 255, (50, *shape)).astype(np.uint8)
    assert learn(source_of(x), everything(x)).mode == ("global" if len(shape) == 2 else "feature")
    assert np.array_equal(learn(source_of(x), everything(x), "none").apply(x), x.astype(np.float32))


def test_block_borders_change_nothing() -> None:
    """A sample is normalised to the same bits alone and inside a large array."""
    x = np.random.default_rng(3).integers(0, 255, (3000, 40, 40)).astype(np.uint8)
    made = learn(source_of(x), everything(x))
    alone = np.concatenate([made.apply(x[i : i + 1]) for i in (0, 162, 163, 164, 2999)])
    assert np.array_equal(made.apply(x)[[0, 162, 163, 164, 2999]].view(np.uint32), alone.view(np.uint32))


def test_preprocessing_survives_json() -> None:
    """Through JSON and back nothing changes, so a checkpoint normalises to the same bits."""
    source = load("digits").train
    for mode in ("none", "global", "feature"):
        made = learn(source, everything(source.x), mode)
        again = Preprocessing.from_dict(json.loads(json.dumps(made.to_dict())))
        assert again == made
        assert np.array_equal(again.apply(source.x).view(np.uint32), made.apply(source.x).view(np.uint32))


@pytest.mark.parametrize(
    "damage",
    [
        {"mean": []},
        {"std": [0.0]},
        {"mean": [float("nan")]},
        {"mode": "magic"},
        {"num_outputs": 3},
        {"task": 1},
    ],
)
def test_damaged_preprocessing_is_refused(damage: dict[str, object]) -> None:
    """Fields that do not fit together, or are missing, are bad content and not a crash."""
    source = load("digits").train
    good = learn(source, everything(source.x)).to_dict()
    with pytest.raises(DataError, match="preprocessing: expected"):
        Preprocessing.from_dict({**good, **damage})
    for name in good.keys() - {"target_mean", "target_std"}:
        with pytest.raises(DataError, match="preprocessing: expected"):
            Preprocessing.from_dict({key: value for key, value in good.items() if key != name})


@pytest.mark.parametrize("shape", [(2,), (4, 4)])
def test_targets_of_a_regression_are_normalised_by_output(shape: tuple[int, ...]) -> None:
    """Training targets have mean 0 and deviation 1 for each output; a constant one is only shifted."""
    scales = np.array([1e5, 1e-3, 0.0])
    y = np.random.default_rng(5).normal(3.0, 1.0, (500, 3)) * scales + [1e5, 0, 7]
    made = prepare(
        Sources(regression(y, shape)), validation_fraction=0.2, split="tail", normalize="auto", seed=0
    )
    got = made.train.y.astype(np.float64)
    assert made.train.y.dtype == np.float32
    # Values of size 1 in float32: their mean is off by less than one rounding of the largest.
    assert np.abs(got.mean(axis=0)).max() < 1e-6
    assert np.abs(got.std(axis=0) - [1, 1, 0]).max() < 1e-6
    assert made.validation is not None
    learnt = made.preprocessing
    assert learnt.target_std[2] == 1.0
    for part, original in ((made.train, y[:400]), (made.validation, y[400:])):
        # One rounding to float32 of the target, one of what the model sees of it.
        restored = learnt.restore_targets(part.y)
        assert restored.dtype == np.float64
        assert np.allclose(restored, original, rtol=3e-7, atol=1e-9)


def test_held_out_targets_are_not_learnt_from() -> None:
    """What is held out does not change the normalisation of the targets by a single bit."""
    y = np.random.default_rng(6).normal(size=(100, 2))
    changed = y.copy()
    changed[80:] = 1e6
    assert learn(regression(y), np.arange(80)) == learn(regression(changed), np.arange(80))


def test_targets_are_left_alone() -> None:
    """Codes of classes, and with "none" the numbers of a regression, stay as they are, bit for bit."""
    digits = load("digits").train
    y = np.random.default_rng(7).normal(1e5, 1, (50, 1)).astype(np.float32)
    for source, mode in ((digits, "auto"), (regression(y), "none")):
        made = learn(source, everything(source.x), mode)
        assert made.target_mean == made.target_std == ()
        assert np.array_equal(made.apply_targets(source.y), source.y)
        assert made.apply_targets(source.y).dtype == source.y.dtype
    assert np.array_equal(made.restore_targets(y), y.astype(np.float64))


def test_targets_survive_json() -> None:
    """Through JSON and back the targets become the same bits."""
    y = np.random.default_rng(8).normal(1e5, 1e3, (300, 2)).astype(np.float32)
    made = learn(regression(y), np.arange(200))
    again = Preprocessing.from_dict(json.loads(json.dumps(made.to_dict())))
    assert again == made
    assert np.array_equal(again.apply_targets(y).view(np.uint32), made.apply_targets(y).view(np.uint32))


def test_checkpoints_without_normalised_targets_are_read() -> None:
    """A checkpoint from before targets were normalised leaves them as they are."""
    y = np.random.default_rng(9).normal(1e5, 1e3, (30, 1)).astype(np.float32)
    fields = learn(regression(y), np.arange(30)).to_dict()
    old = Preprocessing.from_dict(
        {name: value for name, value in fields.items() if not name.startswith("target_")}
    )
    assert np.array_equal(old.apply_targets(y), y)
    assert np.array_equal(old.restore_targets(y), y)


@pytest.mark.parametrize(
    "damage",
    [
        {"target_mean": []},
        {"target_std": [0.0, 1.0]},
        {"target_mean": [float("inf"), 0.0]},
        {"target_mean": [0.0], "target_std": [1.0]},
        {"target_mean": "ab"},
        {"task": "classification", "classes": ["0", "1"]},
    ],
)
def test_damaged_targets_are_refused(damage: dict[str, object]) -> None:
    """Means and deviations that do not fit the outputs are bad content and not a crash."""
    good = learn(regression(np.random.default_rng(10).normal(size=(30, 2))), np.arange(30)).to_dict()
    with pytest.raises(DataError, match="preprocessing: expected"):
        Preprocessing.from_dict({**good, **damage})


def test_validation_set_of_the_data_is_used_whole() -> None:
    """An explicit validation set is taken as it is, training loses nothing, and fraction 0 means none."""
    digits = load("digits").train
    held_out = Source("v", digits.task, digits.x[:7], digits.y[:7], digits.classes, digits.schema)
    options = {"split": "random", "normalize": "auto", "seed": 1}
    made = prepare(Sources(digits, held_out), validation_fraction=0.1, **options)
    assert len(made.train) == 1797
    assert made.validation is not None
    assert np.array_equal(made.validation.x, made.train.x[:7])
    assert prepare(Sources(digits, held_out), validation_fraction=0.0, **options).validation is None


def test_batch_is_what_was_asked_for() -> None:
    """Indices of any shape give those samples, the same bytes into the caller's buffers."""
    x = np.arange(60, dtype=np.float32).reshape(10, 3, 2)
    dataset = ArrayDataset(x, np.arange(10))
    indices = np.array([[3, 3, 9], [0, 1, 2]])
    got_x, got_y = dataset.batch(indices)
    assert np.array_equal(got_x, x[indices])
    assert np.array_equal(got_y, indices)
    x_out, y_out = np.empty((2, 3, 3, 2), np.float32), np.empty((2, 3), np.int64)
    same_x, same_y = dataset.batch(indices, x_out, y_out)
    assert same_x is x_out
    assert same_y is y_out
    assert np.array_equal(x_out.view(np.uint32), got_x.view(np.uint32))
    assert np.array_equal(y_out, got_y)


@pytest.mark.parametrize("index", [-1, 10])
def test_batch_refuses_indices_out_of_range(index: int) -> None:
    """An index that does not exist is an error and never the nearest sample."""
    dataset = ArrayDataset(np.zeros((10, 1), np.float32), np.zeros(10, np.int64))
    with pytest.raises(IndexError, match=r"0\.\.9"):
        dataset.batch(np.array([0, index]))


@pytest.mark.parametrize("size", [1, 15, 1024, 1025, 5000])
def test_fingerprint(size: int) -> None:
    """Equal data have equal fingerprints; another first or last sample, label, shape or order has another."""
    x = np.random.default_rng(4).normal(size=(size, 2)).astype(np.float32)
    y = np.arange(size)
    seen = {fingerprint(ArrayDataset(x, y))}
    assert fingerprint(ArrayDataset(x.copy(), y.copy())) in seen
    for row in (0, size - 1):
        other = x.copy()
        other[row, 1] += 1
        seen.add(fingerprint(ArrayDataset(other, y)))
    seen.add(fingerprint(ArrayDataset(x, y + 1)))
    seen.add(fingerprint(ArrayDataset(x.reshape(size, 1, 2), y)))
    # With one sample the first and the last are the same.
    assert len(seen) == (5 if size > 1 else 4)
