"""The Ray cluster that a job runs on: finding or starting it, asking what it has, and choosing the hosts.

With `RAY_ADDRESS` in the environment (`ray job submit` sets it) the job joins that cluster; without it a Ray
of its own is started on this machine, listens on the loopback alone, and ends with the job.

Ray waits for ever for processors that a cluster does not have, so it is asked first, and the answer names
what was asked and what is there.  Hosts are chosen here and not by Ray: as few nodes as hold the workers, and
those evenly, because the smallest host decides how many lanes there are.  Every host is one bundle of a
placement group; when a node dies, Ray looks for another one for its bundle, a spare one or the same again.

Whoever reaches a Ray cluster can run any program there (CVE-2023-48022).  So a driver without token
authentication is refused, unless `run.ray_insecure` says that the network is trusted.  The driver speaks for
the cluster: the actors of a driver with a token do not run on nodes without (`ray.py` says so then).  Whether
strangers get in is tried by `distbp doctor --backend ray`.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbp.environment import available_cores
from distbp.errors import AuthenticationError, EnvironmentMismatch
from distbp.terminal import say

__all__ = ["Host", "Node", "RayCluster", "choose_hosts"]

OLDEST_RAY = (2, 54)
"""Older versions run programs of whoever reaches their dashboard, tokens or not (CVE-2026-27482)."""

_PLACE_S = 30.0
_OWN = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Tells Ray that no second node will ever join; only then it listens on the loopback alone, on Linux too."""

_PIN = 0.001
"""Share of a node's own resource that ties a bundle to it."""


@dataclass(frozen=True)
class Node:
    """A living node of the cluster: its address, and how many processors Ray gives out there."""

    ip: str
    name: str
    cpus: int


@dataclass(frozen=True)
class Host:
    """A node that takes part: how many workers it has, and the node to which it is tied, if it is."""

    workers: int
    tied_to: str | None = None


