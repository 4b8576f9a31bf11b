"""`launch/mpirun.sh` over emulated hosts: who it was, where the launcher's ranks are not the workers."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import wait_until
from tests.mpi.conftest import REPOSITORY, clean_environment, prefix_of

pytestmark = pytest.mark.mpi

AGENT = REPOSITORY / "cluster" / "launch_agent.sh"
ROUND_ROBIN = {
    "mpich": f"-launcher ssh -launcher-exec {AGENT} -ppn 1",
    "openmpi": f"--prtemca plm_ssh_agent {AGENT} --map-by node --bind-to none",
}
# After an epoch, an evaluation or a save workers wait five minutes for each other: here all three are rare.
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.max_steps=1000000",
    "-o", "train.epochs=1000000", "-o", "checkpoint.every_steps=1000000", "-o", "data.validation_fraction=0",
    "-o", "model.hidden=[64]", "-o", "run.log_samples=true",
]  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two emulated hosts that share this test's directories."""
    from cluster.emulated import EmulatedCluster
    from cluster.requirements import what_is_missing

    if reason := what_is_missing():
        pytest.skip(reason)
    shared = [tmp_path_factory.getbasetemp(), REPOSITORY]
    for name in ("mpich", "openmpi"):
        with contextlib.suppress(pytest.skip.Exception):
            shared.append(prefix_of(name))
    with EmulatedCluster(2, shared=shared) as cluster:
        yield cluster


class HostsJob:
    """A job under launch/mpirun.sh on host0 and host1, ranks dealt out in turn."""

    def __init__(self, hosts, flavour, slots, out):
        prefix = prefix_of(flavour)
        self.hosts = hosts
        self.out = out
        self.said = out.parent / "stderr"
        hostfile = hosts.hostfile(dict.fromkeys(hosts.hosts, slots), flavour=flavour)
        words = ["-n", str(2 * slots), "--hostfile", str(hostfile), "--restarts", "0"]
        np.savez(out.parent / "data.npz", x=np.ones((200_000, 4), np.float32), y=np.arange(200_000) % 10)
        words += ["--mpirun", ROUND_ROBIN[flavour], "--", "train", str(out.parent / "data.npz"), *OPTIONS]
        words += ["--out", str(out)]
        environment = clean_environment() | {
            "PATH": f"{prefix / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "DISTBP_COMMAND": f"{prefix / 'bin' / 'python'} -m distbp.cli.main",
        }
        with self.said.open("w") as stream:
            self.process = hosts.start(
                "host0",
                [REPOSITORY / "launch" / "mpirun.sh", *words],
                cwd=out.parent,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stream,
            )
        try:
            wait_until(self.has_trained, timeout=45)
        except BaseException:
            self.close()
            raise

    def has_trained(self):
        """Whether some steps were made; fail with what was said if the job has ended before."""
        assert self.process.poll() is None, self.said.read_text()
        log = self.out / "samples.log"
        return log.exists() and log.stat().st_size > 50_000

    def ranks(self, host):
        """The processes of ranks on a host, as seen from outside, by the launcher's rank."""
        found = {}
        for pid, argv in self.hosts.processes(host).items():
            if "distbp.cli.main" in argv and "python" in argv[0]:
                with contextlib.suppress(OSError):
                    environment = Path(f"/proc/{pid}/environ").read_bytes().decode()
                    match = re.search(r"\0(?:PMI_RANK|OMPI_COMM_WORLD_RANK)=(\d+)\0", environment)
                    found[int(match[1])] = pid
        return found

    def wait(self):
        """The exit code of the script; fail with what was said if it does not end."""
        try:
            return self.process.wait(50)
        except subprocess.TimeoutExpired:
            processes = {host: self.hosts.processes(host) for host in self.hosts.hosts}
            pytest.fail(f"{self.said.read_text()}\nstill running: {processes}")

    def culprit(self):
        """What the script says about who it was."""
        return re.search(r"mpirun\.sh: culprit: (.*)", self.said.read_text())[1]

    def close(self):
        """End what is left on the hosts."""
        for host in self.hosts.hosts:
            for pid in self.hosts.processes(host):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait(30)


@pytest.mark.parametrize(
    ("number", "how"), [("SIGKILL", "killed by signal 9"), ("SIGSTOP", "waited in vain")]
)
@pytest.mark.parametrize("flavour", ["mpich", "openmpi"])
def test_a_rank_on_another_host_is_named_by_its_worker(hosts, flavour, number, how, tmp_path):
    """Rank 1 of a launcher that deals ranks out in turn is worker 2, on host1: named so, with its log."""
    job = HostsJob(hosts, flavour, 2, tmp_path / "run")
    try:
        os.kill(job.ranks("host1")[1], signal.Signals[number])
        assert job.wait() == 69, job.said.read_text()
        assert job.culprit().startswith("worker 2 on host host1 (rank 1 of the launcher, process "), (
            job.said.read_text()
        )
        assert how in job.culprit()
        assert "rank-00002.log says:" in job.said.read_text()
        wait_until(lambda: not job.ranks("host0") and not job.ranks("host1"))
    finally:
        job.close()


@pytest.mark.parametrize("flavour", ["mpich", "openmpi"])
def test_a_cut_link_ends_the_script(hosts, flavour, tmp_path):
    """A host whose link is cut is named, and the answer is 69, though a launcher may wait for it for ever."""
    job = HostsJob(hosts, flavour, 1, tmp_path / "run")
    try:
        hosts.cut("host1")
        assert job.wait() == 69, job.said.read_text()
        assert job.culprit() == "host host1 or the link to it, for which the others waited in vain"
        wait_until(lambda: not job.ranks("host0") and not job.ranks("host1"))
    finally:
        hosts.mend("host1")
        job.close()


@pytest.mark.parametrize("flavour", ["mpich", "openmpi"])
def test_a_killed_launcher_is_a_loss_on_all_hosts(hosts, flavour, tmp_path):
    """After kill -9 of mpirun itself the answer is 69, whatever ranks could still say, and none is left."""
    job = HostsJob(hosts, flavour, 1, tmp_path / "run")
    try:
        names = ("mpirun", "mpiexec", "mpiexec.hydra", "prterun")
        running = hosts.processes("host0").items()
        (launcher,) = [pid for pid, argv in running if Path(argv[0]).name in names]
        os.kill(launcher, signal.SIGKILL)
        assert job.wait() == 69, job.said.read_text()
        wait_until(lambda: not job.ranks("host0") and not job.ranks("host1"))
    finally:
        job.close()
