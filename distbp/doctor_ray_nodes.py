"""What the doctor makes of a Ray cluster's nodes: pure judgement, no messages.

A `Node` is what Ray says of it and what it says of itself.  Checks are nodes in, a `Verdict` out.  Bits are
compared between the nodes that give out processors, because only these have workers; a node without any, as
the head of many clusters, only has to understand what is sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distbp.backends.base import compare_values
from distbp.backends.ray_doctor import RayNode
from distbp.doctor import Verdict
from distbp.doctor_ranks import say_count, say_list, shortened
from distbp.doctor_witness import NodeFacts

__all__ = [
    "SHARE",
    "START_AGAIN",
    "Node",
    "judge_answers",
    "judge_calls",
    "judge_processors",
    "judge_shared",
    "judge_software",
    "judge_store",
    "judge_token",
]

SHARE = "distbp train --out DIR on a file system that all nodes share: home or scratch, not /tmp"
START_AGAIN = (
    "start every node with RAY_AUTH_MODE=token and the same token: ray get-auth-token --generate writes it "
    "to ~/.ray/auth_token; then chmod 600, copy it to all nodes, and name it in RAY_AUTH_TOKEN_PATH"
)
INSTALL = (
    "pip install the driver's distbp into the Python that runs Ray there, or let a job bring it: ray job "
    "submit with a --working-dir that holds the folder distbp, or with a runtime_env that installs it"
)
SPOKEN = ("python", "distbp", "ray")
"""Software that also a node without processors has to share."""


@dataclass(frozen=True)
class Node:
    """A node of the cluster, and its facts; None if it did not answer."""

    ray: RayNode
    facts: NodeFacts | None

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.ray.name

    def described(self) -> dict[str, Any]:
        """Return the node for the report, as JSON values."""
        facts = self.facts
        known = {} if facts is None else {name: getattr(facts, name) for name in facts.__struct_fields__}
        own = {"name": self.name, "address": self.ray.address, "cpus": self.ray.cpus}
        return own | {"driver": self.ray.drivers, "object_store": self.ray.store_bytes} | known


def judge_answers(nodes: Sequence[Node], silent: Mapping[str, str]) -> Verdict:
    """Say which nodes answered; `silent` says of each other one, by name, why it did not."""
    count = say_count(len(nodes), "node")
    if not silent:
        words = "the one node runs" if len(nodes) == 1 else f"all {count} run"
        return Verdict("ok", f"{words} an actor of distbp")
    without = [name for name, reason in silent.items() if "No module named 'distbp" in reason]
    others = [f"{name}: {reason}" for name, reason in silent.items() if name not in without]
    told = [f"distbp is missing, or another version, on {say_list(without)}"] if without else []
    told += [say_list(others, "; ")] if others else []
    cures = [INSTALL] if without else []
    cures += ["ray status, and the logs in /tmp/ray/session_latest/logs of that node"] if others else []
    # A node that gives out no processors gets no worker.
    needed = any(node.name in silent and (node.ray.cpus or node.ray.drivers) for node in nodes)
    finding = f"{len(silent)} of {count} cannot take part: {'; '.join(told)}"
    return Verdict("FAIL" if needed else "warn", finding, "; ".join(cures))


def judge_software(nodes: Sequence[Node]) -> Verdict:
    """Compare software and the bits of a product with those of the first node that gives out processors."""
    known = [(node, node.facts.software) for node in nodes if node.facts is not None]
    computing = [entry for entry in known if entry[0].ray.cpus >= 1]
    if not known:
        return Verdict("FAIL", "not compared: no node answered")
    first, wanted = (computing or known)[0]
    groups: dict[str, list[str]] = {}
    for node, software in known:
        keys = wanted.keys() | software.keys() if node.ray.cpus >= 1 else SPOKEN
        difference = compare_values(_part(wanted, keys), _part(software, keys))
        if difference:
            groups.setdefault(difference, []).append(node.name)
    if groups:
        told = [f"{say_list(names)}: {shortened(difference)}" for difference, names in groups.items()]
        finding = f"nodes differ from {first.name}, and training would refuse them: {say_list(told, '; ')}"
        return Verdict("FAIL", finding, _cure_difference(" ".join(groups)))
    blas = wanted["blas"]
    same = (
        f"Python {wanted['python']}, Ray {wanted['ray']}, distbp {wanted['distbp']}, "
        f"NumPy {wanted['numpy']}, {blas['name']} {blas['version']}, kernel {blas['kernel']}"
    )
    everybody = "the one node has" if len(known) == 1 else f"all {len(known)} nodes have"
    return Verdict("ok", f"{everybody} {same}; a matrix product has the same bits")


def _part(software: Mapping[str, Any], keys: Any) -> dict[str, Any]:
    return {key: software[key] for key in keys if key in software}


def _cure_difference(differences: str) -> str:
    """Return what makes nodes alike, by what differs."""
    if "blas.kernel" in differences:
        return "start ray on every node with OPENBLAS_CORETYPE=Haswell, or with what the oldest of them has"
    if "cpu_features" in differences:
        return "start ray on every node with NPY_DISABLE_CPU_FEATURES, naming what some of them lack"
    return "install the same Python, NumPy, Ray and distbp on every node, as one image or environment does"


def judge_processors(nodes: Sequence[Node]) -> Verdict:
    """Compare the processors that Ray gives out on each node with those that its processes may use."""
    total = sum(node.ray.cpus for node in nodes)
    if total < 1:
        finding = f"Ray gives out {total:g} processors on {say_count(len(nodes), 'node')}"
        return Verdict("FAIL", finding, "ray start --num-cpus N on the nodes that are to compute")
    crowded = [
        (node, node.facts) for node in nodes if node.facts is not None and node.ray.cpus > node.facts.usable
    ]
    if crowded:
        told = [
            f"{node.name}: Ray gives out {node.ray.cpus:g}, a worker may use {_usable(facts)}"
            for node, facts in crowded
        ]
        counts = say_list([f"--num-cpus {facts.usable} on {node.name}" for node, facts in crowded])
        return Verdict(
            "warn",
            f"{say_list(told, '; ')}: workers would take turns",
            f"ray start {counts}, or distbp train --nproc with fewer",
        )
    each = say_list([f"{node.name} {node.ray.cpus:g}" for node in nodes])
    return Verdict("ok", f"Ray gives out {total:g} ({each}), nowhere more than a worker may use")


def _usable(facts: NodeFacts) -> str:
    """Return how many of how many processors may be used, and the limit that says so."""
    quota = "" if facts.quota is None else f", and a cgroup grants the time of {facts.quota:g}"
    return f"{facts.usable} of {facts.present}{quota}"


def judge_store(nodes: Sequence[Node]) -> Verdict:
    """Say where Ray keeps objects: in memory, or, where /dev/shm is too small for them, on a disk."""
    known = [(node, node.facts) for node in nodes if node.facts is not None]
    on_disk = [
        f"{node.name}: in {facts.store_folder or 'a folder that Ray does not tell'}, since /dev/shm has "
        f"{gibibytes(facts.shm)} for {gibibytes(node.ray.store_bytes)} of objects"
        for node, facts in known
        if (facts.store_folder and not facts.store_folder.startswith("/dev/shm"))
        or (not facts.store_folder and facts.shm < node.ray.store_bytes)
    ]
    if on_disk:
        cure = (
            "a larger /dev/shm (docker run --shm-size 4g, in Kubernetes an emptyDir with medium: Memory), or "
            "ray start --object-store-memory BYTES below its size"
        )
        return Verdict("warn", f"Ray's objects lie on a disk: {say_list(on_disk, '; ')}", cure)
    least = min((node.ray.store_bytes for node, _ in known), default=0)
    return Verdict("ok", f"in /dev/shm, room for {gibibytes(least)} of objects on each node")


def gibibytes(size: int) -> str:
    """Return a size as '1.5 GiB', a small one as '64 MiB'."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{math.floor(size / 2**20)} MiB"


