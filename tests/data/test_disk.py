"""Samples that stay in their file, and the order in which a disk reads them fast."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from distbp.backends.threads import ThreadsJob
from distbp.data import (
    ArrayDataset,
    Blocks,
    Options,
    Order,
    ReadAhead,
    attach,
    fingerprint,
    load,
    pack,
    pack_datasets,
    prepare,
    unpack_datasets,
)
from distbp.data.disk_rows import DiskRows
from distbp.errors import ConfigError, DataError
from distbp.nn import mlp
from distbp.trainer import Trainer

ON_DISK, IN_MEMORY = Options(on_disk=True), Options(on_disk=False)


@pytest.fixture(params=["<f4", ">f4", "<f8", "|u1", "<i2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A directory of x.npy and y.npy, samples of one of the types that are read from a disk."""
    values = np.random.default_rng(1).integers(0, 100, (300, 5, 3))
    np.save(tmp_path / "x.npy", values.astype(request.param))
    np.save(tmp_path / "y.npy", values[:, 0, 0] % 4)
    return str(tmp_path)


def prepared(path: str, options: Options) -> ArrayDataset:
    """Return the training part."""
    sources = load(path, options=options)
    return prepare(sources, validation_fraction=0.2, split="random", normalize="auto", seed=0).train


def test_rows_are_those_of_the_array(folder: str) -> None:
    """Any rows, in any order, twice and across calls of the system, are the array's, of every type."""
    rows = load(folder, options=ON_DISK).train.x
    held = load(folder, options=IN_MEMORY).train.x
    assert isinstance(rows, DiskRows)
    for indices in (
        np.arange(300),
        np.array([7, 7, 299, 0, 6, 8]),
        np.array([[3, 2], [2, 3]]),
        np.empty(0, int),
    ):
        taken = rows.take(indices)
        assert (taken.dtype, taken.tobytes()) == (held.dtype, held[indices].tobytes())
        out = np.empty_like(taken)
        assert rows.take(indices, out) is out
        assert out.tobytes() == taken.tobytes()
        rows.read_ahead(indices)


def test_training_data_are_the_same_on_disk(folder: str) -> None:
    """Prepared, and on its way to a worker, a data set has the bytes and fingerprint of one in memory."""
    disk, memory = prepared(folder, ON_DISK), prepared(folder, IN_MEMORY)
    assert fingerprint(disk) == fingerprint(memory)
    arrays, described = pack_datasets({"train": disk})
    assert sum(array.nbytes for array in arrays.values()) < 240 * 24, "the samples did not stay on the disk"
    descriptor, places = pack(arrays)
    found = unpack_datasets(attach(descriptor, places), described)["train"]
    os.close(descriptor)
    for one, other in zip(found.batch(np.arange(240)), memory.batch(np.arange(240)), strict=True):
        assert one.tobytes() == other.tobytes()


def test_more_rows_than_one_call_reads(tmp_path: Path) -> None:
    """Thousands of neighbours come in several calls."""
    np.save(tmp_path / "x.npy", np.arange(10_000, dtype=np.float32).reshape(5000, 2))
    rows = DiskRows(str(tmp_path / "x.npy"), 128, (5000, 2), "<f4")
    assert rows[:].ravel().tolist() == list(range(10_000))


