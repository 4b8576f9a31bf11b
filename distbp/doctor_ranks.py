"""What ranks say of themselves, and what the doctor makes of it: pure judgement, no messages.

`describe_rank` is what every rank tells rank 0: where it runs, which cores it may use, which software it has.
`arrange` sorts ranks into hosts as `backends/mpi.py` would.  The rest are checks: hosts and ranks in, a
`Verdict` out.  Which ranks did not answer, and how hosts exchange messages, is for `doctor_mpi.py` and
`doctor_links.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from distbp import __version__
from distbp.backends.base import compare_values
from distbp.backends.mpi import host_identity
from distbp.cgroups import cpu_quota
from distbp.config import Run, resolve, to_dict
from distbp.doctor import Verdict
from distbp.environment import describe_environment, limit_threads
from distbp.errors import ConfigError
from distbp.random import normal

__all__ = [
    "NAME_THE_NETWORK",
    "Host",
    "RankFacts",
    "arrange",
    "describe_rank",
    "hash_of_a_product",
    "join_verdicts",
    "judge_binding",
    "judge_names",
    "judge_ranks",
    "judge_software",
    "own_addresses",
    "ranges",
    "say_count",
    "say_list",
    "say_ranks",
    "shortened",
]

MOST_NAMED = 4
"""Hosts or groups of ranks that a line names; it counts the others."""

NAME_THE_NETWORK = (
    "let all TCP ports through between the hosts, or name the network that joins them: mpirun --mca "
    "btl_tcp_if_include eth0 (Open MPI), UCX_NET_DEVICES=eth0 FI_TCP_IFACE=eth0 (MPICH, Intel MPI)"
)

PRODUCT = (64, 512, 256)
"""Shape (rows, inner, columns) of the matrix product whose bits ranks compare: some blocks of any kernel."""


class RankFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What one rank says of itself.

    `cores` are the numbers of those it may use, `granted` of those that the job may use on its host,
    `present` how many the host has, `quota` what its control groups grant, `threads` what `run.threads` asks
    for.  `trouble` is why its DISTBP_* variables are refused.
    """

    rank: int
    host: str
    identity: str
    cores: tuple[int, ...]
    granted: tuple[int, ...]
    present: int
    quota: float | None
    threads: int
    trouble: str
    software: dict[str, Any]


@dataclass(frozen=True)
class Host:
    """The ranks that share one memory."""

    name: str
    ranks: tuple[RankFacts, ...]

    @property
    def usable(self) -> int:
        """Return how many cores the ranks may use together."""
        cores = len({core for rank in self.ranks for core in rank.cores})
        quotas = [rank.quota for rank in self.ranks if rank.quota is not None]
        return max(1, min([cores, *(math.ceil(quota) for quota in quotas)]))

    @property
    def threads(self) -> int:
        """Return how many threads the ranks compute with together."""
        return sum(rank.threads for rank in self.ranks)

    def described(self) -> dict[str, Any]:
        """Return the host for the report, as JSON values."""
        first = self.ranks[0]
        return {
            "name": self.name,
            "cores": first.present,
            "quota": first.quota,
            "blas": first.software["blas"],
            "ranks": [
                {"rank": rank.rank, "cores": list(rank.cores), "threads": rank.threads} for rank in self.ranks
            ],
        }


def describe_rank(rank: int, library: str) -> RankFacts:
    """Return the facts of this process; `library` is what its MPI says of itself."""
    trouble, run, settings = "", Run(), {}
    try:
        config = resolve(environment=os.environ).config
        run, settings = config.run, to_dict(config)
    except ConfigError as error:
        trouble = str(error)
    limits = limit_threads(run.threads)
    try:
        software = describe_environment() | {"product": hash_of_a_product()}
    finally:
        limits.restore_original_limits()
    present = os.cpu_count() or 1
    return RankFacts(
        rank=rank,
        host=socket.gethostname(),
        identity=host_identity().hex(),
        cores=_cores_of(0, present),
        granted=_granted(present),
        present=present,
        quota=cpu_quota(),
        threads=run.threads,
        trouble=trouble,
        software=software | {"distbp": __version__, "mpi": library, "settings": settings},
    )


def _cores_of(process: int, present: int) -> tuple[int, ...]:
    """Return the cores that a process may use; all of them where the system does not tell."""
    try:
        return tuple(sorted(os.sched_getaffinity(process)))
    except (AttributeError, OSError):
        return tuple(range(present))


def _granted(present: int) -> tuple[int, ...]:
    """Return the cores that the job may use on this host, as far as can be known.

    The process that started this one is usually a daemon of the launcher, which is not bound.  Slurm's may
    see the whole host: where the job has fewer cores than that, nothing is known but our own.
    """
    parent, limit = _cores_of(os.getppid(), present), os.environ.get("SLURM_CPUS_ON_NODE", "")
    return _cores_of(0, present) if limit.isdigit() and int(limit) < len(parent) else parent


