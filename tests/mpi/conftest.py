"""Real launchers for the tests: an environment with MPICH and one with Open MPI."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT_OPTIONS = ["--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]


class Flavour:
    """One MPI library with its launcher and a Python that has distbp and mpi4py."""

    def __init__(self, name, prefix, folder):
        self.name = name
        self.python = prefix / "bin" / "python"
        self.launcher = prefix / "bin" / "mpirun"
        self.folder = folder
        self.started = []

    def start(self, ranks, *arguments, env=None):
        """Start `python ARGUMENTS` on `ranks` ranks; the launcher leads a session of its own."""
        options = ROOT_OPTIONS if self.name == "openmpi" else []
        known = {name: value for name, value in os.environ.items() if not name.startswith("DISTBP_")}
        process = subprocess.Popen(
            [self.launcher, *options, "-n", str(ranks), self.python, *map(str, arguments)],
            cwd=self.folder,
            env=known | {"PYTHONPATH": str(REPOSITORY)} | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, ranks, *arguments, env=None, timeout=60):
        """Run `python ARGUMENTS` on `ranks` ranks to the end."""
        process = self.start(ranks, *arguments, env=env)
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def distbp(self, ranks, *arguments, **options):
        """Run a `distbp` command on `ranks` ranks."""
        return self.run(ranks, "-m", "distbp.cli.main", *arguments, **options)


@pytest.fixture(params=["mpich", "openmpi"])
def mpi(request, tmp_path):
    """An MPI library, found through MPICH_PREFIX / OPENMPI_PREFIX or made by `make mpi-environments`."""
    name = request.param
    prefix = Path(os.environ.get(f"{name.upper()}_PREFIX", REPOSITORY / f".venv-{name}"))
    if not (prefix / "bin" / "mpirun").exists():
        pytest.skip(f"no {name} environment at {prefix}: run make mpi-environments")
    flavour = Flavour(name, prefix, tmp_path)
    before = segments()
    yield flavour
    for process in flavour.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)
    for path in (
        segments() - before
    ):  # A killed rank leaves the library's own; launch/mpirun.sh would clean up.
        path.unlink(missing_ok=True)


def segments():
    """The shared-memory files of MPI libraries that exist now."""
    patterns = ("mpich_shm_*", "sm_segment*", "vader_segment*", "ucx_shm_*")
    return {path for pattern in patterns for path in Path("/dev/shm").glob(pattern)}
