"""Nothing is left of an emulated cluster, and its command line does what it says."""

from __future__ import annotations

import os
import signal
import subprocess
import textwrap

import pytest

from cluster import state
from cluster.emulated import EmulatedCluster
from cluster.errors import ClusterError
from tests.cluster.inside import (
    PYTHON,
    REPOSITORY,
    SLEEPER,
    ended,
    everything_outside,
    processes_of,
    start_speaker,
)


class TestNothingIsLeft:
    def test_after_the_with_statement(self):
        """Links, namespaces, mounts, directories and processes are afterwards as they were before."""
        before = everything_outside()
        with EmulatedCluster(2, rate_mbit=10) as cluster:
            process = start_speaker(cluster, "host1", SLEEPER, "here")
            assert everything_outside()[:3] == before[:3], (
                "the machine's own network and mounts stay untouched"
            )
            cluster.cut("host0")
            assert processes_of(cluster.name)
        assert process.wait(20) == 255
        process.stdout.close()
        assert everything_outside() == before
        assert processes_of(cluster.name) == []
        cluster.close()

    def test_after_an_error(self):
        """An exception inside the statement, or while hosts start, leaves nothing either."""
        before = everything_outside()
        with pytest.raises(RuntimeError, match="of the test"), EmulatedCluster(2):
            raise RuntimeError("of the test")
        broken = EmulatedCluster(2)
        broken.addresses["host1"] = "10.77.0.999"
        with pytest.raises(ClusterError, match="999"):
            broken.__enter__()
        assert everything_outside() == before
        assert processes_of(broken.name) == []

    @pytest.mark.parametrize("stopped", [False, True], ids=["", "with a host that is stopped"])
    def test_after_a_kill(self, stopped):
        """SIGKILL of the owner ends its hosts; what is left of its directory goes at the next start."""
        before = everything_outside()
        code = f"""
        import sys
        sys.path.insert(0, {str(REPOSITORY)!r})
        from cluster.emulated import EmulatedCluster
        with EmulatedCluster(2) as cluster:
            cluster.start("host1", ["sleep", "1000"])
            print(cluster.name, flush=True)
            input()
        """
        owner = subprocess.Popen(
            [PYTHON, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        name = owner.stdout.readline().strip()
        first = state.listening_process(state.ROOT / name, "host1")
        if stopped:
            os.kill(first, signal.SIGSTOP)
        pids = processes_of(name)
        assert len(pids) >= 4
        owner.kill()
        owner.wait()
        owner.stdin.close()
        owner.stdout.close()
        if not stopped:
            assert ended(pids), "the hosts end by themselves"
        with EmulatedCluster(1):
            assert not state.ROOT.joinpath(name).exists()
        assert ended(pids)
        assert everything_outside() == before

    def test_of_others_everything_is_left(self, cluster):
        """Cleaning up after the dead touches no cluster whose owner is alive."""
        assert cluster.name not in state.sweep()
        assert cluster.is_alive("host0")


class TestCommandLine:
    def test_from_up_to_down(self, tmp_path):
        """A cluster that `up` started stays, is found by its name, obeys, and goes with `down`."""
        before = everything_outside()
        name = f"test-{os.getpid()}"

        def command(verb, *arguments):
            argv = [PYTHON, "-m", "cluster.emulated", verb, "--name", name, *map(str, arguments)]
            return subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

        try:
            up = command("up", "--hosts", 2, "--rate-mbit", 100, "--shared", tmp_path)
            assert up.returncode == 0, up.stderr
            assert "host0 to host1" in up.stdout
            again = command("up")
            assert again.returncode == 1
            assert f"down --name {name}" in again.stderr
            assert command("exec", "host1", "sh", "-c", "hostname; exit 3").stdout == "host1\n"
            assert command("exec", "host1", "--", "sh", "-c", f"touch {tmp_path}/x; exit 3").returncode == 3
            assert (tmp_path / "x").exists()
            assert command("cut", "host1").returncode == 0
            assert command("exec", "host1", "cat", "/sys/class/net/eth0/carrier").stdout == "0\n"
            assert command("mend", "host1").returncode == 0
            assert command("exec", "host1", "cat", "/sys/class/net/eth0/carrier").stdout == "1\n"
            assert command("kill", "host1").returncode == 0
            status = command("status").stdout.splitlines()
            assert [line.split()[:3] for line in status] == [
                ["host0", "10.77.0.10", "alive"],
                ["host1", "10.77.0.11", "dead"],
            ]
            with pytest.raises(ClusterError, match="this is another"):
                EmulatedCluster.attach(name).restart("host1")
        finally:
            down = command("down")
        assert down.returncode == 0
        assert f"{name!r} is down" in down.stdout
        assert everything_outside() == before
        assert processes_of(name) == []
        assert command("status").returncode == 1

    def test_programs_get_their_signals(self, tmp_path):
        """The owner that `up` leaves behind blocks signals to wait for them; programs in its hosts do not."""
        name = f"signals-{os.getpid()}"
        with subprocess.Popen(
            [PYTHON, "-m", "cluster.emulated", "hold", "--name", name, "--hosts", "1", "--shared", tmp_path],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            text=True,
        ) as holder:
            assert "is up" in holder.stdout.readline()
            blocked = (
                EmulatedCluster.attach(name).run("host0", ["grep", "SigBlk", "/proc/self/status"]).stdout
            )
            holder.terminate()
        assert int(blocked.split()[1], 16) == 0
        assert holder.returncode == 0

    def test_without_root(self):
        """Who is not root is told so, before anything is tried."""
        code = (
            "import os; from cluster import requirements as r; os.seteuid(65534); print(r.what_is_missing())"
        )
        result = subprocess.run(
            [PYTHON, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        assert "needs root" in result.stdout
        assert "user 65534" in result.stdout

    def test_without_iproute2(self, tmp_path, monkeypatch):
        """A missing program is named with the package that brings it."""
        from cluster import requirements

        monkeypatch.setitem(requirements.COMMANDS, "no-such-program", "its-package")
        assert requirements.what_is_missing().endswith("apt-get install -y its-package")
