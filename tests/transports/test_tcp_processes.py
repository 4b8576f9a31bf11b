"""The tcp transport between real processes, and between hosts of the emulated cluster whose cable is cut."""

from __future__ import annotations

import json
import secrets
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.transports.lanes import HERE

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "tests" / "transports" / "lane_member.py"


def told(process):
    """Return the next line of JSON that a member says."""
    line = process.stdout.readline()
    assert line, "expected a line, and the member has ended; its words are above"
    return json.loads(line)


def tell(process, what):
    """Say one line of JSON to a member."""
    process.stdin.write(json.dumps(what) + "\n")
    process.stdin.flush()


@contextmanager
def members(what, addresses, start=subprocess.Popen):
    """Processes of a lane, one at each address, when all are ready; none is left behind."""
    key = secrets.token_hex(32)
    processes = []
    try:
        for rank, address in enumerate(addresses):
            arguments = [sys.executable, PROGRAM, rank, len(addresses), address, what]
            environment = {"PYTHONPATH": str(REPOSITORY)}
            processes.append(
                start(
                    [str(argument) for argument in arguments],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
                )
            )  # fmt: skip
            tell(processes[-1], {"key": key})
        listening = [told(process)["address"] for process in processes]
        for process in processes:
            tell(process, listening)
        for process in processes:
            assert told(process) == {"ready": True}
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=30)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_exchange_the_same_bits(size):
    """Processes that know only addresses and key all end with the same bytes."""
    with members("exchange", [HERE] * size) as processes:
        results = [told(process)["result"] for process in processes]
    assert len(set(results)) == 1
    assert len(results[0]) == 64


def test_a_killed_process_is_named_at_once():
    """Whoever waits for a process that is killed hears of it at once, and which one it was."""
    with members("wait", [HERE] * 4) as processes:
        killed = time.monotonic()
        processes[1].kill()
        for rank in (0, 2, 3):
            said = told(processes[rank])
            assert said["error"] == "TransportError"
            assert "host1" in said["text"]
            assert "waited" not in said["text"]
            assert said["at"] - killed < 30.0  # Not at the deadline, which is 60 s.


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two emulated hosts with a link of 200 Mbit/s."""
    from cluster.emulated import EmulatedCluster
    from cluster.requirements import what_is_missing

    if reason := what_is_missing():
        pytest.skip(reason)
    with EmulatedCluster(2, rate_mbit=200, shared=[tmp_path_factory.getbasetemp()]) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_cut_link_is_noticed(hosts):
    """Both sides of a cut link know within some 15 s: idle, waiting, and with data on their way (A10)."""
    waiting = {"swap": "alltoall", "wait": "barrier", "listen": "connection"}
    found = {}
    with (
        members_on(hosts, "swap") as swapping,
        members_on(hosts, "wait") as in_a_barrier,
        members_on(hosts, "listen") as listening,
    ):
        time.sleep(1.0)
        hosts.cut("host1")
        cut = time.monotonic()
        for what, processes in zip(waiting, (swapping, in_a_barrier, listening), strict=True):
            # Member 1 of the barrier is asleep, and nobody asks it.
            for process in processes[:1] if what == "wait" else processes:
                said = told(process)
                found.setdefault(what, []).append((said["at"] - cut, said))
    hosts.mend("host1")
    for what, answers in found.items():
        for rank, (seconds, said) in enumerate(answers):
            print(f"{what}, host{rank}: after {seconds:.1f} s: {said['text']}")
            assert said["error"] == ("EOFError" if what == "listen" else "TransportError")
            assert waiting[what] in said["text"]
            assert 5.0 < seconds < 25.0
            if what != "listen":
                assert f"host{1 - rank}" in said["text"]


def members_on(hosts, what):
    """Start one member on each emulated host."""
    addresses = list(hosts.addresses.values())
    names = iter(hosts.hosts)
    return members(
        what, addresses, lambda arguments, **options: hosts.start(next(names), arguments, **options)
    )
