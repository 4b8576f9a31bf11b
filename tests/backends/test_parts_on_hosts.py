"""Every optimizer in whole trainings on emulated hosts: the same bits for any workers, and after a loss."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from distbp import checkpoint, nn
from distbp.backends.threads import ThreadsJob, Vanish
from distbp.data import ArrayDataset
from distbp.optim import LAMB, OPTIMIZERS, Averaged
from distbp.trainer import Trainer

PARTS = {**OPTIMIZERS, "average": lambda: Averaged(LAMB(), decay=0.9)}
HOSTS = [(2,), (3,), (5,), (2, 1)]


def data():
    """Return three classes in five dimensions."""
    generator = np.random.default_rng(1)
    y = generator.integers(0, 3, size=90)
    x = generator.normal(size=(90, 5)) + np.eye(3, 5)[y]
    return np.ascontiguousarray(x, np.float32), y


X, Y = data()


def fit(name, out, train=None):
    """Return a program that trains a small network for two epochs with one optimizer."""

    def program(members):
        model = nn.Sequential(nn.Linear(200), nn.Tanh(), nn.Linear(130), nn.Tanh(), nn.Linear(3))
        trainer = Trainer(model, optimizer=PARTS[name](), clip_norm=1.0, batch_size=30, micro_batch=3, seed=1)
        options = {"epochs": 2, "out": out, "members": members, "checkpoint_every_steps": 2}
        history = trainer.fit(train or ArrayDataset(X, Y), val=(X[:40], Y[:40]), **options)
        return history.result | {"again": trainer.evaluate((X[:40], Y[:40]))}

    return program


@pytest.mark.parametrize("name", PARTS)
def test_any_workers_give_the_same_bits(name, tmp_path):
    """Two, three and five workers on one host, and three on two hosts, end in the bits of one worker."""
    alone = ThreadsJob(fit(name, tmp_path / "alone"), (1,)).run()[0]
    assert alone["train_loss"] < 1.4
    for hosts in HOSTS:
        results = ThreadsJob(fit(name, tmp_path / str(hosts)), hosts).run()
        for result in results.values():
            assert result["state_sha256"] == alone["state_sha256"]
            assert result["validation"] == alone["validation"]


@pytest.mark.parametrize("name", ["lars", "lamb", "average"])
@pytest.mark.parametrize("call", [2, 4])
def test_a_loss_between_the_sums_loses_nothing(name, call, tmp_path):
    """With an optimizer that has sums of its own, a worker that vanishes is replaced: the same bits."""

    class Vanishing(ArrayDataset):
        """Data that make worker 1 vanish at its n-th batch, once."""

        calls = 0

        def batch(self, indices, x_out=None, y_out=None):
            if threading.current_thread().name == "worker-1":
                self.calls += 1
                if self.calls == call:
                    raise Vanish
            return super().batch(indices, x_out, y_out)

    alone = ThreadsJob(fit(name, tmp_path / "alone"), (1,)).run()[0]
    job = ThreadsJob(fit(name, tmp_path / "lost", Vanishing(X, Y)), (2, 1))
    for result in job.run().values():
        assert result["state_sha256"] == alone["state_sha256"]
    assert job.state.restarts == 1


def test_the_average_validates_and_predicts(tmp_path):
    """With an average it is the average that validation, evaluate and a loaded checkpoint use."""
    result = ThreadsJob(fit("average", tmp_path), (2,)).run()[0]
    assert result["again"] == result["validation"]
    model = nn.Sequential(nn.Linear(200), nn.Tanh(), nn.Linear(130), nn.Tanh(), nn.Linear(3))
    trainer = Trainer(model, optimizer=PARTS["average"]()).load(tmp_path)
    assert trainer.evaluate((X[:40], Y[:40])) == result["validation"]
    tensors = checkpoint.load(max((tmp_path / "checkpoints").glob("step-*"))).tensors
    assert {name.partition("/")[0] for name in tensors} >= {"parameters", "average", "first_moment"}
    assert not np.array_equal(tensors["parameters/0.weight"], tensors["average/0.weight"])
