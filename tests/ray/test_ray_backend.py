"""The Ray backend on real Ray clusters: one of its own on this machine, and three emulated nodes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import stat
import subprocess
import tempfile
from pathlib import Path

import psutil
import pytest

from tests.conftest import Job, result_of, wait_until
from tests.memory import Memory, corruptions, job_parts, new_seed
from tests.ray.conftest import emulated_hosts

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180)]

REPOSITORY = Path(__file__).resolve().parents[2]
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.epochs=10000",
    "-o", "optimizer.clip_norm=2.0", "-o", "model.hidden=[64]",
]  # fmt: skip
LONG_STEPS = 1000
SHORT = [*OPTIONS, "-o", "train.max_steps=40"]
LONG = [
    *OPTIONS,
    "-o",
    f"train.max_steps={LONG_STEPS}",
    "-o",
    "run.log_samples=true",
    "-o",
    "checkpoint.every_steps=200",
]

SCRIPT = """
import distbp
from distbp import nn

train, validation = distbp.load_data("digits")
model = nn.Sequential(nn.Flatten(), nn.Linear(32), nn.ReLU(), nn.Linear(10))
trainer = distbp.Trainer(model, batch_size=64)
{trouble}
history = trainer.fit(train, val=validation, epochs=2, out={out!r})
distbp.print(distbp.size(), history.result["parameters_sha256"])
"""


@pytest.fixture(scope="module")
def hosts(prefix, tmp_path_factory):
    """Three emulated hosts that share this test's directories."""
    with emulated_hosts(3, prefix, tmp_path_factory) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def nodes(hosts, prefix):
    """A Ray cluster of three nodes with 2, 2 and 1 processors, and a dashboard for jobs."""
    from cluster.ray import RayNodes

    with RayNodes(hosts, prefix, {"host0": 2, "host1": 2, "host2": 1}, dashboard=True) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The results of one worker without Ray, of a short and of a long run."""
    results = {}
    for name, options in (("short", SHORT), ("long", LONG)):
        out = tmp_path_factory.mktemp(name)
        done = Job(["train", "digits", *options, "--backend", "serial", "--out", out], out, None).wait()
        assert done.returncode == 0, done.stderr
        results[name] = result_of(out)
    return results


def distbp(prefix, *arguments):
    """The command line of a distbp command in the environment with Ray."""
    return [prefix / "bin" / "python", "-m", "distbp.cli.main", *arguments]


def train(nodes, prefix, nproc, out, *options):
    """Train on the emulated nodes; return what came back."""
    command = distbp(prefix, "train", "digits", "--backend", "ray", "--nproc", nproc, "--out", out, *options)
    return nodes.run_driver(command, cwd=out.parent, timeout=90)


def steps_of(out):
    """The steps that a run has recorded."""
    log = out / "samples.log"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def pids(hosts, host, kind):
    """The processes of a kind of actor on a host, as seen from outside."""
    return [pid for pid, argv in hosts.processes(host).items() if any(kind in word for word in argv)]


# Four workers end in the same bits below, where they are submitted as a job.
@pytest.mark.parametrize(
    ("nproc", "placed"), [(2, 1), (3, 2), pytest.param(4, 2, marks=pytest.mark.slow), (5, 3)]
)
def test_nodes_give_the_same_bits(nodes, prefix, nproc, placed, undisturbed, tmp_path):
    """Two to five workers on one, two and three nodes end in the bits of one worker without Ray."""
    done = train(nodes, prefix, nproc, tmp_path / "run", *SHORT)
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "run")
    assert (result["backend"], result["world_size"], result["hosts"]) == ("ray", nproc, placed)
    assert result["state_sha256"] == undisturbed["short"]["state_sha256"]
    assert result["validation"] == undisturbed["short"]["validation"]


def test_a_laptop_needs_no_cluster(prefix, undisturbed, tmp_path):
    """Without RAY_ADDRESS a Ray of our own starts, with a token that nobody else may read, and ends."""
    home = tmp_path / "home"
    home.mkdir()
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTBP_"))}
    command = distbp(
        prefix, "train", "digits", "--backend", "ray", "--nproc", "3", "--out", tmp_path / "run", *SHORT
    )
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=known | {"HOME": str(home), "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "run")["state_sha256"] == undisturbed["short"]["state_sha256"]
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600


def test_a_job_is_submitted(nodes, hosts, prefix, undisturbed, tmp_path):
    """`ray job submit -- distbp train --backend ray` ends well and in the same bits."""
    work = tmp_path / "work"
    work.mkdir()
    submit = [
        prefix / "bin" / "ray",
        "job",
        "submit",
        "--address",
        nodes.dashboard_address,
        "--working-dir",
        work,
    ]
    command = distbp(prefix, "train", "digits", "--backend", "ray", "--nproc", "4", "--out", tmp_path / "run")
    done = nodes.run_driver([*submit, "--", *command, *SHORT], cwd=tmp_path, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    result = result_of(tmp_path / "run")
    assert (result["backend"], result["world_size"]) == ("ray", 4)
    assert result["state_sha256"] == undisturbed["short"]["state_sha256"]


IMPORTED = "import sys; print('imported', sorted({'torch', 'pyarrow'} & set(sys.modules)))"


@pytest.fixture(scope="module")
def script_lines(nodes, prefix, tmp_path_factory):
    """The lines of a script on three workers, each of which says at its end what it has imported."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "train.py").write_text(SCRIPT.format(trouble="", out=str(folder / "run")) + IMPORTED)
    done = nodes.run_driver(
        distbp(prefix, "run", "--backend", "ray", "--nproc", "3", "train.py"), cwd=folder, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_script_runs_on_the_nodes(script_lines, tmp_path, distbp_command):
    """`distbp run --backend ray` executes a script on every worker, and prints once what it prints alone."""
    ((size, sha),) = [line.split() for line in script_lines if not line.startswith("imported")]
    (tmp_path / "train.py").write_text(SCRIPT.format(trouble="", out=str(tmp_path / "alone")))
    alone = distbp_command("run", "--backend", "serial", "train.py", cwd=tmp_path)
    assert (size, sha) == ("3", alone.stdout.split()[1])


@pytest.fixture
def distbp_command(distbp):
    """The command of the environment that runs the tests, under a name of its own."""
    return distbp


def test_a_worker_that_raises_is_named(nodes, prefix, tmp_path):
    """An exception in one worker ends the job with 1, its traceback last."""
    trouble = "if distbp.rank() == 2: raise RuntimeError('broken here')"
    (tmp_path / "train.py").write_text(SCRIPT.format(trouble=trouble, out=str(tmp_path / "run")))
    done = nodes.run_driver(
        distbp(prefix, "run", "--backend", "ray", "--nproc", "3", "train.py"), cwd=tmp_path, timeout=90
    )
    assert done.returncode == 1
    assert "worker 2 raised" in done.stderr
    assert done.stderr.strip().endswith("RuntimeError: broken here")


def test_a_small_cluster_is_named(nodes, prefix, tmp_path):
    """More workers than processors: 78, with what was asked for and what is there."""
    done = train(nodes, prefix, 6, tmp_path / "run", *SHORT)
    assert done.returncode == 78
    assert "asked for 6 workers x 1 threads = 6 processors" in done.stderr
    assert "can give 5" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_cluster_without_tokens_is_refused(prefix, tmp_path):
    """A Ray that asks nobody for a token is used only if the user says that its network is trusted."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTBP_"))}
    done = subprocess.run(
        distbp(prefix, "train", "digits", "--backend", "ray", "--nproc", "1", "--out", tmp_path / "run"),
        cwd=tmp_path,
        env=known | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 77
    assert "run.ray_insecure" in done.stderr


OPEN_NODE = """
export PATH="$1/bin:$PATH" PYTHONPATH="$2" HOME="$3" RAY_TMPDIR="$3" RAY_USAGE_STATS_ENABLED=0
ip link set lo up
RAY_AUTH_MODE=disabled ray start --head --node-ip-address=127.0.0.1 --port=6379 --num-cpus=2 \\
    --include-dashboard=false --disable-usage-stats >"$3/ray.log" 2>&1 || exit
ray get-auth-token --generate >/dev/null
export RAY_AUTH_MODE=token RAY_ADDRESS=127.0.0.1:6379
exec python -m distbp.cli.main train digits --backend ray --nproc 1 --out "$3/run"
"""
"""Starts a node without tokens, in a namespace of its own, and trains there as one who has a token."""


def test_nodes_without_tokens_are_named(prefix):
    """A driver with a token and nodes without one cannot work together: 78 names the variable."""
    if os.geteuid() != 0:
        pytest.skip("needs root, for namespaces")
    with tempfile.TemporaryDirectory(prefix="r") as home:  # Short, for the names of Ray's sockets.
        own = ["unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        known = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTBP_"))
        }
        command = [*own, "bash", "-c", OPEN_NODE, "bash", prefix, REPOSITORY, home]
        done = subprocess.run(command, cwd=home, env=known, capture_output=True, text=True, timeout=150)
        assert done.returncode == 78, done.stdout + done.stderr
        assert "RAY_AUTH_MODE" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("address", "word"), [("http://127.0.0.1:8265", "ray job submit"), ("127.0.0.1:1", "nobody listens")]
)
def test_a_wrong_address_is_named(prefix, tmp_path, address, word):
    """An address that is not a cluster's gives 78 and says what to name instead."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DISTBP_"))}
    done = subprocess.run(
        distbp(prefix, "train", "digits", "--backend", "ray", "--nproc", "1", "--out", tmp_path / "run"),
        cwd=tmp_path,
        env=known | {"RAY_ADDRESS": address, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 78
    assert address in done.stderr
    assert word in done.stderr


def test_a_long_line_arrives(nodes, hosts, prefix, tmp_path):
    """What a worker prints in one go may be longer than a message."""
    (tmp_path / "train.py").write_text(
        SCRIPT.format(trouble="print('x' * 20_000_000, flush=True)", out=str(tmp_path / "run"))
    )
    command = distbp(prefix, "run", "--backend", "ray", "--nproc", "1", "train.py")
    done = nodes.run_driver(command, cwd=tmp_path, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("x") >= 20_000_000


def test_a_private_run_directory_is_refused(nodes, hosts, prefix, tmp_path):
    """A script whose run directory only the driver's node sees is refused before step 1."""
    (tmp_path / "train.py").write_text(SCRIPT.format(trouble="", out="/dev/shm/private-run"))
    done = nodes.run_driver(
        distbp(prefix, "run", "--backend", "ray", "--nproc", "3", "train.py"), cwd=tmp_path, timeout=90
    )
    assert done.returncode == 78, done.stderr
    assert "cannot see the run directory" in done.stderr


def test_neither_torch_nor_pyarrow_is_imported(script_lines):
    """Training on Ray imports neither torch nor pyarrow, on no worker."""
    assert [line for line in script_lines if line.startswith("imported")] == ["imported []"] * 3


class Running:
    """A long run on the emulated nodes, with its log."""

    def __init__(self, nodes, prefix, nproc, folder, *options):
        self.out = folder / "run"
        self.log = folder / "log"
        command = distbp(prefix, "train", "digits", "--backend", "ray", "--nproc", nproc, *LONG)
        with self.log.open("w") as stream:
            self.process = nodes.start_driver(
                [*command, *options, "--out", self.out], cwd=folder, stdout=stream, stderr=stream
            )
        wait_until(lambda: steps_of(self.out) > 150 or self.process.poll() is not None, timeout=60)
        assert self.process.poll() is None, self.log.read_text()

    def ends_as(self, undisturbed):
        """Assert that the run ends well, and in the bits of the undisturbed one."""
        assert self.process.wait(90) == 0, self.log.read_text()
        assert result_of(self.out)["state_sha256"] == undisturbed["long"]["state_sha256"]
        assert steps_of(self.out) == LONG_STEPS


@pytest.fixture
def running(nodes, prefix, tmp_path):
    """Start a long run; whatever is left of it is ended."""
    runs = []

    def start(nproc, *options):
        runs.append(Running(nodes, prefix, nproc, tmp_path, *options))
        return runs[-1]

    yield start
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait(30)


def test_a_killed_actor_is_replaced(hosts, running, undisturbed):
    """`kill -9` of a worker actor costs a step: the run ends by itself in the undisturbed bits."""
    run = running(4)
    os.kill(pids(hosts, "host1", "RayWorker")[0], signal.SIGKILL)
    run.ends_as(undisturbed)
    assert "E_LOST_WORKER" in run.log.read_text()
    assert result_of(run.out)["restarts"] == 1


def test_a_killed_keeper_is_replaced(hosts, running, undisturbed):
    """`kill -9` of a keeper costs nothing: a new one takes the arena over from a worker."""
    run = running(4)
    os.kill(pids(hosts, "host1", "HostKeeper")[0], signal.SIGKILL)
    run.ends_as(undisturbed)
    assert "action=adopt" in run.log.read_text()
    assert result_of(run.out)["restarts"] == 0


@pytest.mark.parametrize("every", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_a_corrupted_state_is_given_up_on_every_node(every, hosts, running, undisturbed):
    """A bit that flips in the memory of one of two nodes: both go back to the checkpoint, same bits."""
    run = running(4, "-o", f"run.verify_every={every}")
    parts = job_parts("digits", LONG, (2, 2))
    wait_until(lambda: any(run.out.glob("checkpoints/step-????????")))
    memory = Memory([psutil.Process(pid) for pid in pids(hosts, "host1", "RayWorker")], parts.layout)
    flip = memory.flip_in_time(random.Random(new_seed()), run.out, vector="parameters", bit=20)
    memory.close()
    run.ends_as(undisturbed)
    (event,) = corruptions(run.out)
    assert event["host"] == ("host1" if every == 1 or flip.step % 100 == 0 else "unknown")
    assert event["lane"] in (0, 1)
    assert result_of(run.out)["restarts"] == 1
    text = run.log.read_text()
    assert text.count("E_CORRUPT_STATE step=") == 1
    assert "I_RESUMED step=" in text


def test_a_killed_node_comes_back(nodes, hosts, running, undisturbed):
    """A node that is killed and started again takes its part again: the undisturbed bits."""
    run = running(5)
    hosts.kill("host2")
    hosts.restart("host2")
    nodes.start("host2")
    run.ends_as(undisturbed)
    assert "E_LOST_WORKER" in run.log.read_text()


def test_a_node_that_dies_while_its_worker_is_replaced(nodes, hosts, running, undisturbed):
    """A replacement that Ray gives up because its node has just died is started again."""
    run = running(5)
    os.kill(pids(hosts, "host2", "RayWorker")[0], signal.SIGKILL)
    wait_until(lambda: "E_LOST_WORKER" in run.log.read_text())
    hosts.kill("host2")
    hosts.restart("host2")
    nodes.start("host2")
    run.ends_as(undisturbed)


def test_a_killed_driver_takes_its_actors_along(hosts, running):
    """After `kill -9` of the driver no worker and no keeper is left within ten seconds."""
    run = running(5)
    driver = [pid for pid, argv in hosts.processes("host0").items() if "distbp.cli.main" in argv]
    for pid in driver:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    actors = ("RayWorker", "HostKeeper")
    wait_until(lambda: not any(pids(hosts, h, kind) for h in hosts.hosts for kind in actors), timeout=10)
    run.process.wait(30)


def test_a_stopped_run_goes_on_elsewhere(hosts, running, undisturbed, distbp_command):
    """SIGUSR1 to the driver saves and ends with 75, and local workers end the run in the same bits."""
    run = running(4)
    run.process.send_signal(signal.SIGUSR1)
    assert run.process.wait(30) == 75, run.log.read_text()
    done = distbp_command("train", "digits", *LONG, "--nproc", "2", "--out", run.out)
    assert done.returncode == 0, done.stderr
    assert result_of(run.out)["state_sha256"] == undisturbed["long"]["state_sha256"]
