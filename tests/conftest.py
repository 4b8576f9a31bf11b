"""What tests of several parts share: running the installed command, and finding its processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

COMMAND = [sys.executable, "-m", "distbp.cli.main"]

TESTS = Path(__file__).parent
LONG_FILES = (
    "mpi/test_mpirun_script.py",
    "ray/test_ray_backend.py",
    "backends/test_local.py",
    "ray/test_ray_collective.py",
    "mpi/test_mpi_one_host.py",
    "ray/test_ray_doctor.py",
    "mpi/test_mpi_doctor.py",
    "backends/test_divergence.py",
    "mpi/test_mpi_hosts.py",
    "backends/test_fault_points.py",
    "mpi/test_mpirun_script_hosts.py",
    "test_networks.py",
    "ray/test_ray_jobs.py",
    "test_chaos.py",
    "mpi/test_mpi_memory.py",
    "cli/test_cli_models.py",
)
"""The files that take longest, by turns such as compute and such as wait: `make test` runs two at a time."""


def pytest_collection_modifyitems(items):
    """Run long files first, so that at the end no core is idle while the other has a long one left.

    `--no-loadscope-reorder` in the Makefile lets xdist keep this order; by itself it would begin with the
    files of most tests, and those of Ray and MPI, with few long tests, would come last.
    """
    missing = [name for name in LONG_FILES if not (TESTS / name).exists()]
    assert not missing, f"LONG_FILES in tests/conftest.py names what does not exist: {missing}"
    places = {TESTS / name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


class Job:
    """A `distbp` command that was started; everything that it left is ended when the test ends."""

    def __init__(self, arguments, cwd, env):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DISTBP_")}
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)],
            cwd=cwd,
            env=environment | (env or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid

    def workers(self):
        """The worker processes that run now, by rank."""
        found = {}
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return found
        for child in children:
            try:
                environment = child.environ()
            except (psutil.Error, OSError):
                continue
            if "DISTBP_RANK" in environment and child.status() != psutil.STATUS_ZOMBIE:
                found[int(environment["DISTBP_RANK"])] = child
        return found

    def wait(self, timeout=60):
        """The exit code, and what was printed on both streams."""
        stdout, stderr = self.process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(self.process.args, self.process.returncode, stdout, stderr)

    def kill(self):
        """End the whole process group at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.communicate(timeout=30)


@pytest.fixture
def start(tmp_path):
    """Start a `distbp` command; it gets a directory of its own to work in."""
    jobs = []

    def begin(*arguments, env=None, cwd=None):
        jobs.append(Job(arguments, cwd or tmp_path, env))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            job.kill()


@pytest.fixture
def distbp(start):
    """Run a `distbp` command to its end."""

    def run(*arguments, env=None, cwd=None, timeout=60):
        return start(*arguments, env=env, cwd=cwd).wait(timeout)

    return run


@pytest.fixture(scope="module")
def undisturbed(request, tmp_path_factory):
    """The result of `OPTIONS` of the test's module, on digits in one process that nothing happens to."""
    out = tmp_path_factory.mktemp("undisturbed")
    command = ["train", "digits", *request.module.OPTIONS, "--backend", "serial", "--out", out]
    done = Job(command, out, None).wait()
    assert done.returncode == 0, done.stderr
    return result_of(out)


def wait_until(condition, timeout=30.0):
    """Wait until `condition()` holds and return what it gave; fail after `timeout` seconds."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        value = condition()
        if value:
            return value
        time.sleep(0.005)
    raise AssertionError(f"waited {timeout} s for {condition}")


def result_of(out):
    """The content of a run's result.json."""
    return json.loads((Path(out) / "result.json").read_text())
