"""The emulated cluster itself: hosts are apart where real ones are, and joined where real ones are."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest

from cluster.emulated import EmulatedCluster
from cluster.errors import ClusterError
from tests.cluster.inside import (
    CONNECT,
    QUIET_BYTES,
    RECEIVER,
    SENDER,
    SLEEPER,
    ended,
    python,
    start_speaker,
)


class TestHosts:
    def test_are_apart(self, cluster):
        """Every host has its own name, address, identity, processes, /tmp, /dev/shm and abstract sockets."""
        code = """
import json, os, socket
name = socket.gethostname()
socket.socket(socket.AF_UNIX).bind("\\0the same name everywhere")
for folder in ("/tmp", "/dev/shm"):
    open(f"{folder}/the-same-everywhere", "x").close()
boot_id = open("/proc/sys/kernel/random/boot_id").read()
machine_id = open("/etc/machine-id").read() if os.path.exists("/etc/machine-id") else boot_id
numbers = sorted(int(entry) for entry in os.listdir("/proc") if entry.isdigit())
links = sorted(os.listdir("/sys/class/net"))
few = numbers[0] == 1 and len(numbers) < 9
spaces = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "uts", "mnt", "ipc", "pid")]
print(json.dumps([name, socket.gethostbyname(name), boot_id, machine_id, few, links, spaces]), flush=True)
input()
"""
        started = [
            cluster.start(host, python(code), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            for host in cluster.hosts
        ]
        seen = [json.loads(process.stdout.readline()) for process in started]
        for process in started:
            process.communicate("\n")
            assert process.returncode == 0
        names, addresses, boot_ids, machine_ids, numbers, links, spaces = zip(*seen, strict=True)
        assert names == ("host0", "host1", "host2")
        assert addresses == tuple(cluster.addresses.values())
        assert all(address.startswith("10.") for address in addresses)
        assert len({*boot_ids, Path("/proc/sys/kernel/random/boot_id").read_text()}) == 4
        assert len(set(machine_ids)) == 3
        assert all(numbers)
        ours = [os.readlink(f"/proc/self/ns/{kind}") for kind in ("net", "uts", "mnt", "ipc", "pid")]
        assert len({*ours, *(space for own in spaces for space in own)}) == 5 * 4
        assert links == (["eth0", "lo"],) * 3

    def test_share_the_file_system(self, cluster, tmp_path):
        """What one host writes into a shared directory, the other hosts and we can read."""
        cluster.run("host0", ["sh", "-c", "echo from host0 > note"], cwd=tmp_path, check=True)
        assert cluster.run("host2", ["cat", tmp_path / "note"]).stdout == "from host0\n"
        assert (tmp_path / "note").read_text() == "from host0\n"

    def test_do_not_reach_the_world(self, cluster):
        """A host has one route, to the other hosts: nothing that a test does gets out."""
        routes = cluster.run("host0", ["ip", "route"], check=True).stdout
        assert routes.split()[:3] == ["10.77.0.0/24", "dev", "eth0"]
        assert len(routes.splitlines()) == 1

    def test_one_is_enough(self):
        """A cluster of one host comes up too, and its limited link is no obstacle."""
        with EmulatedCluster(1, rate_mbit=0.5) as alone:
            assert alone.run("host0", ["hostname"]).stdout == "host0\n"

    def test_several_clusters_at_once(self, cluster):
        """Two clusters use the same names and addresses and do not see each other."""
        with EmulatedCluster(2) as other:
            assert other.addresses["host0"] == cluster.addresses["host0"]
            receiver = start_speaker(cluster, "host1", RECEIVER, "listening")
            assert other.run("host0", python(CONNECT, "host1")).returncode == 9
            assert cluster.run("host0", python(SENDER, "host1", 5)).returncode == 0
            assert receiver.communicate()[0] == "5\n"

    @pytest.mark.parametrize("wanted", [{"hosts": 0}, {"hosts": 201}, {"rate_mbit": 0}, {"rate_mbit": -1.0}])
    def test_impossible_wishes(self, wanted):
        """A cluster that cannot be is refused before anything is started."""
        with pytest.raises(ValueError, match="expected"):
            EmulatedCluster(**wanted)

    def test_unknown_host(self, cluster):
        """A host that does not exist is named, with those that do."""
        with pytest.raises(ValueError, match="host0, host1, host2, got 'host9'"):
            cluster.run("host9", ["true"])


class TestPrograms:
    def test_end_as_themselves(self, cluster):
        """Exit codes and signals come back as they do from subprocess."""
        assert cluster.run("host1", ["sh", "-c", "exit 75"]).returncode == 75
        assert cluster.run("host1", ["sh", "-c", "kill -KILL $$"]).returncode == -signal.SIGKILL
        assert cluster.run("host1", ["sh", "-c", "kill -USR1 $$"]).returncode == -signal.SIGUSR1

    def test_streams_environment_and_directory(self, cluster, tmp_path, monkeypatch):
        """Input, both outputs, environment and directory are those of the caller, without the tests' own."""
        monkeypatch.setenv("DISTBP_TEST_SOMETHING", "1")
        monkeypatch.setenv("WITH_ODD_BYTES", "é\udcff\n")
        code = """
import os, sys
sys.stderr.write(os.getcwd())
print(len(sys.stdin.read()), ascii(os.environ["WITH_ODD_BYTES"]), "DISTBP_TEST_SOMETHING" in os.environ)
"""
        result = cluster.run("host1", python(code), input="x" * 300_000, cwd=tmp_path)
        assert result.stdout == "300000 '\\xe9\\udcff\\n' False\n"
        assert result.stderr == str(tmp_path)

    def test_that_do_not_exist(self, cluster):
        """A program that cannot be started is named; one below /tmp comes with the likely reason."""
        result = cluster.run("host1", ["/tmp/elsewhere/program"])
        assert result.returncode == 255
        assert "/tmp/elsewhere/program" in result.stderr
        assert "name what is shared" in result.stderr

    def test_get_signals(self, cluster):
        """A signal for the stand-in arrives at the program, also when the owner of the cluster ignores it."""
        code = """
import signal
signal.signal(signal.SIGUSR1, lambda *_: print("got it", flush=True))
print("here", flush=True)
signal.pause()
signal.pause()
"""
        process = start_speaker(cluster, "host1", code, "here")
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "got it\n"
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM
        process.stdout.close()

    def test_die_with_their_stand_in(self, cluster):
        """A program whose stand-in is killed, or runs into its timeout, is ended with its children."""
        code = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {SLEEPER!r}])"
        process = start_speaker(cluster, "host2", code, "here")
        inside = cluster.processes("host2")
        assert len(inside) == 2
        process.kill()
        process.wait()
        process.stdout.close()
        assert ended(inside)
        with pytest.raises(subprocess.TimeoutExpired):
            cluster.run("host2", python(SLEEPER), timeout=0.2)
        assert ended(cluster.processes("host2"))

    def test_orphans_are_reaped(self, cluster):
        """Process 1 collects what daemons leave, as it does on a real host: no zombie stays."""
        cluster.run("host2", ["sh", "-c", "(true & true &) ; true"], check=True)
        states = cluster.run("host2", ["ps", "-eo", "stat="], check=True).stdout.split()
        assert not [one for one in states if one.startswith("Z")]


