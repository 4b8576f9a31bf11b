"""Whole runs under mpirun: nothing is unpickled on any rank."""

from __future__ import annotations

import pytest

from tests.audit import Watch
from tests.mpi.conftest import REPOSITORY
from tests.test_security import OPTIONS, UNPICKLES

pytestmark = pytest.mark.mpi


def test_nothing_is_unpickled_under_mpirun(mpi, tmp_path):
    """Training with saves, and resuming with more ranks: no rank unpickles anything, mpi4py included."""
    watch = Watch(tmp_path / "audit")
    environment = watch.environment(str(REPOSITORY))
    for ranks, steps in ((2, 110), (3, 150)):
        options = ["-o", f"train.max_steps={steps}", "--out", tmp_path / "run"]
        done = mpi.distbp(ranks, "train", "digits", *OPTIONS, *options, env=environment)
        assert done.returncode == 0, done.stderr
    assert watch.processes("distbp.cli.main") == 2 + 3
    assert watch.found() == []


def test_the_watch_sees_a_rank_that_unpickles(mpi, tmp_path):
    """One rank whose script unpickles, by itself or by a lower-case call of mpi4py, is found."""
    watch = Watch(tmp_path / "audit")
    script = tmp_path / "train.py"
    script.write_text(
        "import distbp\nfrom mpi4py import MPI\n"
        f"if distbp.rank() == 1:\n    {UNPICKLES}\n"
        "MPI.COMM_WORLD.allgather(OSError('x'))\n"
    )
    done = mpi.distbp(2, "run", script, env=watch.environment(str(REPOSITORY)))
    assert done.returncode == 0, done.stderr
    assert watch.processes("distbp.cli.main") == 2
    assert sum("Counter" in line for line in watch.found()) == 1
    assert sum("OSError" in line for line in watch.found()) == 2 * 2
