"""A run as a terminal shows it: state, figures, curves of one line, bars of the workers, what went wrong.

`snapshot` returns lines without escape sequences, for a pipe; `screen` the same for rich, coloured.  Nothing
that comes from a file reaches the terminal as it is: control characters are taken out.
"""

from __future__ import annotations

import textwrap
import time
from typing import TYPE_CHECKING, Any

from distbp.metrics.report import what
from distbp.metrics.report_parts import words_of, worker_rows
from distbp.metrics.run_files import DONE, FAILED, LOST, RUNNING, STOPPED, Run
from distbp.metrics.words import duration, figure, precise, share

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["screen", "snapshot"]

_STATES = {
    RUNNING: ("running", "bold blue"),
    DONE: ("finished", "bold green"),
    STOPPED: ("stopped on request", "bold yellow"),
    FAILED: ("failed", "bold red"),
    LOST: ("ended without a word", "bold red"),
}
_BLOCKS = "▁▂▃▄▅▆▇█"
_MOST_EVENTS = 5
_MOST_WORKERS = 16

Line = list[tuple[str, str]]
"""Texts, each with its style."""


def snapshot(run: Run, width: int = 100) -> str:
    """Return the lines as plain text."""
    return "\n".join("".join(text for text, _ in line).rstrip() for line in _lines(run, width))


def screen(run: Run, width: int, height: int) -> Text:
    """Return the lines as rich shows them, as many as fit."""
    from rich.text import Text

    shown = Text()
    for number, line in enumerate(_lines(run, width)[:height]):
        if number:
            shown.append("\n")
        for text, style in line:
            shown.append(text, style)
    shown.no_wrap, shown.overflow = True, "ellipsis"
    return shown


def _lines(run: Run, width: int) -> list[Line]:
    """Return all lines."""
    word, style = _STATES[run.state]
    size = run.result.get("world_size") or len(worker_rows(run))
    workers = f", {size} worker{'s' if size > 1 else ''}" if size else ""
    lines: list[Line] = [
        [
            (_plain(run.path.name), "bold"),
            ("  ", ""),
            (word, style),
            (f"  {_plain(what(run))}{workers}", "dim"),
        ]
    ]
    lines += [*_progress(run, width), [], *_figures(run, width)]
    rows = _workers(run, width)
    lines += [[], *rows] if rows else []
    news = _news(run, width)
    return [*lines, [], *news] if news else lines


def _progress(run: Run, width: int) -> list[Line]:
    """Return how far the run is, and how long it will take."""
    total, step = run.total_steps, run.step
    newest = [record for record in (run.metrics.train.newest, run.metrics.epochs.newest) if record]
    epoch = max(newest, key=lambda record: record["step"], default={}).get("epoch")
    parts = [f"step {step:,}" + (f" of {total:,}" if total else "")]
    if isinstance(epoch, int | float):
        parts.append(f"epoch {epoch:.1f}")
    if run.seconds_left is not None:
        parts.append(f"{duration(run.seconds_left)} left")
    elif run.result.get("wall_seconds") is not None:
        parts.append(f"took {precise(run.result['wall_seconds'])}")
    if run.state == RUNNING and run.changed and time.time() - run.changed > 10:
        parts.append(f"no record for {duration(time.time() - run.changed)}")
    line: Line = []
    if total:
        room = max(10, min(40, width - 50))
        done = min(room, round(room * step / total))
        line += [("━" * done, "blue"), ("─" * (room - done), "dim"), ("  ", "")]
    return [[*line, (", ".join(parts), "")]]


