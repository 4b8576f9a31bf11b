"""`distbp doctor`: its report, its exit code, and checks that can fail."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from distbp import cgroups, doctor
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
