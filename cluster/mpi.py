"""What the two MPIs want to be told: host files, and the command that starts ranks on emulated hosts.

The differences, each a line below (USERS 3.12, FACTS 3 and 4): MPICH writes two ranks on a host "host:2" and
finds its ssh by -launcher-exec, and passes the whole environment on.  Open MPI writes "host slots=2", finds
its ssh by a parameter of PRRTE, refuses root, binds each rank to one core, and passes to other hosts only
what it is told to.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["FLAVOURS", "PREFIX_VARIABLES", "command", "find_prefix", "hostfile_text"]

FLAVOURS = ("mpich", "openmpi")
PREFIX_VARIABLES = {"mpich": "MPICH_PREFIX", "openmpi": "OPENMPI_PREFIX"}
"""Flavour -> the environment variable that names a prefix with that MPI (a virtual environment, say)."""

AGENT = Path(__file__).resolve().parent / "launch_agent.sh"


def hostfile_text(slots: Mapping[str, int], flavour: str) -> str:
    """Return a host file: `slots` ranks at most on each host, filled in this order."""
    form = {"mpich": "{}:{}\n", "openmpi": "{} slots={}\n"}[_known(flavour)]
    return "".join(form.format(host, count) for host, count in slots.items() if count > 0)


def find_prefix(flavour: str) -> Path | None:
    """Return the prefix that the environment names for `flavour`, or None."""
    named = os.environ.get(PREFIX_VARIABLES[_known(flavour)])
    return Path(named) if named else None


def command(
    argv: Sequence[str],
    *,
    ranks: int,
    flavour: str,
    hostfile: Path,
    prefix: Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """Return the command line that starts `ranks` times `argv` on the hosts of `hostfile`.

    `prefix` holds bin/mpiexec of that flavour.  `environment` reaches every rank.  `options` come last.
    """
    variables = dict(environment or {})
    if _known(flavour) == "mpich":
        own = ["-launcher", "ssh", "-launcher-exec", str(AGENT), "-f", str(hostfile), "-n", str(ranks)]
        for name, value in variables.items():
            own += ["-genv", name, value]
        return [str(prefix / "bin" / "mpiexec"), *own, *options, *argv]
    own = ["--prtemca", "plm_ssh_agent", str(AGENT), "--hostfile", str(hostfile), "-n", str(ranks)]
    own += ["--allow-run-as-root", "--bind-to", "none"]
    for name, value in variables.items():
        own += ["-x", f"{name}={value}"]
    return [str(prefix / "bin" / "mpirun"), *own, *options, *argv]


def _known(flavour: str) -> str:
    """Return `flavour`, or say which ones there are."""
    if flavour not in FLAVOURS:
        raise ValueError(f"flavour: expected one of {', '.join(FLAVOURS)}, got {flavour!r}")
    return flavour
