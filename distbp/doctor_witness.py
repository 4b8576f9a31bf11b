"""What `distbp doctor` asks a node of a Ray cluster, answered there: each node gets an actor of one class.

It needs distbp on the node and nothing of Ray, so an actor that cannot start says what is missing there.
Arguments and answers are numbers, texts, lists and dicts.

Links are opened as a job opens them: over `wire.py`, at the address that leads to the driver, from both
sides, because a firewall may let through one side only.  What is then measured includes the checksums that
gradients travel with.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec

from distbp import __version__
from distbp.cgroups import cpu_quota
from distbp.doctor import examine
from distbp.doctor_folder import look_for
from distbp.doctor_links import Array, Link, measure_pair
from distbp.doctor_ranks import hash_of_a_product
from distbp.environment import available_cores, describe_environment, limit_threads
from distbp.errors import DistbpError, TransportError
from distbp.transports import wire
from distbp.transports.tcp import TCPTransport

__all__ = ["ELSEWHERE", "NodeFacts", "Witness", "token_files_of_this_process"]

ELSEWHERE = ("cores", "out", "/dev/shm", "mpi", "ray")
"""Checks of one machine that say nothing of a node, or that `doctor_ray.py` makes in its own way."""

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container sees how much memory it may use: cgroups v2 and v1."""


class NodeFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says of itself.

    `usable` of `present` processors may be used there; `quota` is what control groups grant.  `store_folder`
    is where Ray keeps objects, "" if it does not tell; `token_files` are those that others may read.  Sizes
    are in bytes.
    """

    usable: int
    present: int
    quota: float | None
    memory: int
    memory_free: int
    shm: int
    shm_free: int
    store_folder: str
    token_files: tuple[str, ...]
    software: dict[str, Any]


class Witness:
    """One node's answers; Ray serves calls one after the other."""

    def __init__(self) -> None:
        self._listener: wire.Listener | None = None
        self._key = b""

    def describe(self, threads: int) -> dict[str, Any]:
        """Return `NodeFacts`; the BLAS computes with `threads` threads, as a worker's does."""
        limits = limit_threads(threads)
        try:
            software = describe_environment() | {"product": hash_of_a_product()}
        finally:
            limits.restore_original_limits()
        shm = shutil.disk_usage("/dev/shm") if Path("/dev/shm").is_dir() else None
        memory, memory_free = _memory()
        facts = NodeFacts(
            usable=available_cores(),
            present=os.cpu_count() or 1,
            quota=cpu_quota(),
            memory=memory,
            memory_free=memory_free,
            shm=shm.total if shm else 0,
            shm_free=shm.free if shm else 0,
            store_folder=_store_folder(),
            token_files=tuple(token_files_of_this_process()),
            software=software | {"distbp": __version__, "ray": _version_of_ray()},
        )
        return dict(msgspec.to_builtins(facts))

    def examine(self, out: str) -> dict[str, dict[str, str]]:
        """Make the checks of one machine, and return each verdict's fields by the check's name."""
        # `check_arena` starts a process, which is to find distbp where this one did.
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        return {name: asdict(verdict) for name, verdict in examine(Path(out), without=ELSEWHERE).items()}

    def look_for(self, path: str, text: str) -> str:
        """Return why this node cannot use the folder of a file that the driver wrote; "" if it can."""
        return look_for(path, text)

    def call(self, driver: tuple[str, int], key: bytes, index: int, ray_address: str, wait_s: float) -> Any:
        """Connect with the driver, and listen for other nodes at the address that leads there.

        Return (address, trouble): where this node listens, which is None if it cannot, and why it did not
        reach the driver.  Without the driver it listens where Ray does.
        """
        self._key = key
        own, trouble = ray_address, ""
        try:
            connection = wire.connect(driver, key, {"role": "witness", "node": index}, wait_s)
            with socket.socket(fileno=os.dup(connection.fileno())) as same:
                own = same.getsockname()[0]
            connection.close()
        except DistbpError as error:
            trouble = _finding(error)
        try:
            self._listener = wire.Listener(own, key)
        except DistbpError as error:
            return None, trouble or _finding(error)
        return list(self._listener.address), trouble

    def exchange(
        self,
        me: int,
        names: tuple[str, str],
        partner: tuple[str, int],
        label: str,
        connect_s: float,
        pair_s: float,
    ) -> dict[str, Any]:
        """Meet another node, and measure the link: this node is `names[me]`, the other listens at `partner`.

        Return the `Link` as "link", and as "unreached" why this node did not get through to the other one.
        Each side connects once, within `connect_s`; all measurements have `pair_s`.
        """
        unreached, unheard, first = "", "", None
        for dialer in (1, 0):
            try:
                if dialer == me:
                    hello = {"role": "pair", "label": label, "dialer": me}
                    connection = wire.connect(partner, self._key, hello, connect_s)
                else:
                    connection = self._accept(label, dialer, names[dialer], connect_s)
            except DistbpError as error:
                if dialer == me:
                    unreached = f"{names[me]} does not reach {names[1 - me]}: {_finding(error)}"
                else:
                    unheard = _finding(error)
                continue
            if first is None:
                first = connection
            else:
                connection.close()
        if unreached or unheard or first is None:
            if first is not None:
                first.close()
            return {"link": msgspec.to_builtins(Link(names, error=unheard)), "unreached": unreached}
        return {"link": msgspec.to_builtins(_measure(first, me, names, pair_s)), "unreached": ""}

    def _accept(self, label: str, dialer: int, name: str, wait_s: float) -> wire.Connection:
        """Return the connection of the other member of a pair; late ones of other pairs are closed."""
        assert self._listener is not None, "a node without a listener is in no pair"
        until = time.monotonic() + wait_s
        while (left := until - time.monotonic()) > 0:
            connection = self._listener.accept(left)
            if connection is None:
                break
            if (connection.hello.get("label"), connection.hello.get("dialer")) == (label, dialer):
                return connection
            connection.close()
        raise TransportError(f"{name} did not connect within {wait_s:g} s")