def choose_hosts(workers: int, threads: int, nodes: Sequence[Node], driver_ip: str) -> list[Host]:
    """Return the hosts for `workers` workers of `threads` processors each: few, and evenly filled.

    The driver's own node comes first if it takes part: rank 0 writes the run directory that the driver holds.
    Raises `EnvironmentMismatch` if the cluster is too small.
    """
    able = [(node.cpus // threads, node.ip == driver_ip, node) for node in nodes if node.cpus >= threads]
    able.sort(key=lambda entry: (-entry[0], not entry[1]))
    chosen, room = [], 0
    for capacity, is_drivers, node in able:
        if room >= workers:
            break
        chosen.append((capacity, is_drivers, node))
        room += capacity
    if room < workers:
        has = ", ".join(f"{node.name} {node.cpus}" for node in nodes) or "none"
        raise EnvironmentMismatch(
            f"asked for {workers} workers x {threads} threads = {workers * threads} processors, the Ray "
            f"cluster can give {room * threads} ({has}); take --nproc {max(room, 1)}, or add nodes"
        )
    chosen.sort(key=lambda entry: not entry[1])
    shares = [0] * len(chosen)
    for _ in range(workers):
        host = min((h for h in range(len(chosen)) if shares[h] < chosen[h][0]), key=lambda h: (shares[h], h))
        shares[host] += 1
    return [
        Host(share, node.ip if is_drivers else None)
        for share, (_, is_drivers, node) in zip(shares, chosen, strict=True)
    ]


class RayCluster:
    """A connection to a Ray cluster; `close` ends it, and a cluster of our own with it; idempotent."""

    def __init__(self, ray: Any, *, own: bool) -> None:
        self.ray = ray
        self.own = own
        self.ip: str = ray.util.get_node_ip_address()
        self._group: Any = None

    @classmethod
    def connect(cls, cpus: int, *, insecure: bool) -> RayCluster:
        """Join the cluster that `RAY_ADDRESS` names, or start one of `cpus` processors on this machine."""
        address = os.environ.get("RAY_ADDRESS")
        if not address:
            _make_token()  # Ray reads its variables when it is imported.
            os.environ |= {name: os.environ.get(name, value) for name, value in _OWN.items()}
        ray = _import_ray()
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            _check_reachable(address)
            options["address"] = address
        else:
            options |= {
                "address": "local",
                "num_cpus": max(cpus, available_cores()),
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",
            }
        try:
            ray.init(**options)
        except Exception as error:
            raise EnvironmentMismatch(
                f"cannot {'join the Ray cluster at ' + address if address else 'start Ray'}: {error}; "
                + (
                    "ray status tells whether it runs"
                    if address
                    else "look into /tmp/ray/session_latest/logs"
                )
            ) from error
        cluster = cls(ray, own=not address)
        if os.environ.get("RAY_AUTH_MODE", "").lower() != "token" and not insecure:
            cluster.close()
            raise AuthenticationError(
                "this Ray cluster asks nobody for a token, so whoever reaches it can run programs on it; "
                "start its nodes with RAY_AUTH_MODE=token and the file that `ray get-auth-token --generate` "
                "makes, or say that its network is trusted: -o run.ray_insecure=true (distbp run: "
                "--ray-insecure)"
            )
        return cluster

    def nodes(self) -> list[Node]:
        """Return the living nodes."""
        return [
            Node(
                node["NodeManagerAddress"],
                node["NodeManagerHostname"],
                int(node["Resources"].get("CPU", 0)),
            )
            for node in self.ray.nodes()
            if node["Alive"]
        ]

    def place(self, hosts: Sequence[Host], threads: int) -> None:
        """Reserve the processors of all hosts; `EnvironmentMismatch` if others hold them for too long."""
        bundles = []
        for host in hosts:
            bundle: dict[str, float] = {"CPU": host.workers * threads}
            if host.tied_to is not None:
                bundle[f"node:{host.tied_to}"] = _PIN
            bundles.append(bundle)
        strategy = "STRICT_SPREAD" if len(hosts) > 1 else "STRICT_PACK"
        self._group = self.ray.util.placement_group(bundles, strategy=strategy)
        if not self._group.wait(_PLACE_S):
            free = self.ray.available_resources().get("CPU", 0)
            asked = sum(host.workers for host in hosts) * threads
            raise EnvironmentMismatch(
                f"waited {_PLACE_S:g} s for {asked} processors on {len(hosts)} nodes, but other jobs hold "
                f"them: {free:g} are free in the cluster; wait for those jobs, or take a smaller --nproc"
            )

    def start_actor(self, kind: type, host: int, cpus: int, **options: Any) -> Any:
        """Start an actor on a host; it waits for the host's node if that is gone."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=host)
        actor = self.ray.remote(num_cpus=cpus, max_restarts=0, scheduling_strategy=strategy, **options)
        return actor(kind).remote()

    def when_done(self, reference: Any, call: Callable[[BaseException | None], None]) -> None:
        """Call `call(error)`, on another thread, when the remote call behind `reference` has ended."""
        reference.future().add_done_callback(lambda future: call(future.exception()))

    def close(self) -> None:
        """Give back the processors and leave the cluster."""
        if self._group is not None:
            self.ray.util.remove_placement_group(self._group)
            self._group = None
        self.ray.shutdown()


def _import_ray() -> Any:
    """Import Ray; a missing or old one is named with its cure."""
    os.environ.setdefault(
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0"
    )  # It would announce a change of GPU rules.
    try:
        import ray
        import ray.util
    except ImportError as error:
        raise EnvironmentMismatch(
            f"backend 'ray' needs Ray: pip install 'ray[default]>=2.54' ({error})"
        ) from error
    version = tuple(int(part) for part in ray.__version__.split(".")[:2])
    if version < OLDEST_RAY:
        raise EnvironmentMismatch(
            f"backend 'ray' needs Ray {OLDEST_RAY[0]}.{OLDEST_RAY[1]} or newer, this is {ray.__version__}: "
            "pip install --upgrade ray"
        )
    return ray


def _make_token() -> None:
    """Turn token authentication on for a Ray of our own; only this user may read the token.

    Ray would make the file itself, readable for everybody.
    """
    if os.environ.get("RAY_AUTH_MODE"):
        return
    os.environ["RAY_AUTH_MODE"] = "token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        if path.stat().st_mode & 0o077:
            say(
                f"distbp: W_TOKEN_READABLE others may read Ray's token in {path}; chmod 600 {path}",
            )
        return
    except OSError as error:
        raise EnvironmentMismatch(
            f"cannot write Ray's token to {path}: {error.strerror}; name another file in RAY_AUTH_TOKEN_PATH"
        ) from error
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _check_reachable(address: str) -> None:
    """Say within seconds that nobody listens at a cluster's address; Ray itself would try for minutes."""
    import socket

    if address.startswith(("http://", "https://")):
        raise EnvironmentMismatch(
            f"RAY_ADDRESS {address} is where jobs are handed in; hand this one in: ray job submit "
            "--working-dir . -- distbp ..., or name the address of the head itself, HOST:6379 as a rule"
        )
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():  # "auto", or the ray:// form of a client: Ray knows better.
        return
    until = time.monotonic() + 10.0
    while True:
        try:
            socket.create_connection((host, int(port)), 2.0).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise EnvironmentMismatch(
                    f"nobody listens at RAY_ADDRESS {address} ({error}); start the cluster, or unset "
                    "RAY_ADDRESS to use this machine alone"
                ) from error
        time.sleep(0.5)
