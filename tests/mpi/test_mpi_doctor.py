"""`distbp doctor` under mpirun, with both MPI libraries, on this machine and on emulated hosts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.conftest import wait_until

pytestmark = pytest.mark.mpi

REPOSITORY = Path(__file__).resolve().parents[2]
FLAVOURS = ("mpich", "openmpi")
RATE_MBIT = 1000

EXAMINE = """
import os, signal, sys
from pathlib import Path
from distbp.backends.launcher import claim
from distbp.backends.mpi import import_mpi
from distbp.cli.doctor_command import show_report
from distbp.doctor_mpi import Deadlines, examine_ranks

rank = claim().rank
{trouble}
deadlines = Deadlines(answer_s={answer_s}, pair_s=3.0)
sys.exit(examine_ranks(Path({out!r}), claim(), lambda report: show_report(report, True), deadlines))
"""
"""What `distbp doctor --json` does, with trouble before it and shorter deadlines."""


def checks_of(printed):
    """The checks of a report, by name; anything but one JSON document on stdout is an error."""
    report = json.loads(printed)
    found = {check["name"]: check for check in report["checks"]}
    assert report["ok"] is not any(check["status"] == "FAIL" for check in found.values())
    for check in found.values():
        assert check["finding"]
        assert check["cure"] or check["status"] == "ok", check
    return found


def failed(found):
    """The names of the checks that failed."""
    return [name for name, check in found.items() if check["status"] == "FAIL"]


def prefix_of(name):
    """The environment of an MPI library, skipping the test if there is none."""
    prefix = Path(os.environ.get(f"{name.upper()}_PREFIX", REPOSITORY / f".venv-{name}"))
    if not (prefix / "bin" / "mpirun").exists():
        pytest.skip(f"no {name} environment at {prefix}: run make mpi-environments")
    return prefix


# ----- one host


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_all_ranks_give_one_report(mpi, ranks, tmp_path):
    """Any number of ranks gives one JSON document with launcher, library, ranks and cores, and no failure."""
    done = mpi.distbp(ranks, "doctor", "--json", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = checks_of(done.stdout)
    library = {"mpich": "MPICH", "openmpi": "Open MPI"}[mpi.name]
    assert library in found["launcher"]["finding"]
    assert f"started {ranks} process" in found["launcher"]["finding"]
    assert found["ranks"]["finding"].startswith(f"{ranks} rank")
    (host,) = json.loads(done.stdout)["hosts"]
    assert [rank["rank"] for rank in host["ranks"]] == list(range(ranks))
    assert all(set(rank["cores"]) == os.sched_getaffinity(0) for rank in host["ranks"])
    crowded = ranks > len(os.sched_getaffinity(0))
    assert found["binding"]["status"] == ("warn" if crowded else "ok")
    assert list(tmp_path.iterdir()) == []


def test_the_report_can_be_read_by_people(mpi):
    """Without --json there is a table of hosts, a line for each check, and one count of them."""
    done = mpi.distbp(2, "doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("host ")
    assert done.stdout.count("checks: ") == 1
    assert done.stdout.count("\nok    launcher") == 1


@pytest.mark.parametrize(
    ("ranks", "binding", "threads", "words"),
    [
        (1, "core", 1, ["rank 0 is bound to core", "idle"]),
        (2, "core", 2, ["ranks 0-1", "2 threads bound to"]),
        (3, "core:overload-allowed", 1, ["are bound to core", "together"]),
    ],
)
def test_binding_that_harms_is_a_warning(ranks, binding, threads, words, tmp_path):
    """Ranks bound by Open MPI to fewer cores than threads, or to one core, are named with --bind-to none."""
    if len(os.sched_getaffinity(0)) != 2:
        pytest.skip("the ranks are laid out for a machine with two cores")
    prefix = prefix_of("openmpi")
    options = ["--allow-run-as-root", "--map-by", "core:OVERSUBSCRIBE", "--bind-to", binding]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "DISTBP_RUN__THREADS": str(threads)}
    command = [prefix / "bin" / "mpirun", *options, "-n", str(ranks), prefix / "bin" / "python"]
    done = subprocess.run(
        [*command, "-m", "distbp.cli.main", "doctor", "--json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check = checks_of(done.stdout)["binding"]
    assert check["status"] == "warn"
    assert "mpirun --bind-to none" in check["cure"]
    for word in words:
        assert word in check["finding"]


ODD_RANK = (
    "import os\nif os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')) == '1': {change}\n"
)


@pytest.mark.parametrize(
    ("change", "named", "cure"),
    [
        ("os.environ['DISTBP_SEED'] = '5'", "settings.seed 0 and 5", "DISTBP_*"),
        ("os.environ['DISTBP_SEED'] = 'x'", "rank 1: environment DISTBP_SEED", "distbp config check"),
        ("os.environ['OPENBLAS_CORETYPE'] = 'Nehalem'", "blas.kernel", "OPENBLAS_CORETYPE"),
        pytest.param(
            "os.environ['NPY_DISABLE_CPU_FEATURES'] = 'X86_V3 AVX2'",
            "cpu_features",
            "NPY_DISABLE_CPU_FEATURES",
            marks=pytest.mark.slow,  # Compared as the kernel is.
        ),
    ],
)
def test_a_rank_that_differs_is_named(mpi, change, named, cure, tmp_path):
    """Another setting, BLAS kernel or CPU feature on one rank is 78, as training would say, with the cure."""
    (tmp_path / "sitecustomize.py").write_text(ODD_RANK.format(change=change))
    path = os.pathsep.join([str(tmp_path), str(REPOSITORY)])
    environment = {"PYTHONPATH": path, "OPENBLAS_CORETYPE": "Haswell"}
    done = mpi.distbp(2, "doctor", "--json", "--out", tmp_path, env=environment)
    assert done.returncode == 78, done.stdout + done.stderr
    found = checks_of(done.stdout)
    assert failed(found) == ["software"]
    assert "rank 1" in found["software"]["finding"]
    assert named in found["software"]["finding"]
    assert cure in found["software"]["cure"]


# ----- launchers and libraries that do not fit


def test_a_launcher_of_the_other_library_fails_once(mpi, tmp_path):
    """mpirun of one library with the Python of the other: one report, 78, and where the right mpirun lies."""
    other = prefix_of(next(name for name in FLAVOURS if name != mpi.name))
    mpi.python = other / "bin" / "python"
    done = mpi.distbp(2, "doctor", "--json", "--out", tmp_path)
    assert done.returncode == 78, done.stdout + done.stderr
    found = checks_of(done.stdout)
    assert failed(found) == ["launcher"]
    assert "does not belong to the MPI library" in found["launcher"]["finding"]
    assert str(other / "bin" / "mpirun") in found["launcher"]["cure"]


def test_a_missing_mpi4py_fails_once(mpi, tmp_path):
    """Without mpi4py N processes give one report that says what to install, not N lone ones."""
    mpi.python = sys.executable
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['mpi4py'] = None\n")
    done = mpi.distbp(3, "doctor", "--json", "--out", tmp_path, env=environment)
    assert done.returncode == 78, done.stdout + done.stderr
    found = checks_of(done.stdout)
    assert failed(found) == ["launcher"]
    assert "started 3 processes; mpi4py is missing" in found["launcher"]["finding"]
    assert found["launcher"]["cure"] == "pip install 'mpi4py>=4.1'"


def test_a_missing_library_fails_once(mpi, tmp_path):
    """An MPI library that cannot be loaded is named with the ways to get one, in one report."""
    environment = {"MPI4PY_LIBMPI": str(tmp_path / "libmpi.so")}
    done = mpi.distbp(2, "doctor", "--json", "--out", tmp_path, env=environment)
    assert done.returncode == 78, done.stdout + done.stderr
    found = checks_of(done.stdout)
    assert failed(found) == ["launcher"]
    assert "mpi4py finds no MPI library" in found["launcher"]["finding"]
    assert str(tmp_path / "libmpi.so") in found["launcher"]["finding"]
    assert "pip install" in found["launcher"]["cure"]


def test_srun_without_pmi_fails(mpi, tmp_path):
    """Slurm's variables without a communicator of that size: 78, and the process of task 0 reports."""
    slurm = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)} | slurm
    command = [mpi.python, "-m", "distbp.cli.main", "doctor", "--json", "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 78, done.stdout + done.stderr
    found = checks_of(done.stdout)
    assert failed(found) == ["launcher"]
    assert "started 4 processes, but this one sees 1" in found["launcher"]["finding"]
    assert "srun --mpi=pmix" in found["launcher"]["cure"]


# ----- ranks that are silent


def test_a_silent_rank_is_named_and_nothing_hangs(mpi, tmp_path):
    """A rank that stops after MPI has started is named within the deadline, and the job ends with 78."""
    trouble = "if rank == 1: import_mpi(); os.kill(os.getpid(), signal.SIGSTOP)"
    script = tmp_path / "examine.py"
    script.write_text(EXAMINE.format(trouble=trouble, answer_s=3.0, out=str(tmp_path)))
    done = mpi.run(3, script)
    assert done.returncode == 78, done.stdout + done.stderr
    found = checks_of(done.stdout)
    assert failed(found) == ["ranks"]
    assert "rank 1 sent rank 0 nothing within 3 s" in found["ranks"]["finding"]
    assert "ranks 0, 2 on" in found["ranks"]["finding"]
    wait_until(lambda: not running(script), timeout=10)


def test_a_call_that_hangs_ends_with_the_job(mpi, tmp_path):
    """A rank that never comes back meets the last deadline, as do those that wait for it inside MPI."""
    trouble = "import time\nfrom distbp import doctor_mpi\ndoctor_mpi.LAST_RESORT_S = 3.0\n"
    trouble += "if rank == 1: doctor_mpi.MPIWorld = lambda patience_s: time.sleep(600)"
    script = tmp_path / "examine.py"
    script.write_text(EXAMINE.format(trouble=trouble, answer_s=30.0, out=str(tmp_path)))
    done = mpi.run(2, script)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "Timeout" in done.stderr
    assert "in examine_ranks" in done.stderr
    wait_until(lambda: not running(script), timeout=10)


def test_a_rank_that_fails_ends_all(mpi, tmp_path):
    """An error inside one rank's examination is printed with its rank, and no other rank waits for it."""
    trouble = "from distbp import doctor_mpi\nif rank == 1: doctor_mpi.describe_rank = None"
    script = tmp_path / "examine.py"
    script.write_text(EXAMINE.format(trouble=trouble, answer_s=30.0, out=str(tmp_path)))
    done = mpi.run(2, script)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "distbp: rank 1: Traceback" in done.stderr
    assert done.stdout == ""


def running(script):
    """The processes that execute `script`."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(script) in (process.info["cmdline"] or [])
    ]


# ----- several hosts


def test_ranks_that_cannot_share_memory_are_named(mpi, tmp_path):
    """Ranks in mount namespaces of their own, as in containers, count as hosts, and a warning says so."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a mount namespace needs root and unshare")
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nexec unshare --mount {mpi.python} "$@"\n')
    wrapper.chmod(0o755)
    mpi.python = wrapper
    done = mpi.distbp(2, "doctor", "--json", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    check = checks_of(done.stdout)["ranks"]
    assert check["status"] == "warn"
    assert "2 ranks on 2 hosts" in check["finding"]
    assert "cannot share memory" in check["finding"]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two emulated hosts on links of 1 Gbit/s; of /tmp they share the directories of these tests alone."""
    with several_hosts(2, RATE_MBIT, tmp_path_factory.getbasetemp()) as cluster:
        yield cluster


@contextlib.contextmanager
def several_hosts(count, rate_mbit, shared):
    """Bring hosts up, skipping the test if this machine cannot."""
    from cluster.emulated import EmulatedCluster
    from cluster.requirements import what_is_missing

    if reason := what_is_missing():
        pytest.skip(reason)
    prefixes = [REPOSITORY / f".venv-{name}" for name in FLAVOURS]
    with EmulatedCluster(count, rate_mbit=rate_mbit, shared=[shared, REPOSITORY, *prefixes]) as cluster:
        yield cluster


def launch(hosts, flavour, slots, *arguments):
    """The command that starts `python ARGUMENTS` on ranks that are placed as `slots` says."""
    prefix = prefix_of(flavour)
    return hosts.mpirun(
        [prefix / "bin" / "python", *arguments],
        sum(slots.values()), flavour, slots=slots, prefix=prefix, environment={"PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def examine(hosts, flavour, out, cwd):
    """Run the doctor with one rank on the first host and two on the second."""
    slots = {"host0": 1, "host1": 2}
    command = launch(hosts, flavour, slots, "-m", "distbp.cli.main", "doctor", "--json", "--out", out)
    return hosts.run("host0", command, timeout=90, cwd=cwd)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_hosts_are_compared_and_their_link_is_measured(hosts, flavour, tmp_path):
    """Two hosts, one and two ranks: a shared directory, and 60 to 110 % of the link's limit."""
    done = examine(hosts, flavour, tmp_path / "runs", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found, report = checks_of(done.stdout), json.loads(done.stdout)
    assert found["ranks"]["finding"] == "3 ranks on 2 hosts"
    assert [(host["name"], len(host["ranks"])) for host in report["hosts"]] == [("host0", 1), ("host1", 2)]
    assert "all 2 hosts" in found["shared"]["finding"]
    assert "host1 10.77.0.11" in found["names"]["finding"]
    (link,) = report["links"]
    assert link["hosts"] == ["host0", "host1"]
    for rate in link["bytes_per_second"]:
        assert 0.6 < rate * 8e-6 / RATE_MBIT < 1.1
    assert 0 < link["latency_s"] < 1
    assert "Gbit/s" in found["network"]["finding"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flavour", "out"),
    [
        ("mpich", "/tmp"),
        pytest.param("mpich", "/tmp/only-here", marks=pytest.mark.slow),
        pytest.param("openmpi", "/tmp", marks=pytest.mark.slow),
        ("openmpi", "/tmp/only-here"),
    ],
)
def test_a_directory_that_hosts_do_not_share_fails(hosts, flavour, out, tmp_path):
    """Each host has a /tmp of its own: both the directory and one below it are refused, naming the host."""
    if out == "/tmp/only-here":
        hosts.run("host0", ["mkdir", "-p", out], check=True, cwd="/")
    done = examine(hosts, flavour, out, tmp_path)
    assert done.returncode == 78, done.stdout + done.stderr
    found = checks_of(done.stdout)
    assert failed(found) == ["shared"]
    missing = "the file is not there" if out == "/tmp" else "there is no such directory"
    assert f"host1: {missing}" in found["shared"]["finding"]
    assert "file system that all hosts share" in found["shared"]["cure"]
    listed = hosts.run("host0", ["find", "/tmp", "-name", ".distbp-doctor*"], check=True, cwd="/").stdout
    assert listed == ""


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_link_that_is_cut_is_reported(flavour, tmp_path):
    """A host whose cable is pulled while links are measured is named in the report, and no rank stays."""
    script = tmp_path / "examine.py"
    script.write_text(EXAMINE.format(trouble="", answer_s=5.0, out=str(tmp_path)))
    with several_hosts(3, 5, tmp_path) as hosts, (tmp_path / "stdout").open("w") as stream:
        command = launch(hosts, flavour, dict.fromkeys(hosts.hosts, 1), script)
        before = hosts.bytes_sent("host2")
        job = hosts.start("host0", command, cwd=tmp_path, stdout=stream, stderr=subprocess.DEVNULL)
        try:
            wait_until(lambda: hosts.bytes_sent("host2") - before > 300_000)
            hosts.cut("host2")
            wait_until(lambda: not ranks_on(hosts, "host0") and not ranks_on(hosts, "host1"), timeout=40)
        finally:
            # The launcher waits for a host that is out of reach.
            for pid in [pid for host in hosts.hosts for pid in hosts.processes(host)]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            job.kill()
            job.wait(30)
    found = checks_of((tmp_path / "stdout").read_text())
    assert failed(found) == ["network"]
    assert "host2" in found["network"]["finding"]


def ranks_on(hosts, host):
    """The processes of ranks on a host, as seen from outside."""
    return [
        pid
        for pid, argv in hosts.processes(host).items()
        if argv[-1].endswith("examine.py") and "python" in argv[0]
    ]
