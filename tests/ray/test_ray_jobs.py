"""`launch/ray-submit.sh` and `launch/slurm-ray.sbatch` with real Ray on emulated hosts."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import result_of, wait_until
from tests.ray.conftest import emulated_hosts, ray_prefix

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).resolve().parents[2]
SUBMIT = REPOSITORY / "launch" / "ray-submit.sh"
SBATCH = REPOSITORY / "launch" / "slurm-ray.sbatch"
PREFIX = Path(os.environ.get("RAY_PREFIX", REPOSITORY / ".venv-ray"))
DISTBP = f"{PREFIX / 'bin' / 'python'} -m distbp.cli.main"
HAS_DASHBOARD = "import ray.dashboard.optional_deps"

SLOW_TO_SAVE = """
import signal, sys, time

def save(number, frame):
    time.sleep(5)
    print("saved", flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, save)
print("trains", flush=True)
time.sleep(200)
"""
"""Stands for a distbp whose checkpoint takes longer than the 3 s that Ray leaves a job by itself."""

SRUN = """#!{python}
import os, signal, subprocess, sys

words = [word for word in sys.argv[1:]]
while words[0].startswith("--"):
    del words[0]
agent = [sys.executable, "-I", "-S", {agent!r}, "--run", os.environ["EMULATED_CLUSTER"]]

def start(host, *command, **more):
    return subprocess.Popen([*agent, host, *command], env=os.environ | more, start_new_session=True)

def to_everybody(number, frame):
    # Slurm signals every process of a step.  Here those have SLURM_PROCID in their environment.
    for host in {hosts!r}:
        start(host, sys.executable, "-c", {signal_all!r}, str(int(number))).wait()

signal.signal(signal.SIGUSR1, to_everybody)
tasks = [start(host, *words, SLURM_PROCID=str(rank)) for rank, host in enumerate({hosts!r})]
sys.exit(max(abs(task.wait()) for task in tasks))
"""

SIGNAL_ALL = """
import os, sys
for entry in os.listdir("/proc"):
    try:
        if entry.isdigit() and b"\\0SLURM_PROCID=" in b"\\0" + open(f"/proc/{entry}/environ", "rb").read():
            os.kill(int(entry), int(sys.argv[1]))
    except OSError:
        pass
"""

SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then printf '%s\\n' {hosts}; else echo "scontrol $*"; fi
"""


@pytest.fixture(scope="module")
def prefix():
    """The environment with Ray and its dashboard."""
    prefix = ray_prefix()
    asked = subprocess.run([prefix / "bin" / "python", "-c", HAS_DASHBOARD], capture_output=True, timeout=60)
    if asked.returncode != 0:
        pytest.skip(f"jobs need Ray's dashboard: {prefix}/bin/pip install 'ray[default]'")
    return prefix


@pytest.fixture(scope="module")
def hosts(prefix, tmp_path_factory):
    """Two emulated hosts that share this test's directories."""
    with emulated_hosts(2, prefix, tmp_path_factory) as cluster:
        yield cluster


