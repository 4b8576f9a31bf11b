"""Directories of emulated clusters: one each below /run/distbp-cluster, locked as long as its owner lives.

A directory holds the hosts' sockets, logs and /etc/hosts, and `cluster.json`.  It is the only thing of a
cluster that has a name outside it: everything else belongs to its processes and ends with them.

The owner holds a lock on the file `owner`.  The kernel lets it go when the owner ends, however that happens,
so a directory without a lock is stale, and `sweep` may remove it; whatever still listens on the sockets in
it is ended first.  Numbers of hosts' processes are never read from a file, where they grow old: the kernel
names the process behind a socket (SO_PEERCRED).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import shutil
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from cluster.agent import Refused, connect

__all__ = [
    "ROOT",
    "claim",
    "end_process",
    "is_owned",
    "listening_process",
    "processes_beside",
    "release",
    "sweep",
]

ROOT = Path("/run/distbp-cluster")
END_TIMEOUT_S = 20.0


def claim(name: str) -> tuple[Path, int]:
    """Make the directory of a new cluster; return it and the descriptor of its lock.

    Stale directories are removed first.  A name that is in use is a `FileExistsError`.
    """
    ROOT.mkdir(mode=0o700, exist_ok=True)
    with _alone():
        _sweep()
        directory = ROOT / name
        directory.mkdir(mode=0o700)
        lock = os.open(directory / "owner", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)  # Waits at most for an `is_owned` that looks just now.
    return directory, lock


def release(directory: Path, lock: int) -> None:
    """Remove the directory of a cluster that has ended."""
    shutil.rmtree(directory, ignore_errors=True)
    os.close(lock)


def sweep() -> list[str]:
    """End what is left of clusters whose owner is gone; return their names."""
    if not ROOT.exists():
        return []
    with _alone():
        return _sweep()


def _sweep() -> list[str]:
    """Do the work of `sweep` while no other process claims or sweeps."""
    stale = [path for path in ROOT.iterdir() if path.is_dir() and not is_owned(path)]
    for directory in stale:
        for path in directory.glob("*.sock"):
            with contextlib.suppress(Refused):
                end_process(listening_process(directory, path.stem))
        shutil.rmtree(directory, ignore_errors=True)
    return sorted(path.name for path in stale)


def is_owned(directory: Path) -> bool:
    """Return whether the owner of the cluster in `directory` is alive."""
    try:
        descriptor = os.open(directory / "owner", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Hold the one lock under which directories come and go."""
    descriptor = os.open(ROOT / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ----- processes


def listening_process(directory: Path, host: str) -> int:
    """Return the number of process 1 of `host`, as it is called outside; `Refused` when it is dead."""
    with connect(directory, host) as connection:
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid, _, _ = struct.unpack("3i", credentials)
    assert pid > 0, f"the process behind {host} is in a process namespace that cannot be seen from here"
    return int(pid)


def processes_beside(first: int) -> dict[int, list[str]]:
    """Return number and arguments of all processes in the process namespace of `first`, without `first`."""
    namespace = os.readlink(f"/proc/{first}/ns/pid")
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == first:
            continue
        with contextlib.suppress(OSError):  # It ended while we looked.
            arguments = (entry / "cmdline").read_bytes()
            if arguments and os.readlink(entry / "ns" / "pid") == namespace:  # Zombies have no arguments.
                found[int(entry.name)] = arguments.decode(errors="replace").rstrip("\0").split("\0")
    return found


def end_process(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal and wait until the process has ended.

    For process 1 of a host that is when every process of the host has ended: the kernel waits for them.
    """
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(descriptor, number)
        if not select.select([descriptor], [], [], END_TIMEOUT_S)[0]:
            raise TimeoutError(
                f"process {pid} of an emulated cluster got signal {number} and has not ended after "
                f"{END_TIMEOUT_S:g} s; look at it: cat /proc/{pid}/stack"
            )
    finally:
        os.close(descriptor)
