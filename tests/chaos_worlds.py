"""Where the chaos takes place: local workers, mpirun on two emulated hosts, Ray on three.

A world starts the job, knows its processes, and says what a loss looks like there.  What is done to it, and
what must be true afterwards, stands in `chaos.py`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from cluster.emulated import EmulatedCluster
from cluster.ray import RayNodes
from tests.soaking import (
    COMMAND,
    REPOSITORY,
    Said,
    command_line,
    environment,
    launcher_ranks,
    marked,
    variable,
)

AGENT = REPOSITORY / "cluster" / "launch_agent.sh"
AGENT_OPTIONS = {
    "mpich": f"-launcher ssh -launcher-exec {AGENT}",
    "openmpi": f"--prtemca plm_ssh_agent {AGENT} --map-by slot --bind-to none",
}


MPICH_LEAVES = re.compile(r"host1:/dev/shm/mpich_shm_|host\d+:/tmp/hydra_hwloc_xmlfile_")
"""What MPICH leaves when a job is aborted: segments on hosts other than the script's, a file of Hydra's."""


@dataclass(frozen=True)
class Worker:
    """A worker that runs: its process, and what a line that says it is lost must contain."""

    pid: int
    name: str
    lost: re.Pattern[str]


class World(ABC):
    """A place for one job at a time.  `disk` holds run directories, `temporary` is $TMPDIR."""

    replaces_workers = True
    """Whether a lost worker is replaced while the job goes on; if not, the whole job starts again."""

    kinds: tuple[str, ...] = ()
    """What happens here; a kind that stands here twice happens twice as often."""

    counts_sockets = True
    """Whether sockets are counted among the descriptors that the launching process must not have more of."""

    loss = re.compile("E_LOST_WORKER|E_STUCK_WORKER")
    """What must not be said of a worker that is slow or paused."""

    def __init__(self, disk, temporary):
        self.disk, self.temporary = disk, temporary
        self.process = None
        self.said = None
        self.started_as = ""
        self.not_ours = set()
        self._clean = {}

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def start(self, options, out, rng):
        """Start the job, or start it again, with as many workers as the dice say."""
        self.process, self.started_as = self._start(options, out, rng)
        self.said = Said(self.process.stderr)

    def close(self):
        """End the job if there is one."""
        if self.process is not None and self.process.poll() is None:
            self.kill()

    def kill(self):
        """Kill every process of the job, the one that was started first; return when all are gone."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait(30)
        until = time.monotonic() + 20
        while left := self.processes():
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            assert time.monotonic() < until, f"cannot be killed: {left}"
            time.sleep(0.02)
        self.said.drain(5)

    def left_behind(self):
        """Return what there is of a job that has ended, after the time that its last processes may take."""
        until = time.monotonic() + 10
        while (left := self._left()) and time.monotonic() < until:
            time.sleep(0.1)
        return left

    def _left(self):
        left = [f"process {pid}: {' '.join(command_line(pid))}" for pid in self.processes()]
        files = [name for name in self.files() if name not in self._clean]
        self.not_ours |= {name for name in files if self.is_anothers(name)}
        return left + [name for name in files if name not in self.not_ours]

    def is_anothers(self, name):
        """Return whether a file was left by somebody whom distbp does not clean up after, and says so."""
        return False

    def forgive_files(self):
        """Take what lies in /dev/shm and /tmp as given: nobody was left who could have removed it."""
        self._clean = dict.fromkeys(self.files())

    # What a world adds.

    @abstractmethod
    def _start(self, options, out, rng):
        """Return the process that was started, and in words how."""

    @abstractmethod
    def processes(self):
        """Return the numbers of all processes of the job."""

    @abstractmethod
    def workers(self):
        """Return the workers that run now."""

    def launching_process(self):
        """Return the process whose end the workers must notice."""
        return self.process.pid

    @abstractmethod
    def files(self):
        """Return what lies in /dev/shm and in temporary directories."""


