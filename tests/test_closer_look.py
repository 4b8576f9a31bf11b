"""What is seen of the learning is the same for any number of workers, and changes nothing of it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

import distbp
from distbp import checkpoint, nn, state
from distbp.arena import WATCHED
from distbp.backends.threads import ThreadsJob, VanishHost
from distbp.checkpoint import Snapshot
from distbp.closer_look import CloserLook
from distbp.metrics import noise
from distbp.metrics.ledger import Ledger
from distbp.metrics.records import read_records
from distbp.nn.inactive import inactive_units

TRAIN, VALIDATION = distbp.load_data("digits")
OPTIONS = ["--epochs", 4, "-o", "schedule.name=constant", "-o", "model.hidden=[300, 64]"]
TIMES = ("samples_per_second", "step_ms", "compute_ms", "wait_ms")


def seen(out):
    """Everything that was measured of the learning: no times, and no records that the clock decides on."""
    records = read_records(out / "metrics.jsonl")
    return [record for record in records if record["kind"] == "layers" or record.get("epoch_end")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    trainer(out)
    return out


def trainer(out, data=TRAIN, **options):
    """Train as `OPTIONS` say, in this process."""
    model = nn.mlp(outputs=10, hidden=[300, 64])
    schedule = distbp.optim.Schedule(lr=0.1, name="constant")
    made = distbp.Trainer(model, optimizer=distbp.SGD(momentum=0.9), schedule=schedule, batch_size=64, seed=0)
    return made.fit(data, val=VALIDATION, **({"epochs": 4, "out": out} | options))


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_sees_the_same(distbp, alone, tmp_path, workers):
    """Looks, entropy and noise scale have the same bits with one, two and three workers."""
    done = distbp("train", "digits", *OPTIONS, "--nproc", workers, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert seen(tmp_path / "run") == seen(alone)


@pytest.mark.parametrize("lost", [False, True])
def test_hosts_see_the_same(alone, tmp_path, lost):
    """Three workers on two hosts; the first host, which alone writes records, is lost and comes back, too."""
    calls = [0]

    class Vanishing(distbp.ArrayDataset):
        def batch(self, *arguments, **options):
            calls[0] += 1
            if calls[0] == 40:
                raise VanishHost
            return super().batch(*arguments, **options)

    def program(members):
        data = Vanishing(TRAIN.x, TRAIN.y) if lost and members.rank == 0 else TRAIN
        return trainer(tmp_path / "run", data, members=members).result

    job = ThreadsJob(program, (1, 2))
    result = job.run()[1]
    assert job.state.restarts == lost
    assert seen(tmp_path / "run") == seen(alone)
    assert [account["host"] for account in result["workers"]] == [0, 1, 1]
    assert all(account["compute_s"] > 0 for account in result["workers"])


def test_a_run_that_goes_on_has_seen_the_same(alone, tmp_path):
    """The sums of half an epoch, and the averages of the noise, come back with the checkpoint."""
    trainer(tmp_path, max_steps=60)
    trainer(tmp_path)
    whole, parts = seen(alone), seen(tmp_path)
    keys = ("entropy", "noise_scale", "loss", "accuracy")
    for one, other in zip([r for r in whole if r["kind"] != "layers"], _of_epochs(parts, whole), strict=True):
        assert {key: one.get(key) for key in keys} == {key: other.get(key) for key in keys}
    assert any(record.get("noise_scale") for record in whole)


def _of_epochs(parts, whole):
    """The records of epochs that the uninterrupted run has as well: the end of a call has one of its own."""
    steps = {record["step"] for record in whole if record["kind"] != "layers"}
    return [record for record in parts if record["kind"] != "layers" and record["step"] in steps]


def test_an_older_checkpoint_is_taken_without_what_was_watched():
    """What is missing, or is no such list, begins at 0; it never keeps a run from going on."""
    good = [1.0] * WATCHED
    for held in (None, [], "text", [1.0], [*good, 1.0], [True] * WATCHED, [None] * WATCHED):
        snapshot = Snapshot(1, {}, {} if held is None else {"watched": held})
        assert not state._watched_of(snapshot).any()
    assert state._watched_of(Snapshot(1, {}, {"watched": good})).tolist() == good
    assert not state._watched_of(None).any()


def test_what_is_watched_is_in_no_hash(alone):
    """The hash of the state is one of its tensors, and none of these is what is watched."""
    newest = max((alone / "checkpoints").iterdir())
    snapshot = checkpoint.load(newest)
    result = json.loads((alone / "result.json").read_text())
    assert checkpoint.state_sha256(snapshot.tensors) == result["state_sha256"]
    assert len(snapshot.metadata["watched"]) == WATCHED
    assert any(snapshot.metadata["watched"])


def test_gradient_norms_and_changes_are_those_of_the_step(tmp_path):
    """The first look, computed again with plain NumPy from the parameters before and after."""
    history = trainer(tmp_path, max_steps=1)
    look = next(record for record in seen(tmp_path) if record["kind"] == "layers")
    network = nn.Network(nn.mlp(outputs=10, hidden=[300, 64]), TRAIN.x.shape[1:], nn.SoftmaxCrossEntropy())
    before = np.zeros(network.layout.size, np.float32)
    network.initialise(before, 0)
    after = checkpoint.load(max((tmp_path / "checkpoints").iterdir())).tensors
    for name, old in zip(network.layout.names, network.views(before), strict=True):
        change = np.linalg.norm((after[f"parameters/{name}"] - old).astype(np.float64))
        # The first step of SGD with momentum is lr times the gradient.
        assert look["gradient_norm"][name] == pytest.approx(change / 0.1, rel=1e-3)
        size = np.linalg.norm(old.astype(np.float64))
        assert look["update_ratio"].get(name, 0.0) == pytest.approx(change / size if size else 0.0, rel=1e-3)
    assert history.result["steps"] == 1


def test_entropy_is_that_of_the_answers():
    """Certain answers have none, a guess among C classes has ln C, and what is not finite counts as none."""
    loss = nn.SoftmaxCrossEntropy()
    loss.build((4,))
    output = np.array([[[0, 0, 0, 0], [1000, 0, 0, 0]], [[0, 0, 0, 0], [-np.inf, 0, 0, 0]]], np.float32)
    with np.errstate(invalid="ignore"):
        sums = loss.forward(output, np.zeros((2, 2), np.int64))
    assert sums.entropy.tolist() == [pytest.approx(math.log(4)), 0.0]
    masked = loss.forward(output[:1], np.zeros((1, 2), np.int64), np.array([[0.0, 1.0]], np.float32))
    assert masked.entropy.tolist() == [0.0]
    p = np.random.default_rng(0).dirichlet(np.ones(4), (3, 5))
    sums = loss.forward(np.log(p), np.zeros((3, 5), np.int64))
    assert sums.entropy == pytest.approx((-p * np.log(p)).sum(axis=(1, 2)))
    yes = nn.BinaryCrossEntropy()
    yes.build((1,))
    z = np.log(p[..., :1] / (1 - p[..., :1]))
    entropy = -(p[..., :1] * np.log(p[..., :1]) + (1 - p[..., :1]) * np.log(1 - p[..., :1]))
    assert yes.forward(z, np.zeros((3, 5), np.int64)).entropy == pytest.approx(entropy.sum(axis=(1, 2)))


def test_the_noise_scale_is_that_of_its_samples():
    """Gradients with a known mean and variance: the estimators are right on average, and so is the scale."""
    rng = np.random.default_rng(0)
    mean, deviation, b, M = np.full(50, 0.1), 1.0, 8, 16
    signal = trace = 0.0
    looks = 400
    for _ in range(looks):
        micro = mean + rng.normal(0, deviation / math.sqrt(b), (M, 50))
        small, big = (micro**2).sum(axis=1).mean(), (micro.mean(axis=0) ** 2).sum()
        one, two = noise.estimate(small, big, b, b * M)
        signal, trace = signal + one / looks, trace + two / looks
    assert signal == pytest.approx(0.5, rel=0.05)
    assert trace == pytest.approx(50.0, rel=0.05)
    assert noise.noise_scale((signal, trace), looks) == pytest.approx(100, rel=0.1)
    assert noise.noise_scale((signal, trace), 4) is None
    assert noise.noise_scale((-0.1, trace), looks) is None


def test_looks_are_bounded():
    """A long run has about two hundred looks, a short one every 25 steps; the first steps have more."""

    class Plan:
        total_steps, micro_batch, network = 100_000, 8, None

    look = CloserLook.__new__(CloserLook)
    look._every = max(25, Plan.total_steps // 200)
    due = [step for step in range(Plan.total_steps) if look.is_due(step)]
    assert due[:6] == [0, 25, 50, 100, 200, 400]
    assert 200 <= len(due) <= 215


def test_inactive_units_are_found_where_they_are():
    """A unit counts if no sample of micro-batch 0 makes it pass a gradient, a channel if no place does."""
    model = nn.Sequential(nn.ReLU(), nn.Sigmoid(), nn.Tanh())
    network = nn.Network(nn.Sequential(model, nn.Flatten()), (2, 3), nn.MeanSquaredError())
    x = np.zeros((2, 1, 2, 3), np.float32)
    x[0, 0, 0] = 1.0, -1.0, 30.0
    x[0, 0, 1] = -1.0, -1.0, 30.0
    network.forward(x, nn.Context(training=True))
    found = inactive_units(network)
    assert {name: idle.tolist() for name, idle in found.items()} == {
        "0.0 ReLU": [False, True, False],
        "0.1 Sigmoid": [False, False, True],
        "0.2 Tanh": [False, False, False],
    }


def test_the_ledger_names_what_a_straggler_cost():
    """Windows add up: the slowest pays what it was slower than the next."""
    ledger = Ledger([0, 0, 1])
    spent = np.array([[2.0, 4.0, 3.0], [2.0, 0.0, 1.0]])
    ledger.add(np.array([0.1, 0.2, 0.15]), spent, 20)
    assert ledger.record(100.0) == {"compute_ms": [100.0, 200.0, 150.0], "wait_ms": [100.0, 0.0, 50.0]}
    ledger.add(np.array([0.1, 0.2, 0.15]), 2 * spent, 20)
    assert ledger.record(100.5) is None
    accounts = ledger.accounts()
    assert [account["cost_s"] for account in accounts] == [0.0, pytest.approx(2.0), 0.0]
    assert [account["host_wait_s"] for account in accounts] == [0.0, 0.0, pytest.approx(2.0)]
    assert accounts[1] | {"cost_s": 2.0} == {
        "rank": 1, "host": 0, "compute_s": 8.0, "wait_s": 0.0, "host_wait_s": 0.0, "cost_s": 2.0
    }  # fmt: skip


def test_who_waited_is_written_down(distbp, tmp_path):
    """Two workers: records of kind "workers", and the sums in the result are those of the run."""
    out = tmp_path / "run"
    done = distbp("train", "digits", *OPTIONS, "--nproc", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    records = [record for record in read_records(out / "metrics.jsonl") if record["kind"] == "workers"]
    assert records
    assert all(len(record["compute_ms"]) == len(record["wait_ms"]) == 2 for record in records)
    result = json.loads((out / "result.json").read_text())
    assert [account["rank"] for account in result["workers"]] == [0, 1]
    for account in result["workers"]:
        assert 0 < account["compute_s"] + account["wait_s"] < result["wall_seconds"]
    assert result["flops_per_sample"] == 6 * (64 * 300 + 300 * 64 + 64 * 10)
    rate = result["flops_per_sample"] * result["samples_per_second"] / 1e9
    assert result["gflops_per_second"] == pytest.approx(rate)
