"""What the tests of the Ray collective backend share: an environment with Ray, and a driver to talk to."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from cluster.emulated import EmulatedCluster
from cluster.requirements import what_is_missing

REPOSITORY = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("collective_driver.py")


def ray_prefix():
    """Return the environment with Ray: $RAY_PREFIX, or the one that `make ray-environment` makes."""
    prefix = Path(os.environ.get("RAY_PREFIX", REPOSITORY / ".venv-ray"))
    if not (prefix / "bin" / "ray").exists():
        pytest.skip(f"no Ray environment at {prefix}: run make ray-environment")
    return prefix


@pytest.fixture(scope="module")
def prefix():
    """The environment with Ray."""
    return ray_prefix()


@contextlib.contextmanager
def emulated_hosts(count, prefix, tmp_path_factory):
    """So many emulated hosts that share the tests' directories and the environment."""
    if reason := what_is_missing():
        pytest.skip(reason)
    with EmulatedCluster(count, shared=[tmp_path_factory.getbasetemp(), REPOSITORY, prefix]) as cluster:
        yield cluster


class Driver:
    """A process of `collective_driver.py`; `driver.do(NAME, ...)` gives what its scenario returns."""

    def __init__(self, process):
        self.process = process
        self._unread = b""

    def __enter__(self):
        assert self._read(90) == "ready"
        return self

    def __exit__(self, *exception):
        self.close()

    def do(self, scenario, /, **arguments):
        """Let the driver do something; its assertions fail here."""
        self.process.stdin.write(json.dumps({"do": scenario, "with": arguments}).encode() + b"\n")
        self.process.stdin.flush()
        return self._read(100)

    def close(self):
        """End it, and whatever it has started."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)
        _, alive = psutil.wait_procs(family, timeout=20)
        for process in alive:
            process.kill()
        self.process.stdout.close()

    def _read(self, seconds):
        """Return the next answer."""
        until = time.monotonic() + seconds
        while b"\n" not in self._unread:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, until - time.monotonic()))
            part = os.read(self.process.stdout.fileno(), 1 << 16) if ready else b""
            assert part, f"the driver gave no answer in {seconds} s, or has ended: {self.process.poll()}"
            self._unread += part
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["result"]


PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}


@pytest.fixture(scope="module")
def driver():
    """A driver with a Ray of its own on this machine."""
    prefix = ray_prefix()
    # A short path: Ray makes sockets in it, whose names may have 107 bytes.
    folder = tempfile.mkdtemp(prefix="ray")
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTBP_"))}
    own = {
        "HOME": folder,  # Ray leaves a token there.
        "PYTHONPATH": str(REPOSITORY),
        "RAY_TEST_FOLDER": folder,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with Driver(subprocess.Popen([prefix / "bin" / "python", DRIVER], env=known | own, **PIPES)) as driver:
        yield driver
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """A driver on the first of two emulated hosts, with two ranks there and one on the other."""
    prefix = ray_prefix()
    from cluster.emulated import EmulatedCluster
    from cluster.ray import RayNodes
    from cluster.requirements import what_is_missing

    if reason := what_is_missing():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("two-nodes")
    with (
        EmulatedCluster(2, shared=[folder, REPOSITORY, prefix]) as hosts,
        RayNodes(hosts, prefix, {"host0": 2, "host1": 1}) as nodes,
    ):
        first, second = hosts.addresses.values()
        environment = nodes.environment() | {"PYTHONPATH": str(REPOSITORY), "RAY_TEST_FOLDER": str(folder)}
        argv = [prefix / "bin" / "python", DRIVER, f"{first},{first},{second}"]
        with Driver(hosts.start("host0", argv, env=environment, **PIPES)) as driver:
            driver.hosts = hosts
            yield driver
