"""What `distbp doctor --backend ray` makes of nodes, links and folders; tests/ray/ has the real clusters."""

from __future__ import annotations

import importlib.util
import json
import secrets
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbp import doctor_upload
from distbp.backends.ray_doctor import RayNode
from distbp.doctor_links import MOST_HOSTS_IN_PAIRS, Link
from distbp.doctor_ray_links import judge_pairs
from distbp.doctor_ray_nodes import (
    Node,
    judge_answers,
    judge_calls,
    judge_processors,
    judge_shared,
    judge_software,
    judge_store,
    judge_token,
)
from distbp.doctor_upload import judge_upload, sizes_to_send
from distbp.doctor_witness import NodeFacts, Witness
from distbp.transports import wire
from distbp.transports.handshake import KEY_BYTES

from .command_line import distbp

SOFTWARE = {
    "python": "3.12.1", "numpy": "2.1.0", "ray": "2.60.0", "distbp": "0.1.0", "product": "a1",
    "blas": {"name": "openblas", "version": "0.3.27", "kernel": "Haswell", "threads": 1},
}  # fmt: skip


def node(name: str, cpus: float = 4, *, driver: bool = False, answered: bool = True, **facts: object) -> Node:
    """Return a node with 4 usable processors and 1 GiB of objects in /dev/shm."""
    software = SOFTWARE | dict(facts.pop("software", {}))  # type: ignore[call-overload]
    known: dict[str, Any] = {
        "usable": 4, "present": 8, "quota": None, "memory": 1 << 34, "memory_free": 1 << 33, "shm": 1 << 31,
        "shm_free": 1 << 31, "store_folder": "/dev/shm", "token_files": (), "software": software,
    }  # fmt: skip
    ray = RayNode(name, name, f"10.0.0.{ord(name[-1])}", cpus, 1 << 30, driver)
    return Node(ray, NodeFacts(**(known | facts)) if answered else None)


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed here")
def test_without_ray_the_doctor_says_so(tmp_path: Path) -> None:
    """Where Ray is missing the line `ray` fails with the cure, and this machine is examined all the same."""
    done = distbp("doctor", "--backend", "ray", cwd=tmp_path)
    assert done.returncode == 78
    assert "FAIL  ray" in done.stdout
    assert "cure: pip install 'ray[default]>=2.54'" in done.stdout
    assert "ok    arena" in done.stdout


@pytest.mark.parametrize(
    ("nodes", "status", "words"),
    [
        ([node("a"), node("b", 2)], "ok", "Ray gives out 6 (a 4, b 2)"),
        ([node("a"), node("b", 8)], "warn", "b: Ray gives out 8, a worker may use 4 of 8"),
        ([node("a", usable=2, quota=1.5)], "warn", "may use 2 of 8, and a cgroup grants the time of 1.5"),
        ([node("a", 0)], "FAIL", "gives out 0 processors on 1 node"),
        ([node("a", 64, answered=False), node("b")], "ok", "Ray gives out 68"),
    ],
)  # fmt: skip
def test_processors_are_compared_with_those_that_ray_gives_out(
    nodes: list[Node], status: str, words: str
) -> None:
    """A node that gives out more than a worker may use is named with its --num-cpus; none at all fails."""
    verdict = judge_processors(nodes)
    assert verdict.status == status
    assert words in verdict.finding
    assert ("--num-cpus" in verdict.cure) is (status != "ok")


def test_a_difference_of_software_is_named() -> None:
    """A node with another BLAS kernel or other bits fails by name; the rest are the same."""
    other = {
        "blas": {"name": "openblas", "version": "0.3.27", "kernel": "Zen", "threads": 1},
        "product": "b2",
    }
    verdict = judge_software([node("a"), node("b"), node("c", software=other)])
    assert verdict.status == "FAIL"
    assert "differ from a" in verdict.finding
    assert "c: blas.kernel 'Haswell' and 'Zen'" in verdict.finding
    assert "OPENBLAS_CORETYPE" in verdict.cure
    assert judge_software([node("a"), node("b")]).status == "ok"


def test_a_head_without_processors_may_have_another_cpu() -> None:
    """Bits are compared between nodes with processors; the others only need the same software to talk."""
    head = node("h", 0, driver=True, software={"product": "b2", "numpy": "2.0.0"})
    assert judge_software([head, node("a"), node("b")]).status == "ok"
    old = node("h", 0, driver=True, software={"distbp": "0.0.9"})
    verdict = judge_software([old, node("a"), node("b")])
    assert verdict.status == "FAIL"
    assert "h: distbp '0.1.0' and '0.0.9'" in verdict.finding


