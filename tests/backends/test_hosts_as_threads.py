"""Whole trainings on several hosts, emulated as threads: the real loop, reduction and recovery."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from distbp import nn
from distbp.backends.threads import ThreadsJob, Vanish, VanishHost
from distbp.data import ArrayDataset, load, prepare
from distbp.optim import SGD
from distbp.trainer import Trainer

EPOCHS = 2


def digits():
    """A part of the digits, small enough for many runs."""
    prepared = prepare(load("digits"), validation_fraction=0.2, split="tail", normalize="auto", seed=0)
    x, y = prepared.train.x[:400], prepared.train.y[:400]
    return ArrayDataset(np.ascontiguousarray(x), np.ascontiguousarray(y)), prepared.validation


TRAIN, VALIDATION = digits()


def fit(out, train=TRAIN, augment=(), **options):
    """Return a program that trains a small network; each worker builds its own layers."""

    def program(members):
        model = nn.Sequential(nn.Flatten(), nn.Linear(24), nn.Tanh(), nn.Linear(10))
        trainer = Trainer(
            model,
            optimizer=SGD(momentum=0.9),
            clip_norm=1.0,
            batch_size=96,
            micro_batch=8,
            seed=3,
            augment=augment,
        )
        history = trainer.fit(
            train,
            val=VALIDATION,
            epochs=EPOCHS,
            out=out,
            log_samples=True,
            members=members,
            checkpoint_every_steps=4,
            **options,
        )
        return history.result

    return program


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The result of one worker on one host."""
    out = tmp_path_factory.mktemp("alone")
    return ThreadsJob(fit(out), (1,)).run()[0] | {"records": epoch_records(out)}


def epoch_records(out):
    """The records that end an epoch, without what depends on time."""
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record.get("epoch_end")]


@pytest.mark.parametrize(
    "host_sizes",
    [(2,), (3,), (1, 1), (2, 1), (1, 2), (2, 2), (3, 3), (1, 1, 1), (2, 1, 3), (3, 2, 1)],
    ids=str,
)
def test_any_hosts_and_workers_give_the_same_bits(host_sizes, alone, tmp_path):
    """One to three hosts with one to three workers each end in the bits, and the records, of one worker."""
    results = ThreadsJob(fit(tmp_path), host_sizes).run()
    assert len(results) == sum(host_sizes)
    for result in results.values():
        assert result["parameters_sha256"] == alone["parameters_sha256"]
        assert result["state_sha256"] == alone["state_sha256"]
        assert result["validation"] == alone["validation"]
    assert epoch_records(tmp_path) == alone["records"]


class VanishingData(ArrayDataset):
    """Data that make the worker who asks for the n-th batch vanish, once."""

    def __init__(self, rank, call, how=Vanish):
        self._how = how
        super().__init__(TRAIN.x, TRAIN.y)
        self._rank, self._call, self._lock = rank, call, threading.Lock()
        self._counts = {}
        self.vanished = False

    def batch(self, indices, x_out=None, y_out=None):
        name = threading.current_thread().name
        with self._lock:
            self._counts[name] = self._counts.get(name, 0) + 1
            if not self.vanished and name == f"worker-{self._rank}" and self._counts[name] == self._call:
                self.vanished = True
                raise self._how
        return super().batch(indices, x_out, y_out)


@pytest.mark.parametrize("host_sizes", [(2,), (1, 1), (2, 2), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("call", [1, 2, 3, 7, 10])
def test_a_worker_that_vanishes_is_replaced_and_nothing_is_lost(host_sizes, call, alone, tmp_path):
    """Whichever worker is lost, at the start or in a step, the run ends with the undisturbed bits."""
    for rank in range(sum(host_sizes)):
        data = VanishingData(rank, call)
        out = tmp_path / str(rank)
        job = ThreadsJob(fit(out, data), host_sizes)
        results = job.run()
        assert data.vanished
        assert job.state.restarts == 1
        for result in results.values():
            assert result["state_sha256"] == alone["state_sha256"]
        assert epoch_records(out) == alone["records"]
        samples = (out / "samples.log").read_text().splitlines()
        assert [int(line.split("\t")[0]) for line in samples] == list(range(len(samples)))
        assert len(samples) == alone["steps"]


@pytest.mark.parametrize("host_sizes", [(1, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("call", [1, 2, 5, 9])
def test_a_host_that_vanishes_gets_the_state_from_another(host_sizes, call, alone, tmp_path):
    """A host that is lost with its memory comes back with the state of a living one, at the same step."""
    for rank in range(len(host_sizes)):
        data = VanishingData(rank, call, VanishHost)
        results = ThreadsJob(fit(tmp_path / str(rank), data), host_sizes).run()
        assert data.vanished
        for result in results.values():
            assert result["state_sha256"] == alone["state_sha256"]
        assert epoch_records(tmp_path / str(rank)) == alone["records"]


class SlowSamples:
    """Takes its time over the samples of the second half of a batch, which the second host has."""

    def check(self, sample_shape):
        """Take any."""

    def __call__(self, x, seed, step, micro_batch):
        if micro_batch >= 6:
            time.sleep(0.02)


def test_the_ledger_says_which_host_waited(tmp_path):
    """The host without the slow samples waits for the other one, in each step for six of them."""
    result = ThreadsJob(fit(tmp_path, augment=[SlowSamples()]), (1, 1)).run()[0]
    quick, slow = result["workers"]
    assert (quick["host"], slow["host"]) == (0, 1)
    assert slow["host_wait_s"] == 0
    assert quick["host_wait_s"] == pytest.approx(slow["cost_s"])
    assert 0 < quick["host_wait_s"] <= slow["compute_s"]
