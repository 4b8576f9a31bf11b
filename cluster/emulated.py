"""Several hosts on one machine, for tests of what happens between hosts.

    with EmulatedCluster(hosts=3, rate_mbit=1000) as cluster:
        cluster.run("host0", ["hostname"])
        cluster.run("host0", cluster.mpirun(["python", "train.py"], ranks=3, flavour="mpich"))
        cluster.cut("host2")

A host is a process (`cluster/host.py`) in network, UTS, mount, IPC and process namespaces of its own: it has
its own hostname, address, /dev/shm, /tmp and process numbers, and shares the rest of the file system with
everybody, as hosts of a real cluster share theirs.  Without the IPC namespace MPI libraries would talk
through shared memory and no test would notice; the byte counters of eth0 tell.

Whoever brings a cluster up owns it: when the owner ends, the cluster does, because its processes hold the
other end of a pipe of the owner's.  `EmulatedCluster.attach` finds a cluster that somebody else keeps up, as
`python -m cluster.emulated up` does.

What it does not know: MPI beyond the command line, and distbp.  Hosts share the machine's cores, so speeds of
computation mean nothing here; bytes and link rates do.  A host that is killed still says goodbye to its
peers, because the kernel closes its connections; for a power failure, `cut` it first.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster import mpi, network, state, wiring
from cluster.agent import Refused, connect
from cluster.errors import ClusterError
from cluster.requirements import what_is_missing

__all__ = ["ClusterError", "EmulatedCluster"]

HERE = Path(__file__).resolve().parent
ISOLATED = ("--net", "--uts", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc")
ADMIN_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where `unshare`, `ip` and `tc` are, whatever PATH a test runs with."""


