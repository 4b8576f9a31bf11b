"""A real Ray cluster on emulated hosts: a head on the first one, a node on each of the others.

Each host's `ray start --block` runs in the host's own namespaces, with a /tmp and a /dev/shm of its own, so
nodes can be killed and added like machines.  The cluster asks for a token (0600, in the cluster's directory)
and looks after dead nodes more often than Ray does by default (`RAY_health_check_*`).

Needs an environment with Ray: `make ray-environment`.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.emulated import EmulatedCluster, environment_for_hosts
from cluster.errors import ClusterError

__all__ = ["RayNodes"]

PORT = 6379
DASHBOARD_PORT = 8265
_READY_S = 90.0

_AWAIT = """
import sys, time, ray
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
until = time.monotonic() + float(sys.argv[3])
while sum(node["Alive"] for node in ray.nodes()) != int(sys.argv[2]):
    if time.monotonic() > until:
        sys.exit(f"expected {sys.argv[2]} living nodes, found {ray.nodes()}")
    time.sleep(0.1)
"""


class RayNodes:
    """A Ray cluster on the hosts `cpus` names, with so many processors each; a context manager.

    `prefix` is the environment with Ray.  With `dashboard` jobs can be submitted to `dashboard_address`, from
    the head host.  Ending it ends what it started; the hosts stay.
    """

    def __init__(
        self, hosts: EmulatedCluster, prefix: Path, cpus: Mapping[str, int], *, dashboard: bool = False
    ) -> None:
        self._hosts = hosts
        self._prefix = prefix
        self._cpus = dict(cpus)
        self._dashboard = dashboard
        self._nodes: dict[str, subprocess.Popen[Any]] = {}
        self.head = next(iter(cpus))
        self.address = f"{hosts.addresses[self.head]}:{PORT}"
        self.dashboard_address = f"http://127.0.0.1:{DASHBOARD_PORT}"
        self._token = hosts.directory / f"ray-token-{secrets.token_hex(4)}"

    def __enter__(self) -> Self:
        descriptor = os.open(self._token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        try:
            for host in self._cpus:
                self.start(host)
            self.wait_for(len(self._cpus))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every node; idempotent."""
        for host in reversed(list(self._nodes)):
            node = self._nodes.pop(host)
            node.terminate()
            try:
                node.wait(20)
            except subprocess.TimeoutExpired:
                node.kill()
                node.wait(20)

    def environment(self) -> dict[str, str]:
        """Return the environment of drivers and nodes: where the cluster is, and the token."""
        return environment_for_hosts() | {
            "PATH": f"{self._prefix / 'bin'}:{os.environ['PATH']}",
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self._token),
            "RAY_health_check_initial_delay_ms": "1000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "1000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_USAGE_STATS_ENABLED": "0",
        }

    def start(self, host: str) -> None:
        """Start the node of a host, for the first time or again after the host was."""
        own = ["--node-ip-address", self._hosts.addresses[host], "--num-cpus", str(self._cpus[host])]
        own += ["--disable-usage-stats", "--block"]
        if host == self.head:
            own += ["--head", "--port", str(PORT), "--include-dashboard", str(self._dashboard).lower()]
        else:
            own += ["--address", self.address]
        environment = self.environment()
        del environment["RAY_ADDRESS"]
        if old := self._nodes.pop(host, None):
            old.kill()
            old.wait(20)
        with (self._hosts.directory / f"ray-{host}.log").open("ab") as log:
            self._nodes[host] = self._hosts.start(
                host,
                [self._prefix / "bin" / "ray", "start", *own],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_for(self, nodes: int) -> None:
        """Return when so many nodes live; `ClusterError` after a minute and a half."""
        script: list[str | Path] = [
            self._prefix / "bin" / "python",
            "-c",
            _AWAIT,
            self.address,
            str(nodes),
            str(_READY_S),
        ]
        done = self._hosts.run(self.head, script, env=self.environment(), timeout=2 * _READY_S)
        if done.returncode != 0:
            log = (self._hosts.directory / f"ray-{self.head}.log").read_text()
            raise ClusterError(f"expected {nodes} Ray nodes: {done.stderr[-2000:]}\n{log[-2000:]}")

    def start_driver(self, argv: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """Start a program on the head host that finds the cluster; options as for `EmulatedCluster.start`."""
        return self._hosts.start(self.head, argv, env=self.environment(), **options)

    def run_driver(self, argv: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[Any]:
        """Run a program on the head host to its end; options as for `EmulatedCluster.run`."""
        return self._hosts.run(self.head, argv, env=self.environment(), **options)
