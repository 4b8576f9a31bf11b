"""`launch/mpirun.sh` with the real distbp and both MPI libraries: code, culprit, clean-up, starting again."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from tests.conftest import result_of, wait_until
from tests.mpi.conftest import on_rank, prefix_of
from tests.soaking import command_line

pytestmark = pytest.mark.mpi

ONCE = ("--restarts", "0")
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.max_steps=1000",
    "-o", "train.epochs=1000", "-o", "optimizer.clip_norm=2.0", "-o", "checkpoint.every_steps=50",
]  # fmt: skip
REFUSED = "does not belong to the MPI library"

# The last worker is in trouble: Hydra blames the first one of those that are dead when it looks.
USER_SCRIPT = """
import os, signal, sys, time
import distbp
from distbp import nn

train, val = distbp.load_data("digits")
model = nn.Sequential(nn.Flatten(), nn.Linear(32), nn.ReLU(), nn.Linear(10))
trainer = distbp.Trainer(model, batch_size=96, micro_batch=8)

class Trouble(distbp.ArrayDataset):
    calls = 0
    def batch(self, indices, x_out=None, y_out=None):
        self.calls += 1
        time.sleep(0.02)
        if self.calls == 50 and distbp.rank() == 2:
            {trouble}
        return super().batch(indices, x_out, y_out)

