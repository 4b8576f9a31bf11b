"""Workers under mpirun on one host, with both MPI libraries: the same bits, and an end to every trouble."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import result_of, wait_until
from tests.mpi.conftest import launcher_rank, on_rank

pytestmark = pytest.mark.mpi

OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.max_steps=200",
    "-o", "train.epochs=1000", "-o", "optimizer.clip_norm=2.0", "-o", "model.hidden=[64]",
    "-o", "run.log_samples=true",
]  # fmt: skip

SCRIPT = """
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
        if self.calls == 30 and distbp.rank() == 1:
            {trouble}
        return super().batch(indices, x_out, y_out)

history = trainer.fit(Trouble(train.x, train.y), val=val, epochs=10, out="run")
distbp.print(history.result["state_sha256"])
"""


def ranks_of(launcher):
    """The rank processes of a job."""
    found = []
    for child in psutil.Process(launcher.pid).children(recursive=True):
        try:
            if "python" in child.name() and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def steps_of(out):
    """The steps that a run has recorded."""
    path = Path(out) / "samples.log"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3, 6])
def test_any_number_of_ranks_gives_the_same_bits(mpi, ranks, undisturbed, tmp_path):
    """One to six ranks end in the bits of one worker without MPI."""
    done = mpi.distbp(ranks, "train", "digits", *OPTIONS, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "run")
    assert result["state_sha256"] == undisturbed["state_sha256"]
    assert (result["backend"], result["world_size"]) == ("mpi", ranks)
    assert done.stderr.count("run directory") == 1


def test_a_script_runs_under_mpirun(mpi, tmp_path, distbp):
    """`mpirun python train.py` prints once what `distbp run` prints."""
    (tmp_path / "train.py").write_text(SCRIPT.format(trouble="pass"))
    alone = distbp("run", "--backend", "serial", "train.py", cwd=tmp_path)
    (tmp_path / "run").rename(tmp_path / "alone")
    done = mpi.run(3, "train.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == alone.stdout.strip()


@pytest.mark.parametrize(
    ("trouble", "code", "words"),
    [
        ("raise RuntimeError('broken here')", 1, ["rank 1 on host", "RuntimeError: broken here"]),
        ("sys.exit(3)", 3, ["rank 1 on host", "sys.exit(3)"]),
        ("os._exit(7)", None, []),
        ("os.kill(os.getpid(), signal.SIGKILL)", None, []),
        pytest.param("os.kill(os.getpid(), signal.SIGSEGV)", None, [], marks=pytest.mark.slow),
    ],
)
def test_trouble_on_one_rank_ends_the_job(mpi, trouble, code, words, tmp_path):
    """A rank that raises, exits or is killed takes the job along; nothing hangs and nothing is left."""
    (tmp_path / "train.py").write_text(SCRIPT.format(trouble=trouble))
    launcher = mpi.start(3, "train.py")
    ranks = wait_until(lambda: (found := ranks_of(launcher)) and len(found) >= 3 and found)
    _, stderr = launcher.communicate(timeout=40)
    assert launcher.returncode != 0
    assert code is None or launcher.returncode == code
    for word in words:
        assert word in stderr
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert not alive


def test_a_stopped_rank_is_named(mpi, tmp_path):
    """SIGSTOP of one rank ends the job within the deadline with 69, naming rank and host."""
    out = tmp_path / "run"
    longer = [*OPTIONS, "-o", "train.max_steps=100000"]
    launcher = mpi.start(2, "-m", "distbp.cli.main", "train", "digits", *longer, "--out", out)
    wait_until(lambda: steps_of(out) >= 20)
    victim = next(p for p in ranks_of(launcher) if launcher_rank(p) == 1)
    victim.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    _, stderr = launcher.communicate(timeout=60)
    assert time.monotonic() - began < 50
    assert launcher.returncode == 69, stderr
    assert "rank 0 on host" in stderr
    assert "for worker 1 of the same host" in stderr


def test_a_signal_to_the_launcher_saves_and_stops(mpi, undisturbed, distbp, tmp_path):
    """SIGUSR1 to mpirun: a durable checkpoint and 75; local workers finish the run with the same bits."""
    out = tmp_path / "run"
    slow = [*OPTIONS, "-o", "checkpoint.every_steps=1"]  # A save after each step, so that there is time.
    launcher = mpi.start(2, "-m", "distbp.cli.main", "train", "digits", *slow, "--out", out)
    wait_until(lambda: steps_of(out) >= 10)
    os.kill(launcher.pid, signal.SIGUSR1)
    _, stderr = launcher.communicate(timeout=40)
    assert launcher.returncode == 75, stderr
    assert stderr.count("stopped on request after step") == 1
    done = distbp("train", "digits", *OPTIONS, "--nproc", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    assert result_of(out)["state_sha256"] == undisturbed["state_sha256"]


def test_a_local_run_goes_on_under_mpirun(mpi, undisturbed, start, tmp_path):
    """A run that was begun and stopped locally ends under mpirun with the same bits."""
    out = tmp_path / "run"
    job = start("train", "digits", *OPTIONS, "--nproc", 2, "--out", out, "-o", "checkpoint.every_steps=1")
    wait_until(lambda: steps_of(out) >= 10)
    os.kill(job.pid, signal.SIGUSR1)
    assert job.wait().returncode == 75
    done = mpi.distbp(3, "train", "digits", *OPTIONS, "--out", out)
    assert done.returncode == 0, done.stderr
    assert result_of(out)["state_sha256"] == undisturbed["state_sha256"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("os.environ['DISTBP_SEED'] = '5'", "seed 0 and 5"),
        ("os.environ['OPENBLAS_CORETYPE'] = 'Nehalem'", "environment.blas.kernel"),
        ("os.environ['NPY_DISABLE_CPU_FEATURES'] = 'X86_V3 AVX2'", "environment.cpu_features"),
    ],
)
def test_ranks_that_differ_are_refused(mpi, change, named, tmp_path):
    """Another option, BLAS kernel or CPU feature on one rank is found before step 1: 78, with the cure."""
    (tmp_path / "sitecustomize.py").write_text(on_rank(1, change))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    environment = {"PYTHONPATH": path, "OPENBLAS_CORETYPE": "Haswell"}
    done = mpi.distbp(3, "train", "digits", *OPTIONS, "--out", tmp_path / "run", env=environment)
    assert done.returncode == 78, done.stderr
    assert "rank 1" in done.stderr
    assert named in done.stderr
    assert "every rank must run the same command" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["digitz"], 66, "did you mean 'digits'"),
        pytest.param(["digits", "-o", "optimizer.lr=nan"], 2, "optimizer.lr", marks=pytest.mark.slow),
        (["digits", "--no-such-option"], 2, "No such option"),
        (["digits", "--backend", "local"], 2, "cannot be used under a launcher"),
        (["digits", "--nproc", "2"], 2, "disagrees with the launcher"),
        (["digits", "--batch-size", "2", "--micro-batch", "1"], 2, "3 workers need at least 3 micro-batches"),
    ],
)
def test_an_error_of_all_ranks_is_told_once(mpi, arguments, code, words, tmp_path):
    """What is wrong on every rank is one message and one exit code."""
    done = mpi.distbp(3, "train", *arguments, "--out", tmp_path / "run")
    assert done.returncode == code, done.stderr
    assert done.stderr.count(words) == 1
    assert "Traceback" not in done.stderr


def test_rank_0_is_heard_when_it_starts_last(mpi, tmp_path):
    """The other ranks, which have the same error, do not end before rank 0 has told it."""
    (tmp_path / "sitecustomize.py").write_text(on_rank(0, "import time; time.sleep(3)"))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parents[2])])
    done = mpi.distbp(3, "train", "digits", "--no-such-option", env={"PYTHONPATH": path})
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("No such option") == 1
    assert "stopped on request" not in done.stderr


def test_a_launcher_of_another_library_is_refused(mpi, tmp_path):
    """Variables of a launcher that claims more processes than MPI sees: 78 with the cure, not N lone runs."""
    slurm = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])} | slurm
    command = [mpi.python, "-m", "distbp.cli.main", "train", "digits", "--out", tmp_path / "run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78, done.stderr
    assert "Slurm (srun) started 4 processes, but this one sees 1" in done.stderr
    assert "mpirun" in done.stderr
