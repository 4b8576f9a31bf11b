"""What `ip` and `tc` are told: the network of an emulated cluster as text, for `ip -batch` and `tc -batch`.

    host0 eth0 ══ host0 ┐
    host1 eth0 ══ host1 ┼ bridge       left: in the host's network namespace, right: in the switch's
    host2 eth0 ══ host2 ┘

Bridge and ports live in a namespace of their own, "the switch": the machine's network never sees them, so any
number of clusters use the same names and addresses at once, and none of them leads outside.

IPv6 addresses are not made on the links: their neighbour discovery would speak at moments of its own, and the
byte counters belong to the job.

Nothing here runs anything.  Delay and loss are missing: they need sch_netem, which not every kernel has.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = [
    "PREFIX_LENGTH",
    "address",
    "bridge_commands",
    "hosts_file",
    "interface_commands",
    "port_commands",
    "rate_commands",
]

NETWORK = "10.77.0."
FIRST_ADDRESS = 10
PREFIX_LENGTH = 24
MOST_HOSTS = 200
"""What fits above FIRST_ADDRESS; a machine that carries as many processes is hard to find anyway."""

BURST_S = 0.002
"""tbf refills by the clock: at 1 Gbit/s a smaller bucket than about 2 ms runs empty between two looks."""

SMALLEST_BURST_BYTES = 65536
"""One packet as the kernel hands it on (segmentation offload) should fit, else tbf cuts it up first."""

QUEUE_S = 0.02
"""How long a packet may wait in front of a link: 20 ms is about what a cheap switch can hold."""


def address(index: int) -> str:
    """Return the address of host number `index`."""
    assert 0 <= index < MOST_HOSTS, f"host {index} has no address"
    return f"{NETWORK}{FIRST_ADDRESS + index}"


def hosts_file(addresses: Mapping[str, str]) -> str:
    """Return /etc/hosts, the same for every host; a host's own name is its address, never 127.0.0.1."""
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    return "".join(f"{line}\n" for line in lines)


def bridge_commands() -> str:
    """Return the lines for `ip` in the switch that make its bridge.

    Without snooping it sends no queries of its own, which would be counted with the job's bytes.
    """
    return (
        "link add bridge type bridge mcast_snooping 0\nlink set bridge addrgenmode none\nlink set bridge up\n"
    )


def port_commands(host: str, pid: int) -> str:
    """Return the lines for `ip` in the switch that plug in `host`, whose process 1 is `pid` there."""
    return (
        f"link add {host} type veth peer name eth0 netns {pid}\n"
        f"link set {host} addrgenmode none\n"
        f"link set {host} master bridge\n"
        f"link set {host} up\n"
    )


def interface_commands(own_address: str) -> str:
    """Return the lines for `ip` in a host that give it its address."""
    return (
        "link set lo up\n"
        "link set eth0 addrgenmode none\n"
        f"address add {own_address}/{PREFIX_LENGTH} dev eth0\n"
        "link set eth0 up\n"
    )


def rate_commands(device: str, rate_mbit: float) -> str:
    """Return the line for `tc` that lets `device` send at most `rate_mbit` Mbit/s (10^6 bits)."""
    burst_bytes = max(SMALLEST_BURST_BYTES, round(rate_mbit * 1e6 / 8 * BURST_S))
    return (
        f"qdisc replace dev {device} root tbf rate {round(rate_mbit * 1e6)}bit "
        f"burst {burst_bytes} latency {QUEUE_S * 1000:g}ms\n"
    )
