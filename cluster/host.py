"""Process 1 of an emulated host: makes the host a world of its own, then starts the commands it is asked for.

It is started by `cluster.emulated` through `unshare`, already inside new network, UTS, mount, IPC and process
namespaces, and sets up what a namespace leaves to its owner: hostname, /dev/shm, /tmp, /sys, /etc/hosts, and
the two numbers by which programs tell machines apart (boot id and machine id).  Then it listens on a unix
socket in the cluster's directory, which all hosts see: the part that sshd has on a real host.

One request is one connection (`cluster/agent.py` has the other end):

    asked    length (4 bytes, big-endian), JSON {argv, cwd, environment, tied}; with descriptors 0, 1, 2
    later    any number of bytes, each the number of a signal for the command
    answer   one line: "exit 3", "signal 9" or "error TEXT"

The descriptors are passed, not copied, so output of any size costs nothing and a closed pipe is seen at once.
A request that is `tied` ends with its connection; without, the command goes on, as under sshd without a
terminal.

The host ends when standard input does: its other end is held by whoever brought the cluster up, so that
nothing survives the owner, not even its SIGKILL.  When process 1 ends, the kernel ends every process of the
namespace and takes mounts and network links away: there is nothing to clean up, hence no code that does.

It runs as a plain script under `python -I -S`, without the package: a host has to start within milliseconds.
The switch between the hosts is the same program without the first half (`--switch`).

Tried and rejected: a real sshd (keys, configuration, and an account database per host), and `nsenter` from
outside (a process that was killed leaves its children behind, and hosts cannot call it for one another).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

MS_BIND, MS_REC = 4096, 16384  # From <sys/mount.h>.
REQUEST_TIMEOUT_S = 10.0
"""A client that connects and then says nothing must not stop the host for the others."""

BASE_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LANG": "C.UTF-8",
}
"""What a command gets that came without an environment: about what sshd gives it."""


@dataclass
class Job:
    """A command that runs, and the client that waits for it (None once the client is gone)."""

    process: subprocess.Popen[bytes]
    client: socket.socket | None
    tied: bool


def main() -> NoReturn:
    """Run as `host.py DIRECTORY NAME [--switch | SHARED...]`; say "ready" when commands can come."""
    directory, name, *rest = sys.argv[1:]
    # A test runner may ignore or block signals, and children inherit that: commands should start as from a
    # shell.
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    for number in (
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):
        signal.signal(number, signal.SIG_DFL)
    if rest != ["--switch"]:
        settle_in(Path(directory), name, rest)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{directory}/{name}.sock")
    listener.listen(64)
    print("ready", flush=True)
    os.dup2(2, 1)  # The reader of "ready" has gone; the log has not.
    extra = {"EMULATED_CLUSTER": directory, "EMULATED_CLUSTER_PYTHON": sys.executable}
    serve(listener, extra)


# ----- a world of its own


def settle_in(directory: Path, name: str, shared: list[str]) -> None:
    """Give this host its name and its own /tmp, /dev/shm, /sys and identity; keep `shared` as outside."""
    socket.sethostname(name)
    # What will be covered is opened first and bound again by its descriptor: its path leads elsewhere then.
    kept = {path: os.open(path, os.O_PATH) for path in [*shared, "/sys/fs/cgroup"] if os.path.exists(path)}
    mount("tmpfs", "/dev/shm", kind="tmpfs", options="mode=1777")
    if "/tmp" not in shared:
        mount("tmpfs", "/tmp", kind="tmpfs", options="mode=1777")
    mount("sysfs", "/sys", kind="sysfs")  # /sys/class/net shows the network of whoever mounted it.
    for path, descriptor in kept.items():
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            os.makedirs(path, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            open(path, "a").close()
        mount(f"/proc/self/fd/{descriptor}", path, flags=MS_BIND | MS_REC)
        os.close(descriptor)
    mount(str(directory / "hosts"), "/etc/hosts", flags=MS_BIND)
    boot_id = uuid.uuid4()
    replace("/proc/sys/kernel/random/boot_id", f"{boot_id}\n", directory / f"{name}.boot-id")
    replace("/etc/machine-id", f"{boot_id.hex}\n", directory / f"{name}.machine-id")


def mount(source: str, target: str, *, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount by the system call: mount(8) would resolve /proc/self/fd/N to the path that was just covered."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = libc.mount(
        source.encode(),
        target.encode(),
        kind.encode() or None,
        ctypes.c_ulong(flags),
        options.encode() or None,
    )
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot mount {source!r}: {os.strerror(number)}", target)


def replace(path: str, text: str, source: Path) -> None:
    """Let `path` read as `text` in this host; a system without that file stays without it."""
    if os.path.exists(path):
        source.write_text(text)
        mount(str(source), path, flags=MS_BIND)


# ----- commands


def serve(listener: socket.socket, extra: dict[str, str]) -> NoReturn:
    """Start what clients ask for, tell them how it ended, and reap; `extra` joins every environment."""
    wake_reader, wake_writer = socket.socketpair()
    wake_reader.setblocking(False)
    wake_writer.setblocking(False)
    signal.set_wakeup_fd(wake_writer.fileno(), warn_on_full_buffer=False)
    signal.signal(
        signal.SIGCHLD, lambda number, frame: None
    )  # Only to be woken; reaping is done in the loop.
    jobs: dict[int, Job] = {}
    while True:
        clients = {job.client: job for job in jobs.values() if job.client is not None}
        watched: list[int | socket.socket] = [0, listener, wake_reader, *clients]
        ready, _, _ = select.select(watched, [], [])
        if 0 in ready and not os.read(0, 1):
            os._exit(0)
        if wake_reader in ready:
            wake_reader.recv(4096)
        for client, job in clients.items():
            if client in ready:
                hear(job, client)
        reap(jobs)
        if listener in ready:
            accept(listener, jobs, extra)


def hear(job: Job, client: socket.socket) -> None:
    """Pass on the signals that a client sends; when it is gone, end the command if it is tied to it."""
    try:
        numbers = client.recv(64)
    except OSError:
        numbers = b""
    for number in numbers:
        if job.process.returncode is None:
            os.kill(job.process.pid, number)
    if not numbers:
        client.close()
        job.client = None
        if job.tied:
            os.killpg(job.process.pid, signal.SIGKILL)  # Not reaped yet, so the number is still its own.


def reap(jobs: dict[int, Job]) -> None:
    """Collect every process that ended, orphans included, and answer whoever waits for it."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        job = jobs.pop(pid, None)
        if job is None:
            continue
        code = job.process.returncode = os.waitstatus_to_exitcode(status)
        if job.client is not None:
            answer(job.client, f"exit {code}" if code >= 0 else f"signal {-code}")


