"""`distbp doctor`: its report, its exit code, and checks that can fail."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distbp import cgroups, doctor
from distbp.doctor_links import MOST_HOSTS_IN_PAIRS, Link, judge_links, rounds
from distbp.doctor_ranks import Host, RankFacts, arrange, join_verdicts, judge_binding, judge_names, say_ranks
from distbp.reduce import LaneReduction

from .command_line import distbp, succeed


def test_the_report_is_json(tmp_path: Path) -> None:
    """Every check appears with a status and a finding, and on a machine that trains none has failed."""
    found = json.loads(succeed("doctor", "--json", cwd=tmp_path))
    assert found["ok"] is True
    assert [check["name"] for check in found["checks"]] == list(doctor.checks(Path("runs")))
    for check in found["checks"]:
        assert check["status"] in ("ok", "warn")
        assert check["finding"]
        assert check["cure"] or check["status"] == "ok"
    assert not (tmp_path / "runs").exists()


def test_a_failure_is_78_and_named(tmp_path: Path) -> None:
    """Where runs cannot be written the check fails with a cure, the others still run, and the code is 78."""
    (tmp_path / "file").write_text("")
    done = distbp("doctor", "--out", "file", cwd=tmp_path)
    assert done.returncode == 78
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("FAIL"))
    assert line.split()[1] == "out"
    assert "cure: distbp train --out" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("1 FAIL")


def test_nothing_is_left_where_it_wrote(tmp_path: Path) -> None:
    """The trial file in the run directory is removed."""
    assert doctor.check_out(tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_variables_that_steer_the_arithmetic_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A BLAS kernel that was chosen by hand is in the report."""
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    assert "OPENBLAS_CORETYPE=Haswell" in doctor.check_blas().finding


def test_few_open_files_are_a_warning() -> None:
    """A low limit of open files is a warning with the command that raises it."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, limits[1]))
    try:
        verdict = doctor.check_open_files()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (verdict.status, verdict.cure) == ("warn", "ulimit -n 1024")


def test_a_partner_that_does_not_start_fails_the_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the second process dies at once the check says so, without waiting for it in the barrier."""
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert doctor.check_arena().status == "FAIL"


class RankByRank(LaneReduction):
    """A reduction that adds worker by worker, as all others do: its bits depend on their number."""

    def run(self, start: int = 0, stop: int | None = None) -> None:
        for _, _, array in self.pieces[1:]:
            self.target += array


def test_an_order_of_additions_that_depends_on_workers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The self-test fails when the bits change with the number of workers."""
    monkeypatch.setattr(doctor, "LaneReduction", RankByRank)
    verdict = doctor.check_same_bits()
    assert verdict.status == "FAIL"
    assert "differ from those of 1" in verdict.finding


def test_one_core_of_many_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was bound to one core, as some launchers do, is told how to get the others."""
    monkeypatch.setattr(doctor, "available_cores", lambda: 1)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 8)
    verdict = doctor.check_cores()
    assert verdict.status == "warn"
    assert "--bind-to none" in verdict.cure


def kernel_files(folder: Path, version: int, group: str, root: str, quotas: dict[str, str]) -> Path:
    """Write what the kernel shows of a process in `group` of a cgroup hierarchy whose `root` is mounted."""
    mount = folder / "cgroup"
    kind, options = ("cgroup", "rw,cpu,cpuacct") if version == 1 else ("cgroup2", "rw")
    controllers = "3:cpu,cpuacct" if version == 1 else "0:"
    for place, quota in quotas.items():
        (mount / place).mkdir(parents=True, exist_ok=True)
        if version == 1:
            (mount / place / "cpu.cfs_quota_us").write_text(f"{quota}\n")
            (mount / place / "cpu.cfs_period_us").write_text("100000\n")
        else:
            (mount / place / "cpu.max").write_text(f"{quota} 100000\n")
    process = folder / "self"
    process.mkdir()
    (process / "cgroup").write_text(f"9:memory:/else\n{controllers}:{group}\n")
    (process / "mountinfo").write_text(
        "22 1 8:1 / / rw - ext4 /dev/root rw\n"
        f"36 22 0:30 {root} {mount} rw,nosuid shared:9 - {kind} cgroup {options}\n"
    )
    return process