def _figures(run: Run, width: int) -> list[Line]:
    """Return the figures, each with its curve."""
    metrics = run.metrics
    epochs, validation, steps = metrics.epochs.all(), metrics.validation.all(), metrics.train.all()
    room = max(10, min(48, width - 40))
    some = [record.get("loss") for record in epochs]
    rows = (
        ("training loss", some if len(some) > 1 else [record.get("loss") for record in steps], figure),
        ("validation loss", [record.get("loss") for record in validation], figure),
        ("training accuracy", [record.get("accuracy") for record in epochs], share),
        ("validation accuracy", [record.get("accuracy") for record in validation], share),
        ("entropy, nats", [record.get("entropy") for record in epochs or steps], figure),
        ("learning rate", [record.get("lr") for record in steps], figure),
        ("samples a second", [record.get("samples_per_second") for record in steps], figure),
    )
    lines: list[Line] = []
    for name, values, show in rows:
        numbers = [value for value in values if isinstance(value, int | float)]
        if numbers:
            shown = show(numbers[-1])
            lines.append(
                [
                    (f"{name:<20}", "dim"),
                    (f"{shown:>12}", "bold"),
                    ("  ", ""),
                    (_curve(numbers, room), "cyan"),
                ]
            )
    return lines or [[("nothing is recorded yet", "dim")]]


def _workers(run: Run, width: int) -> list[Line]:
    """Return a bar for each worker: how long it computed, how long it waited."""
    rows = worker_rows(run)
    unit = "s" if any("compute_s" in row for row in rows) else "ms"
    times = [
        (row, float(row.get(f"compute_{unit}") or 0), float(row.get(f"wait_{unit}") or 0)) for row in rows
    ]
    longest = max((compute + wait for _, compute, wait in times), default=0.0)
    if not longest:
        return []
    room = max(10, min(48, width - 48))
    head = "seconds in all" if unit == "s" else "ms a step"
    lines: list[Line] = [[("worker", "dim"), (f"{'compute':>12}{'wait':>10}  {head}", "dim")]]
    for row, compute, wait in times[:_MOST_WORKERS]:
        filled = round(room * compute / longest)
        waited = round(room * (compute + wait) / longest) - filled
        cost = f"  cost {figure(row['cost_s'])} s" if row.get("cost_s") else ""
        lines.append(
            [
                (f"{row['rank']:>6}{figure(compute):>12}{figure(wait):>10}  ", ""),
                ("█" * filled, "blue"),
                ("░" * waited, "yellow"),
                (cost, "yellow"),
            ]
        )
    if len(times) > _MOST_WORKERS:
        lines.append([(f"and {len(times) - _MOST_WORKERS} more workers", "dim")])
    return lines


def _news(run: Run, width: int) -> list[Line]:
    """Return why the run failed, what it found out about itself, and its last events."""
    lines: list[Line] = []
    if run.state == FAILED:
        code, message = run.result.get("exit_code", "?"), str(run.result.get("message", ""))
        lines += _wrapped(f"exit code {code}: {message}", "red", width)
    if run.state == LOST:
        lines.append(
            [("the job is gone and left no word; the same command goes on from its checkpoint", "red")]
        )
    latest: dict[str, dict[str, Any]] = {}
    for event in run.of_kind("diagnosis"):
        latest[str(event.get("name"))] = event
    for event in latest.values():
        lines += _wrapped(f"! {words_of(event)}", "yellow", width)
        if event.get("remedy"):
            lines += _wrapped(f"  {event['remedy']}", "", width)
    others = [event for event in run.events if event.get("kind") not in ("diagnosis", "start")]
    for event in others[-_MOST_EVENTS:]:
        ago = time.strftime("%H:%M:%S", time.localtime(event.get("time", 0)))
        quiet = event.get("kind") == "checkpoint" and event.get("status") == "saved"
        lines += _wrapped(f"{ago}  {words_of(event)}", "dim" if quiet else "yellow", width)
    return lines


def _wrapped(text: str, style: str, width: int) -> list[Line]:
    """Return the text in lines that fit."""
    rows = textwrap.wrap(_plain(text), max(20, width - 1), subsequent_indent="    ", drop_whitespace=True)
    return [[(row, style)] for row in rows]


def _curve(values: list[float], room: int) -> str:
    """Return a curve of one line, at most `room` characters."""
    step = max(1, -(-len(values) // room))
    means = [sum(values[at : at + step]) / len(values[at : at + step]) for at in range(0, len(values), step)]
    finite = [mean for mean in means if abs(mean) < float("inf")]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    top = len(_BLOCKS) - 1
    scaled = (round((mean - low) / (high - low) * top) if high > low else 0 for mean in finite)
    return "".join(_BLOCKS[level] for level in scaled)


def _plain(text: str) -> str:
    """Return the text without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
