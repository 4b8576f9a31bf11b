"""MPI on the emulated cluster: the stand-in for ssh, and both launchers with real ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from cluster import mpi
from cluster.errors import ClusterError
from tests.cluster.inside import (
    QUIET_BYTES,
    REPOSITORY,
    ended,
)


class TestLaunchAgent:
    def agent(self, cluster, *arguments, **options):
        """Call the agent in host0, as a launcher would."""
        return cluster.run("host0", [REPOSITORY / "cluster" / "launch_agent.sh", *arguments], **options)

    def test_runs_a_command_as_ssh_does(self, cluster):
        """Options of ssh are skipped, words are joined for a shell, and the environment is a fresh one."""
        words = (
            "-x",
            "-o",
            "StrictHostKeyChecking no",
            "-p22",
            "root@host2",
            "hostname;",
            "pwd;",
            "echo $HOME$MARK",
        )
        result = self.agent(cluster, *words, env={**os.environ, "MARK": "ours"})
        assert result.stdout.split() == ["host2", "/", "/root"]

    def test_passes_input_and_exit_code(self, cluster):
        """Input reaches the command, its exit code comes back, and a signal is 255 as with ssh."""
        result = self.agent(cluster, "host1", "cat; exit 7", input="through")
        assert (result.stdout, result.returncode) == ("through", 7)
        assert self.agent(cluster, "host1", "kill -TERM $$").returncode == 255

    def test_unknown_host(self, cluster):
        """A host that does not answer is 255, as with ssh, and named."""
        result = self.agent(cluster, "host7", "true")
        assert result.returncode == 255
        assert "'host7'" in result.stderr

    def test_commands_outlive_it(self, cluster):
        """A command goes on when the agent is killed, as under sshd: leaks of a launcher stay visible."""
        process = cluster.start(
            "host0",
            [REPOSITORY / "cluster" / "launch_agent.sh", "host1", *map(str, ("exec", "sleep", "1000"))],
            stdout=subprocess.PIPE,
        )
        while not (inside := [pid for pid, argv in cluster.processes("host1").items() if argv[0] == "sleep"]):
            assert process.poll() is None
        process.kill()
        process.wait()
        process.stdout.close()
        cluster.run("host1", ["true"], check=True)
        assert Path(f"/proc/{inside[0]}").exists()
        os.kill(inside[0], signal.SIGKILL)
        assert ended(inside)


class TestMPI:
    HELLO = """
import json, os, socket, sys
import numpy as np
from mpi4py import MPI
world = MPI.COMM_WORLD
values = np.full(int(sys.argv[1]), world.rank + 1, np.float32)
total = np.empty_like(values)
world.Allreduce(values, total)
names = world.gather(socket.gethostname() + " " + os.environ.get("MARK", "without"))
if world.rank == 0:
    print(json.dumps([world.size, names, float(total[0]), float(total[-1])]))
"""

    def hello(self, cluster, flavour, slots, size):
        """Run HELLO on 3 ranks; return what rank 0 said and the bytes that each host sent."""
        prefix = mpi.find_prefix(flavour)
        if prefix is None:
            pytest.skip(f"set {mpi.PREFIX_VARIABLES[flavour]} to a prefix with {flavour}, mpi4py and NumPy")
        before = {host: cluster.bytes_sent(host) for host in cluster.hosts}
        argv = [prefix / "bin" / "python", "-c", self.HELLO, size]
        result = cluster.run(
            "host0", cluster.mpirun(argv, 3, flavour, slots=slots, environment={"MARK": "ours"})
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout), {
            host: cluster.bytes_sent(host) - before[host] for host in cluster.hosts
        }

    @pytest.mark.parametrize("flavour", mpi.FLAVOURS)
    def test_ranks_on_two_hosts_talk_through_eth0(self, cluster, flavour):
        """A vector that 2 + 1 ranks add crosses both links; with all ranks on one host none of it does."""
        size = 1_000_000
        said, sent = self.hello(cluster, flavour, {"host0": 2, "host1": 1}, size)
        assert said == [3, ["host0 ours", "host0 ours", "host1 ours"], 6.0, 6.0]
        assert sent["host0"] > 4 * size / 2, "at least a part of the vector leaves each host"
        assert sent["host1"] > 4 * size / 2
        assert sent["host2"] < QUIET_BYTES
        said, sent = self.hello(cluster, flavour, {"host0": 3}, size)
        assert said == [3, ["host0 ours"] * 3, 6.0, 6.0]
        assert max(sent.values()) < QUIET_BYTES
        assert [cluster.processes(host) for host in cluster.hosts] == [{}, {}, {}]

    def test_without_a_prefix(self, cluster, monkeypatch):
        """Who has not said where the MPI is gets to know how to say it."""
        monkeypatch.delenv("MPICH_PREFIX", raising=False)
        with pytest.raises(ClusterError, match="set MPICH_PREFIX"):
            cluster.mpirun(["true"], 2, "mpich")
        with pytest.raises(ValueError, match="mpich, openmpi, got 'lam'"):
            cluster.mpirun(["true"], 2, "lam")

    @pytest.mark.parametrize("flavour", mpi.FLAVOURS)
    def test_examples_are_what_is_written(self, flavour):
        """The host file examples have the form that the emulated cluster uses, which both MPIs accept."""
        text = (REPOSITORY / "cluster" / "hostfiles" / f"{flavour}.hosts").read_text()
        lines = "".join(f"{line}\n" for line in text.splitlines() if not line.startswith("#"))
        assert lines == mpi.hostfile_text({"node01": 8, "node02": 8, "node03": 4}, flavour)