class TestNetwork:
    def test_counts_bytes(self, cluster):
        """What one host sends to another is counted where it leaves and where it arrives, nowhere else."""
        size = 1_000_000
        before = [(cluster.bytes_sent(host), cluster.bytes_received(host)) for host in cluster.hosts]
        receiver = start_speaker(cluster, "host1", RECEIVER, "listening")
        cluster.run("host0", python(SENDER, "host1", size), check=True)
        assert receiver.communicate()[0] == f"{size}\n"
        after = [(cluster.bytes_sent(host), cluster.bytes_received(host)) for host in cluster.hosts]
        sent, received = ([b[way] - a[way] for a, b in zip(before, after, strict=True)] for way in (0, 1))
        assert size < sent[0] < 1.1 * size
        assert size < received[1] < 1.1 * size
        assert max(sent[1], sent[2], received[0], received[2]) < QUIET_BYTES + 0.05 * size

    def test_loopback_is_not_counted(self, cluster):
        """What processes of one host tell each other does not pass its eth0."""
        before = cluster.bytes_sent("host0")
        receiver = start_speaker(cluster, "host0", RECEIVER, "listening")
        cluster.run("host0", python(SENDER, "host0", 1_000_000), check=True)
        assert receiver.communicate()[0] == "1000000\n"
        assert cluster.bytes_sent("host0") - before < QUIET_BYTES

    @pytest.mark.parametrize(
        "pairs",
        [[("host1", "host0"), ("host2", "host0")], [("host0", "host1"), ("host0", "host2")]],
        ids=["two senders", "two receivers"],
    )
    def test_rate_limit(self, pairs):
        """No link is faster than its limit, neither that of one receiver nor that of one sender.

        A busy machine makes transfers slower, never faster, so the bound holds at any load.  A tenth of the
        time is allowed for what passes in the first burst, which is 64 of 4,000 kB.
        """
        rate_mbit, size = 100, 2_000_000
        code = "import time\n" + SENDER.replace("connection.send", "print(time.monotonic())\nconnection.send")
        receiving = Counter(receiver for _, receiver in pairs)
        with EmulatedCluster(3, rate_mbit=rate_mbit) as limited:
            receivers = [
                start_speaker(limited, host, RECEIVER, "listening", count)
                for host, count in receiving.items()
            ]
            senders = [
                limited.start(sender, python(code, receiver, size), stdout=subprocess.PIPE, text=True)
                for sender, receiver in pairs
            ]
            received = [int(receiver.communicate()[0]) for receiver in receivers]
            end = time.monotonic()
            begin = min(float(sender.communicate()[0]) for sender in senders)
        assert sum(received) == 2 * size
        assert end - begin > 0.9 * 2 * size * 8 / (rate_mbit * 1e6)

    def test_cut_and_mend(self, cluster):
        """Nothing gets through a cut link, the others work on, and mending is enough to go on."""
        receiver = start_speaker(cluster, "host1", RECEIVER, "listening")
        cluster.cut("host1")
        try:
            assert cluster.run("host0", python(CONNECT, "host1")).returncode == 9
            assert cluster.run("host1", ["cat", "/sys/class/net/eth0/carrier"]).stdout == "0\n"
            assert cluster.is_alive("host1")
            other = start_speaker(cluster, "host2", RECEIVER, "listening")
            cluster.run("host0", python(SENDER, "host2", 3), check=True)
            assert other.communicate()[0] == "3\n"
        finally:
            cluster.mend("host1")
        cluster.run("host0", python(SENDER, "host1", 4), check=True)
        assert receiver.communicate()[0] == "4\n"

    def test_a_connection_outlives_a_cut(self, cluster):
        """A cut tells nobody: what was sent meanwhile arrives after mending, on the same connection."""
        receiver = start_speaker(cluster, "host1", RECEIVER, "listening")
        code = SENDER + "\nprint('sent', flush=True)\ninput()\nconnection.sendall(b'more')"
        sender = cluster.start(
            "host0", python(code, "host1", 10), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert sender.stdout.readline() == "sent\n"
        cluster.cut("host1")
        sender.communicate("\n")
        cluster.mend("host1")
        assert receiver.communicate(timeout=30)[0] == "14\n"


class TestKill:
    def test_ends_every_process_and_no_other(self):
        """A killed host is dead at once with all it ran, its peers see the connection end, and live on."""
        with EmulatedCluster(2) as cluster:
            receiver = start_speaker(cluster, "host0", RECEIVER, "listening")
            code = SENDER + "\nprint('sent', flush=True)\nimport signal\nsignal.pause()"
            victim = cluster.start("host1", python(code, "host0", 10), stdout=subprocess.PIPE, text=True)
            assert victim.stdout.readline() == "sent\n"
            inside = cluster.processes("host1")
            assert len(inside) == 1
            cluster.kill("host1")
            assert not any(Path(f"/proc/{pid}").exists() for pid in inside)
            assert victim.wait(20) == 255
            victim.stdout.close()
            assert receiver.communicate()[0] == "10\n"
            assert not cluster.is_alive("host1")
            assert cluster.is_alive("host0")
            with pytest.raises(ClusterError, match="expected host1 to be alive"):
                cluster.bytes_sent("host1")
            assert "may have been killed" in cluster.run("host1", ["true"]).stderr
            cluster.kill("host1")

    def test_restart(self):
        """A killed host comes back under its name and address, empty, and is reached again."""
        with EmulatedCluster(2, rate_mbit=100) as cluster:
            cluster.run("host1", ["touch", "/tmp/x", "/dev/shm/x"], check=True)
            with pytest.raises(ClusterError, match="expected host1 to be dead"):
                cluster.restart("host1")
            cluster.kill("host1")
            cluster.restart("host1")
            assert (
                cluster.run("host1", ["sh", "-c", "hostname; ls /dev/shm /tmp/x"]).stdout
                == "host1\n/dev/shm:\n"
            )
            receiver = start_speaker(cluster, "host1", RECEIVER, "listening")
            cluster.run("host0", python(SENDER, "host1", 7), check=True)
            assert receiver.communicate()[0] == "7\n"