@pytest.mark.parametrize(
    ("version", "group", "root", "quotas", "expected"),
    [
        (2, "/job/step", "/", {"": "max", "job": "250000", "job/step": "max"}, 2.5),
        (2, "/job/step", "/", {"job": "400000", "job/step": "150000"}, 1.5),
        (2, "/", "/", {"": "max"}, None),
        (1, "/docker/a", "/docker/a", {"": "50000"}, 0.5),
        (1, "/docker/a", "/", {"docker": "-1", "docker/a": "300000"}, 3.0),
        (1, "/elsewhere", "/docker/a", {"": "200000"}, 2.0),
        (1, "/job", "/", {"job": "-1"}, None),
    ],
)
def test_the_quota_of_a_cgroup_is_found(
    tmp_path: Path, version: int, group: str, root: str, quotas: dict[str, str], expected: float | None
) -> None:
    """The least quota on the way from a process's cgroup to the root counts, in v1, v2 and containers."""
    assert cgroups.cpu_quota(kernel_files(tmp_path, version, group, root, quotas)) == expected


@pytest.mark.parametrize(
    ("library", "launcher", "fit"),
    [
        ("MPICH Version: 5.0.2", "HYDRA build details", True),
        ("Open MPI v5.0.11, package: x", "mpiexec (Open MPI) 5.0.11", True),
        ("Open MPI v4.1.4", "mpiexec (OpenRTE) 4.1.4", True),
        ("Intel(R) MPI Library 2021.18", "Intel(R) MPI Library for Linux* OS, Version 2021", True),
        ("Open MPI v5.0.11", "HYDRA build details", False),
        ("MPICH Version: 5.0.2", "mpirun (Open MPI) 5.0.11", False),
    ],
)
def test_library_and_launcher_of_one_family_fit(library: str, launcher: str, fit: bool) -> None:
    """What real libraries and launchers say of themselves tells whether they understand each other."""
    assert (doctor._family(library) == doctor._family(launcher)) is fit