class Submitter:
    """Starts `launch/ray-submit.sh` on the head of a Ray cluster, in a directory that it may send along."""

    def __init__(self, nodes, folder):
        self.nodes = nodes
        self.folder = folder

    def start(self, *words, command):
        """Start the script with `command` in place of distbp."""
        given = [SUBMIT, "--address", self.nodes.dashboard_address, "--restarts", "0", "--", *words]
        environment = self.nodes.environment() | {"DISTBP_COMMAND": command}
        return self.nodes._hosts.start(
            self.nodes.head, given, cwd=self.folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip

    def run(self, *words, command):
        """Run it to the end; return the exit code and what was printed."""
        process = self.start(*words, command=command)
        printed, _ = process.communicate(timeout=120)
        return process.returncode, printed


@pytest.fixture(scope="module")
def nodes(hosts, prefix):
    """A Ray cluster of one node with a dashboard."""
    from cluster.ray import RayNodes

    with RayNodes(hosts, prefix, {"host0": 2}, dashboard=True) as cluster:
        yield cluster


@pytest.fixture
def submit(nodes, tmp_path):
    """Submit from a directory of this test's own."""
    return Submitter(nodes, tmp_path)


def test_a_job_gives_its_own_code(submit):
    """Ray's client answers 1 to every failure; the script answers what the job did."""
    code, printed = submit.run("-c", "echo printed; exit 79", command="bash")
    assert code == 79, printed
    assert "\nprinted\n" in printed


def test_a_job_that_is_killed_is_a_loss(submit):
    """When the shell around distbp is killed as well, nobody leaves a code, and that is 69."""
    code, printed = submit.run("-c", "kill -9 $PPID", command="bash")
    assert code == 69, printed
    assert "Ray killed it, or lost its node" in printed


def test_what_is_measured_is_what_is_sent(submit, tmp_path):
    """The job starts in a copy of the directory without what the script leaves out."""
    for name in ("train.py", "pkg/data/x", "data/x", "runs/x", ".venv-a/x", "ignored", "left-out"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".gitignore").write_text("ignored\n")
    (tmp_path / ".rayignore").write_text("left-out\n")
    code, printed = submit.run(".", "-type", "f", command="find")
    assert code == 0, printed
    sent = set(re.findall(r"^\./(.*)$", printed, re.MULTILINE))
    assert sent == {"train.py", "pkg/data/x", ".gitignore", ".rayignore"}


@pytest.mark.slow
def test_a_stop_leaves_time_to_save(submit, tmp_path):
    """A signal to the script reaches the job as SIGTERM, and Ray waits until it has saved."""
    (tmp_path / "slow.py").write_text(SLOW_TO_SAVE)
    process = submit.start("slow.py", command="python")
    read_until(process, "trains")
    process.send_signal(signal.SIGUSR1)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert "\nsaved\n" in printed


@pytest.mark.slow
def test_distbp_trains_and_stops_as_a_job(submit, tmp_path):
    """The real distbp trains two workers, saves on request with 75, and a finished run ends with 0."""
    out = tmp_path / "run"
    words = ["train", "digits", "--nproc", "2", "--out", str(out), "-o", "train.epochs=10000"]
    process = submit.start(*words, "-o", "train.max_steps=100000", command=DISTBP)
    wait_until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size, 90)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    result = result_of(out)
    assert (result["backend"], result["world_size"], result["exit_code"]) == ("ray", 2, 75)
    words[words.index(str(out))] = str(tmp_path / "short")
    code, printed = submit.run(*words, "-o", "train.max_steps=3", command=DISTBP)
    assert code == 0, printed
    assert result_of(tmp_path / "short")["steps"] == 3


def read_until(process, text):
    """Read what a process prints until a line is `text`."""
    for line in process.stdout:
        if line.strip() == text:
            return
    raise AssertionError(f"the script ended before it printed {text!r}")


# ----- Slurm


@pytest.mark.slow
def test_symmetric_run_saves_on_request_and_leaves_nothing(hosts, prefix, tmp_path):
    """Ray starts on two nodes, SIGUSR1 reaches every process, only distbp acts on it, and Ray ends too."""
    programs = {
        "srun": SRUN.format(
            python=sys.executable, hosts=hosts.hosts, agent=str(REPOSITORY / "cluster" / "agent.py"),
            signal_all=SIGNAL_ALL,
        ),
        "scontrol": SCONTROL.format(hosts=" ".join(hosts.hosts)),
        "distbp": f'#!/bin/sh\nexec {DISTBP} "$@"\n',
    }  # fmt: skip
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "DISTBP_"))}
    environment = kept | {
        "PATH": f"{folder}:{prefix / 'bin'}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_PER_TASK": "1",
        "SLURM_JOB_NODELIST": "host[0-1]",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    before = {host: temporary(hosts, host) for host in hosts.hosts}
    out = tmp_path / "run"
    words = ["train", "digits", "--nproc", "2", "--out", out, "-o", "train.epochs=10000"]
    process = hosts.start(
        "host0", [SBATCH, *words, "-o", "train.max_steps=100000"], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    try:
        wait_until(lambda: (out / "metrics.jsonl").exists() and (out / "metrics.jsonl").stat().st_size, 120)
        process.send_signal(signal.SIGUSR1)
        printed, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75, printed
    assert "scontrol requeue 4711" in printed
    result = result_of(out)
    assert (result["hosts"], result["exit_code"]) == (2, 75)
    for host in hosts.hosts:
        assert temporary(hosts, host) == before[host]
        assert not [argv for argv in hosts.processes(host).values() if "raylet" in argv[0]]
    assert not list(tmp_path.glob(".ray-*"))


def temporary(hosts, host):
    """What is in a host's own /tmp and /dev/shm."""
    return hosts.run(host, ["ls", "-A", "/tmp", "/dev/shm"], check=True).stdout