def test_a_large_file_stays_on_the_disk_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of more than half of the memory are not read into it, and smaller ones are."""
    np.save(tmp_path / "x.npy", np.zeros((1000, 10), np.float32))
    np.save(tmp_path / "y.npy", np.arange(1000) % 2)
    for memory, stays in ((90_000, False), (70_000, True)):
        monkeypatch.setattr("distbp.data.arrays.memory_bytes", lambda memory=memory: memory)
        assert isinstance(load(str(tmp_path)).train.x, DiskRows) == stays


def test_what_cannot_be_read_by_rows_is_refused(tmp_path: Path) -> None:
    """Arrays in another order or without rows, and archives, are refused if the disk was asked for."""
    np.save(tmp_path / "y.npy", np.arange(4) % 2)
    for array in (np.asfortranarray(np.eye(4)), np.arange(4.0), np.eye(4, dtype=bool)):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(DataError, match="C order"):
            load(str(tmp_path), options=ON_DISK)
    np.savez(tmp_path / "a.npz", x=np.eye(4), y=np.arange(4))
    with pytest.raises(ConfigError, match=r"data\.on_disk: expected an \.npy file"):
        load(str(tmp_path / "a.npz"), options=ON_DISK)


def test_another_file_is_noticed(tmp_path: Path) -> None:
    """A file that is cut short while it is read, or was changed when a worker opens it, is an error."""
    path = tmp_path / "x.npy"
    np.save(path, np.ones((100, 4), np.float32))
    rows = DiskRows(str(path), 128, (100, 4), "<f4")
    description = rows.describe(None)  # type: ignore[arg-type]
    os.truncate(path, 1000)
    with pytest.raises(DataError, match="cut short"):
        rows.take(np.array([99]))
    with pytest.raises(DataError, match="as it was when the job began"):
        DiskRows.restore(description, None)  # type: ignore[arg-type]
    np.save(path, np.zeros((100, 4), np.float32))
    os.utime(path, ns=(1, 1))
    with pytest.raises(DataError, match="as it was when the job began"):
        DiskRows.restore(description, None)  # type: ignore[arg-type]


def test_a_value_that_is_not_finite_is_found(tmp_path: Path) -> None:
    """It is not seen when the file is opened, but before the first step."""
    x = np.ones((100, 4), np.float32)
    x[57, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(100) % 2)
    with pytest.raises(DataError, match="NaN or Inf"):
        prepared(str(tmp_path), ON_DISK)


@pytest.mark.parametrize("size", [1, 7, 64, 1000, 4096, 10_007])
@pytest.mark.parametrize("block", [1, 5, 64])
def test_every_epoch_has_every_sample_once(size: int, block: int) -> None:
    """Whatever the blocks, an epoch is a permutation, another one than the epoch before."""
    order = Order(size, 3, Blocks(min(block, size), window=4))
    epochs = order.indices(0, 3 * size).reshape(3, size)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(size))
    if size > 64:
        assert (epochs[0] != epochs[1]).any()
        assert (epochs[0][: size // 2] != np.arange(size)[: size // 2]).any()


def test_positions_can_be_asked_for_in_any_pieces() -> None:
    """A worker that enters anywhere sees the same samples."""
    blocks = Blocks(16, window=8)
    whole = Order(1000, 5, blocks).indices(0, 3000)
    for start, count in ((0, 64), (999, 2), (130, 500), (2999, 1)):
        assert np.array_equal(Order(1000, 5, blocks).indices(start, count), whole[start : start + count])


def test_a_window_is_read_in_runs() -> None:
    """The samples of a window are those of its blocks: long runs, of many places, mixed."""
    blocks = Blocks(50, window=10)
    samples = Order(100_000, 1, blocks).indices(0, 500)
    runs = np.flatnonzero(np.diff(np.sort(samples)) != 1)
    assert len(runs) <= 10
    assert len({int(sample) // 50 for sample in samples[:50]}) >= 8
    assert np.ptp(samples) > 30_000


def trained(data: ArrayDataset, out: Path, shuffle: str, hosts: tuple[int, ...] = (1,)) -> str:
    """Return the hash of the state after some steps."""

    def program(members):  # type: ignore[no-untyped-def]
        trainer = Trainer(mlp(outputs=4, hidden=(8,)), batch_size=24, micro_batch=4, lr=0.01, shuffle=shuffle)
        return trainer.fit(data, epochs=2, max_steps=14, out=out, members=members).result

    results = ThreadsJob(program, hosts).run()
    assert len({result["state_sha256"] for result in results.values()}) == 1
    found: str = results[0]["state_sha256"]
    return found


def test_training_from_disk_has_the_bits_of_training_from_memory(folder: str, tmp_path: Path) -> None:
    """The same order of samples gives the same state, wherever they are held, on any workers."""
    disk, memory = prepared(folder, ON_DISK), prepared(folder, IN_MEMORY)
    for shuffle in ("full", "block"):
        expected = trained(memory, tmp_path / shuffle, shuffle)
        for hosts in ((1,), (2,), (3,), (2, 1)):
            name = "-".join(map(str, hosts))
            assert trained(disk, tmp_path / f"{shuffle}-{name}", shuffle, hosts) == expected


def test_auto_is_by_blocks_on_disk_and_full_in_memory(tmp_path: Path) -> None:
    """Without a word about it, each has the order that suits it; the orders are two runs."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(300, 4096)).astype(np.float32))
    np.save(tmp_path / "y.npy", np.arange(300) % 4)
    disk, memory = prepared(str(tmp_path), ON_DISK), prepared(str(tmp_path), IN_MEMORY)
    assert trained(disk, tmp_path / "a", "auto") == trained(memory, tmp_path / "b", "block")
    assert trained(memory, tmp_path / "c", "auto") == trained(memory, tmp_path / "d", "full")
    with pytest.raises(ConfigError, match="blocks"):
        trained(memory, tmp_path / "a", "full")


def test_what_comes_next_is_fetched_once() -> None:
    """One stretch ahead, each stretch once, and again after a turn back."""
    asked: list[np.ndarray] = []

    class Watched(DiskRows):
        def __init__(self) -> None:
            self.shape, self.dtype, self.disk_row_bytes = (1000, 2), np.dtype(np.float32), 8

        def read_ahead(self, indices: np.ndarray) -> None:
            asked.append(indices)

    order = Order(1000, 0, Blocks(10, window=4))
    ahead = ReadAhead(ArrayDataset(Watched(), np.zeros(1000, np.int64)), order, 16)
    for step in range(10):
        ahead.reach(16 * step)
    assert len(asked) == 5
    assert np.array_equal(np.concatenate(asked), order.indices(0, 200))
    ahead.reach(0)
    assert len(asked) == 7
