"""What the tests of the emulated cluster share: small programs for hosts, and looking for what is left.

Where a program has to be somewhere before a test goes on, it says so on a pipe; nothing sleeps.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path

from cluster import state

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
QUIET_BYTES = 20_000
"""What address resolution and the start of a connection may cost: far below any payload of these tests."""

RECEIVER = """
import select, socket, sys
num_senders = int(sys.argv[1]) if len(sys.argv) > 1 else 1
listener = socket.create_server(("", 5000))
print("listening", flush=True)
received = 0
connections = [listener.accept()[0] for _ in range(num_senders)]
while connections:
    for connection in select.select(connections, [], [])[0]:
        part = connection.recv(1 << 20)
        received += len(part)
        if not part:
            connections.remove(connection)
print(received, flush=True)
"""

SENDER = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5000), timeout=20)
connection.sendall(bytes(int(sys.argv[2])))
"""

CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 5000), timeout=0.5)
except OSError:
    sys.exit(9)
"""

SLEEPER = "import signal; print('here', flush=True); signal.pause()"


def python(code, *arguments):
    """The command line that runs `code`."""
    return [PYTHON, "-S", "-c", code, *map(str, arguments)]


def start_speaker(cluster, host, code, first_line, *arguments):
    """Start `code` in `host` and return when it has said `first_line`."""
    process = cluster.start(host, python(code, *arguments), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == f"{first_line}\n"
    return process


def ended(pids, timeout=20):
    """Whether all these processes end; waits for it."""
    poll = {}
    for pid in pids:
        try:
            poll[os.pidfd_open(pid)] = pid
        except ProcessLookupError:
            continue
    try:
        return all(select.select([descriptor], [], [], timeout)[0] for descriptor in poll)
    finally:
        for descriptor in poll:
            os.close(descriptor)


def everything_outside():
    """What of this process's clusters could be left on the machine; other people's clusters do not count."""
    links = sorted(os.listdir("/sys/class/net"))
    namespaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    touched = (str(state.ROOT), " /tmp ", " /dev/shm ", " /sys ", " /etc/", " /proc/")
    all_mounts = Path("/proc/self/mounts").read_text().splitlines()
    mounts = [line for line in all_mounts if any(part in line for part in touched)]
    directories = sorted(path.name for path in state.ROOT.glob(f"{os.getpid()}-*"))
    return links, namespaces, mounts, directories


def processes_of(name):
    """All processes of the machine that have the cluster's directory in their arguments or environment."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            text = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(state.ROOT / name).encode() in text:
            found.append(int(entry.name))
    return found
