"""The command line of the emulated cluster: `python -m cluster.emulated up|down|status|exec|...`.

A cluster lives as long as its owner, so `up` leaves a process behind that owns it and waits; `down` asks that
process to end.  All other commands look the cluster up by its name, do one thing, and are gone.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

from cluster import state
from cluster.emulated import HERE, EmulatedCluster, environment_for_hosts
from cluster.errors import ClusterError

__all__ = ["main"]

DEFAULT_NAME = "default"


def main(arguments: Sequence[str]) -> int:
    """Run one command; return its exit code: 0 done, 1 it failed, 2 usage, that of the program for `exec`."""
    options = parser().parse_args(arguments)
    try:
        return int(COMMANDS[options.command](options))
    except (ClusterError, ValueError) as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    top = argparse.ArgumentParser(prog="python -m cluster.emulated", description=__doc__.partition("\n")[0])
    commands = top.add_subparsers(dest="command", required=True)

    def add(name: str, description: str, *, with_host: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("--name", default=DEFAULT_NAME, help="which cluster (default: %(default)s)")
        if with_host:
            command.add_argument("host", help="host0, host1, ...")
        return command

    for name, description in {
        "up": "start a cluster that stays until `down`",
        "hold": "the same, and own it: stays until SIGTERM, Ctrl-C, or the end of this process",
    }.items():
        command = add(name, description)
        command.add_argument("--hosts", type=int, default=3, help="how many (default: %(default)s)")
        command.add_argument("--rate-mbit", type=float, help="limit of every link, Mbit/s (default: none)")
        command.add_argument(
            "--shared", action="append", default=[], help="a path below /tmp that all hosts see"
        )
    add("down", "end the cluster")
    add("status", "hosts, addresses, whether they live, and bytes through eth0")
    command = add("exec", "run a program in a host", with_host=True)
    command.add_argument("argv", nargs=argparse.REMAINDER, metavar="PROGRAM ARGS...")
    add("kill", "end all processes of a host at once", with_host=True)
    add("cut", "unplug a host's cable", with_host=True)
    add("mend", "plug it in again", with_host=True)
    return top


# ----- the commands


def up(options: argparse.Namespace) -> int:
    """Leave a `hold` behind, and return when the cluster is ready or could not be."""
    argv = [
        sys.executable,
        "-m",
        "cluster.emulated",
        "hold",
        "--name",
        options.name,
        "--hosts",
        str(options.hosts),
    ]
    argv += [] if options.rate_mbit is None else ["--rate-mbit", str(options.rate_mbit)]
    argv += [word for path in [os.getcwd(), *options.shared] for word in ("--shared", path)]
    holder = subprocess.Popen(
        argv,
        cwd=HERE.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert holder.stdout is not None
    assert holder.stderr is not None
    said = holder.stdout.readline()
    if not said:
        print(holder.stderr.read(), end="", file=sys.stderr)
        return holder.wait()
    print(said, end="")
    return 0


def hold(options: argparse.Namespace) -> int:
    """Own a cluster until a signal comes."""
    ends = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    with EmulatedCluster(
        options.hosts, rate_mbit=options.rate_mbit, name=options.name, shared=options.shared
    ) as cluster:
        names = f"{cluster.hosts[0]} to {cluster.hosts[-1]}" if len(cluster.hosts) > 1 else cluster.hosts[0]
        print(f"cluster {cluster.name!r} is up: {names}; state in {cluster.directory}", flush=True)
        nowhere = os.open(os.devnull, os.O_RDWR)  # Whoever read the line above may be gone.
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        signal.sigwait(ends)
    return 0


def down(options: argparse.Namespace) -> int:
    """End the owner, and with it the cluster; also what an owner left that was killed."""
    for name in state.sweep():
        print(f"removed what was left of cluster {name!r}")
    directory = state.ROOT / options.name
    if not state.is_owned(directory):
        print(f"no cluster {options.name!r} is up")
        return 0
    owner = json.loads((directory / "cluster.json").read_text())["owner"]
    state.end_process(owner, signal.SIGTERM)
    print(f"cluster {options.name!r} is down")
    return 0


def status(options: argparse.Namespace) -> int:
    """Print one line a host."""
    cluster = EmulatedCluster.attach(options.name)
    for host, address in cluster.addresses.items():
        if cluster.is_alive(host):
            sent, received = cluster.bytes_sent(host), cluster.bytes_received(host)
            print(f"{host}  {address}  alive  sent {sent:,} bytes, received {received:,}")
        else:
            print(f"{host}  {address}  dead")
    return 0


def execute(options: argparse.Namespace) -> NoReturn:
    """Become the client of a program in a host."""
    argv = options.argv[1:] if options.argv[:1] == ["--"] else options.argv
    if not argv:
        raise ClusterError("exec: expected a program after the host, got none; a shell: exec host0 bash")
    client = EmulatedCluster.attach(options.name).client(options.host, argv)
    os.execve(client[0], client, environment_for_hosts())


def kill(options: argparse.Namespace) -> int:
    """Kill a host."""
    EmulatedCluster.attach(options.name).kill(options.host)
    return 0


def cut(options: argparse.Namespace) -> int:
    """Cut a link."""
    EmulatedCluster.attach(options.name).cut(options.host)
    return 0


def mend(options: argparse.Namespace) -> int:
    """Mend a link."""
    EmulatedCluster.attach(options.name).mend(options.host)
    return 0


COMMANDS = {
    "up": up,
    "hold": hold,
    "down": down,
    "status": status,
    "exec": execute,
    "kill": kill,
    "cut": cut,
    "mend": mend,
}
