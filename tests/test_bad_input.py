"""Bad input to `distbp train`: the message, the exit code, and no worker started."""

from __future__ import annotations

import gzip
import shutil
import struct

import numpy as np
import pytest

from tests.conftest import result_of, wait_until

SHORT = ["-o", "train.max_steps=20", "-o", "checkpoint.every_steps=5"]


def write_idx(folder, count=40, labels=None, cut=0):
    """A pair of IDX files with `count` images of 4x4; `cut` bytes are missing at the end of the images."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 4, 4), np.uint8)
    labels = rng.integers(0, 3, count) if labels is None else labels
    content = struct.pack(">IIII", 0x803, count, 4, 4) + images.tobytes()
    (folder / "train-images-idx3-ubyte").write_bytes(content[: len(content) - cut])
    header = struct.pack(">II", 0x801, count)
    (folder / "train-labels-idx1-ubyte").write_bytes(header + np.asarray(labels, np.uint8).tobytes())
    return folder


def write_table(path, rows):
    """A CSV file with two numeric columns and a class."""
    path.write_text("a,b,kind\n" + "\n".join(rows) + "\n")
    return path


GOOD_ROWS = [f"{i},{i * 0.5},{'xyz'[i % 3]}" for i in range(30)]


def truncated_idx(tmp_path):
    """Images of which the last bytes are missing."""
    return [write_idx(tmp_path / "idx", cut=10)], 65, ["train-images-idx3-ubyte", "656", "646"]


def truncated_gzip(tmp_path):
    """Compressed images that end too early."""
    folder = write_idx(tmp_path / "idx")
    plain = folder / "train-images-idx3-ubyte"
    packed = gzip.compress(plain.read_bytes())
    plain.unlink()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(packed[:-20])
    return [folder], 65, ["train-images-idx3-ubyte.gz"]


def label_out_of_range(tmp_path):
    """A negative class."""
    path = tmp_path / "data.npz"
    y = np.arange(30) % 3
    y[7] = -1
    np.savez(path, x=np.ones((30, 4), np.float32), y=y)
    return [path], 65, ["data.npz", "out of range", "-1", "7"]


def text_in_a_numeric_column(tmp_path):
    """One word among numbers: file, row and column are named."""
    rows = list(GOOD_ROWS)
    rows[4] = "4,abc,x"
    return [write_table(tmp_path / "t.csv", rows), "--target", "kind"], 65, ["t.csv", "6", "'b'", "'abc'"]


def nan_in_the_data(tmp_path):
    """A number that is none: the sample is named."""
    path = tmp_path / "data.npz"
    x = np.ones((30, 4), np.float32)
    x[11, 2] = np.nan
    np.savez(path, x=x, y=np.arange(30) % 3)
    return [path], 65, ["data.npz", "11"]


BAD = {
    "unknown model": lambda path: (["digits", "-o", "model.name=mpl"], 2, ["model.name", "'mpl'", "mlp"]),
    "unknown key": lambda path: (["digits", "-o", "optimizer.momentun=0.5"], 2, ["momentun", "momentum"]),
    "too many workers": lambda path: (
        ["digits", "--nproc", "9"],
        2,
        ["9 workers", "batch_size 64", "--nproc 8", "--batch-size 72"],
    ),
    "batch size no multiple": lambda path: (
        ["digits", "--batch-size", "64", "--micro-batch", "48"],
        2,
        ["64", "48"],
    ),
    "learning rate nan": lambda path: (["digits", "-o", "optimizer.lr=nan"], 2, ["optimizer.lr", "nan"]),
    "missing file": lambda path: ([path / "missing.npz"], 66, ["missing.npz"]),
    "no data": lambda path: ([], 2, ["distbp train digits"]),
    "missing configuration": lambda path: (["digits", "-c", path / "job.toml"], 66, ["job.toml"]),
    "truncated IDX": truncated_idx,
    "truncated gzip": truncated_gzip,
    "label out of range": label_out_of_range,
    "text in a numeric column": text_in_a_numeric_column,
    "NaN in the data": nan_in_the_data,
    "unknown target": lambda path: (
        [write_table(path / "t.csv", GOOD_ROWS), "--target", "kinds"],
        2,
        ["kinds", "kind"],
    ),
    "serial with two workers": lambda path: (
        ["digits", "--backend", "serial", "--nproc", "2"],
        2,
        ["--backend local"],
    ),
    "missing checkpoint": lambda path: (["digits", "--resume", path / "none"], 66, ["none"]),
    "regression loss for classes": lambda path: (
        ["digits", "-o", "loss.name=mean_squared_error"],
        2,
        ["loss.name", "classes"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused(name, distbp, tmp_path):
    """Every kind of bad input has its code, names the culprit, and starts no worker."""
    arguments, code, parts = BAD[name](tmp_path)
    done = distbp("train", *arguments, "--out", tmp_path / "run")
    assert done.returncode == code, done.stderr
    for part in parts:
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob("logs/*"))


def test_all_mistakes_are_told_at_once(distbp):
    """Three mistakes in one command give three lines."""
    done = distbp(
        "train", "digits", "-o", "optimizer.lr=-1", "-o", "model.hiden=[3]", "-o", "train.epochs=many"
    )
    assert done.returncode == 2
    for part in ("optimizer.lr", "model.hiden", "model.hidden", "train.epochs", "'many'"):
        assert part in done.stderr


def test_more_workers_than_cores_is_a_warning(distbp, tmp_path):
    """Too many workers for the machine run, and are told what would be faster."""
    done = distbp("train", "digits", *SHORT, "--nproc", "8", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "W_MORE_WORKERS_THAN_CORES 8 workers" in done.stderr


def test_a_run_directory_in_use_is_refused(start, distbp, tmp_path):
    """The second job gets 73 and the first one's process number."""
    out = tmp_path / "run"
    first = start("train", "digits", "--epochs", "4000", "--out", out)
    wait_until(lambda: (out / "lock").exists() and (out / "lock").stat().st_size)
    second = distbp("train", "digits", "--out", out)
    assert second.returncode == 73
    assert f"process {first.pid}" in second.stderr
    first.kill()
    assert distbp("train", "digits", *SHORT, "--out", out).returncode == 0