def test_a_store_on_disk_is_named() -> None:
    """Ray's objects outside of /dev/shm are a warning, also where only the sizes tell."""
    assert judge_store([node("a"), node("b")]).status == "ok"
    for facts in ({"store_folder": "/tmp/ray"}, {"store_folder": "", "shm": 64 << 20}):
        verdict = judge_store([node("a"), node("b", **facts)])
        assert verdict.status == "warn"
        assert "b: in " in verdict.finding
        assert "a: " not in verdict.finding


@pytest.mark.parametrize(
    ("mode", "trial", "readable", "insecure", "status"),
    [
        ("token", "refused", {}, False, "ok"),
        ("token", "refused", {"a": ["/t"]}, False, "warn"),
        ("token", "admitted", {}, False, "FAIL"),
        ("token", "admitted", {}, True, "warn"),
        ("", "admitted", {}, False, "FAIL"),
        ("disabled", "silent", {}, True, "warn"),
        ("token", "silent", {}, False, "warn"),
    ],
)
def test_only_a_refusal_shows_that_a_token_is_asked_for(
    mode: str, trial: str, readable: dict[str, list[str]], insecure: bool, status: str
) -> None:
    """A token in our environment proves nothing: the cluster has to refuse whoever has none."""
    verdict = judge_token(mode, trial, readable, insecure)
    assert verdict.status == status
    assert verdict.cure or status == "ok"


@pytest.mark.parametrize(
    ("nodes", "blind", "status"),
    [
        ([node("a", driver=True)], {}, "ok"),
        ([node("a", driver=True), node("b")], {}, "ok"),
        ([node("a", driver=True), node("b")], {"b": "no"}, "warn"),
        ([node("a", 0, driver=True), node("b")], {"b": "no"}, "FAIL"),
        ([node("a", 1, driver=True), node("b")], {"b": "no"}, "FAIL"),
        ([node("a"), node("b")], {"b": "no"}, "FAIL"),
        ([node("a", driver=True), node("b"), node("c", 0)], {"c": "no"}, "ok"),
        ([], {}, "FAIL"),
    ],
)
def test_who_must_see_the_run_directory(nodes: list[Node], blind: dict[str, str], status: str) -> None:
    """A blind node is a warning while a worker of 2 threads fits on the driver's node, else a failure."""
    assert judge_shared(nodes, blind, "/runs", 2).status == status


def test_silent_nodes_are_told_by_their_reason() -> None:
    """A missing distbp gets its cure, another reason its words; a node without processors is a warning."""
    nodes = [node("a", driver=True), node("b"), node("c", 0)]
    assert judge_answers(nodes, {}).status == "ok"
    verdict = judge_answers(
        nodes, {"b": "ModuleNotFoundError: No module named 'distbp'", "c": "gave no answer"}
    )
    assert verdict.status == "FAIL"
    assert "distbp is missing, or another version, on b; c: gave no answer" in verdict.finding
    assert verdict.cure.startswith("pip install")
    assert judge_answers(nodes, {"c": "gave no answer"}).status == "warn"
    assert judge_calls({"b": "no answer"}, 3, "10.0.0.1:5").status == "FAIL"
    assert judge_calls({}, 0, "10.0.0.1:5").status == "FAIL"


def test_pairs_that_were_not_tried_are_counted() -> None:
    """When time ran out the report says how many pairs are missing."""
    good = Link(("a", "b"), (1e9, 1e9), 1e-5)
    assert judge_pairs([good], 0, 2, 180.0).status == "ok"
    verdict = judge_pairs([good], 2, 3, 180.0)
    assert (verdict.status, "2 pairs were not tried within 180 s" in verdict.finding) == ("warn", True)
    assert judge_pairs([], 3, 3, 180.0).status == "FAIL"
    assert judge_pairs([], 0, 1, 180.0).status == judge_pairs([], 0, 0, 180.0).status == "ok"
    assert MOST_HOSTS_IN_PAIRS >= 3


# ----- two nodes, as threads of this process


class Pair:
    """Two witnesses on this machine that have called a driver."""

    def __init__(self) -> None:
        self.key = secrets.token_bytes(KEY_BYTES)
        self.driver = wire.Listener("127.0.0.1", self.key)
        self.witnesses = (Witness(), Witness())
        self.addresses: list[Any] = []
        for index, witness in enumerate(self.witnesses):
            called = threading.Thread(target=lambda: self.driver.accept(5.0))
            called.start()
            address, trouble = witness.call(self.driver.address, self.key, index, "127.0.0.1", 5.0)
            called.join()
            assert trouble == ""
            self.addresses.append(address)

    def exchange(self, members: tuple[int, ...], connect_s: float) -> dict[int, dict[str, Any]]:
        """Let some of the two take part in an exchange; return what they say."""
        told: dict[int, dict[str, Any]] = {}

        def take_part(me: int) -> None:
            partner = tuple(self.addresses[1 - me])
            told[me] = self.witnesses[me].exchange(me, ("a", "b"), partner, "label", connect_s, 20.0)

        threads = [threading.Thread(target=take_part, args=(me,)) for me in members]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return told


