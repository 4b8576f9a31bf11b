"""Faults on purpose: a worker is lost at every point of a step, in every way, and the bits stay the same."""

from __future__ import annotations

import os
import re
import subprocess

import pytest

from distbp.errors import ConfigError
from distbp.fault_points import KINDS, PHASES, Fault, parse_faults
from tests.conftest import COMMAND, result_of

STEP, STEPS = 11, 30
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", f"train.max_steps={STEPS}",
    "-o", "train.epochs=1000", "-o", "optimizer.clip_norm=2.0", "-o", "model.hidden=[32]",
    "-o", f"checkpoint.every_steps={STEP}",
]  # fmt: skip
LOCAL = [phase for phase in PHASES if phase not in ("start", "exchange", "save")]
"""Phases that every worker of one host passes in step `STEP`."""


def check(done, out, undisturbed, restarts):
    """The run ended well, after so many restarts, with the bits of the undisturbed one."""
    assert done.returncode == 0, done.stderr
    result = result_of(out)
    assert result["state_sha256"] == undisturbed["state_sha256"]
    assert result["restarts"] == restarts
    assert not [path.name for path in (out / "checkpoints").iterdir() if ".tmp-" in path.name]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("phase", LOCAL)
def test_a_kill_at_every_point_costs_one_step(phase, rank, undisturbed, distbp, tmp_path):
    """Whoever dies, wherever in the step, is replaced, and the step is done again."""
    out = tmp_path / "run"
    fault = f"{STEP}:{phase}:{rank}:kill"
    done = distbp("train", "digits", *OPTIONS, "--nproc", 2, "--out", out, env={"DISTBP_FAULT": fault})
    check(done, out, undisturbed, 1)
    assert f"E_LOST_WORKER rank={rank}" in done.stderr
    # The committed step: worker 0, which stores it, may be a little behind worker 1, or go on after its loss.
    assert re.search(rf"step=({STEP - 1}|{STEP}|{STEP + 1}) cause=SIGKILL", done.stderr)


def test_a_kill_while_a_save_is_in_flight(undisturbed, distbp, tmp_path):
    """The writer of checkpoints dies with one begun: it is made again, and nothing half written is left."""
    out = tmp_path / "run"
    fault = f"{STEP}:save:0:kill"
    done = distbp("train", "digits", *OPTIONS, "--nproc", 2, "--out", out, env={"DISTBP_FAULT": fault})
    check(done, out, undisturbed, 1)
    assert (out / "checkpoints" / f"step-{STEP:08d}").is_dir()


@pytest.mark.parametrize(("kind", "cause"), [("exit", "exit 7"), ("segfault", "SIGSEGV")])
def test_other_ends_are_losses_too(kind, cause, undisturbed, distbp, tmp_path):
    """A process that ends by itself, or by a wrong address, is replaced like one that was killed."""
    out = tmp_path / "run"
    fault = f"{STEP}:backward:1:{kind}"
    done = distbp("train", "digits", *OPTIONS, "--nproc", 2, "--out", out, env={"DISTBP_FAULT": fault})
    check(done, out, undisturbed, 1)
    assert f"cause={cause}" in done.stderr


def test_a_stop_is_found_and_the_worker_replaced(undisturbed, distbp, tmp_path):
    """A worker that stands still is found by its lack of progress, killed and replaced."""
    out = tmp_path / "run"
    fault = f"{STEP}:reduce:1:stop"
    done = distbp("train", "digits", *OPTIONS, "--nproc", 2, "--out", out, env={"DISTBP_FAULT": fault})
    check(done, out, undisturbed, 1)
    assert "E_STUCK_WORKER rank=1" in done.stderr


def test_an_exception_ends_the_job(distbp, tmp_path):
    """User code that raises would raise again: 1, with the rank and the traceback last."""
    fault = f"{STEP}:forward:1:raise"
    out = tmp_path / "run"
    done = distbp("train", "digits", *OPTIONS, "--nproc", 2, "--out", out, env={"DISTBP_FAULT": fault})
    assert done.returncode == 1
    assert "worker 1 raised" in done.stderr
    assert done.stderr.rstrip().endswith("RuntimeError: DISTBP_FAULT asked for this")


