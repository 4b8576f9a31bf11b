"""`distbp doctor`: print what `distbp/doctor.py` finds."""

from __future__ import annotations

import json
from pathlib import Path

import click

__all__ = ["command"]


@click.command(help="Say what works on this machine, and how to cure what does not.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--out", default="runs", show_default=True, metavar="DIR", help="Where runs would be written.")
def command(as_json: bool, out: str) -> int:
    """Return 0 if nothing failed, else 78."""
    from dataclasses import asdict

    from distbp.doctor import examine
    from distbp.errors import EnvironmentMismatch

    found = examine(Path(out))
    failed, warned = (sum(one.status == status for one in found.values()) for status in ("FAIL", "warn"))
    if as_json:
        listed = [{"name": name} | asdict(verdict) for name, verdict in found.items()]
        print(json.dumps({"ok": not failed, "checks": listed}, indent=2))
    else:
        width = max(map(len, found))
        for name, verdict in found.items():
            print(f"{verdict.status:<6}{name:<{width}}  {verdict.finding}")
            if verdict.cure:
                print(f"{'':<6}{'':<{width}}  cure: {verdict.cure}")
        print(f"{len(found)} checks: {warned} warn, {failed} FAIL")
    return EnvironmentMismatch.exit_code if failed else 0
