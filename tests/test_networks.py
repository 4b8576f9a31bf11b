"""Whole trainings of every network: the same bits for any workers, statistics and randomness included."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from distbp import checkpoint, nn
from distbp.backends.threads import ThreadsJob, VanishHost
from distbp.data import ArrayDataset, load, prepare, transforms
from distbp.data.bells import Bells
from distbp.errors import ConfigError
from distbp.optim import LAMB, LARS, SGD, AdamW, Averaged
from distbp.trainer import Trainer, find_checkpoint
from tests.nn.layer_examples import LAYERS, samples_for

STEPS = 4


def digits():
    """A part of the digits, small enough for many runs of a large network."""
    prepared = prepare(load("digits"), validation_fraction=0.2, split="tail", normalize="auto", seed=0)
    return (
        ArrayDataset(*(np.ascontiguousarray(part[:100]) for part in (data.x, data.y)))
        for data in (prepared.train, prepared.validation)
    )


TRAIN, VALIDATION = digits()


def text():
    """Sixteen codes and what follows each of them, for training and for validation."""
    codes = np.random.default_rng(5).integers(0, 10, 1617).cumsum() % 10
    windows = [codes[start : start + 1600].reshape(100, 16) for start in (0, 1)]
    return ArrayDataset(*(part[:80] for part in windows)), ArrayDataset(*(part[80:] for part in windows))


def bells():
    """Eighty struck bells to name, and twenty others."""
    return tuple(
        ArrayDataset(Bells("sound", first=first, count=count), Bells("note", first=first, count=count))
        for first, count in ((0, 80), (1000, 20))
    )


def table():
    """Two columns of codes among three numbers; the class depends on one of each."""
    generator = np.random.default_rng(6)
    x = generator.normal(size=(100, 5)).astype(np.float32)
    x[:, 1], x[:, 4] = generator.integers(0, 5, 100), generator.integers(0, 3, 100)
    y = (x[:, 1] + 5 * (x[:, 0] > 0)).astype(np.int64)
    return ArrayDataset(x[:80].copy(), y[:80].copy()), ArrayDataset(x[80:].copy(), y[80:].copy())


DATA = {"audio": bells(), "tabular": table(), "transformer": text()}
"""Name -> training and validation data of the networks that cannot read digits."""


def digits_again():
    """The training part, made anew."""
    return next(iter(digits()))


def dropping():
    """A network that normalises and drops, in several places and dimensions."""
    return nn.Sequential(
        nn.AsImage(),
        nn.Conv2d(4, 3),
        nn.BatchNorm(),
        nn.Residual(nn.Sequential(nn.Dropout(0.2), nn.Conv2d(4, 3, padding="same"), nn.BatchNorm(rate=0.3))),
        nn.GlobalAvgPool(),
        nn.Linear(16),
        nn.BatchNorm(),
        nn.SiLU(),
        nn.Dropout(0.5),
        nn.Linear(10),
    )


OPTIONS = {"audio": {"outputs": 100}, "tabular": {"outputs": 10, "codes": [(1, 5), (4, 3)]}}

# The two deeper resnets are made of the same layers as the first.
MODELS = {
    name: (lambda name=name: nn.build_model(name, **OPTIONS.get(name, {"outputs": 10})))
    for name in nn.MODELS
    if name not in ("resnet32", "resnet56")
} | {"dropping": dropping}


def trainer_of(model, augment=()):
    """Return a trainer of ten micro-batches of four."""
    return Trainer(
        model(),
        optimizer=SGD(momentum=0.9),
        lr=0.05,
        batch_size=40,
        micro_batch=4,
        seed=3,
        augment=augment,
    )


def fit(model, out, data=(TRAIN, VALIDATION), augment=(), **options):
    """Return a program that trains a network; each worker builds its own layers."""
    train, validation = data

    def program(members):
        history = trainer_of(model, augment).fit(
            train, val=validation, epochs=9, max_steps=STEPS, out=out, members=members, **options
        )
        return history.result

    return program


@pytest.fixture(scope="module")
def run_alone(tmp_path_factory):
    """Give the result and the directory of a network that one worker has trained; each is trained once."""

    @functools.cache
    def run(name):
        out = tmp_path_factory.mktemp(name)
        job = ThreadsJob(fit(MODELS[name], out, DATA.get(name, (TRAIN, VALIDATION))), (1,))
        return job.run()[0], out

    return run


@pytest.mark.parametrize("name", MODELS)
def test_same_bits_for_any_workers(name, run_alone, tmp_path):
    """2, 3 and 5 workers, on one host or spread over two, end in the state of one worker."""
    data = DATA.get(name, (TRAIN, VALIDATION))
    alone, _ = run_alone(name)
    assert alone["skipped_steps"] == 0
    for host_sizes in ((2,), (3,), (5,), (2, 1), (2, 3)):
        out = tmp_path / "-".join(map(str, host_sizes))
        for result in ThreadsJob(fit(MODELS[name], out, data), host_sizes).run().values():
            assert result["parameters_sha256"] == alone["parameters_sha256"]
            assert result["state_sha256"] == alone["state_sha256"]
            assert result["validation"] == alone["validation"]


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_has_the_same_bits_for_any_workers(name, tmp_path):
    """Each example of the layers' contract, with a Linear layer behind it, has one state on 1, 3 and 5."""
    make, shape = LAYERS[name]
    samples = samples_for(nn.Network(make(), shape, nn.MeanSquaredError()), 12, 5)
    x = np.ascontiguousarray(samples.reshape(60, *shape))
    y = np.random.default_rng(2).normal(size=(60, 2)).astype(np.float32)

    def program(members):
        model = nn.Sequential(make(), nn.Flatten(), nn.Linear(2))
        trainer = Trainer(model, loss="mean_squared_error", lr=0.01, batch_size=30, micro_batch=3)
        return trainer.fit(ArrayDataset(x, y), epochs=2, max_steps=3, out=out, members=members).result

    hashes = set()
    for workers in (1, 2, 3, 5):
        out = tmp_path / str(workers)
        hashes |= {result["state_sha256"] for result in ThreadsJob(program, (workers,)).run().values()}
    assert len(hashes) == 1
    loaded = Trainer(nn.Sequential(make(), nn.Flatten(), nn.Linear(2)), loss="mean_squared_error").load(out)
    assert loaded.evaluate(ArrayDataset(x, y))["loss"] > 0


