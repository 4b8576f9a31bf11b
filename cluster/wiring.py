"""Wire a running switch and running hosts together: has the lines of `cluster/network.py` carried out inside.

`ip` and `tc` are started in the host or switch that they configure, like any other command there.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cluster import network
from cluster.agent import ask, connect, wait
from cluster.errors import ClusterError
from cluster.state import listening_process

__all__ = ["SWITCH", "make_bridge", "plug_in", "set_link", "unplug"]

SWITCH = "switch"


def make_bridge(directory: Path) -> None:
    """Make the bridge in the switch."""
    configure(directory, SWITCH, "ip", network.bridge_commands())


def plug_in(directory: Path, host: str, address: str, rate_mbit: float | None) -> None:
    """Join `host` with the switch, give it its address, and limit its link in both directions."""
    pid = listening_process(directory, host)
    configure(directory, SWITCH, "ip", network.port_commands(host, pid))
    configure(directory, host, "ip", network.interface_commands(address))
    if rate_mbit is not None:
        configure(directory, host, "tc", network.rate_commands("eth0", rate_mbit))
        configure(directory, SWITCH, "tc", network.rate_commands(host, rate_mbit))


def set_link(directory: Path, host: str, state: str) -> None:
    """Set the switch's port of `host` "up" or "down"; the host sees the carrier go, not its own address."""
    configure(directory, SWITCH, "ip", f"link set {host} {state}\n")


def unplug(directory: Path, host: str) -> None:
    """Remove the port of a host that is dead; the kernel may have been faster."""
    with contextlib.suppress(ClusterError):
        configure(directory, SWITCH, "ip", f"link delete {host}\n")


def configure(directory: Path, where: str, program: str, lines: str) -> None:
    """Run lines of `ip` or `tc` in a host or the switch; one that fails is a `ClusterError`."""
    with memory_file(lines) as text, memory_file("") as output, connect(directory, where) as connection:
        ask(connection, [program, "-batch", "-"], descriptors=(text, output, output))
        if wait(connection) != 0:
            said = os.pread(output, 4096, 0).decode().strip()
            raise ClusterError(f"expected {program} to accept, in {where}:\n{lines}and it said: {said}")


@contextlib.contextmanager
def memory_file(text: str) -> Iterator[int]:
    """Yield the descriptor of a file in memory that holds `text`."""
    descriptor = os.memfd_create("cluster")
    try:
        os.pwrite(descriptor, text.encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)
