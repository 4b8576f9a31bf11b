"""`distbp report`: a run on one page, `RUN/report.html`, which needs no network and no server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

__all__ = ["command"]

_BUDGET_S = 20.0
"""Seconds that the confusion matrix may take; with more samples it is made of a part of them."""


@click.command(
    help="Write RUN/report.html: result, curves, layers, confusion, timeline and workers on one page."
)
@click.argument("run", metavar="RUN")
@click.option("--no-data", is_flag=True, help="Do not read checkpoint and data for a new confusion matrix.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: where the page is.")
def command(run: str, no_data: bool, as_json: bool) -> None:
    """Write the page and say where it is."""
    from distbp.errors import CannotWrite
    from distbp.metrics.report import write_report
    from distbp.metrics.run_files import RUNNING, read_run

    found = read_run(run)
    missing = "" if no_data or found.state == RUNNING else _confusion(found.path)
    if missing:
        print(f"distbp: no new confusion matrix: {missing}", file=sys.stderr)
    try:
        path = write_report(run)
    except OSError as error:
        raise CannotWrite(
            f"cannot write {Path(run) / 'report.html'}: {error.strerror}; free some space, or mend its "
            "permissions"
        ) from error
    state = {"report": str(path), "state": found.state, "bytes": path.stat().st_size}
    print(json.dumps(state, indent=2) if as_json else path)


def _confusion(path: Path) -> str:
    """Bring the confusion matrix up to date; return why that cannot be."""
    from distbp.cli.confusion import add_confusion
    from distbp.errors import DistbpError

    try:
        return add_confusion(path, budget_s=_BUDGET_S, hurry=False)
    except DistbpError as error:
        return str(error)
