"""`distbp doctor`: print what `distbp/doctor.py` finds, and what hosts find together."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distbp.doctor import Verdict
    from distbp.doctor_mpi import Report
    from distbp.doctor_ray import RayReport

__all__ = ["command", "show_ray_report", "show_report"]


@click.command(
    help="Say what works on this machine, and how to cure what does not.\n\n"
    "Under mpirun or srun all ranks are examined together, and one report is printed: launcher and library, "
    "placement, binding, software, the shared directory, and the links between hosts.\n\n"
    "With --backend ray all nodes of the cluster at RAY_ADDRESS are examined, or without it a Ray of our "
    "own: token, nodes, software, processors, the shared directory, and the links between nodes."
)
@click.option(
    "--backend",
    type=click.Choice(["auto", "ray"]),
    default="auto",
    show_default=True,
    help="What to examine.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--out", default="runs", show_default=True, metavar="DIR", help="Where runs would be written.")
@click.option("--ray-insecure", is_flag=True, help="Use a Ray cluster that asks for no token.")
def command(backend: str, as_json: bool, out: str, ray_insecure: bool) -> int:
    """Return 0 if nothing failed, else 78."""
    if backend == "ray":
        return _examine_ray(out, as_json, ray_insecure)
    from distbp.backends.launcher import claim

    claimed = claim()
    if claimed is not None:
        from distbp.doctor_mpi import examine_ranks

        return examine_ranks(Path(out), claimed, lambda report: show_report(report, as_json))
    from distbp.doctor import examine, exit_code_of

    found = examine(Path(out))
    if as_json:
        print(json.dumps(_as_json(found), indent=2))
    else:
        _print_verdicts(found)
    return exit_code_of(found)


def _examine_ray(out: str, as_json: bool, insecure: bool) -> int:
    """Examine a Ray cluster, with the threads and the trust that `distbp train` would take from here."""
    from distbp.config import resolve
    from distbp.doctor_ray import examine_cluster

    flags = {"run.ray_insecure": True} if insecure else {}
    run = resolve(environment=os.environ, flags=flags).config.run
    return examine_cluster(Path(out), run, lambda report: show_ray_report(report, as_json))


def show_report(report: Report, as_json: bool) -> None:
    """Print what ranks found together."""
    if as_json:
        print(json.dumps(_as_json(report.found) | {"hosts": report.hosts, "links": report.links}, indent=2))
        return
    if report.hosts:
        _print_hosts(report.hosts)
    _print_verdicts(report.found)


def show_ray_report(report: RayReport, as_json: bool) -> None:
    """Print what was found in a Ray cluster."""
    if as_json:
        print(json.dumps(_as_json(report.found) | {"nodes": report.nodes, "links": report.links}, indent=2))
        return
    if report.nodes:
        _print_nodes(report.nodes)
    _print_verdicts(report.found)


def _as_json(found: dict[str, Verdict]) -> dict[str, Any]:
    """Return verdicts as JSON values."""
    from dataclasses import asdict

    listed = [{"name": name} | asdict(verdict) for name, verdict in found.items()]
    return {"ok": not _count(found, "FAIL"), "checks": listed}


def _print_verdicts(found: dict[str, Verdict]) -> None:
    """Print a line for each check, below it the cure, and at the end how many there are."""
    width = max(map(len, found))
    for name, verdict in found.items():
        print(f"{verdict.status:<6}{name:<{width}}  {verdict.finding}")
        if verdict.cure:
            print(f"{'':<6}{'':<{width}}  cure: {verdict.cure}")
    print(f"{len(found)} checks: {_count(found, 'warn')} warn, {_count(found, 'FAIL')} FAIL")


def _count(found: dict[str, Verdict], status: str) -> int:
    return sum(one.status == status for one in found.values())


def _print_hosts(hosts: list[dict[str, Any]]) -> None:
    """Print a table of hosts: a line for each group of ranks with the same cores and threads."""
    from distbp.doctor_ranks import ranges

    rows = [("host", "ranks", "may use cores", "of", "threads of a rank", "BLAS kernel")]
    for host in hosts:
        groups: dict[tuple[str, int], list[int]] = {}
        for rank in host["ranks"]:
            groups.setdefault((ranges(rank["cores"]), rank["threads"]), []).append(rank["rank"])
        for (cores, threads), ranks in groups.items():
            kernel = f"{host['blas']['name']} {host['blas']['kernel']}"
            rows.append((host["name"], ranges(ranks), cores, f"{host['cores']}", f"{threads}", kernel))
    _print_table(rows)


def _print_nodes(nodes: list[dict[str, Any]]) -> None:
    """Print a table of the nodes of a Ray cluster; a dash where a node did not answer."""
    from distbp.doctor_ray_nodes import gibibytes

    rows = [
        (
            "node", "address", "Ray gives", "may use", "memory", "/dev/shm", "Python", "Ray", "distbp",
            "NumPy", "BLAS kernel",
        )
    ]  # fmt: skip
    for node in nodes:
        row = [node["name"], node["address"], f"{node['cpus']:g}"]
        if "software" in node:
            software = node["software"]
            row += [f"{node['usable']}", gibibytes(node["memory"]), gibibytes(node["shm"])]
            row += [software[name] for name in ("python", "ray", "distbp", "numpy")]
            row += [f"{software['blas']['name']} {software['blas']['kernel']}"]
        rows.append((*row, *["-"] * (len(rows[0]) - len(row))))
    _print_table(rows)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts in columns, and an empty line."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    print()