class EmulatedCluster:
    """Hosts host0, host1, ... on one switch, up inside a `with` statement.

    `rate_mbit` limits every link, in each direction, to so many Mbit/s (10^6 bits).  `shared` are further
    paths below /tmp that all hosts should see; the working directory, the repository, this Python and the
    MPIs named by MPICH_PREFIX and OPENMPI_PREFIX are always shared.  `name` is for those who want
    to find the cluster again.
    """

    def __init__(
        self,
        hosts: int = 3,
        *,
        rate_mbit: float | None = None,
        name: str | None = None,
        shared: Iterable[str | Path] = (),
    ) -> None:
        if not 1 <= hosts <= network.MOST_HOSTS:
            raise ValueError(f"hosts: expected 1 to {network.MOST_HOSTS}, got {hosts!r}")
        if rate_mbit is not None and not rate_mbit > 0:
            raise ValueError(f"rate_mbit: expected a positive number or None, got {rate_mbit!r}")
        self.name = name or f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.addresses = {f"host{index}": network.address(index) for index in range(hosts)}
        self.directory = state.ROOT / self.name
        self._rate_mbit = rate_mbit
        self._shared = shared_paths(shared)
        self._lock: int | None = None
        self._lifeline: int | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._num_hostfiles = 0

    @property
    def hosts(self) -> list[str]:
        """The names of the hosts, also of those that were killed."""
        return list(self.addresses)

    # ----- up and down

    def __enter__(self) -> Self:
        if reason := what_is_missing():
            raise ClusterError(reason)
        try:
            self.directory, self._lock = state.claim(self.name)
        except FileExistsError as error:
            raise ClusterError(
                f"expected a name that is free, and cluster {self.name!r} is up already; "
                f"end it: python -m cluster.emulated down --name {self.name}"
            ) from error
        try:
            self._bring_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process of the cluster and remove its directory.  A cluster of somebody else's stays."""
        if self._lock is None:
            return
        for host in [*self.hosts, wiring.SWITCH]:
            with contextlib.suppress(Refused):
                state.end_process(state.listening_process(self.directory, host))
        if self._lifeline is not None:
            os.close(self._lifeline)  # Ends also what has not come as far as listening.
            self._lifeline = None
        for process in self._processes.values():
            process.wait(state.END_TIMEOUT_S)
        state.release(self.directory, self._lock)
        self._lock = None

    @classmethod
    def attach(cls, name: str) -> Self:
        """Return the cluster `name` that another process keeps up."""
        directory = state.ROOT / name
        if not state.is_owned(directory):
            raise ClusterError(
                f"expected a cluster {name!r} to be up, found none; "
                f"start one: python -m cluster.emulated up --name {name}"
            )
        record = json.loads((directory / "cluster.json").read_text())
        cluster = cls(len(record["addresses"]), rate_mbit=record["rate_mbit"], name=name)
        cluster._shared = record["shared"]
        return cluster

    def _bring_up(self) -> None:
        """Start switch and hosts, all at once because most of it is waiting, and join them."""
        (self.directory / "hosts").write_text(network.hosts_file(self.addresses))
        record = {
            "addresses": self.addresses,
            "rate_mbit": self._rate_mbit,
            "shared": self._shared,
            "owner": os.getpid(),
        }
        (self.directory / "cluster.json").write_text(json.dumps(record))
        lifeline_for_hosts, self._lifeline = os.pipe()
        try:
            starting = [self._launch(wiring.SWITCH, ["unshare", "--net"], ["--switch"], lifeline_for_hosts)]
            for host in self.hosts:
                starting.append(self._launch(host, ["unshare", *ISOLATED], self._shared, lifeline_for_hosts))
        finally:
            os.close(lifeline_for_hosts)
        for process in starting:
            self._await_ready(process)
        wiring.make_bridge(self.directory)
        for host, address in self.addresses.items():
            wiring.plug_in(self.directory, host, address, self._rate_mbit)

    def _launch(self, name: str, isolate: Sequence[str], arguments: Sequence[str], lifeline: int) -> str:
        """Start `cluster/host.py` as `name`; return the name."""
        daemon = [sys.executable, "-I", "-S", str(HERE / "host.py"), str(self.directory), name, *arguments]
        with (self.directory / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*isolate, "--", *daemon],
                cwd="/",
                env={"PATH": ADMIN_PATH, "LANG": "C.UTF-8"},
                stdin=lifeline,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the test, not for the hosts.
            )
        return name

    def _await_ready(self, name: str) -> None:
        """Wait until a host that was launched listens; a host that dies instead closes the pipe."""
        stream = self._processes[name].stdout
        assert stream is not None, f"{name} was launched without a pipe"
        with stream:
            if stream.readline() != b"ready\n":
                log = (self.directory / f"{name}.log").read_text().strip()
                raise ClusterError(f"expected {name} to start, and it ended; it said:\n{log}")

    # ----- what a host does

    def start(self, host: str, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Start a program in `host` and return a process that stands for it.

        `options` are those of `subprocess.Popen`.  Signals reach the program (SIGSTOP does not, SIGKILL ends
        both), and the stand-in ends the way the program did.  A host that is gone is exit code 255.  The
        environment, unless given, is this one without what only tests read (DISTBP_TEST_*).
        """
        options.setdefault("env", environment_for_hosts())
        return subprocess.Popen(self.client(host, argv), **options)

    def client(self, host: str, argv: Sequence[str | Path]) -> list[str]:
        """Return the command line of a process that stands for `argv` in `host`, as `start` uses it."""
        self._check(host)
        own = [sys.executable, "-I", "-S", str(HERE / "agent.py"), "--run", str(self.directory), host]
        return [*own, *map(str, argv)]

    def run(
        self,
        host: str,
        argv: Sequence[str | Path],
        *,
        timeout: float | None = 60.0,
        check: bool = False,
        **options: Any,
    ) -> subprocess.CompletedProcess[Any]:
        """Run a program in `host` to its end; by default both streams are captured as text.

        After `timeout` seconds the program is killed and `subprocess.TimeoutExpired` raised; `check` turns an
        exit code other than 0 into `subprocess.CalledProcessError`.
        """
        given = options.pop("input", None)
        defaults = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        defaults["stdin"] = subprocess.DEVNULL if given is None else subprocess.PIPE
        with self.start(host, argv, **(defaults | options)) as process:
            try:
                stdout, stderr = process.communicate(given, timeout=timeout)
            except BaseException:
                process.kill()
                raise
        result = subprocess.CompletedProcess(list(map(str, argv)), process.returncode, stdout, stderr)
        if check:
            result.check_returncode()
        return result

    def processes(self, host: str) -> dict[int, list[str]]:
        """Return what runs in `host`: process number as seen from outside -> its arguments."""
        return state.processes_beside(self._pid(host))

    def bytes_sent(self, host: str) -> int:
        """Return how many bytes the host has sent through eth0 since it started, headers included.

        The kernel cuts large packets late (segmentation offload), so many carry one header for up to 64 kB.
        """
        return self._counters(host)[8]

    def bytes_received(self, host: str) -> int:
        """Return how many bytes the host has received through eth0 since it started."""
        return self._counters(host)[0]

    def _counters(self, host: str) -> list[int]:
        """Return the row of eth0 in /proc/net/dev: 8 numbers of arrivals, 8 of departures; bytes first."""
        rows = Path(f"/proc/{self._pid(host)}/net/dev").read_text().splitlines()
        row = next(row for row in rows if row.strip().startswith("eth0:"))
        return [int(number) for number in row.partition(":")[2].split()]

    # ----- what happens to a host

    def kill(self, host: str) -> None:
        """End all processes of a host at once; return when the last one is gone.  A dead host stays dead."""
        self._check(host)
        with contextlib.suppress(Refused):
            state.end_process(state.listening_process(self.directory, host))
        # The kernel takes the link away some time later; a port that goes now is free for a restart.
        wiring.unplug(self.directory, host)

    def restart(self, host: str) -> None:
        """Start a host that was killed: same name, same address, empty /tmp and /dev/shm, counters at 0."""
        self._check(host)
        if self._lock is None or self._lifeline is None:
            raise ClusterError(
                f"expected the process that brought the cluster up to restart {host}, and this is another"
            )
        if self.is_alive(host):
            raise ClusterError(f"expected {host} to be dead, and it is alive; kill it first")
        self._processes.pop(host).wait(state.END_TIMEOUT_S)
        (self.directory / f"{host}.sock").unlink()
        lifeline = os.open(f"/proc/self/fd/{self._lifeline}", os.O_RDONLY)  # The other end of the same pipe.
        try:
            self._await_ready(self._launch(host, ["unshare", *ISOLATED], self._shared, lifeline))
        finally:
            os.close(lifeline)
        wiring.plug_in(self.directory, host, self.addresses[host], self._rate_mbit)

    def cut(self, host: str) -> None:
        """Unplug the host's cable at the switch: nothing arrives any more, and nobody is told."""
        self._check(host)
        wiring.set_link(self.directory, host, "down")

    def mend(self, host: str) -> None:
        """Plug the cable in again."""
        self._check(host)
        wiring.set_link(self.directory, host, "up")

    def is_alive(self, host: str) -> bool:
        """Return whether the host runs."""
        self._check(host)
        try:
            connect(self.directory, host).close()
        except Refused:
            return False
        return True

    # ----- MPI

    def hostfile(self, slots: Mapping[str, int] | None = None, *, flavour: str) -> Path:
        """Write a host file with so many `slots` on each host (default: 1 on every host), in that order."""
        slots = dict.fromkeys(self.hosts, 1) if slots is None else slots
        for host in slots:
            self._check(host)
        self._num_hostfiles += 1
        path = self.directory / f"hostfile-{os.getpid()}-{self._num_hostfiles}"
        path.write_text(mpi.hostfile_text(slots, flavour))
        return path

    def mpirun(
        self,
        argv: Sequence[str | Path],
        ranks: int,
        flavour: str,
        *,
        slots: Mapping[str, int] | None = None,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        prefix: Path | None = None,
    ) -> list[str]:
        """Return the command that starts `ranks` times `argv`; give it to `run` or `start` on any host.

        `flavour` is "mpich" or "openmpi", installed in `prefix` (default: where MPICH_PREFIX or
        OPENMPI_PREFIX points to).  `environment` reaches every rank; `options` go to the launcher.
        """
        prefix = prefix or mpi.find_prefix(flavour)
        if prefix is None:
            raise ClusterError(
                f"expected a prefix with bin/mpiexec of {flavour}, got none; "
                f"pass prefix=... or set {mpi.PREFIX_VARIABLES[flavour]}"
            )
        hostfile = self.hostfile(slots, flavour=flavour)
        return mpi.command(
            list(map(str, argv)), ranks=ranks, flavour=flavour, hostfile=hostfile, prefix=prefix,
            options=options, environment=environment,
        )  # fmt: skip

    # -----

    def _check(self, host: str) -> None:
        """Refuse names that are not hosts of this cluster."""
        if host not in self.addresses:
            raise ValueError(f"host: expected one of {', '.join(self.hosts)}, got {host!r}")

    def _pid(self, host: str) -> int:
        """Return the number of the host's process 1, as seen from outside."""
        self._check(host)
        try:
            return state.listening_process(self.directory, host)
        except Refused as error:
            raise ClusterError(f"expected {host} to be alive: {error}") from error


def environment_for_hosts() -> dict[str, str]:
    """Return this environment without the variables that tell tests what to use.

    distbp reads every DISTBP_ variable as a setting and would refuse them.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith("DISTBP_TEST_")}


def shared_paths(further: Iterable[str | Path]) -> list[str]:
    """Return the paths below /tmp that hosts must see although each has a /tmp of its own."""
    wanted = [Path.cwd(), HERE.parent, Path(sys.prefix), Path(sys.base_prefix), *map(Path, further)]
    wanted += [prefix for flavour in mpi.FLAVOURS if (prefix := mpi.find_prefix(flavour))]
    resolved = {path.resolve() for path in wanted}
    return sorted(str(path) for path in resolved if path.exists() and path.is_relative_to("/tmp"))


if __name__ == "__main__":
    from cluster.command import main

    sys.exit(main(sys.argv[1:]))
