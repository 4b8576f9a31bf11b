"""`distbp doctor --backend ray` on real Ray clusters: three emulated nodes, and one of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from distbp.environment import available_cores
from tests.conftest import wait_until
from tests.ray.conftest import emulated_hosts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

REPOSITORY = Path(__file__).resolve().parents[2]
TOO_MANY = available_cores() + 3

# Holds every processor of the cluster; says so, waits for a line, and says whether all actors still live.
OTHER_JOB = """
import os, sys, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
class Busy:
    def number(self):
        return os.getpid()
actors = []
for node in ray.nodes():
    there = {"num_cpus": node["Resources"]["CPU"], "resources": {f"node:{node['NodeManagerAddress']}": 0.001}}
    actors.append(ray.remote(**there)(Busy).remote())
before = ray.get([actor.number.remote() for actor in actors])
print("ready", flush=True)
sys.stdin.readline()
print("undisturbed" if ray.get([actor.number.remote() for actor in actors]) == before else "disturbed")
"""

# As `distbp doctor --backend ray --json --out runs`, with other deadlines.
IMPATIENT = """
import sys
from pathlib import Path
from distbp.cli.doctor_command import show_ray_report
from distbp.config import Run
from distbp.doctor_ray import examine_cluster
from distbp.doctor_ray_links import Deadlines
deadlines = Deadlines({})
sys.exit(examine_cluster(Path("runs"), Run(), lambda report: show_ray_report(report, True), deadlines))
"""


@pytest.fixture(scope="module")
def hosts(prefix, tmp_path_factory):
    """Three emulated hosts that share this test's directories; the last one has little shared memory."""
    with emulated_hosts(3, prefix, tmp_path_factory) as cluster:
        small = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", "/dev/shm"]
        cluster.run("host2", small, check=True)
        yield cluster


@pytest.fixture(scope="module")
def nodes(hosts, prefix):
    """A Ray cluster of three nodes, of which the last gives out more processors than there are."""
    from cluster.ray import RayNodes

    with RayNodes(hosts, prefix, {"host0": 1, "host1": 1, "host2": TOO_MANY}) as cluster:
        yield cluster


def doctor(prefix, *options):
    """The command line of the doctor in the environment with Ray."""
    return [prefix / "bin" / "python", "-m", "distbp.cli.main", "doctor", "--backend", "ray", *options]


def impatient(prefix, **deadlines):
    """The command line of the doctor with other deadlines."""
    words = ", ".join(f"{name}={value}" for name, value in deadlines.items())
    return [prefix / "bin" / "python", "-c", IMPATIENT.format(words)]


class Examined:
    """What a doctor printed as JSON."""

    def __init__(self, done):
        assert done.stdout.startswith("{"), done.stderr
        self.returncode = done.returncode
        self.report = json.loads(done.stdout)
        self.checks = {check["name"]: check for check in self.report["checks"]}

    def wrong(self):
        """The status of every check that is not ok."""
        return {name: one["status"] for name, one in self.checks.items() if one["status"] != "ok"}

    def says(self, name, *words):
        """Assert that a check has these words in its finding, and, if it is not ok, a cure."""
        check = self.checks[name]
        assert [word for word in words if word not in check["finding"]] == [], check
        assert check["cure"] or check["status"] == "ok"
        return check["cure"]


STANDING = {"processors": "warn", "object store": "warn"}
"""What is wrong with the nodes of these tests from the beginning."""