def test_augmented_samples_are_the_same_for_any_workers(tmp_path):
    """Moved, mirrored and noisy samples give the same bits on any workers, and others than plain ones."""
    augment = transforms(crop=1, flip=True, noise=0.1)
    plain = ThreadsJob(fit(dropping, tmp_path / "plain"), (1,)).run()[0]
    alone = ThreadsJob(fit(dropping, tmp_path / "alone", augment=augment), (1,)).run()[0]
    assert alone["state_sha256"] != plain["state_sha256"]
    for host_sizes in ((2,), (3,), (5,), (2, 1)):
        out = tmp_path / "-".join(map(str, host_sizes))
        for result in ThreadsJob(fit(dropping, out, augment=augment), host_sizes).run().values():
            assert result["state_sha256"] == alone["state_sha256"]
    # The data set itself was not touched.
    assert (TRAIN.x == digits_again().x).all()


def test_another_augmentation_is_another_run(tmp_path):
    """A run is not resumed with other transforms, and samples that a transform cannot take are refused."""
    trainer_of(dropping).fit(TRAIN, epochs=1, max_steps=1, out=tmp_path)
    with pytest.raises(ConfigError, match="augment"):
        trainer_of(dropping, transforms(flip=True)).fit(TRAIN, epochs=1, max_steps=2, out=tmp_path)
    with pytest.raises(ConfigError, match=r"data\.augment_crop"):
        trainer_of(dropping, transforms(crop=8)).fit(TRAIN, epochs=1, out=tmp_path / "other")


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_holds_the_whole_network(name, run_alone, tmp_path):
    """A loaded model gives the figures of training, and a run goes on from a checkpoint bit for bit."""
    data = DATA.get(name, (TRAIN, VALIDATION))
    alone, out_of_alone = run_alone(name)
    loaded = trainer_of(MODELS[name]).load(out_of_alone)
    assert loaded.evaluate(data[1]) == alone["validation"]
    out = tmp_path / "halves"
    ThreadsJob(fit(MODELS[name], out, data, checkpoint_every_steps=2, keep=0), (2,)).run()
    resumed = out / "checkpoints" / "step-00000002"
    again = ThreadsJob(fit(MODELS[name], tmp_path / "again", data, resume=str(resumed)), (3,)).run()[0]
    assert again["state_sha256"] == alone["state_sha256"]


