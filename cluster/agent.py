"""Run one command in an emulated host: the client of `cluster/host.py`.

    agent.py [ssh options] HOST COMMAND...         as ssh would; MPI launchers call it by launch_agent.sh
    agent.py --run DIRECTORY HOST PROGRAM ARGS...  as subprocess would; `EmulatedCluster.start` calls it

As ssh: the command is one string for /bin/sh, starts in / with the environment of a fresh login, goes on
when the client is killed, and 255 means "no connection" or "ended by a signal".  The cluster's directory is
named by EMULATED_CLUSTER, which every process in a host has.

As subprocess: the program gets this process's arguments, directory and environment, signals are passed on,
the program dies with this process, and this process ends the way the program did, by the same signal if it
was one.

What is not emulated: the way there.  A unix socket leads to the host even when its link is cut, so a launcher
can still start something on a host that is cut off; what it starts cannot call home.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["Refused", "ask", "connect", "wait"]

PASSED_ON = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SSH_OPTIONS_WITH_VALUE = frozenset("BbcDEeFIiJLlmOopQRSWw")
NO_CONNECTION = 255


class Refused(Exception):
    """The host is not there, or could not start the command."""


def connect(directory: str | Path, host: str) -> socket.socket:
    """Open a connection to `host` of the cluster in `directory`; the caller closes it."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(f"{directory}/{host}.sock")
    except OSError as error:
        connection.close()
        raise Refused(
            f"expected an emulated host {host!r} of the cluster in {str(directory)!r}, and nobody answers "
            f"there ({error.strerror}); it may have been killed, or the name is wrong"
        ) from error
    return connection


def ask(
    connection: socket.socket,
    argv: Sequence[str],
    *,
    cwd: str = "/",
    environment: Mapping[str, str] | None = None,
    descriptors: Sequence[int] = (0, 1, 2),
    tied: bool = True,
) -> None:
    """Have `argv` started with `descriptors` as its standard streams.

    `environment` None is that of a fresh login.  `tied`: the command is killed when the connection closes.
    """
    request = {
        "argv": list(argv),
        "cwd": cwd,
        "environment": None if environment is None else dict(environment),
        "tied": tied,
    }
    body = json.dumps(request).encode()
    socket.send_fds(connection, [len(body).to_bytes(4, "big")], list(descriptors))
    connection.sendall(body)


def wait(connection: socket.socket) -> int:
    """Return how the command ended: its exit code, or minus the number of the signal that ended it."""
    received = b""
    while not received.endswith(b"\n"):
        try:
            part = connection.recv(4096)
        except ConnectionResetError:
            part = b""
        if not part:
            raise Refused("the emulated host ended before the command did")
        received += part
    kind, _, value = received.decode().strip().partition(" ")
    if kind == "error":
        raise Refused(f"the emulated host could not start the command: {value}")
    return int(value) if kind == "exit" else -int(value)


# ----- the two ways to call it


def main(arguments: list[str]) -> int:
    """Run what the command line says; return the exit code."""
    try:
        if arguments[:1] == ["--run"]:
            return run(*arguments[1:3], argv=arguments[3:])
        return ssh(arguments)
    except Refused as error:
        print(f"agent.py: {error}", file=sys.stderr)
        return NO_CONNECTION


def run(directory: str, host: str, *, argv: list[str]) -> int:
    """Run `argv` as if it were this process."""
    connection = connect(directory, host)
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: connection.send(bytes([number])))
    ask(connection, argv, cwd=os.getcwd(), environment=os.environ)
    code = wait(connection)
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # The program has left its own core file, if any.
        if -code not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    return code


def ssh(arguments: list[str]) -> int:
    """Run a command as ssh does."""
    host, command = parse_ssh(arguments)
    directory = os.environ.get("EMULATED_CLUSTER")
    if not directory or not host or not command:
        raise Refused(
            f"expected [ssh options] HOST COMMAND... inside an emulated host (EMULATED_CLUSTER set), "
            f"got {arguments!r} with EMULATED_CLUSTER={directory!r}"
        )
    connection = connect(directory, host)
    ask(connection, ["/bin/sh", "-c", " ".join(command)], tied=False)
    code = wait(connection)
    return code if code >= 0 else NO_CONNECTION


def parse_ssh(arguments: list[str]) -> tuple[str, list[str]]:
    """Return host and command, without the options that ssh understands and we do not need."""
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        option = rest.pop(0)
        if option == "--":
            break
        if option[-1] in SSH_OPTIONS_WITH_VALUE and len(option) == 2 and rest:
            rest.pop(0)
    host = rest.pop(0).rpartition("@")[2] if rest else ""
    return host, rest


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