def judge_token(mode: str, trial: str, readable: Mapping[str, Sequence[str]], insecure: bool) -> Verdict:
    """Say whether the cluster asks for a token, and who else may read it.

    `mode` is RAY_AUTH_MODE, `trial` what came of trying without a token (`Admittance.outcome`), `readable`
    the files that others may read, by node.
    """
    if trial == "admitted" or mode != "token":
        finding = "the cluster asks nobody for a token, so whoever reaches it can run programs on its nodes"
        if insecure:
            return Verdict("warn", f"{finding}; its network was said to be trusted", START_AGAIN)
        return Verdict("FAIL", finding, f"{START_AGAIN}; or trust its network: --ray-insecure")
    if readable:
        which = [f"{path} on {name}" for name, paths in readable.items() for path in paths]
        paths = sorted({path for several in readable.values() for path in several})
        return Verdict(
            "warn", f"others may read the token: {say_list(which)}", f"chmod 600 {' '.join(paths)}"
        )
    if trial != "refused":
        finding = f"RAY_AUTH_MODE=token here; without a token the cluster was {trial}, so it may ask nobody"
        return Verdict("warn", finding, "look at RAY_AUTH_MODE of the processes on its head")
    return Verdict("ok", "the cluster refuses whoever has no token, and nobody else may read ours")