def test_statistics_have_names_in_the_checkpoint(tmp_path):
    """Each running statistic is a tensor of its own, float64, and part of what two runs are compared by."""
    result = ThreadsJob(fit(dropping, tmp_path), (1,)).run()[0]
    tensors = checkpoint.load(find_checkpoint(tmp_path)).tensors
    held = {name: tensor for name, tensor in tensors.items() if name.startswith("statistics/")}
    assert {name: tensor.shape for name, tensor in held.items()} == {
        "statistics/2.mean": (4,),
        "statistics/2.variance": (4,),
        "statistics/3.inner.2.mean": (4,),
        "statistics/3.inner.2.variance": (4,),
        "statistics/6.mean": (16,),
        "statistics/6.variance": (16,),
    }
    assert all(tensor.dtype == np.float64 for tensor in held.values())
    assert tensors["scalars"].shape == (8,)
    parameters = [tensor for name, tensor in tensors.items() if name.startswith("parameters/")]
    assert checkpoint.parameters_sha256([*parameters, *held.values()]) == result["parameters_sha256"]
    held["statistics/6.mean"][0] += 1e-9
    assert checkpoint.parameters_sha256([*parameters, *held.values()]) != result["parameters_sha256"]


def test_statistics_are_the_mean_over_micro_batches(tmp_path):
    """After one step an average is start + rate * (mean of the micro-batches' statistics - start)."""
    model = lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm(rate=0.5), nn.Linear(10))  # noqa: E731
    trainer = trainer_of(model)
    trainer.fit(TRAIN, epochs=1, max_steps=1, out=tmp_path, log_samples=True)
    indices = [int(n) for n in (tmp_path / "samples.log").read_text().split("\t")[1].split()]
    x = TRAIN.x[indices].reshape(10, 4, 64).astype(np.float64)
    tensors = checkpoint.load(find_checkpoint(tmp_path)).tensors
    # Statistics of a micro-batch are float32.
    np.testing.assert_allclose(tensors["statistics/1.mean"], 0.5 * x.mean(axis=(0, 1)), rtol=0, atol=1e-6)
    wanted = 0.5 + 0.5 * x.var(axis=1, ddof=1).mean(axis=0)
    np.testing.assert_allclose(tensors["statistics/1.variance"], wanted, rtol=1e-5)


class VanishingHost(ArrayDataset):
    """Data that make the host of whoever asks for the n-th batch vanish, once."""

    def __init__(self, call):
        super().__init__(TRAIN.x, TRAIN.y)
        self.calls, self.call = 0, call

    def batch(self, indices, x_out=None, y_out=None):
        self.calls += 1
        if self.calls == self.call:
            raise VanishHost
        return super().batch(indices, x_out, y_out)