def hash_of_a_product() -> str:
    """Return the SHA-256 of a matrix product: the same on ranks whose BLAS gives the same bits."""
    rows, inner, columns = PRODUCT
    left = normal(rows * inner, 0, "doctor left").astype(np.float32).reshape(rows, inner)
    right = normal(inner * columns, 0, "doctor right").astype(np.float32).reshape(inner, columns)
    return hashlib.sha256((left @ right).tobytes()).hexdigest()


def own_addresses() -> list[str]:
    """Return the addresses that this host's own name leads to; none if it leads nowhere."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        return []


def arrange(facts: Sequence[RankFacts]) -> list[Host]:
    """Return the hosts in the order of their first ranks; those of one name are told apart by these."""
    by_identity: dict[str, list[RankFacts]] = {}
    for one in sorted(facts, key=lambda one: one.rank):
        by_identity.setdefault(one.identity, []).append(one)
    groups = [tuple(group) for group in by_identity.values()]
    names = [group[0].host for group in groups]
    return [
        Host(name if names.count(name) == 1 else f"{name} (rank {group[0].rank})", group)
        for name, group in zip(names, groups, strict=True)
    ]


def judge_ranks(hosts: Sequence[Host], missing: Sequence[int], waited_s: float) -> Verdict:
    """Say how many ranks are where, and which of them could not be heard."""
    count = sum(len(host.ranks) for host in hosts)
    if missing:
        return Verdict(
            "FAIL",
            f"{say_ranks(missing)} sent rank 0 nothing within {waited_s:g} s; heard were "
            f"{say_list([_on(host) for host in hosts])}",
            NAME_THE_NETWORK,
        )
    found = f"{say_count(count, 'rank')} on {say_count(len(hosts), 'host')}"
    names = [host.ranks[0].host for host in hosts]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        return Verdict(
            "warn",
            f"{found}; ranks on {say_list(doubled)} cannot share memory, and count as several hosts",
            "start one container for all ranks of a host, not one for each",
        )
    return Verdict("ok", found)


def judge_software(hosts: Sequence[Host]) -> Verdict:
    """Compare software, settings and the bits of a product with rank 0's, as training does before step 1."""
    ranks = [rank for host in hosts for rank in host.ranks]
    troubled = [rank for rank in ranks if rank.trouble]
    if troubled:
        return Verdict("FAIL", f"rank {troubled[0].rank}: {troubled[0].trouble}", "distbp config check")
    first = ranks[0]
    groups: dict[str, list[RankFacts]] = {}
    for rank in ranks:
        if difference := compare_values(first.software, rank.software):
            groups.setdefault(difference, []).append(rank)
    if not groups:
        blas = first.software["blas"]
        same = f"NumPy {first.software['numpy']}, {blas['name']} {blas['version']}, kernel {blas['kernel']}"
        everybody = "the one rank has" if len(ranks) == 1 else f"all {len(ranks)} ranks have"
        return Verdict("ok", f"{everybody} {same}; a matrix product has the same bits")
    told = [
        f"{say_ranks([rank.rank for rank in group])} ({say_list(sorted({rank.host for rank in group}))}): "
        + shortened(difference)
        for difference, group in groups.items()
    ]
    return Verdict(
        "FAIL",
        f"ranks differ from rank 0 ({first.host}), and training would refuse them: {say_list(told, '; ')}",
        _cure_difference(" ".join(groups)),
    )


def _cure_difference(differences: str) -> str:
    """Return what makes ranks alike, by what differs."""
    if "settings." in differences:
        return "the same DISTBP_* variables on every rank; Open MPI hands on what mpirun -x NAME names"
    if "blas.kernel" in differences:
        return "OPENBLAS_CORETYPE=Haswell on every rank (Open MPI: mpirun -x OPENBLAS_CORETYPE)"
    if "cpu_features" in differences:
        return "NPY_DISABLE_CPU_FEATURES on every rank, with what some of them lack"
    return "install the same Python, NumPy and distbp on every host"


def shortened(difference: str) -> str:
    """Return a difference without the lists of all CPU features, which fill a page."""
    entries = difference.split("; ")
    return "; ".join(entry if len(entry) < 200 else f"{entry.split()[0]} differ" for entry in entries)


def judge_binding(hosts: Sequence[Host], unbind: str) -> Verdict:
    """Compare the cores that ranks may use with their threads, and with the cores that stay idle.

    `unbind` is the launcher's option that binds nothing.
    """
    told = [(host.name, *problem) for host in hosts if (problem := _binding_problem(host)) is not None]
    if told:
        bound = any(by_launcher for _, _, by_launcher in told)
        more = "fewer ranks on a host (-n, slots), or a smaller run.threads"
        problems = say_list([f"{name}: {problem}" for name, problem, _ in told], "; ")
        return Verdict("warn", problems, f"{unbind}; srun --cpus-per-task=THREADS" if bound else more)
    each = sorted({rank.threads for host in hosts for rank in host.ranks})
    threads = " or ".join(map(str, each))
    return Verdict("ok", f"run.threads = {threads}, and every rank has cores enough for its threads")


