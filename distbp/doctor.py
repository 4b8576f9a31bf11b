"""The checks of `distbp doctor`: what works on this machine, and the command that cures what does not.

A check is a function without arguments that returns a `Verdict`; `checks` lists them by name.  Each tries the
real thing where that is cheap: two processes meet in a real arena, a real network is differentiated, a file
is written and locked where runs would lie.  MPI is never initialised in this process and Ray never imported:
the first may abort the process, the second costs a second.  Under a launcher `distbp/doctor_mpi.py` adds what
ranks can only find out together.

    ok     works, or is an option that is not installed
    warn   works, but slower, or not for every backend
    FAIL   training on this machine would fail or be wrong

It knows nothing of terminals.  Rejected: checking by version numbers alone; a kernel that lists futex may
still run in a sandbox that refuses it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import importlib.metadata
import importlib.util
import math
import os
import platform
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from distbp import nn
from distbp.arena import Arena, ArenaLayout
from distbp.barrier import NAP_S, nap
from distbp.cgroups import cpu_quota
from distbp.environment import available_cores, describe_environment
from distbp.errors import DistbpError, EnvironmentMismatch
from distbp.nn.gradient_check import check_gradient
from distbp.partition import split_range
from distbp.random import normal
from distbp.reduce import LaneReduction, MicroBatchSum, aligned_blocks

__all__ = ["Verdict", "barrier_partner", "check_out", "checks", "examine", "existing_folder", "exit_code_of"]

Status = Literal["ok", "warn", "FAIL"]

# What decides about bits or speed of the numeric libraries when it is set.
BLAS_VARIABLES = (
    "OPENBLAS_CORETYPE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR",
    "BLIS_NUM_THREADS", "NPY_DISABLE_CPU_FEATURES", "NPY_ENABLE_CPU_FEATURES",
)  # fmt: skip
LEAST_RAY = (2, 54)  # Older ones run code for anybody who reaches their ports (CVE-2023-48022).
LEAST_OPEN_FILES = 1024  # The launching process holds a few for each worker.
LEAST_FREE_BYTES = 1 << 30  # Some three checkpoints of a model of 30 million parameters.
MEETINGS = 100
MEET_TIMEOUT_S = 10.0
MPI_TIMEOUT_S = 20.0  # Loading a library from a cold network file system takes seconds.
MICRO_BATCHES = 6
REINSTALL = "pip install --force-reinstall numpy"  # Its wheel brings an OpenBLAS that passes these checks.
GET_MPI = "module load openmpi (the site's MPI), or pip install mpich"


@dataclass(frozen=True)
class Verdict:
    """What a check found, in words, and the command or setting that cures it."""

    status: Status
    finding: str
    cure: str = ""


def exit_code_of(found: Mapping[str, Verdict]) -> int:
    """Return 0 if nothing failed, else 78."""
    failed = any(verdict.status == "FAIL" for verdict in found.values())
    return EnvironmentMismatch.exit_code if failed else 0


def checks(out: Path) -> dict[str, Callable[[], Verdict]]:
    """Return the checks by name, in the order of the report; runs would be written below `out`."""
    return {
        "python": check_python,
        "numpy": check_numpy,
        "blas": check_blas,
        "cores": check_cores,
        "linux": check_linux,
        "arena": check_arena,
        "gradients": check_gradients,
        "same bits": check_same_bits,
        "open files": check_open_files,
        "out": functools.partial(check_out, out),
        "/dev/shm": check_shared_memory,
        "mpi": check_mpi,
        "ray": check_ray,
    }


def examine(out: Path, *, without: Collection[str] = ()) -> dict[str, Verdict]:
    """Run every check but those named; one that raises has failed and says how, and the others still run."""
    found = {}
    for name, check in checks(out).items():
        if name in without:
            continue
        try:
            found[name] = check()
        except (DistbpError, OSError, ValueError, ArithmeticError, RuntimeError) as error:
            found[name] = Verdict("FAIL", f"the check ended with {type(error).__name__}: {error}")
    return found


def check_python() -> Verdict:
    """Name Python; pip and the syntax of this package refuse one that is too old."""
    return Verdict("ok", f"{platform.python_version()} at {sys.executable}")


def check_numpy() -> Verdict:
    """Check the version of NumPy."""
    if int(np.__version__.split(".")[0]) < 2:
        return Verdict("FAIL", np.__version__, "pip install 'numpy>=2'")
    return Verdict("ok", np.__version__)


def check_blas() -> Verdict:
    """Name the BLAS library, its kernel and threads, and the variables that steer it."""
    blas = describe_environment()["blas"]
    if blas["name"] == "unknown":
        return Verdict("warn", "threadpoolctl finds no BLAS library, so its threads have no limit", REINSTALL)
    found = f"{blas['name']} {blas['version']}, kernel {blas['kernel']}, {blas['threads']} threads"
    steering = [f"{name}={os.environ[name]}" for name in BLAS_VARIABLES if name in os.environ]
    return Verdict("ok", f"{found}; set here: {', '.join(steering)}" if steering else found)


def check_cores() -> Verdict:
    """Compare the cores of the machine, those this process may use, and the time that it is given."""
    usable, present, quota = available_cores(), os.cpu_count() or 1, cpu_quota()
    found = f"{usable} of {present} may be used"
    if quota is not None:
        found += f"; a cgroup grants the time of {quota:g}"
        if quota < usable:
            nproc = max(1, math.floor(quota))
            return Verdict("warn", found, f"distbp train --nproc {nproc}, or a larger quota")
    if usable == 1 < present:
        return Verdict("warn", found, "mpirun --bind-to none, srun --cpus-per-task N, or taskset -c 0-N")
    return Verdict("ok", found)


def check_linux() -> Verdict:
    """Try the three calls of the Linux kernel that the local backend rests on."""
    if sys.platform != "linux":
        return Verdict("warn", f"{sys.platform}: several workers need Linux", "distbp train --backend serial")
    attempts: dict[str, Callable[[], object]] = {
        "memfd": lambda: os.close(os.memfd_create("distbp-doctor", os.MFD_CLOEXEC)),
        "pidfd": lambda: os.close(os.pidfd_open(os.getpid())),
        "futex": _sleep_on_futex,
    }
    refused = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            refused.append(name)
    if refused:
        cure = (
            "distbp train --backend serial, or a kernel from 5.3 on without a seccomp filter for these calls"
        )
        return Verdict("FAIL", f"{platform.release()} refuses {', '.join(refused)}", cure)
    return Verdict("ok", f"{platform.release()}: memfd, pidfd and futex work")


def _sleep_on_futex() -> None:
    """Raise OSError unless the kernel puts this process to sleep on a word; one that refuses returns at once.

    Of three tries, since a signal may end a sleep early.
    """
    word = np.zeros(1, np.uint32)
    for _ in range(3):
        begin = time.monotonic()
        try:
            nap(word.ctypes.data, 0)
        except KeyError:
            raise OSError(f"the number of the call is not known for {platform.machine()}") from None
        if time.monotonic() - begin >= NAP_S / 2:
            return
    raise OSError("the call returns at once")


def check_arena() -> Verdict:
    """Let two processes meet in the barrier of a real arena and see each other's writes."""
    if sys.platform != "linux":
        return Verdict("ok", "not needed: one worker has no barrier")
    arena = Arena.create(_TWO_WORKERS, rank=0, deadline_s=MEET_TIMEOUT_S)
    program = f"from distbp.doctor import barrier_partner; barrier_partner({arena.descriptor})"
    try:
        arena.release()
        with subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=[arena.descriptor], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) as partner:  # fmt: skip
            try:
                assert partner.stdout is not None, "the partner speaks through a pipe"
                # A partner that dies while it starts ends the line; nobody waits in the barrier for it.
                heard, _, _ = select.select([partner.stdout], [], [], MEET_TIMEOUT_S)
                ready = bool(heard) and partner.stdout.readline() != ""
                begin = time.monotonic()
                sums = _meet(arena) if ready else 0
                took_us = (time.monotonic() - begin) / MEETINGS * 1e6
            finally:
                partner.kill()
            said = partner.communicate()[1].strip().rpartition("\n")[2]
    finally:
        arena.close()
    if sums != MEETINGS * (MEETINGS + 1) // 2:
        return Verdict("FAIL", f"two processes did not meet in shared memory: {said or 'writes were lost'}")
    return Verdict("ok", f"two processes met {MEETINGS} times in shared memory, {took_us:.0f} us each")


_TWO_WORKERS = ArenaLayout(
    size=16, vectors=("parameters",), blocks=(1, 1), sums=1, evaluation_rows=1, tail=1, scalars=1
)


def barrier_partner(descriptor: int) -> None:
    """Be the other process of `check_arena`: worker 1 of the arena behind `descriptor`."""
    arena = Arena.attach(descriptor, _TWO_WORKERS, rank=1, deadline_s=MEET_TIMEOUT_S)
    print("ready", flush=True)
    _meet(arena)


def _meet(arena: Arena) -> int:
    """Meet the other worker, who writes 1, 2, 3, ... before each meeting; return the sum of what was seen."""
    arena.wait_for_release(lambda attempt: None, MEET_TIMEOUT_S)
    assert arena.rank is not None, "both processes are workers"
    mine, other, seen = arena.slots[arena.rank][0], arena.slots[1 - arena.rank][0], 0
    for number in range(1, MEETINGS + 1):
        mine[0] = number
        arena.barrier.wait()
        seen += int(other[0])
        arena.barrier.wait()
    return seen


def check_gradients() -> Verdict:
    """Compare backpropagation with differences of the loss, in a small network."""
    report = check_gradient(_small_network(), *_small_data(), directions=1)
    if not report.ok:
        return Verdict("FAIL", f"backpropagation is wrong by {report.worst_error:.1e}", REINSTALL)
    return Verdict("ok", f"backpropagation agrees with differences of the loss to {report.worst_error:.0e}")


def check_same_bits() -> Verdict:
    """Make two steps as 1, 2, 3 and 6 workers would, and compare the parameters bit by bit."""
    groupings = (1, 2, 3, MICRO_BATCHES)
    results = [_two_steps(workers).tobytes() for workers in groupings]
    differing = [str(n) for n, result in zip(groupings, results, strict=True) if result != results[0]]
    if differing:
        finding = f"two steps of {' and '.join(differing)} workers differ from those of 1"
        return Verdict("FAIL", finding, REINSTALL)
    return Verdict("ok", "two steps give the same bits for 1, 2, 3 and 6 workers")


def _small_network() -> nn.Network:
    model = nn.mlp(outputs=3, hidden=(16, 8), activation="tanh")
    return nn.Network(model, (5,), nn.build_loss("cross_entropy"))


def _small_data() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return stacked micro-batches of 4 samples: x (6, 4, 5), y (6, 4)."""
    x = normal(MICRO_BATCHES * 4 * 5, 0, "doctor").astype(np.float32).reshape(MICRO_BATCHES, 4, 5)
    return x, (np.arange(MICRO_BATCHES * 4) % 3).reshape(MICRO_BATCHES, 4)


def _two_steps(workers: int) -> NDArray[np.float32]:
    """Return the parameters after two steps shared by `workers`, who compute one after another."""
    network, (x, y) = _small_network(), _small_data()
    parameters = np.zeros(network.layout.size, np.float32)
    network.initialise(parameters, 0)
    network.use(network.views(parameters))
    ranges = [split_range(MICRO_BATCHES, workers, rank) for rank in range(workers)]
    for step in range(2):
        slots = []
        for first, last in ranges:
            slots.append([np.zeros_like(parameters) for _ in aligned_blocks(first, last)])
            gradient = MicroBatchSum(first, last, slots[-1])
            network.send_gradients_to(functools.partial(_collect, gradient))
            context = nn.Context(training=True, step=step, first_micro_batch=first)
            network.loss_and_gradient(x[first:last], y[first:last], context)
        lane = LaneReduction(slots, ranges, [(0, MICRO_BATCHES)], None)
        lane.run()
        parameters -= np.float32(0.1 / y.size) * lane.target
    return parameters


def _collect(gradient: MicroBatchSum, parameter: nn.Parameter, leaf: Any) -> None:
    gradient.collect(parameter.offset, parameter.shape, leaf)


def check_open_files() -> Verdict:
    """Check how many descriptors a process may hold."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = "no limit" if soft == resource.RLIM_INFINITY else f"at most {soft}"
    if soft != resource.RLIM_INFINITY and soft < LEAST_OPEN_FILES:
        raisable = hard == resource.RLIM_INFINITY or hard >= LEAST_OPEN_FILES
        return Verdict("warn", found, f"ulimit -n {LEAST_OPEN_FILES if raisable else hard}")
    return Verdict("ok", found)


def check_out(out: Path) -> Verdict:
    """Write, lock, rename and remove a file where runs would lie; `out` itself is not created."""
    folder = existing_folder(out)
    where = f"{out}" if folder == out.absolute() else f"{out} (would be created in {folder})"
    try:
        descriptor, name = tempfile.mkstemp(prefix=".distbp-doctor-", dir=folder)
        try:
            os.write(descriptor, b"distbp")
            os.fsync(descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.replace(name, name + ".renamed")
            name += ".renamed"
        finally:
            os.close(descriptor)
            os.unlink(name)
    except OSError as error:
        reason = f"{errno.errorcode.get(error.errno or 0, '?')}, {error.strerror}"
        return Verdict("FAIL", f"{where} cannot be written: {reason}", "distbp train --out DIR elsewhere")
    free = shutil.disk_usage(folder).free
    found = f"{where} can be written and locked, {free / 2**30:.1f} GiB free"
    if free < LEAST_FREE_BYTES:
        return Verdict("warn", found, "make room, or distbp train --out DIR on another file system")
    return Verdict("ok", found)


def existing_folder(out: Path) -> Path:
    """Return `out`, or the nearest path above it that exists; absolute."""
    wanted = out.absolute()
    return next(path for path in (wanted, *wanted.parents) if path.exists())


def check_shared_memory() -> Verdict:
    """Name the size of /dev/shm, which MPI libraries and Ray use and distbp does not."""
    if not Path("/dev/shm").is_dir():
        return Verdict("ok", "there is none, and distbp needs none")
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.total / 2**30:.1f} GiB, {usage.free / 2**30:.1f} free"
    return Verdict("ok", f"{found}; distbp uses none, MPI libraries and Ray do")


def check_mpi() -> Verdict:
    """Compare the MPI library that mpi4py loads with the launcher on the PATH.  A process of its own asks.

    A launcher of another family starts N processes that each believe to be alone.
    """
    if importlib.util.find_spec("mpi4py") is None:
        return Verdict("ok", "mpi4py is not installed; only --backend mpi needs it")
    library = _first_line(sys.executable, "-c", _ASK_MPI)
    if library is None:
        return Verdict("warn", "mpi4py finds no MPI library", GET_MPI)
    program = shutil.which("mpiexec")
    if program is None:
        return Verdict("warn", f"library {library}; no mpiexec on the PATH", GET_MPI)
    version = _first_line(program, "--version") or "unknown"
    found = f"library {library}; {program}: {version}"
    if _family(library) != _family(version):
        found += "; the two are of different families: every process would be rank 0 of 1"
        cure = (
            "put the library's mpiexec first on the PATH, or MPI4PY_LIBMPI=/path/of/the/launcher's/libmpi.so"
        )
        return Verdict("warn", found, cure)
    return Verdict("ok", found)


# The library's version may be asked for before MPI_Init (MPI-4.1, section 9.1.1).
_ASK_MPI = (
    "import mpi4py; mpi4py.rc.initialize = False; from mpi4py import MPI; "
    "print(MPI.Get_library_version().strip('\\0'))"
)


def _first_line(*command: str) -> str | None:
    """Return the first line that a command prints, None if it fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MPI_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(
        (" ".join(line.split()).rstrip(":") for line in done.stdout.splitlines() if line.strip()), None
    )


def _family(version: str) -> str:
    """Return which launchers and libraries understand each other; Intel MPI and MPICH share Hydra."""
    words = version.lower()
    if "open mpi" in words or "openrte" in words or "prrte" in words:
        return "Open MPI"
    return "MPICH" if any(name in words for name in ("mpich", "hydra", "intel")) else words


def check_ray() -> Verdict:
    """Check the version of Ray by its metadata."""
    try:
        version = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        return Verdict("ok", "ray is not installed; only --backend ray needs it")
    least = ".".join(map(str, LEAST_RAY))
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST_RAY:
        return Verdict("warn", f"{version}: anybody can run code in it", f"pip install 'ray>={least}'")
    return Verdict("ok", version)