def _finding(error: DistbpError) -> str:
    """Return what an error says has happened, without what it says to do about it in a running job."""
    return str(error).partition("; ")[0]


def _measure(connection: wire.Connection, me: int, names: Sequence[str], pair_s: float) -> Link:
    """Return what two nodes measure over a connection, which is closed afterwards."""
    until = time.monotonic() + pair_s

    def check() -> None:
        if time.monotonic() > until:
            raise TransportError(f"{names[me]} waited {pair_s:g} s for {names[1 - me]}")

    transport = TCPTransport({1 - me: connection}, me, 2, names=names, deadline_s=pair_s, check=check)

    def move(array: Array, forth: bool) -> None:
        transport.broadcast(array, 0 if forth else 1)

    try:
        return measure_pair((names[0], names[1]), move)
    finally:
        transport.close()


def token_files_of_this_process() -> list[str]:
    """Return the files from which Ray would read its token here and which others may read, too."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return []  # It wins over files; others cannot see the environment of a process.
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    try:
        readable = stat.S_IMODE(path.stat().st_mode) & (stat.S_IRWXG | stat.S_IRWXO)
    except OSError:
        return []
    return [str(path)] if readable else []


def _version_of_ray() -> str:
    """Return the version of the Ray that runs this process, "none" outside of one."""
    return str(getattr(sys.modules.get("ray"), "__version__", "none"))


def _memory() -> tuple[int, int]:
    """Return how many bytes of memory this node has, or its container may use, and how many are free."""
    rows = dict(line.split()[:2] for line in _read("/proc/meminfo").splitlines())
    total, free = (int(rows.get(name, 0)) << 10 for name in ("MemTotal:", "MemAvailable:"))
    limits = [int(text) for text in map(_read, CGROUP_LIMITS) if text.strip().isdigit()]
    total = min([total, *limits])
    return total, min(total, free)


def _store_folder() -> str:
    """Return where Ray's store of objects lies; Ray tells it to the process that started this one."""
    words = _read(f"/proc/{os.getppid()}/cmdline").split("\0")
    return next((word.partition("=")[2] for word in words if word.startswith("--plasma_directory=")), "")


def _read(path: str) -> str:
    """Return what the kernel says in a file, "" if there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""
