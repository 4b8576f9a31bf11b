"""A gradient that is not finite: the same decision, code and words on every backend."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

from distbp import checkpoint
from distbp.data import Order
from distbp.partition import split_range
from tests.backends.bad_steps import FEATURES, SAMPLES
from tests.conftest import result_of

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("bad_steps.py")
BAD_SAMPLE, MICRO_BATCHES = 17, 12
CASES = {"a poisoned sample": (BAD_SAMPLE, "0.1"), "a learning rate of 1e30": (None, "1e30")}
POISONED, DIVERGING = CASES
ONE_CASE = [POISONED, pytest.param(DIVERGING, marks=pytest.mark.slow)]
"""Where a start takes seconds: what a backend does with such numbers does not depend on their origin."""


def write_samples(path, poisoned):
    """Write the file of samples, one of them perhaps not finite."""
    x = np.random.default_rng(3).standard_normal((SAMPLES, FEATURES)).astype(np.float32)
    if poisoned is not None:
        x[poisoned, 5] = np.nan
    x.tofile(path)


def arguments(tmp_path, case):
    """The arguments of the script, after writing its data."""
    poisoned, rate = CASES[case]
    write_samples(tmp_path / "samples", poisoned)
    return [tmp_path / "run", tmp_path / "samples", rate]


def check(tmp_path, case, code, text, workers):
    """The run ended with 79, said who and which samples, and saved nothing that is not finite."""
    assert code == 79, text
    said = re.search(
        r"finite 3 times in a row, last in step (\d+) \(worker (\d+), micro-batch (\d+), samples ([\d, ]+)",
        text,
    )
    assert said, text
    step, worker, micro_batch = (int(said[number]) for number in (1, 2, 3))
    samples = [int(sample) for sample in said[4].split(",")]
    order = Order(SAMPLES, 0)
    assert samples == order.indices(step * SAMPLES + micro_batch * 8, 8).tolist()
    low, high = split_range(MICRO_BATCHES, workers, worker)
    assert low <= micro_batch < high
    if case == "a poisoned sample":
        assert step == 2, "the first three steps were bad"
        assert BAD_SAMPLE in samples
    for path in (tmp_path / "run" / "checkpoints").glob("step-????????"):
        tensors = checkpoint.load(path).tensors
        assert all(np.isfinite(tensor).all() for tensor in tensors.values()), path


@pytest.mark.parametrize("nproc", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_local_workers_decide_alike(case, nproc, distbp, tmp_path):
    """A poisoned sample in a file, a huge learning rate: 79, worker and samples named, nothing bad saved."""
    done = distbp("run", "--nproc", nproc, SCRIPT, *arguments(tmp_path, case))
    check(tmp_path, case, done.returncode, done.stderr, nproc)
    assert result_of(tmp_path / "run")["exit_code"] == 79
    if nproc > 1:
        logs = [path.read_text() for path in (tmp_path / "run" / "logs").glob("rank-*.log")]
        assert any("failed with 79" in log and "samples" in log for log in logs)


def test_good_samples_skip_nothing(distbp, tmp_path):
    """Without a bad sample the same script ends well on three workers."""
    write_samples(tmp_path / "samples", None)
    done = distbp("run", "--nproc", 3, SCRIPT, tmp_path / "run", tmp_path / "samples", "0.1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "skipped 0\n"


@pytest.mark.mpi
@pytest.mark.parametrize("flavour", ["mpich", "openmpi"])
@pytest.mark.parametrize("case", CASES)
def test_ranks_decide_alike(case, flavour, tmp_path):
    """The same under mpirun, told once."""
    from tests.mpi.conftest import Flavour, prefix_of

    mpi = Flavour(flavour, prefix_of(flavour), tmp_path)
    done = mpi.run(3, SCRIPT, *arguments(tmp_path, case))
    check(tmp_path, case, done.returncode, done.stderr, 3)
    assert done.stderr.count("times in a row") == 1


@pytest.mark.mpi
@pytest.mark.parametrize("case", ONE_CASE)
def test_hosts_decide_alike(case, tmp_path):
    """On two hosts whoever speaks names the worker and the samples, also those of the other host."""
    from cluster.emulated import EmulatedCluster
    from cluster.requirements import what_is_missing
    from tests.mpi.conftest import prefix_of

    if reason := what_is_missing():
        pytest.skip(reason)
    prefix = prefix_of("mpich")
    words = [prefix / "bin" / "python", SCRIPT, *arguments(tmp_path, case)]
    with EmulatedCluster(2, shared=[tmp_path, REPOSITORY, prefix]) as cluster:
        launch = cluster.mpirun(
            [str(word) for word in words],
            4,
            "mpich",
            slots={"host0": 2, "host1": 2},
            prefix=prefix,
            environment={"PYTHONPATH": str(REPOSITORY)},
        )
        done = cluster.run(cluster.hosts[0], launch, timeout=90, cwd=tmp_path)
    check(tmp_path, case, done.returncode, done.stderr, 4)


@pytest.mark.ray
@pytest.mark.timeout(180)
@pytest.mark.parametrize("case", ONE_CASE)
def test_actors_decide_alike(case, tmp_path):
    """The same on Ray."""
    prefix = Path(os.environ.get("RAY_PREFIX", REPOSITORY / ".venv-ray"))
    if not (prefix / "bin" / "ray").exists():
        pytest.skip(f"no Ray environment at {prefix}: run make ray-environment")
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTBP_"))}
    done = subprocess.run(
        [
            *(prefix / "bin" / "python", "-m", "distbp.cli.main", "run", "--backend", "ray", "--nproc", "2"),
            *(SCRIPT, *arguments(tmp_path, case)),
        ],
        cwd=tmp_path,
        env=known | {"HOME": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    check(tmp_path, case, done.returncode, done.stderr, 2)