def accept(listener: socket.socket, jobs: dict[int, Job], extra: dict[str, str]) -> None:
    """Take one request and start its command."""
    client, _ = listener.accept()
    client.settimeout(REQUEST_TIMEOUT_S)
    descriptors: list[int] = []
    try:
        head, descriptors, _, _ = socket.recv_fds(client, 4, 3)
        if len(head) < 4 or len(descriptors) < 3:
            client.close()  # It only wanted to know whether somebody listens.
            return
        request = json.loads(receive(client, int.from_bytes(head, "big")))
        environment = BASE_ENVIRONMENT if request["environment"] is None else request["environment"]
        process = subprocess.Popen(
            request["argv"],
            cwd=request["cwd"],
            env=environment | extra,
            stdin=descriptors[0],
            stdout=descriptors[1],
            stderr=descriptors[2],
            start_new_session=True,
        )
        jobs[process.pid] = Job(process, client, request["tied"])
    except (OSError, ValueError) as error:
        hint = (
            " (each host has a /tmp of its own: name what is shared below it)"
            if "/tmp/" in str(error)
            else ""
        )
        answer(client, f"error {error}{hint}")
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def receive(client: socket.socket, size: int) -> bytes:
    """Read exactly `size` bytes."""
    parts = bytearray()
    while len(parts) < size:
        part = client.recv(size - len(parts))
        if not part:
            raise ConnectionResetError(f"expected a request of {size} bytes, got {len(parts)}")
        parts += part
    return bytes(parts)


def answer(client: socket.socket, line: str) -> None:
    """Send the one line of the answer and hang up; a client that is gone needs none."""
    with contextlib.suppress(OSError):
        client.sendall(line.replace("\n", " ").encode() + b"\n")
    client.close()


if __name__ == "__main__":
    main()