trainer.fit(Trouble(train.x, train.y), val=val, epochs=10, out="run")
"""


def checkpoints(out):
    """The checkpoints that a run has saved, the newest last."""
    return sorted(path.name for path in Path(out).glob("checkpoints/step-????????"))


@pytest.mark.parametrize(
    ("trouble", "code", "how"),
    [
        ("raise RuntimeError('broken here')", 1, ""),
        ("sys.exit(3)", 3, ""),
        ("os._exit(3)", 69, "left with 3"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 69, "killed by signal 9"),
        pytest.param(
            "os.kill(os.getpid(), signal.SIGSEGV)", 69, "killed by signal 11", marks=pytest.mark.slow
        ),
        ("os.kill(os.getpid(), signal.SIGSTOP)", 69, "for which the others waited in vain"),
    ],
    ids=["exception", "sys.exit", "os._exit", "SIGKILL", "SIGSEGV", "SIGSTOP"],
)
def test_trouble_on_one_rank_has_a_code_and_a_culprit(script, trouble, code, how, tmp_path):
    """A worker that raises, exits, dies or hangs: the right code, its number, host, log, and nothing left."""
    (tmp_path / "train.py").write_text(USER_SCRIPT.format(trouble=trouble))
    ended = script("run", "train.py", options=ONCE).wait()
    assert ended.returncode == code, ended.stderr
    (culprit,) = ended.culprits
    assert (culprit.worker, culprit.host, culprit.how) == (2, socket.gethostname(), how)
    assert f"{tmp_path}/run/logs/rank-00002.log says:" in ended.stderr
    assert ", launcher rank 2" in ended.stderr
    ended.check_clean()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("os.environ['DISTBP_SEED'] = '5'", "seed 0 and 5"),
        pytest.param(
            "os.environ['OPENBLAS_CORETYPE'] = 'Nehalem'", "environment.blas.kernel", marks=pytest.mark.slow
        ),
    ],
    ids=["configuration", "kernel"],
)
def test_a_rank_that_differs_is_named(script, change, named, tmp_path):
    """Another configuration or BLAS kernel on one rank: 78, the rank, and the cure; no further start."""
    (tmp_path / "sitecustomize.py").write_text(on_rank(1, change))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    environment = {"PYTHONPATH": path, "OPENBLAS_CORETYPE": "Haswell"}
    ended = script("train", "digits", *OPTIONS, "--out", tmp_path / "run", env=environment).wait()
    assert ended.returncode == 78, ended.stderr
    assert "mpirun.sh: culprit: worker 1" in ended.stderr
    assert named in ended.stderr
    assert "every rank must run the same command" in ended.stderr
    assert "starting again" not in ended.stderr
    ended.check_clean()


# Rank 2 is killed above; rank 0 is the one that stores.
@pytest.mark.parametrize("victim", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_rank_is_replaced_by_a_new_start(script, victim, undisturbed, tmp_path):
    """After kill -9 the job starts again from its last checkpoint and ends in the bits of one worker."""
    out = tmp_path / "run"
    job = script("train", "digits", *OPTIONS, "--out", out, options=("--restarts", "2"))
    wait_until(lambda: checkpoints(out))
    job.ranks()[victim].kill()
    ended = job.wait()
    assert ended.returncode == 0, ended.stderr
    assert [culprit.worker for culprit in ended.culprits] == [victim]
    assert "resumed from step-" in ended.stderr
    assert result_of(out)["state_sha256"] == undisturbed["state_sha256"]
    ended.check_clean()


def test_a_killed_launcher_is_replaced_by_a_new_start(script, undisturbed, tmp_path):
    """After kill -9 of mpirun itself, to which nobody can speak any more, the job starts again: same bits."""
    out = tmp_path / "run"
    job = script("train", "digits", *OPTIONS, "--out", out, options=("--restarts", "2"))
    wait_until(lambda: checkpoints(out))
    (launcher,) = launchers(job)
    os.kill(launcher, signal.SIGKILL)
    ended = job.wait()
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("starting again") == 1
    assert "resumed from step-" in ended.stderr
    assert result_of(out)["state_sha256"] == undisturbed["state_sha256"]
    ended.check_clean()


def launchers(job):
    """The processes of mpirun itself."""
    names = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun")
    return [pid for pid in job.marked() if Path(command_line(pid)[0]).name in names]


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (signal.SIGUSR1, 75),
        pytest.param(signal.SIGTERM, 75, marks=pytest.mark.slow),  # Handled by the same words as SIGUSR1.
        (signal.SIGINT, 130),
    ],
    ids=lambda v: str(v),
)
def test_a_signal_saves_and_stops(script, sent, code, undisturbed, distbp, tmp_path):
    """SIGUSR1 and SIGTERM end with 75, Ctrl-C with 130; the checkpoint leads to the bits of one worker."""
    out = tmp_path / "run"
    job = script("train", "digits", *OPTIONS, "--out", out)
    wait_until(lambda: checkpoints(out))
    if sent == signal.SIGINT:
        os.killpg(job.process.pid, sent)  # As a terminal does.
    else:
        os.kill(job.process.pid, sent)
    ended = job.wait()
    assert ended.returncode == code, ended.stderr
    assert ended.stderr.count("stopped on request after step") == 1
    ended.check_clean()
    assert result_of(out)["status"] == "stopped"
    assert checkpoints(out)[-1] == f"step-{result_of(out)['steps']:08d}"
    assert distbp("train", "digits", *OPTIONS, "--nproc", 2, "--out", out).returncode == 0
    assert result_of(out)["state_sha256"] == undisturbed["state_sha256"]


def other_python(mpi):
    """The Python of the environment with the other MPI library."""
    return prefix_of({"mpich": "openmpi", "openmpi": "mpich"}[mpi.name]) / "bin" / "python"


def test_a_launcher_of_the_other_library_is_refused(mpi, tmp_path):
    """MPICH's launcher with Open MPI's library, and the reverse: 78 with the cure, and no run is begun."""
    words = ["train", "digits", *OPTIONS, "--out", tmp_path / "run"]
    done = mpi.distbp(3, *words, python=other_python(mpi))
    assert done.returncode == 78, done.stderr
    assert REFUSED in done.stderr
    assert "use that library's own mpirun" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_script_refuses_a_launcher_of_the_other_library(mpi, script, tmp_path):
    """The same under launch/mpirun.sh; it accuses nobody, and does not start again what cannot work."""
    words = ["train", "digits", *OPTIONS, "--out", tmp_path / "run"]
    ended = script(*words, python=other_python(mpi)).wait()
    assert ended.returncode == 78, ended.stderr
    assert REFUSED in ended.stderr
    assert "use that library's own mpirun" in ended.stderr
    assert "culprit" not in ended.stderr
    assert "starting again" not in ended.stderr
    assert not (tmp_path / "run").exists()
    ended.check_clean()
