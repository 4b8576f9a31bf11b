"""How `distbp doctor` speaks with every node of a Ray cluster: an actor on each, and answers with deadlines.

The actors take no processors, so they run beside the jobs of others, also where nothing is free.  Each is
tied to its node by the node's number and not by `node:ADDRESS`, which several Ray nodes on one machine share;
and Ray says at once when a node of that number is gone, while it would wait for ever for its address.

A node that does not answer in time, or whose actor cannot start, is a result and not an error: it is what the
doctor was asked for.  It is not asked again, so that one sick node costs one deadline and not one for each
question.  Nothing is known here of checks; `doctor_ray.py` asks the questions, `doctor_witness.py` answers.

Whether a cluster asks for a token is tried from a process that has none: a driver with a token learns nothing
about it.  Ray itself tries for 20 s to join with a wrong token and then does not say why; the trial does.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from distbp.backends.ray_cluster import RayCluster

__all__ = ["Admittance", "RayNode", "RayWitnesses", "takes_connections"]


@dataclass(frozen=True)
class RayNode:
    """A living node as Ray describes it: `cpus` processors and `store_bytes` of objects are given out there.

    `name` is the host's, with the address if two nodes have the same; `drivers` is this process's own node.
    """

    number: str
    name: str
    address: str
    cpus: float
    store_bytes: int
    drivers: bool


class RayWitnesses:
    """An actor of class `kind` on every living node; a context manager that ends them.

    `nodes[i]` is where witness i is, the driver's own node first.  `silent[i]` says why node i is not asked
    any more.
    """

    def __init__(self, cluster: RayCluster, kind: type) -> None:
        self._cluster = cluster
        self._kind = kind
        self._actors: list[Any] = []
        self.nodes = _living_nodes(cluster)
        self.silent: dict[int, str] = {}

    def __enter__(self) -> RayWitnesses:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        for node in self.nodes:
            strategy = NodeAffinitySchedulingStrategy(node.number, soft=False)
            options = self._cluster.ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=strategy)
            self._actors.append(options(self._kind).remote())
        return self

    def __exit__(self, *failure: object) -> None:
        """End all actors; idempotent."""
        while self._actors:
            with suppress(Exception):  # The cluster itself may be gone.
                self._cluster.ray.kill(self._actors.pop(), no_restart=True)

    def ask_all(self, method: str, *arguments: Any, timeout_s: float) -> dict[int, Any]:
        """Call a method of every witness with the same arguments; return the answers by node."""
        return self.ask(method, dict.fromkeys(range(len(self.nodes)), arguments), timeout_s)

    def ask(self, method: str, arguments: Mapping[int, Sequence[Any]], timeout_s: float) -> dict[int, Any]:
        """Call a method of the witnesses `arguments` names, all at once; return the answers by node.

        Whoever gives none within `timeout_s` seconds is from then on `silent`.
        """
        ray = self._cluster.ray
        asked = {
            getattr(self._actors[index], method).remote(*words): index
            for index, words in arguments.items()
            if index not in self.silent
        }
        if not asked:
            return {}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=timeout_s)
        told = {}
        for reference, index in asked.items():
            if reference not in ready:
                self.silent[index] = f"gave no answer within {timeout_s:g} s, asked to {method}"
                continue
            try:
                told[index] = ray.get(reference, timeout=timeout_s)
            except Exception as error:  # Ray's own, and whatever the method raised.
                self.silent[index] = _last_line(error)
        return told


class Admittance:
    """A trial whether the cluster at `address` lets us in, with the token of this process or without.

    It runs in a process of its own, since Ray reads its variables once.  Starting it does not wait.
    """

    def __init__(self, address: str, *, with_token: bool) -> None:
        environment = dict(os.environ)
        if not with_token:
            for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
                environment.pop(name, None)
            environment["RAY_AUTH_MODE"] = "disabled"
        self._process = subprocess.Popen(
            [sys.executable, "-c", _TRY, address],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # Ray tells its retries there.
            text=True,
        )

    def outcome(self, timeout_s: float) -> str:
        """Return "admitted", "refused", "silent" after `timeout_s`, or why it could not be tried."""
        try:
            said = self._process.communicate(timeout=timeout_s)[0].strip()
        except subprocess.TimeoutExpired:
            self.close()
            return "silent"
        return said.rpartition("\n")[2] or f"the trial ended with {self._process.returncode}"

    def close(self) -> None:
        """End the trial; idempotent."""
        self._process.kill()
        self._process.communicate()


# Joining as a driver would leave a job in the cluster's records; this client of Ray's only says hello.
_TRY = """
import sys
try:
    from ray._raylet import GcsClient
except Exception as error:
    print(f"this Ray cannot try it ({type(error).__name__})")
    sys.exit()
try:
    GcsClient(address=sys.argv[1])
    print("admitted")
except Exception as error:
    refused = "Authentication" in type(error).__name__ or "token" in str(error).lower()
    print("refused" if refused else f"{type(error).__name__}: {error}".splitlines()[0])
"""


def takes_connections(address: str, timeout_s: float) -> bool:
    """Return whether somebody listens at HOST:PORT; False also for addresses of another form."""
    host, separator, port = address.rpartition(":")
    if not separator or not port.isdigit():
        return False
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout_s).close()
    except OSError:
        return False
    return True


def _living_nodes(cluster: RayCluster) -> list[RayNode]:
    """Return the living nodes, the driver's own first, then by address."""
    own = cluster.ray.get_runtime_context().get_node_id()
    living = [node for node in cluster.ray.nodes() if node["Alive"]]
    hosts = [node["NodeManagerHostname"] for node in living]
    nodes = []
    for node, host in zip(living, hosts, strict=True):
        address, resources = node["NodeManagerAddress"], node["Resources"]
        nodes.append(
            RayNode(
                number=node["NodeID"],
                name=host if hosts.count(host) == 1 else f"{host} ({address})",
                address=address,
                cpus=float(resources.get("CPU", 0)),
                store_bytes=int(resources.get("object_store_memory", 0)),
                drivers=node["NodeID"] == own,
            )
        )
    return sorted(nodes, key=lambda node: (not node.drivers, _numeric(node.address), node.name))


def _numeric(address: str) -> list[tuple[int, str]]:
    """Return a key that sorts 10.0.0.9 before 10.0.0.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in address.split(".")]


def _last_line(error: BaseException) -> str:
    """Return the last line of an error that came through Ray, which is the one that was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
