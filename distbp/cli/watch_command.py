"""`distbp watch`: a run in the terminal or in a browser, from any shell, while it goes on or afterwards.

It only reads files, so it cannot disturb the run.  Without a terminal, in a pipe, it prints how things stand
and ends.  With one it redraws until the run ends or Ctrl-C.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.text import Text

    from distbp.metrics.run_files import Run

__all__ = ["command"]

_EVERY_S = 0.5


@click.command(
    help="Look at the run in RUN: loss, accuracy, rate, time left, workers, warnings. Ctrl-C ends it."
)
@click.argument("run", metavar="RUN")
@click.option("--http", is_flag=True, help="Show the report in a browser on this machine, always up to date.")
@click.option("--port", type=click.IntRange(0, 65535), help="Port of --http.  [default: a free one]")
@click.option("--once", is_flag=True, help="Print how things stand, and end.")
@click.option("--json", "as_json", is_flag=True, help="Print how things stand as one JSON object, and end.")
def command(run: str, http: bool, port: int | None, once: bool, as_json: bool) -> None:
    """Show the run."""
    from distbp.errors import ConfigError
    from distbp.metrics.run_files import read_run

    if port is not None and not http:
        raise ConfigError("--port: expected together with --http, which serves a page; add --http")
    found = read_run(run)
    if as_json:
        _print_json(found)
    elif http:
        _serve(found.path, port or 0)
    elif once or not sys.stdout.isatty():
        from distbp.metrics.watch_view import snapshot

        print(snapshot(found))
    else:
        _follow(found)


def _follow(found: Run) -> None:
    """Redraw until the run has ended; what was drawn last stays."""
    from rich.console import Console
    from rich.live import Live

    from distbp.metrics.run_files import RUNNING, read_run
    from distbp.metrics.watch_view import screen

    console = Console()

    def draw() -> Text:
        return screen(found, console.width, max(3, console.height - 1))

    try:
        with Live(draw(), console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while found.state == RUNNING:
                time.sleep(_EVERY_S)
                found = read_run(found.path, found.metrics)
                live.update(draw(), refresh=True)
    except KeyboardInterrupt:
        return


def _serve(path: Path, port: int) -> None:
    """Serve the page until Ctrl-C."""
    from distbp.errors import EnvironmentMismatch
    from distbp.metrics.live_page import LivePage

    try:
        live = LivePage(path, port)
    except OSError as error:
        raise EnvironmentMismatch(
            f"--port {port}: cannot listen there: {error.strerror}; choose another, or leave --port out"
        ) from error
    print(f"{live.address}\nopen this in a browser on this machine; Ctrl-C ends it", flush=True)
    try:
        live.serve()
    except KeyboardInterrupt:
        return


def _print_json(found: Run) -> None:
    """Print what a program wants to know."""
    import json

    from distbp.metrics.report_parts import worker_rows

    train, validation = found.metrics.train.newest, found.metrics.validation.newest
    print(
        json.dumps(
            {
                "run": str(found.path),
                "state": found.state,
                "step": found.step,
                "total_steps": found.total_steps,
                "samples_per_second": found.samples_per_second,
                "seconds_left": found.seconds_left,
                "train": train,
                "validation": validation,
                "workers": worker_rows(found),
                "diagnoses": found.of_kind("diagnosis"),
                "losses": found.of_kind("lost", "stuck", "corrupt"),
                "result": found.result or None,
            },
            indent=2,
        )
    )
