"""The contract of every source: what `load` promises, whatever the format."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distbp.data import (
    SOURCES,
    Source,
    attach,
    fingerprint,
    load,
    pack,
    pack_datasets,
    prepare,
    unpack_datasets,
)
from distbp.errors import ConfigError
from tests.data.data_files import images, labels, write_idx, write_wav

REAL_MNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "mnist-t10k"


def make_digits(folder: Path) -> str:
    """The built-in name."""
    return "digits"


def make_idx(folder: Path) -> str:
    """A training pair of IDX files in a directory."""
    write_idx(folder / "train-images-idx3-ubyte", images(30))
    write_idx(folder / "train-labels-idx1-ubyte", labels(30))
    return str(folder)


def make_idx_compressed(folder: Path) -> str:
    """A compressed pair, given by its images file."""
    write_idx(folder / "train-images-idx3-ubyte.gz", images(30))
    write_idx(folder / "train-labels-idx1-ubyte.gz", labels(30))
    return str(folder / "train-images-idx3-ubyte.gz")


def make_npz(folder: Path) -> str:
    """One .npz with capital names."""
    np.savez_compressed(folder / "data.npz", X=images(30), Y=labels(30))
    return str(folder / "data.npz")


def make_npy_directory(folder: Path) -> str:
    """A directory with x.npy, in Fortran order, and two float targets in y.npy."""
    np.save(folder / "x.npy", np.asfortranarray(images(30)))
    np.save(folder / "y.npy", np.linspace(-1, 1, 60).reshape(30, 2))
    return str(folder)


def make_npy_pair(folder: Path) -> str:
    """Two .npy files, big-endian, given by the first."""
    np.save(folder / "x_train.npy", images(30).astype(">f4"))
    np.save(folder / "y_train.npy", labels(30))
    return str(folder / "x_train.npy")


def table_text(delimiter: str) -> str:
    """Return a table with a number, a text and a class."""
    rows = [["age", "town", "label"]] + [[str(20 + i / 2), "BAC"[i % 3], str(i % 2)] for i in range(30)]
    return "\n".join(delimiter.join(row) for row in rows) + "\n"


def make_csv(folder: Path) -> str:
    """A .csv file."""
    (folder / "people.csv").write_text(table_text(","))
    return str(folder / "people.csv")


def make_tsv(folder: Path) -> str:
    """A .tsv file."""
    (folder / "people.tsv").write_text(table_text("\t"))
    return str(folder / "people.tsv")


def make_parquet(folder: Path) -> str:
    """A Parquet file of the same table."""
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'distbp[parquet]'")
    from pyarrow import csv

    parquet.write_table(csv.read_csv(make_csv(folder)), folder / "people.parquet", row_group_size=7)
    return str(folder / "people.parquet")


def make_text(folder: Path) -> str:
    """A text of 1,600 characters."""
    (folder / "story.txt").write_text("Once upon a time \u00e4 \n" * 80)
    return str(folder / "story.txt")


def make_image_folder(folder: Path) -> str:
    """A folder of images for each of three classes."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'distbp[image]'")
    for number, (pixels, label) in enumerate(zip(images(30), labels(30), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        image.fromarray(pixels).save(folder / str(label) / f"{number}.png")
    return str(folder)


def make_sound_folder(folder: Path) -> str:
    """A folder of WAV files for each of three classes."""
    for number, (pixels, label) in enumerate(zip(images(30), labels(30), strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        write_wav(folder / str(label) / f"{number}.wav", pixels.reshape(-1).tobytes(), width=1)
    return str(folder)


MAKERS = {
    "sound folder": make_sound_folder,
    "image folder": make_image_folder,
    "digits": make_digits,
    "idx": make_idx,
    "idx.gz": make_idx_compressed,
    "npz": make_npz,
    "npy directory": make_npy_directory,
    "npy pair": make_npy_pair,
    "csv": make_csv,
    "tsv": make_tsv,
    "parquet": make_parquet,
    "text": make_text,
}


@pytest.fixture(params=MAKERS)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The path of a small data set in one of the formats."""
    return MAKERS[request.param](tmp_path)


def values(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Return all samples and targets of a source, whether they are held or made when asked for."""
    return source.x[:], source.y[:]


def test_canonical_form(path: str) -> None:
    """Every source gives finite samples, one target each, and classes exactly for classification."""
    source = load(path).train
    x, y = values(source)
    assert (x.shape, x.dtype) == (source.x.shape, source.x.dtype)
    assert (y.shape, y.dtype) == (source.y.shape, source.y.dtype)
    assert x.ndim >= 2
    assert x.flags.c_contiguous
    assert x.dtype.isnative
    assert np.isfinite(x).all()
    assert len(y) == len(x) > 0
    if source.task == "classification":
        assert y.dtype == np.int64
        assert source.classes is not None
        assert 0 <= y.min() <= y.max() < len(source.classes) == source.num_outputs
    else:
        assert y.dtype == np.float32
        assert source.classes is None
        assert y.shape == (len(x), source.num_outputs)


def test_same_path_same_bits(path: str) -> None:
    """Loading a path twice gives the same bytes."""
    for first, second in zip(values(load(path).train), values(load(path).train), strict=True):
        assert first.tobytes() == second.tobytes()


def test_schema_reads_the_file_alike(path: str) -> None:
    """A schema that went through JSON reads the same file to the same bytes and the same schema."""
    first = load(path).train
    again = load(path, schema=json.loads(json.dumps(first.schema))).train
    for one, other in zip(values(again), values(first), strict=True):
        assert one.tobytes() == other.tobytes()
    assert again.classes == first.classes
    assert {**again.schema, "format": first.schema["format"]} == first.schema


def test_labels_are_not_needed_to_predict(path: str) -> None:
    """With `labelled=False` the samples are the same and the targets are zeros of the right shape."""
    first = load(path).train
    blind = load(path, schema=first.schema, labelled=False).train
    assert not blind.labelled
    assert blind.x[:].tobytes() == first.x[:].tobytes()
    assert blind.y.shape == first.y.shape
    assert blind.y.dtype == first.y.dtype
    assert not blind.y[:].any()


def test_source_can_be_prepared(path: str) -> None:
    """Whatever was loaded becomes training and validation data that cover every sample."""
    source = load(path).train
    made = prepare(load(path), validation_fraction=0.2, split="random", normalize="auto", seed=1)
    assert made.validation is not None
    assert len(made.train) + len(made.validation) == len(source.x)
    assert made.train.x.dtype == (np.int64 if source.schema.get("codes") else np.float32)
    assert np.isfinite(made.train.x[:]).all()


def test_data_survive_the_way_to_a_worker(path: str) -> None:
    """Packed into shared memory and unpacked, data sets give the same bytes, fingerprints and lengths."""
    made = prepare(load(path), validation_fraction=0.2, split="random", normalize="auto", seed=1)
    arrays, described = pack_datasets({"train": made.train, "validation": made.validation, "other": None})
    descriptor, places = pack(arrays)
    found = unpack_datasets(attach(descriptor, places), json.loads(json.dumps(described)))
    os.close(descriptor)
    assert set(found) == {"train", "validation"}
    assert fingerprint(found["train"]) == fingerprint(made.train)
    indices = np.array([3, 0, 3], np.int64)
    out = tuple(np.empty_like(part) for part in made.train.batch(indices))
    for batch in (found["train"].batch(indices), found["train"].batch(indices, *out), out):
        for one, other in zip(batch, made.train.batch(indices), strict=True):
            assert (one.tobytes(), one.dtype, one.shape) == (other.tobytes(), other.dtype, other.shape)


def test_target_without_columns_is_refused(path: str) -> None:
    """`--target` is never silently ignored: formats without columns refuse it."""
    if path.endswith((".csv", ".tsv", ".parquet")):
        assert load(path, target="age").train.schema["target"] == "age"
    else:
        with pytest.raises(ConfigError, match="leave --target out"):
            load(path, target="age")


def test_every_format_is_in_the_contract(tmp_path: Path) -> None:
    """Each format of SOURCES recognises one of the files of this suite, so none escapes the contract."""
    seen = set()
    for name, maker in MAKERS.items():
        folder = tmp_path / name.replace(" ", "-")
        folder.mkdir()
        made = Path(maker(folder))
        if made.exists():
            seen.add(next(key for key, source in SOURCES.items() if source.matches(made)))
    assert seen == set(SOURCES)


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    """The shipped digits are bit for bit those that scikit-learn distributes."""
    from sklearn.datasets import load_digits

    source, oracle = load("digits").train, load_digits()
    assert source.x.shape == (1797, 8, 8)
    assert source.x.dtype == np.uint8
    assert np.array_equal(source.x, oracle.images)
    assert np.array_equal(source.y, oracle.target)


def test_builtin_name_wins_over_a_local_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`digits` is the built-in data even where a directory has that name; `./digits` is the directory."""
    (tmp_path / "digits").mkdir()
    make_idx(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert len(load("digits").train.x) == 1797
    assert len(load("./digits").train.x) == 30


def test_train_and_t10k_pairs_of_a_directory(tmp_path: Path) -> None:
    """A directory with a train pair and a t10k pair gives training and validation data."""
    make_idx(tmp_path)
    write_idx(tmp_path / "t10k-images-idx3-ubyte", images(9, seed=1))
    write_idx(tmp_path / "t10k-labels-idx1-ubyte", labels(9))
    sources = load(str(tmp_path))
    assert np.array_equal(sources.train.x, images(30))
    assert sources.validation is not None
    assert np.array_equal(sources.validation.x, images(9, seed=1))
    assert sources.validation.classes == sources.train.classes


@pytest.mark.parametrize("validation", ["val", "test"])
def test_validation_arrays_of_an_npz(tmp_path: Path, validation: str) -> None:
    """An .npz with x_train and x_val or x_test gives both, with the classes of training."""
    parts = {"x_train": images(30), "y_train": labels(30)}
    np.savez(tmp_path / "a.npz", **parts, **{f"x_{validation}": images(2), f"y_{validation}": labels(2)})
    sources = load(str(tmp_path / "a.npz"))
    assert sources.validation is not None
    assert len(sources.validation.x) == 2
    assert sources.validation.classes == sources.train.classes


@pytest.mark.parametrize("code", ["u1", "i1", "i2", "i4", "f4", "f8"])
def test_idx_value_types(tmp_path: Path, code: str) -> None:
    """Every value type of IDX comes back with its values and its type."""
    x = np.arange(-6, 6).reshape(6, 2).astype(code)
    write_idx(tmp_path / "a-images", x)
    write_idx(tmp_path / "a-labels", labels(6))
    got = load(str(tmp_path / "a-images")).train.x
    assert got.dtype == x.dtype
    assert np.array_equal(got, x)


def test_real_mnist() -> None:
    """The real MNIST test pair is a lone pair: 10,000 images, ten classes, no validation set."""
    if not REAL_MNIST.is_dir():
        pytest.skip(f"needs the MNIST test files in {REAL_MNIST}")
    sources = load(str(REAL_MNIST))
    assert sources.validation is None
    assert sources.train.x.shape == (10000, 28, 28)
    # The published counts of the digits 0 and 1 in the test set.
    assert np.bincount(sources.train.y)[:2].tolist() == [980, 1135]


def test_class_gaps_are_allowed(tmp_path: Path) -> None:
    """Codes 0 and 5 make six classes: codes are names, not counts."""
    np.savez(tmp_path / "a.npz", x=images(4), y=np.array([0, 5, 0, 5]))
    assert load(str(tmp_path / "a.npz")).train.classes == ("0", "1", "2", "3", "4", "5")


def test_regression_targets_become_a_column(tmp_path: Path) -> None:
    """Float targets of shape (N,) are regression with one output."""
    np.savez(tmp_path / "a.npz", x=images(4), y=np.array([0.5, 1, 2, 3]))
    source = load(str(tmp_path / "a.npz")).train
    assert source.task == "regression"
    assert source.y.tolist() == [[0.5], [1], [2], [3]]
    assert replace(source, name="b").num_outputs == 1