class LocalWorld(World):
    """Workers on this machine, one to four."""

    name = "local"
    kinds = (
        "kill", "kill", "kill", "segv", "two", "again", "again", "pause", "pause_all", "stop", "job",
        "launcher", "flip", "fill", "stop_request",
    )  # fmt: skip

    def _start(self, options, out, rng):
        nproc = rng.randint(1, 4)
        self.mark = f"CHAOS={uuid.uuid4().hex}"
        process = subprocess.Popen(
            [*COMMAND, *options, "--nproc", str(nproc), "--out", out],
            env=environment(CHAOS=self.mark.partition("=")[2], TMPDIR=str(self.temporary)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        return process, f"{nproc} workers"

    def processes(self):
        """Return those that carry the job's mark."""
        return marked(self.mark)

    def workers(self):
        """Return the processes that were given a rank."""
        found = []
        for pid in self.processes():
            rank = variable(pid, "DISTBP_RANK")
            if rank is not None:
                lost = re.compile(rf"E_LOST_WORKER rank={rank} .*pid={pid} ")
                found.append(Worker(pid, f"worker {rank}", lost))
        return sorted(found, key=lambda worker: worker.name)

    def files(self):
        """Return what lies in this namespace's /dev/shm and in $TMPDIR."""
        return [str(path) for folder in (Path("/dev/shm"), self.temporary) for path in folder.iterdir()]


class HostsWorld(World):
    """A job on emulated hosts."""

    num_hosts = 2

    def __init__(self, disk, temporary, prefixes):
        super().__init__(disk, temporary)
        self._prefixes = prefixes
        self._stack = contextlib.ExitStack()
        self.hosts = EmulatedCluster(self.num_hosts, shared=[disk, REPOSITORY, *prefixes.values()])

    def __enter__(self):
        self._stack.enter_context(self.hosts)
        self._clean = dict.fromkeys(self.files())
        return self

    def close(self):
        """End the job, then the hosts."""
        super().close()
        self._stack.close()

    def files(self):
        """Return what lies in /dev/shm and /tmp of each host."""
        found = []
        for host in self.hosts.hosts:
            listed = self.hosts.run(host, ["find", "/dev/shm", "/tmp", "-mindepth", "1", "-maxdepth", "1"])
            found += [f"{host}:{name}" for name in listed.stdout.split() if self.is_ours(name)]
        return found

    def is_ours(self, name):
        """Return whether a file of a host is the job's."""
        return True


class MpirunWorld(HostsWorld):
    """`launch/mpirun.sh` over two emulated hosts, with the MPI libraries that are there in turn."""

    name = "mpirun"
    replaces_workers = False
    kinds = (
        "kill", "kill", "segv", "pause", "stop", "job", "launcher", "flip", "fill", "stop_request", "cut",
    )  # fmt: skip
    loss = re.compile("culprit|starting again")

    def _start(self, options, out, rng):
        flavour = rng.choice(sorted(self._prefixes))
        prefix = self._prefixes[flavour]
        slots = dict(zip(self.hosts.hosts, rng.choice([(1, 1), (2, 1), (1, 2), (2, 2)]), strict=True))
        hostfile = self.hosts.hostfile(slots, flavour=flavour)
        words = ["-n", str(sum(slots.values())), "--hostfile", hostfile, "--restarts", "3"]
        words += ["--mpirun", AGENT_OPTIONS[flavour], "--", "train", *options, "--out", out]
        process = self.hosts.start(
            "host0",
            [REPOSITORY / "launch" / "mpirun.sh", *words],
            cwd=self.disk,
            env=environment(
                PATH=f"{prefix / 'bin'}{os.pathsep}{os.environ['PATH']}",
                DISTBP_COMMAND=f"{prefix / 'bin' / 'python'} -m distbp.cli.main",
            ),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        return process, f"{flavour} {'+'.join(map(str, slots.values()))}"

    def processes(self):
        """Return everything that runs on the hosts: there is nothing else."""
        return [pid for host in self.hosts.hosts for pid in self.hosts.processes(host)]

    def is_anothers(self, name):
        """Return whether MPICH left it where launch/mpirun.sh does not clean up."""
        return bool(MPICH_LEAVES.match(name))

    def workers(self):
        """Return the ranks; hosts are filled one after the other: the launcher's numbers are the workers'."""
        found = []
        for host in self.hosts.hosts:
            for rank, pid in sorted(launcher_ranks(self.hosts.processes(host)).items()):
                lost = re.compile(rf"culprit: worker {rank} on host {host}\b")
                found.append(Worker(pid, f"rank {rank} on {host}", lost))
        return found

    def launching_process(self):
        """Return mpirun itself, below the script."""
        for pid, words in self.hosts.processes("host0").items():
            if Path(words[0]).name in ("mpirun", "mpiexec", "mpiexec.hydra", "prterun"):
                return pid
        return None


class RayWorld(HostsWorld):
    """Actors on a Ray cluster of three emulated hosts with 2, 1 and 1 processors."""

    name = "ray"
    counts_sockets = False  # Ray opens connections of its own in the driver, as nodes come and go.
    num_hosts = 3
    kinds = (
        "kill", "kill", "segv", "two", "again", "keeper", "node", "pause", "stop", "launcher", "flip", "fill",
        "stop_request",
    )  # fmt: skip
    loss = re.compile("E_LOST|E_STUCK")

    def __enter__(self):
        super().__enter__()
        self._prefix = self._prefixes["ray"]
        cpus = {"host0": 2, "host1": 1, "host2": 1}
        self.nodes = self._stack.enter_context(RayNodes(self.hosts, self._prefix, cpus))
        self.forgive_files()
        return self

    def _start(self, options, out, rng):
        nproc = rng.randint(2, 4)
        command = [self._prefix / "bin" / "python", "-m", "distbp.cli.main", "train", *options]
        process = self.nodes.start_driver(
            [*command, "--backend", "ray", "--nproc", str(nproc), "--out", out],
            cwd=self.disk,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        return process, f"{nproc} workers"

    def actors(self, kind):
        """Return processes of a kind of actor with their hosts."""
        return [
            (pid, host)
            for host in self.hosts.hosts
            if self.hosts.is_alive(host)
            for pid, words in self.hosts.processes(host).items()
            if any(kind in word for word in words)
        ]

    def processes(self):
        """Return driver and actors; the nodes stay."""
        found = [pid for kind in ("RayWorker", "HostKeeper") for pid, _ in self.actors(kind)]
        return found + [pid for pid, _ in self.actors("distbp.cli.main")]

    def workers(self):
        """Return the worker actors; distbp calls them by the number that they have on their host."""
        found = []
        for pid, host in self.actors("RayWorker"):
            lost = re.compile(rf"E_LOST_WORKER .*host={host} pid={inner_pid(pid)} ")
            found.append(Worker(pid, f"an actor on {host}", lost))
        return found

    def launching_process(self):
        """Return the driver."""
        for pid, words in self.hosts.processes("host0").items():
            if "distbp.cli.main" in words and "train" in words:
                return pid
        return None

    def is_ours(self, name):
        """Return whether a file is distbp's; Ray's own nodes keep theirs while they run."""
        return "distbp" in name

    def lose_node(self, rng):
        """Kill a host that has a keeper, and bring it back with an empty memory; return its name."""
        used = sorted({host for _, host in self.actors("HostKeeper")} - {"host0"})
        if not used:
            return None
        host = rng.choice(used)
        self.hosts.kill(host)
        return host

    def restore_node(self, host):
        """Start the host and its node again."""
        self.hosts.restart(host)
        self.nodes.start(host)


def inner_pid(pid):
    """Return the number that a process has in its own namespace."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return -1
    return int(re.search(r"^NSpid:.*?(\d+)$", status, re.MULTILINE)[1])


def open_world(where, disk, temporary):
    """Return the world of that name, or say why it cannot be had here and end."""
    if where == "local":
        return LocalWorld(disk, temporary)
    names = ("ray",) if where == "ray" else ("mpich", "openmpi")
    launchers = {"ray": "ray", "mpich": "mpirun", "openmpi": "mpirun"}
    prefixes = {
        name: Path(os.environ.get(f"{name.upper()}_PREFIX", REPOSITORY / f".venv-{name}")) for name in names
    }
    prefixes = {name: path for name, path in prefixes.items() if (path / "bin" / launchers[name]).exists()}
    if not prefixes:
        target = "ray-environment" if where == "ray" else "mpi-environments"
        sys.exit(f"there is no environment for {where}: run make {target}")
    return {"mpirun": MpirunWorld, "ray": RayWorld}[where](disk, temporary, prefixes)