def test_two_nodes_measure_their_link() -> None:
    """Nodes that reach each other agree on a link with a rate in both directions."""
    told = Pair().exchange((0, 1), 5.0)
    links = [msgspec.convert(told[me]["link"], Link) for me in (0, 1)]
    assert [link.error for link in links] == ["", ""]
    assert [told[me]["unreached"] for me in (0, 1)] == ["", ""]
    assert all(rate > 0 for link in links for rate in link.bytes_per_second)
    assert all(link.latency_s > 0 for link in links)


def test_a_node_whose_partner_is_silent_says_so_in_time() -> None:
    """A node that gets no answer names the other one, and waits for both directions and not longer."""
    pair = Pair()
    begin = time.monotonic()
    told = pair.exchange((0,), 0.5)[0]
    assert time.monotonic() - begin < 10
    port = pair.addresses[1][1]
    assert told["unreached"].startswith("a does not reach b: expected 127.0.0.1:")
    assert str(port) in told["unreached"]
    assert "b did not connect" in told["link"]["error"]


def test_a_node_that_does_not_reach_the_driver_says_so() -> None:
    """A driver whose address leads nowhere is what a node reports, and it listens all the same."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # Reserved, and nobody listens there.
        nobody = bound.getsockname()
        address, trouble = Witness().call(nobody, secrets.token_bytes(KEY_BYTES), 0, "127.0.0.1", 0.5)
    assert "within 0.5 s" in trouble
    assert address[0] == "127.0.0.1"


def test_a_node_describes_itself() -> None:
    """What a node tells is JSON, and has what the report shows."""
    facts = msgspec.convert(json.loads(json.dumps(Witness().describe(1))), NodeFacts)
    assert 1 <= facts.usable <= facts.present
    assert 0 < facts.memory_free <= facts.memory
    assert facts.software["blas"]["threads"] in (1, None)


# ----- what would be sent


def write(path: Path, size: int) -> None:
    """Write a file of so many bytes, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with things that Ray sends, and others that it leaves out."""
    here = tmp_path / "here"
    write(here / "train.py", 1000)
    write(here / "package" / "deep" / "model.py", 2000)
    for ignored in (
        ".git/objects/pack",
        ".venv/lib",
        "venv/lib",
        "package/__pycache__/x.pyc",
        "runs/a",
        "b.tmp",
    ):
        write(here / ignored, 1 << 30)
    (here / ".gitignore").write_text("runs/\n")
    (here / ".rayignore").write_text("*.tmp\n")
    write(tmp_path / "elsewhere" / "data.npz", 5000)
    (here / "data").symlink_to(tmp_path / "elsewhere")
    write(here / "clone" / "code.py", 300)
    subprocess.run(["git", "init", "--quiet", here / "clone"], check=True)
    write(here / "clone" / "big.bin", 1 << 30)
    (here / "clone" / ".gitignore").write_text("*.bin\n")
    return here


def test_what_would_be_sent_is_counted_as_ray_does(folder: Path) -> None:
    """Ignored files, environments and .git are left out; links, and repositories inside, are followed."""
    sizes, whole = sizes_to_send(folder, 30.0)
    assert whole
    assert sizes == {
        "train.py": 1000, "package": 2000, "data": 5000, "clone": 306, ".gitignore": 6, ".rayignore": 6,
    }  # fmt: skip
    assert judge_upload(folder).status == "ok"


def test_too_much_to_send_is_named(folder: Path) -> None:
    """From the limit on the largest entries are named; one byte less is fine."""
    rest = sum(sizes_to_send(folder, 30.0)[0].values())
    write(folder / "weights.npz", doctor_upload.MOST_BYTES - rest - 1)
    assert judge_upload(folder).status == "ok"
    write(folder / "weights.npz", doctor_upload.MOST_BYTES - rest)
    verdict = judge_upload(folder)
    assert verdict.status == "warn"
    assert "the largest: weights.npz 100 MiB" in verdict.finding
    assert ".rayignore" in verdict.cure


def test_counting_ends_in_time(folder: Path) -> None:
    """Without time to count, what was seen so far is told, and that it is not all."""
    assert sizes_to_send(folder, 0.0)[1] is False
