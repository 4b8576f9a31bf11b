"""Silent corruption of the state: found, named, and undone from a checkpoint.  Real flips in real arenas."""

from __future__ import annotations

import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbp import nn
from distbp.arena import EMPTY, RELOAD, Arena, ArenaLayout
from distbp.backends.base import Admission, Seat
from distbp.backends.corruption import describe_corruption
from distbp.backends.threads import ThreadsJob
from distbp.data import ArrayDataset
from distbp.errors import StateCorrupted
from distbp.exchange import cut_pieces
from distbp.nn import arrange
from distbp.optim import SGD, norm
from distbp.trainer import Trainer
from distbp.verify import Corruption, StateCheck, add_up, block_sums, cover_state
from tests.conftest import result_of, wait_until
from tests.memory import Memory, corruptions, job_parts, new_seed

# ----- checksums


@settings(max_examples=200, deadline=None)
@given(data=st.data(), size=st.integers(1, 40_000))
def test_every_single_bit_flip_changes_one_checksum(data, size):
    """Whichever bit of a tensor flips, the checksum of its block differs, and no other."""
    rng = np.random.default_rng(size)
    tensor = rng.standard_normal(size).astype(np.float32)
    before = block_sums(tensor)
    place, bit = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 31))
    tensor.view(np.uint32)[place] ^= np.uint32(1 << bit)
    assert np.flatnonzero(block_sums(tensor) != before).tolist() == [place // norm.BLOCK]


def seat_of(arena, local_rank=0, workers=1):
    """A seat on the only host."""
    return Seat(
        local_rank,
        (workers,),
        arena,
        None,
        lambda: 1,
        lambda attempt: None,
        lambda record: None,
    )


def covered_arena(shapes, workers=1):
    """An arena that holds a random state after 4 steps, covered, and the check of each worker."""
    layout = arrange([(f"t{index}", shape) for index, shape in enumerate(shapes)])
    blocks = norm.blocks(layout.borders())
    places = ArenaLayout(layout.size, ("parameters", "momentum"), (1,) * workers, len(blocks), 0, 8, 8)
    keeper = Arena.create(places)
    rng = np.random.default_rng(1)
    for flat in keeper.vectors(4).values():
        for view in layout.views(flat):
            view[...] = rng.standard_normal(view.shape)
    keeper.scalars(4)[:] = rng.standard_normal(8)
    cover_state(keeper, layout, 4, 1)
    checks = []
    for worker in range(workers):
        arena = Arena.attach(os.dup(keeper.descriptor), places, worker)
        check = StateCheck(seat_of(arena, worker, workers), layout, 1)
        check.open(cut_pieces(blocks, layout.size, [0], workers, worker), [0], None)
        checks.append(check)
    return keeper, layout, checks


SHAPES = [(700, 129), (129,), (1,), (33, 3), (16385,), (65536,)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_flip_anywhere_is_found_by_all_and_its_tensor_named(workers):
    """A flip in parameters, momentum, padding or scalars: every worker raises, with lane and tensor."""
    keeper, layout, checks = covered_arena(SHAPES, workers)
    for check in checks:
        check.look_back(4)
        check.conclude()
    rng = random.Random(new_seed())
    for _ in range(60):
        vector = rng.choice(["parameters", "momentum", "scalars"])
        array = keeper.scalars(4) if vector == "scalars" else keeper.vectors(4)[vector]
        words = array.view(np.uint8)
        byte, bit = rng.randrange(len(words)), rng.randrange(8)
        words[byte] ^= 1 << bit
        for check in checks:
            check.look_back(4)
        findings = []
        for check in checks:
            with pytest.raises(Corruption) as raised:
                check.conclude()
            findings.append(raised.value.finding)
        assert all(finding == findings[0] for finding in findings)
        finding = findings[0]
        assert (finding["step"], finding["host"], finding["cause"]) == (4, 0, "checksum")
        if vector == "scalars":
            assert (finding["lane"], finding["tensor"]) == (0, "scalars")
        else:
            owner = max(t for t, start in enumerate(layout.offsets) if 4 * start <= byte)
            assert finding["tensor"] == f"{vector}/t{owner}"
        words[byte] ^= 1 << bit
        for check in checks:
            check._note[:] = 0


def test_copies_are_compared_tensor_by_tensor():
    """A copy of the state is accepted as it is, and refused with any bit of it flipped."""
    keeper, layout, (check,) = covered_arena(SHAPES)
    copies = {
        f"{vector}/{name}": view.copy()
        for vector, flat in keeper.vectors(4).items()
        for name, view in zip(layout.names, layout.views(flat), strict=True)
    } | {"scalars": keeper.scalars(4).copy()}
    assert check.accepts(4, copies)
    assert check.accepts(3, {}), "a state that is not covered cannot be refused"
    rng = random.Random(new_seed())
    for name in copies:
        words = copies[name].reshape(-1).view(np.uint8)
        byte, bit = rng.randrange(len(words)), rng.randrange(8)
        words[byte] ^= 1 << bit
        check._note[:] = 0
        assert not check.accepts(4, copies)
        check.look_back(4)
        with pytest.raises(Corruption) as raised:
            check.conclude()
        assert (raised.value.finding["tensor"], raised.value.finding["cause"]) == (name, "copy")
        words[byte] ^= 1 << bit
    assert add_up(copies["scalars"]) == keeper.checks(4)[-1, 0]


def test_what_is_said_names_hosts():
    """The line and the record name lane, tensor and host, or say that nobody can tell the host."""
    finding = {
        "step": 7,
        "lane": 1,
        "host": 1,
        "odd_hosts": [1],
        "tensor": "momentum/1.w",
        "cause": "checksum",
    }
    event = describe_corruption(finding, ["a", "b"])
    assert event.text == "E_CORRUPT_STATE step=7 lane=1 host=b tensor=momentum/1.w cause=checksum"
    assert event.record["kind"] == "corrupt"
    unknown = finding | {"host": None, "odd_hosts": [], "tensor": None, "cause": "hosts differ"}
    text = describe_corruption(unknown, ["a", "b"]).text
    assert text == "E_CORRUPT_STATE step=7 lane=1 host=unknown tensor=unknown cause=hosts-differ hosts=a,b"


# ----- several hosts, emulated as threads


def digits():
    """Some samples of ten classes."""
    rng = np.random.default_rng(0)
    return ArrayDataset(rng.standard_normal((400, 20)).astype(np.float32), rng.integers(0, 10, 400))


class FlippingData(ArrayDataset):
    """Data that flip a bit of the state when worker `rank` asks for its n-th batch."""

    def __init__(self, data, rank, call, flip):
        super().__init__(data.x, data.y)
        self._name, self._call, self._flip, self._calls = f"worker-{rank}", call, flip, 0

    def batch(self, indices, x_out=None, y_out=None):
        if threading.current_thread().name == self._name:
            self._calls += 1
            if self._calls == self._call:
                self._flip()
        return super().batch(indices, x_out, y_out)


STEPS, EVERY = 24, 10


def fit(out, call=None, flip=lambda: None, rank=0, validation=None, **options):
    """A program that trains a small network; `flip` is called with the n-th batch of worker `rank`."""

    def program(members):
        model = nn.Sequential(nn.Linear(24), nn.Tanh(), nn.Linear(10))
        trainer = Trainer(model, optimizer=SGD(momentum=0.9), batch_size=96, micro_batch=8, seed=3)
        settings = {"verify_every": EVERY, "checkpoint_every_steps": 4, "max_steps": STEPS} | options
        data = FlippingData(digits(), rank, call, flip)
        val = None if validation is None else FlippingData(digits(), rank, validation, flip)
        return trainer.fit(data, val=val or digits(), epochs=99, out=out, members=members, **settings).result

    return program


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The result of one worker on one host."""
    return ThreadsJob(fit(tmp_path_factory.mktemp("alone")), (1,)).run()[0]


def epoch_losses(result):
    """The validation losses of a run, by step."""
    lines = (Path(result["out"]) / "metrics.jsonl").read_text().splitlines()
    return {r["step"]: r["loss"] for r in map(json.loads, lines) if r["kind"] == "validation"}


def flip_of(jobs, host, place=5, bit=20):
    """Return a function that flips one bit of the parameters of one host, once."""
    done = []

    def flip():
        if not done:
            arena = jobs[0]._arenas[host]
            step = arena.committed
            arena.vectors(step)["parameters"].view(np.uint32)[place] ^= np.uint32(1 << bit)
            done.append(step)

    return flip, done


@pytest.mark.parametrize("host_sizes", [(1,), (2,), (1, 1), (2, 2), (1, 1, 1), (2, 1, 3)], ids=str)
@pytest.mark.parametrize("host", ["first", "last"])
def test_with_every_step_verified_the_host_is_named(host_sizes, host, alone, tmp_path):
    """A flip on any of several hosts is found before the step is committed, named, and the bits are right."""
    odd = 0 if host == "first" else len(host_sizes) - 1
    jobs = []
    flip, flipped = flip_of(jobs, odd)
    rank = sum(host_sizes[:odd])
    jobs.append(ThreadsJob(fit(tmp_path, 9, flip, rank, verify_every=1), host_sizes))
    results = jobs[0].run()
    assert {result["state_sha256"] for result in results.values()} == {alone["state_sha256"]}
    assert jobs[0].state.restarts == 1
    findings = jobs[0].findings
    # A worker that is slow to wake up in the last barrier may be parked before it can say so.
    assert 1 <= len(findings) <= sum(host_sizes)
    assert all(finding == findings[0] for finding in findings)
    assert findings[0] | {"lane": 0} == {
        "step": flipped[0], "lane": 0, "host": odd, "odd_hosts": [odd],
        "tensor": "parameters/0.weight", "cause": "checksum",
    }  # fmt: skip


@pytest.mark.parametrize("host_sizes", [(1, 1), (2, 2), (1, 1, 1), (1, 2, 1)], ids=str)
def test_hosts_that_differ_are_found_before_the_next_save(host_sizes, alone, tmp_path):
    """A flip that was already read makes hosts differ: found before a save; of three, the host is named."""
    jobs = []
    flip, flipped = flip_of(jobs, len(host_sizes) - 1)
    jobs.append(ThreadsJob(fit(tmp_path, 8, flip, sum(host_sizes[:-1])), host_sizes))
    results = jobs[0].run()
    assert {result["state_sha256"] for result in results.values()} == {alone["state_sha256"]}
    assert flipped[0] % 4, "the flip was to hit a state that is not covered"
    (finding,) = {json.dumps(finding) for finding in jobs[0].findings}
    found = json.loads(finding)
    assert found["cause"] == "hosts differ"
    assert found["step"] == flipped[0] // 4 * 4 + 4, "the next state that is saved"
    assert found["host"] == (None if len(host_sizes) == 2 else len(host_sizes) - 1)


@pytest.mark.parametrize("host_sizes", [(1,), (2,), (2, 2)], ids=str)
def test_the_last_state_is_verified_too(host_sizes, alone, tmp_path):
    """A flip during the evaluation after the last step is found before anything is saved or reported."""
    for host in range(len(host_sizes)):
        out = tmp_path / str(host)
        jobs = []
        flip, flipped = flip_of(jobs, host)
        # 400 samples in batches of 96: epochs end at steps 5, 9, 13, 17, 21; worker 0 evaluates in each.
        calls = {(1,): 21, (2,): 11, (2, 2): 6}[host_sizes]
        rank = sum(host_sizes[:host])
        jobs.append(ThreadsJob(fit(out, None, flip, rank, calls, verify_every=1), host_sizes))
        results = jobs[0].run()
        assert flipped == [STEPS]
        assert {result["state_sha256"] for result in results.values()} == {alone["state_sha256"]}
        assert jobs[0].findings[0]["step"] == STEPS
        assert all(result["validation"] == alone["validation"] for result in results.values())


@pytest.mark.parametrize("host_sizes", [(1,), (2, 2)], ids=str)
def test_an_evaluation_is_verified_before_a_checkpoint_ends_it(host_sizes, alone, tmp_path):
    """A flip during an evaluation at a step that is saved does not stay in the records."""
    for host in range(len(host_sizes)):
        out = tmp_path / str(host)
        jobs = []
        flip, flipped = flip_of(jobs, host)
        rank = sum(host_sizes[:host])
        program = fit(out, None, flip, rank, 1, checkpoint_every_steps=1)
        jobs.append(ThreadsJob(program, host_sizes))
        results = jobs[0].run()
        assert flipped == [5]
        assert {result["state_sha256"] for result in results.values()} == {alone["state_sha256"]}
        assert jobs[0].findings[0]["step"] == 5
        assert epoch_losses(results[0]) == epoch_losses(alone)


def test_without_a_check_nothing_is_found(alone, tmp_path):
    """With verify_every = 0 a flip goes unnoticed, and one that was read makes another result."""
    jobs = []
    flip, _ = flip_of(jobs, 0)
    jobs.append(ThreadsJob(fit(tmp_path, 7, flip, verify_every=0), (1,)))
    result = jobs[0].run()[0]
    assert jobs[0].findings == []
    assert result["state_sha256"] != alone["state_sha256"]


def test_without_a_checkpoint_the_run_ends_with_80(tmp_path):
    """Where nothing was saved yet there is nothing to go back to."""
    jobs = []
    flip, _ = flip_of(jobs, 0)
    program = fit(tmp_path, 7, flip, verify_every=1, checkpoint_every_steps=None)
    jobs.append(ThreadsJob(program, (2,)))
    with pytest.raises(StateCorrupted, match="no checkpoint to go back to"):
        jobs[0].run()


def test_a_corrupted_host_is_not_taken_for_divergence(alone, tmp_path):
    """Parameters of one host that turn into NaN spoil every step; hosts compare before they give up."""
    jobs, done = [], []

    def spoil():
        if not done:
            arena = jobs[0]._arenas[1]
            arena.vectors(arena.committed)["parameters"][5] = np.nan
            done.append(arena.committed)

    program = fit(tmp_path, 16, spoil, 1, verify_every=1000, checkpoint_every_steps=12)
    jobs.append(ThreadsJob(program, (1, 1)))
    results = jobs[0].run()
    assert done == [13]
    assert jobs[0].findings[0]["cause"] == "hosts differ"
    assert jobs[0].findings[0]["step"] == 16
    assert results[0]["state_sha256"] == alone["state_sha256"]


@pytest.mark.parametrize("host_sizes", [(2,), (1, 1), (2, 2)], ids=str)
def test_a_corrupted_beginning_is_not_taken_for_other_software(host_sizes, tmp_path):
    """A flip before the trial gradient is found as one, although workers compute other bits with it."""
    jobs = []
    for out in (tmp_path / "wanted", tmp_path / "run"):
        ThreadsJob(fit(out, max_steps=8), (1,)).run()
    wanted = ThreadsJob(fit(tmp_path / "wanted"), (1,)).run()[0]
    flip, flipped = flip_of(jobs, len(host_sizes) - 1)
    # The second batch is that of the trial.
    rank = sum(host_sizes) - 1
    jobs.append(ThreadsJob(fit(tmp_path / "run", 2, flip, rank), host_sizes))
    results = jobs[0].run()
    assert flipped == [8]
    assert jobs[0].findings[0]["cause"] == "checksum"
    assert results[0]["state_sha256"] == wanted["state_sha256"]


def test_padding_does_not_survive_a_reload(tmp_path):
    """A flip between two tensors is undone as well, although no checkpoint holds what lies there."""
    jobs = []
    flip, _ = flip_of(jobs, 0, place=20 * 24 + 24 + 3)
    jobs.append(ThreadsJob(fit(tmp_path, 9, flip, verify_every=1), (1,)))
    jobs[0].run()
    assert jobs[0].state.restarts == 1
    assert jobs[0].findings[0]["tensor"] == "parameters/0.bias"


# ----- real processes

OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.max_steps=1200",
    "-o", "train.epochs=1000", "-o", "model.hidden=[64]", "-o", "run.verify_every=1",
    "-o", "checkpoint.every_steps=25", "-o", "run.max_restarts=100", "-o", "run.log_samples=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The result of a run to which nothing happens, and that verifies nothing."""
    from tests.conftest import Job

    out = tmp_path_factory.mktemp("undisturbed")
    never = [*OPTIONS, "-o", "run.verify_every=0"]
    done = Job(["train", "digits", *never, "--backend", "serial", "--out", out], out, None).wait()
    assert done.returncode == 0, done.stderr
    return result_of(out)


@pytest.mark.parametrize(("backend", "nproc"), [("serial", 1), ("local", 1), ("local", 2), ("local", 3)])
def test_flips_in_processes_are_found_and_undone(backend, nproc, undisturbed, start, tmp_path):
    """Bits flipped through /proc/PID/mem are found in the step that reads them, and undone."""
    rng = random.Random(new_seed())
    out = tmp_path / "run"
    job = start("train", "digits", *OPTIONS, "--backend", backend, "--nproc", nproc, "--out", out)
    parts = job_parts("digits", OPTIONS, (nproc,))
    wait_until(lambda: any(out.glob("checkpoints/step-????????")))
    workers = [psutil.Process(job.pid)] if backend == "serial" else job.workers().values()
    memory = Memory(workers, parts.layout)
    found = last = 0
    for vector in ("parameters", "momentum", "scalars", None):
        # Until the words are wiped, the arena still holds the state that is being given up.
        wait_until(lambda: memory.committed > last)  # noqa: B023
        flip = memory.flip(rng, vector)
        wait_until(lambda: len(corruptions(out)) > found or memory.committed >= flip.step + 2)  # noqa: B023
        events = corruptions(out)[found:]
        assert events or flip.late, f"missed {flip}"
        for event in events:
            assert (event["lane"], event["tensor"]) == parts.place(flip.vector, flip.element)
            assert event["step"] in (flip.step, flip.step + 1)
        found, last = found + len(events), flip.step
    memory.close()
    done = job.wait()
    assert done.returncode == 0, done.stderr
    result = result_of(out)
    assert result["state_sha256"] == undisturbed["state_sha256"]
    assert result["restarts"] == found
    assert done.stderr.count("E_CORRUPT_STATE step=") == found == done.stderr.count("I_RESUMED step=")
    lines = (out / "samples.log").read_text().splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == list(range(1200))


def test_a_flip_before_the_first_checkpoint_ends_a_local_run_with_80(start, tmp_path):
    """Nothing to go back to: exit 80, the finding and the cure are said, and the result says so too."""
    out = tmp_path / "run"
    options = [*OPTIONS, "-o", "checkpoint.every_steps=1000"]
    job = start("train", "digits", *options, "--nproc", 2, "--out", out)
    parts = job_parts("digits", options, (2,))
    wait_until(lambda: len(job.workers()) == 2)
    wait_until(lambda: (out / "samples.log").exists())
    memory = Memory(job.workers().values(), parts.layout)
    memory.flip_in_time(random.Random(new_seed()), out)
    memory.close()
    done = job.wait()
    assert done.returncode == 80, done.stderr
    assert "E_CORRUPT_STATE step=" in done.stderr
    assert "no checkpoint to go back to" in done.stderr.splitlines()[-1]
    assert result_of(out)["exit_code"] == 80


def test_restarts_without_progress_are_limited(start, tmp_path):
    """Memory that goes bad again and again ends the run with 70 after run.max_restarts."""
    out = tmp_path / "run"
    options = [*OPTIONS, "-o", "run.max_restarts=1", "-o", "train.max_steps=100000"]
    options += ["-o", "checkpoint.every_steps=100000"]
    begin = ["train", "digits", *OPTIONS, "-o", "train.max_steps=25", "--nproc", 2, "--out", out]
    assert start(*begin).wait().returncode == 0
    job = start("train", "digits", *options, "--nproc", 2, "--out", out)
    parts = job_parts("digits", options, (2,))
    rng = random.Random(new_seed())
    wait_until(lambda: len(job.workers()) == 2)
    wait_until(lambda: (out / "samples.log").read_bytes().count(b"\n") > 26)
    memory = Memory(job.workers().values(), parts.layout)
    while job.process.poll() is None and len(corruptions(out)) < 2:
        try:
            if memory.committed >= 0:
                memory.flip(rng, "parameters")
        except (OSError, AssertionError, psutil.NoSuchProcess):
            continue  # The arena is empty for a moment, or the job is over.
    memory.close()
    done = job.wait()
    assert done.returncode == 70, done.stderr
    assert "look at the memory of that host" in done.stderr.splitlines()[-1]


def test_reload_is_a_source_that_no_host_can_be():
    """The word that asks for a reload is neither a host's number nor that of an empty arena."""
    assert RELOAD not in (EMPTY, *range(100))
    assert Admission.__dataclass_fields__.keys() >= {"out", "restore"}