def _binding_problem(host: Host) -> tuple[str, bool] | None:
    """Return the worst that can be said of a host's cores, and whether the launcher's binding is why."""
    granted = {core for rank in host.ranks for core in (*rank.granted, *rank.cores)}
    bound = [rank for rank in host.ranks if set(rank.cores) != granted]
    few = [rank for rank in bound if len(rank.cores) < rank.threads]
    if few:
        one = few[0]
        which = say_ranks([rank.rank for rank in few])
        return f"{which}: {say_count(one.threads, 'thread')} bound to {_cores(one.cores)}", True
    for cores in sorted({rank.cores for rank in bound}):
        inside = [rank for rank in host.ranks if set(rank.cores) <= set(cores)]
        if sum(rank.threads for rank in inside) > len(cores):
            return f"{say_ranks([rank.rank for rank in inside])} are bound to {_cores(cores)} together", True
    if host.threads > host.usable:
        threads = f"{say_count(len(host.ranks), 'rank')} with {say_count(host.threads, 'thread')} together"
        quota = host.ranks[0].quota
        limit = "" if quota is None else f"; a cgroup grants the time of {quota:g}"
        return f"{threads} on {say_count(host.usable, 'core')}{limit}", False
    taken = {core for rank in host.ranks for core in rank.cores}
    idle = granted - taken
    if bound and idle:
        verb = "is" if len(bound) == 1 else "are"
        which = f"{say_ranks([rank.rank for rank in bound])} {verb} bound to {_cores(sorted(taken))}"
        return f"{which}, while {_cores(sorted(idle))} {'is' if len(idle) == 1 else 'are'} idle", True
    return None


def judge_names(addresses: Mapping[str, Sequence[str]]) -> Verdict:
    """Check that host names lead to addresses which other hosts can reach; `addresses` by host name."""
    if len(addresses) == 1:
        return Verdict("ok", "one host: no other one needs its address")
    inward = [
        f"{host} ({', '.join(found) or 'no address'})"
        for host, found in addresses.items()
        if all(address.startswith("127.") or address == "::1" for address in found)
    ]
    if inward:
        return Verdict(
            "warn",
            f"on these hosts their own name leads to no address that others can reach: {say_list(inward)}",
            "write the hosts' real addresses into /etc/hosts or the name service",
        )
    return Verdict("ok", say_list([f"{host} {', '.join(found)}" for host, found in addresses.items()]))


def join_verdicts(by_host: Mapping[str, Mapping[str, Verdict]]) -> dict[str, Verdict]:
    """Return one verdict for each check, from those of every host: the worst, with the hosts that have it."""
    joined = {}
    for name in next(iter(by_host.values())):
        verdicts = {host: found[name] for host, found in by_host.items() if name in found}
        worst = max((verdict.status for verdict in verdicts.values()), key=("ok", "warn", "FAIL").index)
        having = {host: verdict for host, verdict in verdicts.items() if verdict.status == worst}
        first = next(iter(having.values()))
        finding = first.finding
        if worst != "ok" and len(by_host) > 1:
            finding = say_list([f"{host}: {verdict.finding}" for host, verdict in having.items()], "; ")
        elif len(verdicts) > 1:
            finding += f" (on {next(iter(having))}; ok on all {len(verdicts)} hosts)"
        joined[name] = Verdict(worst, finding, first.cure)
    return joined


def say_ranks(ranks: Sequence[int]) -> str:
    """Return 'rank 3' or 'ranks 0-3, 6'."""
    return f"rank{'s' if len(ranks) != 1 else ''} {ranges(ranks)}"


def ranges(numbers: Sequence[int]) -> str:
    """Return sorted numbers as '0-3, 6'."""
    runs = [
        [number for _, number in group]
        for _, group in itertools.groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0])
    ]
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def _cores(cores: Sequence[int]) -> str:
    return f"core{'s' if len(cores) != 1 else ''} {ranges(cores)}"


def _on(host: Host) -> str:
    return f"{say_ranks([rank.rank for rank in host.ranks])} on {host.name}"


def say_count(number: int, noun: str) -> str:
    """Return '1 rank', '2 ranks' or '2 processes'."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{number} {noun}{plural if number != 1 else ''}"


def say_list(entries: Sequence[str], separator: str = ", ") -> str:
    """Return the first entries, and how many more there are."""
    more = len(entries) - MOST_NAMED
    return separator.join(entries[:MOST_NAMED]) + (f"{separator}and {more} more" if more > 0 else "")