def test_never_resume_protects_a_run(distbp, tmp_path):
    """`--resume never` into a directory that holds a run is refused."""
    out = tmp_path / "run"
    assert distbp("train", "digits", *SHORT, "--out", out).returncode == 0
    again = distbp("train", "digits", *SHORT, "--out", out, "--resume", "never")
    assert again.returncode == 73
    assert "already holds a run" in again.stderr


def test_a_finished_run_says_so(distbp, tmp_path):
    """The same command again ends at once with 0, and more epochs go on from the end."""
    out = tmp_path / "run"
    assert distbp("train", "digits", *SHORT, "--out", out).returncode == 0
    again = distbp("train", "digits", *SHORT, "--out", out)
    assert again.returncode == 0
    assert "already finished" in again.stderr
    longer = distbp("train", "digits", "-o", "train.max_steps=30", "--out", out)
    assert longer.returncode == 0, longer.stderr
    assert result_of(out)["steps"] == 30


def flip_a_bit(checkpoint):
    """Change one bit in the middle of a checkpoint's tensors."""
    path = checkpoint / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_falls_back_and_says_so(distbp, tmp_path):
    """A damaged newest checkpoint is named and the one before is used; the end has the same bits."""
    out, whole = tmp_path / "run", tmp_path / "whole"
    options = [*SHORT, "-o", "schedule.name=constant"]
    assert distbp("train", "digits", *options, "--out", whole).returncode == 0
    assert distbp("train", "digits", *options, "-o", "train.max_steps=15", "--out", out).returncode == 0
    flip_a_bit(out / "checkpoints" / "step-00000015")
    done = distbp("train", "digits", *options, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "W_CHECKPOINT_DAMAGED step-00000015" in done.stderr
    assert result_of(out)["state_sha256"] == result_of(whole)["state_sha256"]


def test_a_named_checkpoint_never_falls_back(distbp, tmp_path):
    """Who names a damaged checkpoint gets 65 and the reason, although an older one is whole."""
    out = tmp_path / "run"
    assert distbp("train", "digits", *SHORT, "--out", out).returncode == 0
    damaged = out / "checkpoints" / "step-00000020"
    flip_a_bit(damaged)
    done = distbp("train", "digits", *SHORT, "--out", tmp_path / "new", "--resume", damaged)
    assert done.returncode == 65
    assert "state.safetensors" in done.stderr


def test_a_checkpoint_of_another_model_is_refused(distbp, tmp_path):
    """Another network, or another seed, is not silently trained on."""
    out = tmp_path / "run"
    assert distbp("train", "digits", *SHORT, "--out", out).returncode == 0
    done = distbp("train", "digits", *SHORT, "-o", "model.hidden=[7]", "--seed", "4", "--out", out)
    assert done.returncode == 2
    assert "belongs to another run" in done.stderr
    assert "layout" in done.stderr
    assert "seed: the checkpoint has 0, this run 4" in done.stderr


def test_no_space_in_the_run_directory_is_named(distbp, tmp_path):
    """A run directory that cannot be made is 73 with the path."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    done = distbp("train", "digits", "--out", blocked / "run")
    assert done.returncode == 73
    assert str(blocked / "run") in done.stderr
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