@pytest.mark.parametrize("second", ["start:0", "start:1", "start:2", "read:2", "commit:0", "commit:2"])
def test_a_second_loss_during_recovery(second, undisturbed, distbp, tmp_path):
    """While worker 1 is replaced, or in the step that is done again, another one is lost."""
    out = tmp_path / "run"
    faults = f"{STEP}:apply:1:kill,{STEP}:{second}:kill"
    done = distbp("train", "digits", *OPTIONS, "--nproc", 3, "--out", out, env={"DISTBP_FAULT": faults})
    # Worker 1 is lost once: its replacement passes unharmed.
    check(done, out, undisturbed, 1 if second == "start:1" else 2)


def test_a_job_killed_with_its_worker_is_resumed(undisturbed, distbp, tmp_path):
    """The serial backend has nobody to replace the only worker; the same command goes on."""
    out = tmp_path / "run"
    command = ["train", "digits", *OPTIONS, "--backend", "serial", "--out", out]
    done = distbp(*command, env={"DISTBP_FAULT": f"{STEP + 5}:apply:0:kill"})
    assert done.returncode == -9
    check(distbp(*command), out, undisturbed, 0)


def test_starts_without_progress_are_counted(distbp, tmp_path):
    """Whatever starts a job again and again that dies before a checkpoint is told so with 70, once."""
    out = tmp_path / "run"
    command = ["train", "digits", *OPTIONS, "-o", "run.max_restarts=2", "--backend", "serial", "--out", out]
    dies = {"DISTBP_FAULT": "3:read:0:kill"}
    codes = [distbp(*command, env=dies).returncode for _ in range(4)]
    assert codes == [-9, -9, -9, 70]
    assert distbp(*command).returncode == 0


def test_a_new_checkpoint_begins_the_count_anew(distbp, tmp_path):
    """Starts that die again and again, but further on, may go on for ever."""
    out = tmp_path / "run"
    options = [*OPTIONS, "-o", "run.max_restarts=0", "-o", "train.max_steps=1000"]
    command = ["train", "digits", *options, "--backend", "serial", "--out", out]
    for step in (300, 600, 900):
        done = distbp(*command, env={"DISTBP_FAULT": f"{step}:read:0:kill"})
        assert done.returncode == -9, done.stderr
    assert distbp(*command).returncode == 0


LATE = """
import os, time
if os.environ.get("DISTBP_RANK") == "1":
    time.sleep(3600)
"""


def test_a_worker_that_never_comes_is_named_and_given_up(distbp, tmp_path):
    """A worker that hangs before `fit`, in an import say, ends the job with 69 after `run.join_timeout_s`."""
    (tmp_path / "sitecustomize.py").write_text(LATE)
    options = [*OPTIONS, "-o", "run.join_timeout_s=3"]
    command = ["train", "digits", *options, "--nproc", 2, "--out", tmp_path / "run"]
    done = distbp(*command, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 69
    assert "for worker [1] to call fit" in done.stderr
    assert "run.join_timeout_s" in done.stderr


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_reader_that_goes_away_does_not_end_the_job(nproc, undisturbed, tmp_path):
    """`distbp train ... 2>&1 | head -1` trains to the end, also when there is something to say."""
    out = tmp_path / "run"
    command = [*COMMAND, "train", "digits", *OPTIONS, "--nproc", str(nproc), "--out", str(out)]
    reader, writer = os.pipe()
    environment = os.environ | {"DISTBP_FAULT": f"{STEP}:apply:0:kill"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=writer, stderr=writer)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    process.wait(60)
    assert result_of(out)["state_sha256"] == undisturbed["state_sha256"]
    assert result_of(out)["restarts"] == 1


@pytest.mark.parametrize(
    "text", ["x", "1:read:0", "1:sleep:0:kill", "1:read:0:maim", "-1:read:0:kill", "1:read:r:kill"]
)
def test_a_wrong_fault_is_refused(text, distbp, tmp_path):
    """A variable that says nothing useful is a usage error before a worker starts."""
    with pytest.raises(ConfigError, match="STEP:PHASE:RANK:KIND"):
        parse_faults(text)
    done = distbp("train", "digits", "--nproc", 2, "--out", tmp_path / "run", env={"DISTBP_FAULT": text})
    assert done.returncode == 2
    assert "DISTBP_FAULT" in done.stderr


def test_several_faults_are_read():
    """Faults are separated by commas, and every phase and kind has a name."""
    text = ",".join(f"{step}:{phase}:0:{kind}" for step, phase in enumerate(PHASES) for kind in KINDS)
    assert parse_faults(text) == [
        Fault(step, phase, 0, kind) for step, phase in enumerate(PHASES) for kind in KINDS
    ]