@pytest.mark.parametrize("call", [5, 9, 12])
def test_a_lost_host_gets_statistics_from_another(call, tmp_path):
    """A host that comes back without its memory gets the statistics of a living one: the same bits."""
    alone = ThreadsJob(fit(dropping, tmp_path / "alone"), (1,)).run()[0]
    data = VanishingHost(call)
    results = ThreadsJob(fit(dropping, tmp_path / "lost", (data, VALIDATION)), (1, 1)).run()
    assert data.calls > call
    for result in results.values():
        assert result["state_sha256"] == alone["state_sha256"]


def test_statistics_that_are_not_finite_skip_the_step(tmp_path):
    """Samples that overflow a variance are in a skipped step and leave no trace in the averages."""
    x = TRAIN.x.copy()
    x[7] = 1e30
    poisoned = ArrayDataset(x, TRAIN.y)
    trainer = trainer_of(dropping)
    history = trainer.fit(poisoned, epochs=1, max_steps=3, out=tmp_path)
    assert history.result["skipped_steps"] == 1
    tensors = checkpoint.load(find_checkpoint(tmp_path)).tensors
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_a_micro_batch_of_one_is_refused_with_the_key(tmp_path):
    """A network that normalises vectors says which key to change when micro-batches are single samples."""
    trainer = Trainer(dropping(), batch_size=8, micro_batch=1)
    with pytest.raises(ConfigError, match=r"train\.micro_batch"):
        trainer.fit(TRAIN, epochs=1, out=tmp_path)


def test_the_command_trains_and_evaluates_a_network_with_statistics(distbp, tmp_path):
    """`distbp train`, `evaluate` and `predict` agree about resnet20, on two worker processes and on one."""
    options = ["-o", "model.name=resnet20", "-o", "train.max_steps=3", "-o", "optimizer.lr=0.01"]
    shas = []
    for nproc in (1, 2):
        done = distbp("train", "digits", *options, "--nproc", nproc, "--out", f"run{nproc}")
        assert done.returncode == 0, done.stderr
        shas.append(next(word for word in done.stdout.split() if len(word) == 16 and word.isalnum()))
    assert shas[0] == shas[1]
    samples = load("digits").train
    np.savez(tmp_path / "data.npz", x=samples.x[:200], y=samples.y[:200])
    evaluated = distbp("evaluate", "run1", "data.npz")
    assert evaluated.returncode == 0, evaluated.stderr
    predicted = distbp("predict", "run2", "data.npz", "-o", "p.npy")
    assert predicted.returncode == 0, predicted.stderr
    accuracy = float(evaluated.stdout.split("accuracy")[1].split()[0])
    answers = np.load(tmp_path / "p.npy", allow_pickle=False)
    assert accuracy == np.mean(answers == samples.y[:200])


@pytest.mark.parametrize(
    "optimizer", [LAMB(), LARS(), Averaged(AdamW(), decay=0.9)], ids=lambda o: type(o).__name__
)
def test_a_state_that_is_checked_has_the_same_bits(optimizer, tmp_path):
    """Statistics, averages and rules with norms pass every check of the state, in steps and in saves.

    A checked step updates the lane in parts, so this compares parts with the whole, too.
    """
    hashes = set()
    for every, hosts in ((0, (1,)), (1, (1,)), (2, (2, 1)), (1, (3,))):

        def program(members, every=every, hosts=hosts):
            trainer = Trainer(wide(), optimizer=optimizer, lr=0.01, batch_size=40, micro_batch=4, seed=3)
            out = tmp_path / f"{every}-{'-'.join(map(str, hosts))}"
            options = {"max_steps": STEPS, "checkpoint_every_steps": 2, "verify_every": every}
            return trainer.fit(TRAIN, val=VALIDATION, epochs=9, out=out, members=members, **options).result

        results = ThreadsJob(program, hosts).run()
        hashes |= {result["state_sha256"] for result in results.values()}
        assert all(result["restarts"] == 0 for result in results.values() if "restarts" in result)
    assert len(hashes) == 1


def wide():
    """A network with statistics, and a tensor of several blocks and chunks."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(700), nn.BatchNorm(), nn.ReLU(), nn.Linear(130), nn.Linear(10)
    )