@pytest.fixture
def other_job(nodes, prefix):
    """A job of somebody else's that holds every processor; afterwards it must be as it was."""
    job = nodes.start_driver(
        [prefix / "bin" / "python", "-c", OTHER_JOB],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert job.stdout.readline() == "ready\n"
        yield job
        assert job.communicate("go on\n", timeout=30)[0] == "undisturbed\n"
    finally:
        job.kill()
        job.communicate(timeout=30)


def test_all_nodes_are_examined(nodes, hosts, prefix, other_job, tmp_path):
    """Where nothing is free, every node is examined and every pair measured, and no actor is left."""
    done = nodes.run_driver(doctor(prefix, "--json", "--out", tmp_path / "runs"), cwd=tmp_path, timeout=90)
    found = Examined(done)
    assert (done.returncode, found.wrong()) == (0, STANDING)
    found.says("cluster", nodes.address, "3 nodes, the driver on host0", "0 of them free")
    assert f"--num-cpus {available_cores()} on host2" in found.says(
        "processors", f"host2: Ray gives out {TOO_MANY}"
    )
    assert "/dev/shm" in found.says("object store", "host2: in /tmp", "64 MiB")
    by_name = {node["name"]: node for node in found.report["nodes"]}
    assert list(by_name) == ["host0", "host1", "host2"]
    for name, node in by_name.items():
        assert node["address"] == hosts.addresses[name]
        assert node["software"] == by_name["host0"]["software"]
        assert node["memory"] > 0
    assert sorted(tuple(link["hosts"]) for link in found.report["links"]) == [
        ("host0", "host1"), ("host0", "host2"), ("host1", "host2"),
    ]  # fmt: skip
    assert all(min(link["bytes_per_second"]) > 0 and not link["error"] for link in found.report["links"])
    assert list(tmp_path.iterdir()) == []
    wait_until(lambda: not witnesses(hosts), timeout=10)


def witnesses(hosts):
    """The doctor's actors that still run."""
    running = [argv for host in hosts.hosts for argv in hosts.processes(host).values()]
    return [argv for argv in running if any("Witness" in word for word in argv)]


@pytest.fixture(scope="module")
def troubled(nodes, hosts, prefix, tmp_path_factory):
    """The report when host2 has no distbp, everybody may read the token, and only host0 sees --out."""
    token = Path(nodes.environment()["RAY_AUTH_TOKEN_PATH"])
    hidden = REPOSITORY / "distbp"
    hosts.run("host2", ["mount", "-t", "tmpfs", "none", hidden], check=True)
    token.chmod(0o644)
    try:
        command = doctor(prefix, "--json", "--out", "/dev/shm/runs")
        return Examined(nodes.run_driver(command, cwd=tmp_path_factory.mktemp("here"), timeout=90))
    finally:
        token.chmod(0o600)
        hosts.run("host2", ["umount", hidden], check=True)


def test_a_node_without_distbp_is_named(troubled):
    """A node that cannot import distbp fails with its name and the cure, and the others are examined."""
    assert troubled.returncode == 78
    assert troubled.wrong() == {"nodes": "FAIL", "token": "warn", "shared": "warn"}
    assert "pip install" in troubled.says("nodes", "1 of 3 nodes", "distbp is missing", "host2")
    assert [link["hosts"] for link in troubled.report["links"]] == [["host0", "host1"]]


def test_a_private_run_directory_is_named(troubled):
    """A node that does not see --out is named, with what follows for `train` and for `run`."""
    cure = troubled.says("shared", "host1: ", "distbp train needs a worker on host0", "distbp run refuses")
    assert "--out" in cure


def test_a_readable_token_is_named(troubled):
    """A token file that others may read is a warning with the command that mends it."""
    assert troubled.says("token", "others may read", "host0", "host1").startswith("chmod 600 /")


def test_a_firewall_between_two_nodes_is_named(nodes, hosts, prefix, tmp_path):
    """Nodes that reach the driver but not each other fail as a pair, while the other pairs are measured."""
    ports, ranges = (50000, 50100), "/proc/sys/net/ipv4/ip_local_port_range"
    rule = ["to", hosts.addresses["host1"], "ipproto", "tcp", "dport", f"{ports[0]}-{ports[1]}", "blackhole"]
    if hosts.run("host2", ["ip", "rule", "add", *rule]).returncode != 0:
        pytest.skip("the kernel has no routing rules for ports")
    before = hosts.run("host1", ["cat", ranges], check=True).stdout
    try:
        hosts.run("host1", ["tee", ranges], input=f"{ports[0]} {ports[1]}", check=True)
        done = nodes.run_driver(impatient(prefix, connect_s=2.0), cwd=tmp_path, timeout=90)
    finally:
        hosts.run("host2", ["ip", "rule", "del", *rule], check=True)
        hosts.run("host1", ["tee", ranges], input=before, check=True)
    found = Examined(done)
    assert (done.returncode, found.wrong()) == (78, STANDING | {"network": "FAIL"})
    assert "TCP ports" in found.says(
        "network", "host1 and host2 exchange nothing", "host2 does not reach host1"
    )
    assert {tuple(link["hosts"]): bool(link["error"]) for link in found.report["links"]} == {
        ("host0", "host1"): False, ("host0", "host2"): False, ("host1", "host2"): True,
    }  # fmt: skip


def test_a_node_that_is_silent_is_named(nodes, hosts, prefix, tmp_path):
    """A node whose actor does not come up is named after the deadline, and is asked nothing more."""
    hidden = REPOSITORY / "distbp"
    hosts.run("host2", ["mount", "-t", "tmpfs", "none", hidden], check=True)
    try:
        hosts.run(
            "host2", ["tee", hidden / "__init__.py"], input="import time; time.sleep(600)\n", check=True
        )
        done = nodes.run_driver(impatient(prefix, start_s=12.0), cwd=tmp_path, timeout=90)
    finally:
        hosts.run("host2", ["umount", "--lazy", hidden], check=True)
    found = Examined(done)
    assert (done.returncode, found.wrong()) == (78, {"nodes": "FAIL"})
    found.says("nodes", "host2: gave no answer within 12 s")


def test_a_wrong_token_is_named(nodes, hosts, prefix, tmp_path):
    """A cluster that does not take our token is not joined, and the report says so."""
    environment = nodes.environment() | {"RAY_AUTH_TOKEN": "0" * 64}
    done = hosts.run("host0", doctor(prefix, "--json"), cwd=tmp_path, env=environment, timeout=90)
    found = Examined(done)
    assert (done.returncode, found.wrong()) == (78, {"token": "FAIL"})
    assert "RAY_AUTH_TOKEN_PATH" in found.says("token", nodes.address, "did not take our token")


# ----- without a cluster


@pytest.fixture
def alone(prefix, tmp_path):
    """Run a command without a cluster, in a home of its own; nothing of it may be left running."""
    home = tmp_path / "home"
    home.mkdir()
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTBP_"))}
    logs = tempfile.mkdtemp(prefix="r")  # Short: names of Ray's sockets below it may have 107 bytes.
    known |= {"HOME": str(home), "PYTHONPATH": str(REPOSITORY), "RAY_TMPDIR": logs}

    def run(command, **variables):
        return Examined(
            subprocess.run(
                command, cwd=tmp_path, env=known | variables, capture_output=True, text=True, timeout=120
            )
        )

    yield run
    try:
        wait_until(lambda: not processes_with_home(home), timeout=10)
    finally:
        shutil.rmtree(logs, ignore_errors=True)


def processes_with_home(home):
    """The processes whose HOME is this one."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("HOME") == str(home):
                found.append(process)
    return found


def test_a_laptop_needs_no_cluster(prefix, alone, tmp_path):
    """Without RAY_ADDRESS a Ray of our own is started, found well, and ended."""
    found = alone(doctor(prefix, "--json"))
    assert (found.returncode, found.wrong()) == (0, {})
    found.says("cluster", "one of our own", "1 node")
    assert len(found.report["nodes"]) == 1
    assert found.report["nodes"][0]["cpus"] == found.report["nodes"][0]["usable"]
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize(("options", "status", "code"), [([], "FAIL", 78), (["--ray-insecure"], "warn", 0)])
def test_a_cluster_without_tokens_is_named(prefix, alone, options, status, code):
    """A Ray that asks nobody for a token fails, or is a warning if its network is said to be trusted."""
    found = alone(doctor(prefix, "--json", *options), RAY_AUTH_MODE="disabled")
    assert (found.returncode, found.wrong()) == (code, {"token": status})
    assert "RAY_AUTH_MODE=token" in found.says("token", "asks nobody for a token")


def test_a_head_that_says_nothing_is_named(prefix, alone):
    """An address that takes connections and never answers is named after the deadline."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        found = alone(impatient(prefix, trial_s=4.0), RAY_ADDRESS=address)
    assert (found.returncode, found.wrong()) == (78, {"cluster": "FAIL"})
    found.says("cluster", address, "gave no answer within 4 s")


def test_joining_that_does_not_return_is_named(prefix, alone):
    """A wait inside Ray that takes too long ends the process with a report, and what was started with it."""
    found = alone(impatient(prefix, join_s=1.0))
    assert (found.returncode, found.wrong()) == (78, {"cluster": "FAIL"})
    found.says("cluster", "waited 1 s for a Ray of our own")
