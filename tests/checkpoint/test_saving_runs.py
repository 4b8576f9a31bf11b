"""Whole training runs whose saves are killed, refused, delayed or damaged: they end in the same bits."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from distbp.checkpoint import list_checkpoints, load, state_sha256
from tests.conftest import COMMAND, Job, result_of, wait_until

from .test_saver import immutable, mounted
from .traced_save import why_not

STEPS = 240
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.epochs=1000",
    "-o", "model.hidden=[64]",
    "-o", "schedule.name=constant", "-o", "optimizer.lr=0.01", "-o", "checkpoint.every_seconds=none",
]  # fmt: skip
EVERY_40 = [*OPTIONS, "-o", f"train.max_steps={STEPS}", "-o", "checkpoint.every_steps=40"]


@pytest.fixture
def strace():
    """Skip, with the reason, where strace cannot be used."""
    reason = why_not()
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The result of the run that nothing happens to, with all its checkpoints."""
    out = tmp_path_factory.mktemp("undisturbed")
    options = [*EVERY_40, "-o", "checkpoint.keep=100", "--backend", "serial", "--out", out]
    done = Job(["train", "digits", *options], out, None).wait()
    assert done.returncode == 0, done.stderr
    return out


def events(out):
    """What the run recorded about its checkpoints."""
    lines = (Path(out) / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == "checkpoint"]


def assert_same_end(out, undisturbed):
    """Assert that a run has ended in the bits of the undisturbed one."""
    assert result_of(out)["state_sha256"] == result_of(undisturbed)["state_sha256"]


@pytest.mark.parametrize("call", ["rename", pytest.param("fsync", marks=pytest.mark.slow)])
def test_a_run_killed_in_a_save_goes_on(call, strace, undisturbed, distbp, tmp_path):
    """Killed at its N-th call of a kind, while starting or while saving, a run goes on to the same bits."""
    for number in range(1, 12):
        out = tmp_path / f"{number}"
        command = [*COMMAND, "train", "digits", *EVERY_40, "--backend", "serial", "--out", out]
        traced = ["strace", "-f", "-o", "/dev/null", "-e", f"trace={call}"]
        traced += ["-e", f"inject={call}:signal=KILL:when={number}"]
        killed = subprocess.run([*traced, *command], capture_output=True, timeout=60, check=False)
        if killed.returncode == 0:  # Each thread counts by itself, and no thread makes so many.
            break
        assert killed.returncode in (-9, 137), killed.stderr
        done = distbp("train", "digits", *EVERY_40, "--nproc", 2, "--out", out)
        assert done.returncode == 0, done.stderr
        assert_same_end(out, undisturbed)
        assert not list((out / "checkpoints").glob("*.tmp-*"))
    assert number > {"fsync": 6, "rename": 1}[call], "a save makes more of these calls"
    assert killed.returncode == 0


@pytest.mark.parametrize("options", [("--backend", "serial"), ("--nproc", 2)])
@pytest.mark.parametrize(("mount", "error"), [("size=16k", "ENOSPC"), ("ro", "EROFS")])
def test_a_disk_that_refuses_ends_the_run_after_three(mount, error, options, start, tmp_path):
    """No room, or no right to write: training goes on twice, then all workers end with 73 and the reason."""
    out = tmp_path / "run"
    with mounted(out / "checkpoints", mount):
        often = [*OPTIONS, "-o", "train.max_steps=100000", "-o", "checkpoint.every_steps=20"]
        job = start("train", "digits", *often, *options, "--out", out)
        serial = options[0] == "--backend"
        workers = [] if serial else list(wait_until(job.workers).values())
        done = job.wait()
        assert done.returncode == 73, done.stderr
        assert "3 checkpoints in a row could not be written" in done.stderr.strip().splitlines()[-1]
        assert error in done.stderr.strip().splitlines()[-1]
        assert done.stderr.count("E_SAVE_FAILED") == 3
        assert [event["step"] for event in events(out)] == [20, 40, 60]
        assert result_of(out)["exit_code"] == 73
        assert not [worker for worker in workers if worker.is_running()]
        if mount != "ro":
            assert list((out / "checkpoints").iterdir()) == []


