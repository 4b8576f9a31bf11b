"""Every optimizer and kind of network in whole trainings on emulated hosts: the same bits everywhere."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from distbp import checkpoint, nn
from distbp.backends.threads import ThreadsJob, Vanish
from distbp.data import ArrayDataset
from distbp.optim import LAMB, OPTIMIZERS, SGD, Adam, Averaged
from distbp.trainer import Trainer

HOSTS = [(2,), (3,), (5,), (2, 1)]
SAMPLES = 90


@dataclass(frozen=True)
class Part:
    """How to make a model, what it takes, and what trains it."""

    model: Any
    x: np.ndarray
    y: np.ndarray
    loss: str = "cross_entropy"
    optimizer: Any = Adam
    options: dict[str, Any] = field(default_factory=dict)


def normal(*shape: int) -> np.ndarray:
    """Return float32 samples."""
    return np.random.default_rng(1).normal(size=(SAMPLES, *shape)).astype(np.float32)


def codes(number: int, *shape: int) -> np.ndarray:
    """Return integer codes below `number`."""
    return np.random.default_rng(2).integers(0, number, size=(SAMPLES, *shape))


def perceptron() -> nn.Layer:
    """Return a network with tensors of several blocks of norms."""
    return nn.Sequential(nn.Linear(200), nn.Tanh(), nn.Linear(130), nn.Tanh(), nn.Linear(3))


def average() -> Averaged:
    """Return an optimizer with sums of its own and an average."""
    return Averaged(LAMB(), decay=0.9)


PARTS = {
    **{name: Part(perceptron, normal(5), codes(3), optimizer=kind) for name, kind in OPTIMIZERS.items()},
    "average": Part(perceptron, normal(5), codes(3), optimizer=average),
    "gru": Part(lambda: nn.gru(outputs=3, hidden=(7, 5)), normal(6, 2), codes(3)),
    "lstm": Part(lambda: nn.lstm(outputs=1, hidden=(6,)), normal(6), normal(1), loss="mean_squared_error"),
    "transformer": Part(
        lambda: nn.transformer(outputs=11, layers=2, heads=2, width=16), codes(11, 9), codes(11, 9)
    ),
    "huber": Part(lambda: nn.linear(outputs=2), normal(4), normal(2), loss="huber", optimizer=SGD),
    "binary": Part(lambda: nn.linear(outputs=1), normal(4), codes(2), loss="binary_cross_entropy"),
}


def fit(name, out, train=None):
    """Return a program that trains for two epochs."""
    part = PARTS[name]

    def program(members):
        trainer = Trainer(
            part.model(),
            loss=part.loss,
            optimizer=part.optimizer(),
            clip_norm=1.0,
            batch_size=30,
            micro_batch=3,
            seed=1,
        )
        options = {"epochs": 2, "out": out, "members": members, "checkpoint_every_steps": 2}
        held_out = (part.x[:40], part.y[:40])
        history = trainer.fit(train or (part.x, part.y), val=held_out, **options)
        return history.result | {"again": trainer.evaluate(held_out), "outputs": trainer.predict(part.x[:40])}

    return program


@pytest.mark.parametrize("name", PARTS)
def test_any_workers_give_the_same_bits(name, tmp_path):
    """Two, three and five workers on one host, and three on two hosts, end in the bits of one worker."""
    alone = ThreadsJob(fit(name, tmp_path / "alone"), (1,)).run()[0]
    assert np.isfinite(alone["train_loss"])
    assert alone["again"] == alone["validation"]
    for hosts in HOSTS:
        results = ThreadsJob(fit(name, tmp_path / str(hosts)), hosts).run()
        for result in results.values():
            assert result["state_sha256"] == alone["state_sha256"]
            assert result["validation"] == alone["validation"]


@pytest.mark.parametrize("name", PARTS)
def test_checkpoints_round_trip(name, tmp_path):
    """A model that is loaded from its checkpoint gives the bits that the trained one gave."""
    result = ThreadsJob(fit(name, tmp_path), (2,)).run()[0]
    part = PARTS[name]
    loaded = Trainer(part.model(), loss=part.loss, optimizer=part.optimizer()).load(tmp_path)
    assert loaded.predict(part.x[:40]).tobytes() == result["outputs"].tobytes()
    assert loaded.evaluate((part.x[:40], part.y[:40])) == result["validation"]


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
    job = ThreadsJob(fit(name, tmp_path / "lost", Vanishing(PARTS[name].x, PARTS[name].y)), (2, 1))
    for result in job.run().values():
        assert result["state_sha256"] == alone["state_sha256"]
    assert job.state.restarts == 1


def test_the_average_is_beside_the_parameters(tmp_path):
    """A checkpoint holds parameters, moments and the average, which differ."""
    ThreadsJob(fit("average", tmp_path), (2,)).run()
    tensors = checkpoint.load(max((tmp_path / "checkpoints").glob("step-*"))).tensors
    assert {name.partition("/")[0] for name in tensors} >= {"parameters", "average", "first_moment"}
    assert not np.array_equal(tensors["parameters/0.weight"], tensors["average/0.weight"])