def judge_calls(unreached: Mapping[str, str], nodes: int, driver: str) -> Verdict:
    """Say which nodes did not get through to the driver, which listens at `driver`."""
    if unreached:
        told = say_list([f"{name}: {trouble}" for name, trouble in unreached.items()], "; ")
        cure = "let all TCP ports of the driver's host through from the nodes: workers connect with it"
        return Verdict("FAIL", f"{say_count(len(unreached), 'node')} did not reach the driver: {told}", cure)
    if nodes == 0:
        return Verdict("FAIL", "not tried: no node answered")
    who = "the one node reaches" if nodes == 1 else f"all {nodes} nodes reach"
    return Verdict("ok", f"{who} the driver at {driver}, and each proved to the other who it is")


def judge_shared(nodes: Sequence[Node], blind: Mapping[str, str], where: str, threads: int) -> Verdict:
    """Say which nodes cannot use the driver's folder `where`, and what follows; `blind` says why, by name.

    Worker 0 writes the checkpoints.  It is on the driver's node if that has a worker, of `threads`
    processors.  Nodes on which no worker has room need to see nothing.
    """
    if not nodes:
        return Verdict("FAIL", "not tried: no node answered")
    nodes = [node for node in nodes if node.ray.drivers or node.ray.cpus >= threads]
    blind = {node.name: blind[node.name] for node in nodes if node.name in blind}
    if not blind:
        if len(nodes) <= 1:
            return Verdict("ok", "one node: nothing needs to be shared")
        finding = f"all {len(nodes)} nodes read what the driver writes in {where}, and can write there"
        return Verdict("ok", finding)
    told = say_list([f"{name}: {reason}" for name, reason in blind.items()], "; ")
    found = f"what the driver writes in {where} is of no use to {told}"
    home = next((node for node in nodes if node.ray.drivers), None)
    if home is None or home.ray.cpus < threads or home.name in blind:
        follows = "worker 0 could be there, whose checkpoints would be lost: training refuses that"
        return Verdict("FAIL", f"{found}; {follows}", SHARE)
    follows = (
        f"distbp train needs a worker on {home.name}, and those elsewhere keep no log; distbp run refuses "
        "to start"
    )
    return Verdict("warn", f"{found}; {follows}", SHARE)