def test_a_save_that_is_refused_costs_a_checkpoint_and_no_bits(undisturbed, distbp, tmp_path):
    """Two saves of a run fail, the others do not; it ends with 0 and the same bits, and says which failed."""
    out = tmp_path / "run"
    names = [out / "checkpoints" / f"step-{step:08d}" for step in (40, 80)]
    for name in names:
        name.mkdir(parents=True)
    with immutable(names[0]), immutable(names[1]):
        done = distbp("train", "digits", *EVERY_40, "--nproc", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert_same_end(out, undisturbed)
    assert "E_SAVE_FAILED step=40 in_a_row=1/3" in done.stderr
    status = {event["step"]: event["status"] for event in events(out) if "step" in event}
    assert status == {step: "failed" if step <= 80 else "saved" for step in range(40, STEPS + 1, 40)}


def test_training_goes_on_while_a_slow_disk_saves(strace, start, distbp, tmp_path):
    """With a disk that takes 0.2 s for each fsync steps go on meanwhile; what is saved is the right state."""
    out = tmp_path / "run"
    options = [*OPTIONS, "-o", "checkpoint.every_seconds=0.2", "-o", "checkpoint.keep=100"]
    slow = ["-f", "--seccomp-bpf", "-o", "/dev/null", "-e", "trace=fsync"]
    slow += ["-e", "inject=fsync:delay_enter=200000"]
    command = [
        *COMMAND,
        "train",
        "digits",
        *options,
        "-o",
        "train.max_steps=1000000",
        "--nproc",
        2,
        "--out",
        out,
    ]
    process = subprocess.Popen(["strace", *slow, *map(str, command)], start_new_session=True)
    try:
        wait_until(lambda: (out / "events.jsonl").exists() and len(events(out)) >= 3, timeout=60)
        psutil.Process(process.pid).children()[0].terminate()
        assert process.wait(60) == 75
    finally:
        process.kill()
    saved = [event for event in events(out) if event["status"] == "saved"]
    for before, after in itertools.pairwise(saved[:-1]):  # The last one is that of the stop, in a hurry.
        assert before["seconds"] > 6 * 0.2, "a save makes six calls of fsync"
        assert after["step"] - before["step"] > 10, "training stood still"
    path = list_checkpoints(out / "checkpoints")[-2]
    step = int(path.name.removeprefix("step-"))
    serial = ["--backend", "serial", "-o", f"train.max_steps={step}", "--out", tmp_path / "reference"]
    assert distbp("train", "digits", *OPTIONS, *serial).returncode == 0
    assert state_sha256(load(path).tensors) == result_of(tmp_path / "reference")["state_sha256"]


def test_every_checkpoint_of_a_run_holds_the_state_of_its_step(undisturbed, distbp, tmp_path):
    """Saved by three workers while they train on, each checkpoint is the one that a single worker saves."""
    out = tmp_path / "run"
    options = [*EVERY_40, "-o", "checkpoint.keep=100", "--nproc", 3, "--out", out]
    assert distbp("train", "digits", *options).returncode == 0
    found = {path.name: state_sha256(load(path).tensors) for path in list_checkpoints(out / "checkpoints")}
    expected = {
        path.name: state_sha256(load(path).tensors) for path in list_checkpoints(undisturbed / "checkpoints")
    }
    assert len(expected) == STEPS // 40
    assert found == expected


def test_a_damaged_checkpoint_is_passed_over_unless_it_was_named(undisturbed, distbp, tmp_path):
    """`--resume auto` says which is damaged and takes the one before; `--resume CHECKPOINT` ends with 65."""
    out = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    (out / "result.json").unlink()
    newest, before = list_checkpoints(out / "checkpoints")[:2]
    with open(newest / "state.safetensors", "r+b") as file:
        file.seek(1000)
        file.write(b"\xaa")
    for resume, directory in ((newest, out), (newest, tmp_path / "other")):
        refused = distbp("train", "digits", *EVERY_40, "--resume", resume, "--out", directory)
        assert refused.returncode == 65, refused.stderr
        assert newest.name in refused.stderr
    done = distbp("train", "digits", *EVERY_40, "--nproc", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"W_CHECKPOINT_DAMAGED {newest.name}: state.safetensors" in done.stderr
    assert_same_end(out, undisturbed)
    damaged = [event for event in events(out) if event["status"] == "damaged"]
    assert [Path(event["path"]).name for event in damaged] == [newest.name]
    assert (out / "checkpoints" / before.name).is_dir()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["tests.power_cuts", "--cuts", "4"], 0, "4 power cuts, 0 with a loss"),
        (["tests.power_cuts", "--cuts", "2", "--without-fsync"], 1, "was acknowledged, recovery finds -1"),
        (["tests.flips", "--count", "200"], 0, "200 flips and 20 cuts"),
    ],
)
def test_the_long_commands_in_short(arguments, code, said):
    """A few power cuts lose nothing, without fsync they do; some hundred flips of a run are all found."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=100, check=False,
        cwd=Path(__file__).resolve().parents[2], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if "cannot cut the power here" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout
