"""`distbp doctor` under a launcher: what ranks can only find out together.

Every rank runs `examine_ranks`; rank 0 gathers, judges, and shows one report.

    1  the launcher belongs to the MPI library                every rank, before and after MPI starts
    2  where a rank is, what it has, which cores it may use   every rank (`doctor_ranks.py`)
    3  the checks of one machine                              the first rank of each host (`doctor.py`)
    4  a file that rank 0 writes where runs would lie         the first rank of each host
    5  messages between hosts, two by two                     the first rank of each host (`doctor_links.py`)

Whoever is silent at one of these is named in the report, which then ends there, and `Abort` ends the ranks:
MPI cannot be left in good order when a host is out of reach.  Beneath all deadlines lies one for the whole
examination, kept by a thread without the interpreter, for a library that hangs inside one call.

A launcher that does not belong to the library starts N processes of which each believes to be alone.  Then
the process that the launcher calls rank 0 reports, and the others stand aside.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from distbp.backends.launcher import Claim
from distbp.backends.mpi_world import MPIWorld, loaded_library
from distbp.doctor import Verdict, examine, existing_folder, exit_code_of
from distbp.doctor_folder import look_for, posted
from distbp.doctor_links import judge_links, measure_links
from distbp.doctor_ranks import (
    NAME_THE_NETWORK,
    Host,
    RankFacts,
    arrange,
    describe_rank,
    join_verdicts,
    judge_binding,
    judge_names,
    judge_ranks,
    judge_software,
    own_addresses,
    say_count,
    say_list,
)
from distbp.errors import DistbpError, EnvironmentMismatch, TransportError

__all__ = ["Report", "examine_ranks"]

LAST_RESORT_S = 900.0
"""No examination takes as long; a process that still runs is ended, with the place where it hangs."""

ASIDE_S = 5.0
"""How long processes that nobody asks wait for the report: many launchers end all when one ends badly."""

REPLACED = ("cores", "mpi")
"""Checks of one process that ranks make together: `binding`, and `launcher` with the library."""

LAUNCHERS = ("mpirun", "mpiexec")

LOCAL_RANKS = (
    "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "MV2_COMM_WORLD_LOCAL_RANK",
    "JSM_NAMESPACE_LOCAL_RANK", "FLUX_TASK_LOCAL_ID", "SLURM_LOCALID",
)  # fmt: skip
"""Where launchers write which process of its host this is."""

UNBIND = {
    "Open MPI": "mpirun --bind-to none",
    "Slurm (srun)": "srun --cpu-bind=none",
    "MPICH or Intel MPI (Hydra)": "mpiexec -bind-to none (Intel MPI: I_MPI_PIN=0)",
}
"""Launcher -> what makes it bind nothing."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds: for ranks to answer rank 0, for rank 0 to come back to them, for what a pair of hosts does."""

    answer_s: float = 60.0
    patience_s: float = 600.0
    pair_s: float = 20.0


@dataclass
class Report:
    """What rank 0 shows: verdicts by name, and the figures behind them."""

    found: dict[str, Verdict] = field(default_factory=dict)
    hosts: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Return 0 if nothing failed, else 78."""
        return exit_code_of(self.found)


class _CutShort(Exception):
    """Somebody was silent; the report says who, and nothing more can be asked."""


def examine_ranks(
    out: Path, claimed: Claim, show: Callable[[Report], None], deadlines: Deadlines | None = None
) -> int:
    """Examine the job together with all ranks, and return the exit code of this one.

    `show` is called in one process, with the report.  Runs would be written below rank 0's `out`.
    """
    deadlines = deadlines or Deadlines()
    faulthandler.dump_traceback_later(LAST_RESORT_S, exit=True)
    try:
        world = MPIWorld(deadlines.patience_s)
    except EnvironmentMismatch as error:
        return _without_mpi(out, claimed, error, show)
    try:
        return _Examination(world, out, claimed, deadlines).run(show)
    except BaseException as error:
        shown = str(error) if isinstance(error, DistbpError) else traceback.format_exc().rstrip()
        print(f"distbp: {world.names[world.rank]}: {shown}", file=sys.stderr)
        world.abort(error.exit_code if isinstance(error, DistbpError) else 1)


def _without_mpi(
    out: Path, claimed: Claim, error: EnvironmentMismatch, show: Callable[[Report], None]
) -> int:
    """Report why ranks cannot meet, in the process that the launcher calls rank 0."""
    finding, _, cure = str(error).partition("; ")
    if importlib.util.find_spec("mpi4py") is None:
        started = say_count(claimed.size, "process")
        finding, cure = (
            f"{claimed.launcher} started {started}; mpi4py is missing",
            "pip install 'mpi4py>=4.1'",
        )
    if claimed.rank == 0:
        report = Report(examine(out, without=REPLACED))
        report.found["launcher"] = Verdict(
            "FAIL", finding, cure.replace("(distbp doctor names it)", _own_launcher())
        )
        show(report)
        return report.exit_code
    if next((os.environ[name] for name in LOCAL_RANKS if name in os.environ), "") == "0":
        # What fails on this host may work on the first one, which then waits for us.
        print(f"distbp: rank {claimed.rank} on host {os.uname().nodename}: {finding}", file=sys.stderr)
    time.sleep(ASIDE_S)
    return error.exit_code


def _own_launcher() -> str:
    """Return, in brackets, where the launcher lies that came with the loaded library."""
    library = loaded_library()
    beside = [] if library is None else [Path(library).parent.parent / "bin" / name for name in LAUNCHERS]
    return f"({next((path for path in beside if path.exists()), 'beside ' + (library or 'it'))})"


@dataclass
class _Examination:
    """Everything that ranks do together; `report` fills on rank 0.

    `firsts[h]` is the rank that speaks for host h, `names[h]` what the host is called.
    """

    world: MPIWorld
    out: Path
    claimed: Claim
    deadlines: Deadlines
    report: Report = field(default_factory=Report)
    firsts: Sequence[int] = ()
    names: Sequence[str] = ()

    def run(self, show: Callable[[Report], None]) -> int:
        """Examine, show the report on rank 0, and leave together with its exit code."""
        whole = True
        try:
            self._examine()
        except _CutShort:
            whole = False
        if self.world.rank == 0:
            show(self.report)
            if not whole:
                self.world.abort(self.report.exit_code)
        return int(self.world.broadcast(self.report.exit_code, range(self.world.size)))

    def _examine(self) -> None:
        """Make all checks, one after the other; `_CutShort` on rank 0 when somebody is silent."""
        hosts = self._meet()
        plan = [
            [host.ranks[0].rank for host in hosts],
            [host.name for host in hosts],
            f"{self.out.absolute()}",
        ]
        self.firsts, self.names, out = self.world.broadcast(plan, range(self.world.size))
        self.out = Path(out)  # Where rank 0 would write decides, as it does in training.
        if self.world.rank in self.firsts:
            self._examine_hosts()
            self._check_shared()
            self._check_network()

    def _meet(self) -> list[Host]:
        """Hear every rank, and judge what they say; return the hosts on rank 0."""
        world, answer_s = self.world, self.deadlines.answer_s
        mine = describe_rank(world.rank, world.library)
        world.names[world.rank] += f" on host {mine.host}"
        told, missing = world.gather(msgspec.to_builtins(mine), answer_s, range(world.size))
        if world.rank != 0:
            return []
        hosts = arrange([msgspec.convert(one, RankFacts) for one in told.values()])
        for host in hosts:
            for rank in host.ranks:
                world.names[rank.rank] = f"rank {rank.rank} on host {host.name}"
        self.report.hosts = [host.described() for host in hosts]
        unbind = UNBIND.get(self.claimed.launcher, "the launcher's option that binds nothing")
        judged = {
            "launcher": self._judge_launcher(),
            "ranks": judge_ranks(hosts, missing, answer_s),
            "software": judge_software(hosts),
            "binding": judge_binding(hosts, unbind),
        }
        self.report.found = judged
        if missing:
            self.report.found = examine(self.out, without=REPLACED) | judged
            raise _CutShort
        return hosts

    def _judge_launcher(self) -> Verdict:
        """Name the library and the launcher, which `MPIWorld` has found to belong together."""
        file, level = loaded_library(), self.world.thread_level
        library = self.world.library if file is None else f"{self.world.library} ({file})"
        started = f"{self.claimed.launcher} started {say_count(self.claimed.size, 'process')}"
        found = f"{started}, as many as {library} sees"
        if level in ("SINGLE", "FUNNELED"):
            # `exchange.py` calls MPI from a thread of its own.
            cure = "distbp train -o run.overlap=false, or an MPI library with support for threads"
            return Verdict("warn", f"{found}; it gives MPI_THREAD_{level} only", cure)
        return Verdict("ok", found)

    def _examine_hosts(self) -> None:
        """Make the checks of one machine on each host at the same time, and join what they find."""
        others = () if self.world.rank == 0 else ("out",)  # There `shared` looks at the directory.
        found = examine(self.out, without=(*REPLACED, *others))
        mine = [{name: asdict(verdict) for name, verdict in found.items()}, own_addresses()]
        told, missing = self._hear(mine)
        if self.world.rank != 0:
            return
        by_host = {
            host: {name: Verdict(**verdict) for name, verdict in verdicts.items()}
            for host, (verdicts, _) in told.items()
        }
        self.report.found = join_verdicts(by_host) | self.report.found
        if missing:
            cure = "distbp doctor on that host alone shows where it stops"
            self.report.found["hosts"] = Verdict(
                "FAIL", f"{missing}, asked for the checks of one machine", cure
            )
            raise _CutShort
        self.report.found["names"] = judge_names({host: addresses for host, (_, addresses) in told.items()})

    def _check_shared(self) -> None:
        """Let rank 0 write a file where runs would lie, and one rank of every other host read it."""
        if len(self.firsts) == 1:
            self.report.found["shared"] = Verdict("ok", "one host: nothing needs to be shared")
            return
        with posted(self.out) if self.world.rank == 0 else contextlib.nullcontext() as token:
            token = self.world.broadcast(token, self.firsts)
            mine = "" if token is None or self.world.rank == 0 else look_for(*token)
            told, missing = self._hear(mine)
        if self.world.rank != 0:
            return
        where = f"{self.names[0]} writes in {existing_folder(self.out)}"
        problems = [f"{host}: {problem}" for host, problem in told.items() if problem]
        cure = "distbp train --out DIR on a file system that all hosts share: home or scratch, not /tmp"
        if token is None:
            verdict = Verdict("FAIL", "not tried: rank 0 cannot write there", cure)
        elif missing:
            verdict = Verdict("FAIL", f"{missing}, asked for what {where}", cure)
        elif problems:
            verdict = Verdict("FAIL", f"what {where} is of no use to {say_list(problems, '; ')}", cure)
        else:
            hosts = say_count(len(self.firsts), "host")
            verdict = Verdict("ok", f"all {hosts} read what {where}, and can write there")
        self.report.found["shared"] = verdict
        if missing:
            raise _CutShort

    def _check_network(self) -> None:
        """Let hosts exchange messages two by two."""
        try:
            links = measure_links(self.world, self.firsts, self.names, self.deadlines.pair_s)
        except TransportError as error:
            if self.world.rank != 0:
                raise
            self.report.found["network"] = Verdict("FAIL", str(error), NAME_THE_NETWORK)
            raise _CutShort from None
        if self.world.rank != 0:
            return
        self.report.links = [msgspec.to_builtins(link) for link in links]
        self.report.found["network"] = judge_links(links, len(self.firsts))
        if any(link.error for link in links):
            raise _CutShort

    def _hear(self, value: Any) -> tuple[dict[str, Any], str]:
        """Return on rank 0 what the hosts say, by name, and in words which of them said nothing in time."""
        told, missing = self.world.gather(value, self.deadlines.answer_s, self.firsts)
        silent = ", ".join(self.world.names[rank] for rank in missing)
        words = f"{silent} sent nothing within {self.deadlines.answer_s:g} s" if missing else ""
        names = dict(zip(self.firsts, self.names, strict=True))
        return {names[rank]: told[rank] for rank in sorted(told)}, words