def test_the_doctor_starts_neither_mpi_nor_ray() -> None:
    """A whole examination imports neither mpi4py nor ray into this process."""
    program = (
        "import sys; from pathlib import Path; from distbp.doctor import examine; examine(Path('.')); "
        "sys.exit(bool({'mpi4py', 'ray'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


# ----- what is made of several ranks and hosts; tests/mpi/test_mpi_doctor.py has the real ones


def rank(number: int, host: str = "a", **facts: object) -> RankFacts:
    """Return the facts of a rank on a host with cores 0 to 3, all granted."""
    known: dict[str, object] = {
        "rank": number, "host": host, "identity": host, "cores": (0, 1, 2, 3), "granted": (0, 1, 2, 3),
        "present": 4, "quota": None, "threads": 1, "trouble": "", "software": {},
    }  # fmt: skip
    return RankFacts(**(known | facts))  # type: ignore[arg-type]


@pytest.mark.parametrize("hosts", [1, 2, 3, 4, 7, 8, MOST_HOSTS_IN_PAIRS])
def test_every_pair_of_hosts_meets_once(hosts: int) -> None:
    """All pairs occur once, and no host is in two pairs of a round."""
    pairs = [pair for several in rounds(hosts) for pair in several]
    assert sorted(pairs) == [(a, b) for a in range(hosts) for b in range(a + 1, hosts)]
    for several in rounds(hosts):
        met = [host for pair in several for host in pair]
        assert len(met) == len(set(met))


@pytest.mark.parametrize("hosts", [MOST_HOSTS_IN_PAIRS + 1, 200])
def test_of_many_hosts_neighbours_meet(hosts: int) -> None:
    """Above the limit each host meets two neighbours, in three rounds, and the finding says so."""
    pairs = [pair for several in rounds(hosts) for pair in several]
    assert len(pairs) == len(set(pairs)) == hosts
    assert len(rounds(hosts)) == 3
    for several in rounds(hosts):
        met = [host for pair in several for host in pair]
        assert len(met) == len(set(met))
    links = [Link((f"h{a}", f"h{b}"), (1e9, 1e9), 1e-5) for a, b in pairs]
    assert "only neighbours" in judge_links(links, hosts).finding


def test_a_slow_link_is_named() -> None:
    """A link that carries less than half of the median, in either direction, is a warning with its hosts."""
    links = [Link((f"h{a}", f"h{b}"), (1.25e8, 1.25e8), 1e-5) for a, b in [(0, 1), (0, 2), (1, 2)]]
    assert judge_links(links, 3).status == "ok"
    links[1] = Link(("h0", "h2"), (1.25e8, 1e7), 1e-5)
    verdict = judge_links(links, 3)
    assert verdict.status == "warn"
    assert verdict.finding.endswith("h0 and h2")


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ([rank(0), rank(1), rank(2), rank(3)], ""),
        ([rank(0, cores=(0,)), rank(1, cores=(1,)), rank(2, cores=(2,)), rank(3, cores=(3,))], ""),
        ([rank(0, cores=(0,)), rank(1, cores=(1,))], "bound to cores 0-1, while cores 2-3 are idle"),
        ([rank(0, cores=(0,), granted=(0,)), rank(1, cores=(1,), granted=(1,))], ""),
        ([rank(0, cores=(0, 1), threads=4)], "rank 0: 4 threads bound to cores 0-1"),
        ([rank(0, cores=(2,)), rank(1, cores=(2,))], "ranks 0-1 are bound to core 2 together"),
        ([rank(0, threads=4), rank(1, threads=4)], "2 ranks with 8 threads together on 4 cores"),
        ([rank(0, quota=1.5, threads=3)], "on 2 cores; a cgroup grants the time of 1.5"),
    ],
)  # fmt: skip
def test_cores_are_compared_with_threads(ranks: list[RankFacts], words: str) -> None:
    """Too few cores, one core for several ranks, idle ones beside bound ranks, and a quota are warnings."""
    verdict = judge_binding([Host("a", tuple(ranks))], "mpirun --bind-to none")
    assert verdict.status == ("warn" if words else "ok")
    assert words in verdict.finding
    assert ("--bind-to none" in verdict.cure) is ("bound" in words)


def test_ranks_are_sorted_into_hosts() -> None:
    """Ranks of one identity are a host; hosts of one name are told apart by their first rank."""
    hosts = arrange([rank(2, "b"), rank(0, "a"), rank(1, "b"), rank(3, "a", identity="other")])
    assert [host.name for host in hosts] == ["a (rank 0)", "b", "a (rank 3)"]
    assert [[one.rank for one in host.ranks] for host in hosts] == [[0], [1, 2], [3]]
    assert say_ranks([0, 1, 2, 5, 7, 8]) == "ranks 0-2, 5, 7-8"


def test_the_worst_verdict_counts_and_names_its_hosts() -> None:
    """A check that fails on some hosts fails, with the finding of each of them."""
    good, bad = doctor.Verdict("ok", "fine"), doctor.Verdict("FAIL", "broken", "mend it")
    joined = join_verdicts({"a": {"arena": good, "out": good}, "b": {"arena": bad}, "c": {"arena": good}})
    assert joined == {"arena": doctor.Verdict("FAIL", "b: broken", "mend it"), "out": good}
    joined = join_verdicts({"a": {"arena": good}, "b": {"arena": good}})
    assert joined == {"arena": doctor.Verdict("ok", "fine (on a; ok on all 2 hosts)")}


def test_a_name_that_leads_to_itself_is_a_warning() -> None:
    """A host whose name leads to a loopback address only cannot be found by the others."""
    assert judge_names({"a": ["127.0.1.1"]}).status == "ok"
    assert judge_names({"a": ["10.0.0.1"], "b": ["10.0.0.2", "127.0.0.1"]}).status == "ok"
    verdict = judge_names({"a": ["10.0.0.1"], "b": ["127.0.1.1"], "c": []})
    assert verdict.status == "warn"
    assert "b (127.0.1.1), c (no address)" in verdict.finding
