"""`RUN/report.html`: a run on one page, in one file that needs no network.

`page` turns a `Run` into HTML; `write_report` reads the run and replaces the file.  It is made at the end of
every run, by `distbp report`, and again and again by `distbp watch --http`.  Curves are thinned, so a run of
a million steps makes a page as small as one of a thousand.

The page may fetch nothing and run nothing but its own script: its policy carries the script's hash.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import math
import os
import time
from pathlib import Path
from typing import Any

from distbp.metrics.charts import Curve, Point, chart, stacked
from distbp.metrics.report_parts import (
    confusion,
    diagnoses,
    escape,
    layers,
    settings,
    timeline,
    words_of,
    workers,
)
from distbp.metrics.run_files import DONE, FAILED, LOST, RUNNING, STOPPED, Run, read_run
from distbp.metrics.words import duration, figure, precise, share
from distbp.terminal import say

__all__ = ["page", "try_to_report", "what", "write_report"]

Record = dict[str, Any]

_STATES = {
    DONE: "finished",
    RUNNING: "running",
    STOPPED: "stopped on request",
    FAILED: "failed",
    LOST: "ended without a word",
}


def try_to_report(path: Path) -> None:
    """Write the report of a run that has ended; whatever goes wrong costs the report only."""
    try:
        write_report(path)
    except Exception as error:
        reason = error or type(error).__name__
        say(f"distbp: W_REPORT_LOST {path / 'report.html'}: {reason}; the run is not harmed")


def write_report(path: str | Path) -> Path:
    """Write `report.html` of the run in `path`, whole or not at all, and return where it is.

    Raises InputMissing if there is no run, OSError if the file cannot be written.
    """
    run = read_run(path)
    target, temporary = run.path / "report.html", run.path / "report.html.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(temporary, flags, 0o600), "w", encoding="utf-8") as file:
        file.write(page(run))
    os.replace(temporary, target)
    return target


def page(run: Run, *, live: bool = False) -> str:
    """Return the page; `live` lets it fetch itself anew."""
    script = _part("report.js") + (_part("live.js") if live else "")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    policy += "; connect-src 'self'" if live else ""
    sections = (_head(run, live), _ending(run), diagnoses(run), _curves(run), layers(run), confusion(run))
    rest = (timeline(run), workers(run), settings(run), _foot(run))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(run.path.name)}: {_STATES[run.state]}</title>"
        f"<style>{_part('report.css')}</style></head><body>"
        f'<main data-state="{run.state}">{"".join(sections)}{"".join(rest)}</main>'
        f"<script>{script}</script></body></html>\n"
    )


@functools.cache
def _part(name: str) -> str:
    """Return a file of the page's looks and script."""
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")


def what(run: Run) -> str:
    """Return what is trained on what: 'mlp on digits'; a script does not say."""
    data, model = run.table("data").get("path"), run.table("model").get("name")
    return f"{model} on {Path(str(data)).name}" if data and model else "trained by a script"


def _head(run: Run, live: bool) -> str:
    """Return name, state and the most important figures."""
    result = run.result
    parts = [escape(what(run))]
    if result.get("num_parameters"):
        parts.append(f"{result['num_parameters']:,} parameters")
    size = result.get("world_size") or max(
        (len(r.get("compute_ms") or []) for r in run.metrics.workers.items[-1:]), default=0
    )
    if size:
        hosts = result.get("hosts", 1)
        where = f" on {hosts} hosts" if hosts and hosts > 1 else ""
        parts.append(f"{size} worker{'s' if size > 1 else ''}{where}")
    if result.get("backend"):
        parts.append(f"backend {escape(result['backend'])}")
    bar = ""
    if run.state == RUNNING and run.total_steps:
        bar = f'<div class="progress"><i style="width:{100 * run.step / run.total_steps:.2f}%"></i></div>'
    tiles = "".join(
        f'<div class="tile"><small>{name}</small><b>{value}</b></div>' for name, value in _tiles(run)
    )
    note = '<p class="note" id="live">This page renews itself.</p>' if live else ""
    return (
        f'<div class="head"><h1>{escape(run.path.name)}</h1>'
        f'<span class="state {run.state}">{_STATES[run.state]}</span></div>'
        f'<p class="faint">{" · ".join(parts)}</p>{note}{bar}<div class="tiles">{tiles}</div>'
    )


def _tiles(run: Run) -> list[tuple[str, str]]:
    """Return the figures at the top: what it is and how much."""
    found: list[tuple[str, str]] = []
    validation = run.metrics.validation.newest or {}
    train = run.metrics.epochs.newest or run.metrics.train.newest or {}
    if validation.get("accuracy") is not None:
        found.append(("validation accuracy", share(validation["accuracy"])))
    if validation.get("loss") is not None:
        found.append(("validation loss", figure(validation["loss"])))
    if train.get("loss") is not None:
        found.append(("training loss", figure(train["loss"])))
    total = f" of {run.total_steps:,}" if run.total_steps else ""
    found.append(("steps", f"{run.step:,}{total}"))
    if run.seconds_left is not None:
        found.append(("time left", duration(run.seconds_left)))
    elif run.result.get("wall_seconds") is not None:
        found.append(("took", precise(run.result["wall_seconds"])))
    if run.samples_per_second:
        found.append(("samples a second", figure(run.samples_per_second)))
    if run.result.get("step_ms_median"):
        found.append(("median step", f"{figure(run.result['step_ms_median'])} ms"))
    if run.result.get("gflops_per_second"):
        found.append(("GFLOP a second", figure(run.result["gflops_per_second"])))
    if lost := len(run.of_kind("lost", "stuck", "corrupt")):
        found.append(("losses survived" if run.state in (DONE, RUNNING) else "losses", str(lost)))
    return found


def _ending(run: Run) -> str:
    """Return why a run ended that did not reach its end, and what can be done."""
    if run.state in (DONE, RUNNING):
        return ""
    if run.state == STOPPED:
        return (
            '<div class="card warn"><strong>Stopped on request</strong>'
            "<p>Its state is saved; the same command goes on from there.</p></div>"
        )
    culprits = run.of_kind("lost", "stuck", "corrupt")[-3:]
    listed = "".join(f"<li>{escape(words_of(event))}</li>" for event in culprits)
    if run.state == FAILED:
        message = escape(run.result.get("message", "")).replace("\n", "<br>")
        title = f"Failed with exit code {escape(run.result.get('exit_code', '?'))}"
    else:
        message = (
            "The job is gone and left no word: it was killed, or the machine went down. The same command "
            "goes on from its last checkpoint."
        )
        title = "Ended without a word"
    last = f"<p>Last events:</p><ul>{listed}</ul>" if listed else ""
    return f'<div class="card bad"><strong>{title}</strong><p>{message}</p>{last}</div>'


def _points(records: list[Record], field: str, factor: float = 1.0) -> list[Point]:
    """Return step and value of every record that has the field."""
    found = []
    for record in records:
        value = record.get(field)
        if value is None or isinstance(value, dict | list):
            continue
        try:
            found.append((float(record["step"]), float(value) * factor))
        except ValueError:
            continue
    return found


def _curves(run: Run) -> str:
    """Return the charts."""
    metrics = run.metrics
    steps, epochs, validation = metrics.train.all(), metrics.epochs.all(), metrics.validation.all()
    some = _points(epochs, "loss")
    loss = [
        Curve("training", some if len(some) > 1 else _points(steps, "loss"), 0),
        Curve("validation", _points(validation, "loss"), 1),
    ]
    noise = [Curve("training", _points(steps, "loss"), 0)] if len(some) > 1 else []
    accuracy = [
        Curve("training", _points(epochs, "accuracy", 100), 0),
        Curve("validation", _points(validation, "accuracy", 100), 1),
    ]
    entropy = [
        Curve("training", _points(epochs, "entropy") or _points(steps, "entropy"), 0),
        Curve("validation", _points(validation, "entropy"), 1),
    ]
    speed = _points(steps, "samples_per_second")
    scale = _points(epochs, "noise_scale") or _points(steps, "noise_scale")
    axis: dict[str, Any] = {"x_last": run.step, "x_label": "step"}
    charts = (
        chart("Loss", loss, unit="at the end of epochs" if len(some) > 1 else "", **axis),
        chart("Accuracy", accuracy, unit="% right at the end of epochs", linear=True, **axis),
        chart("Entropy of predictions", entropy, unit="nats", note=_guessing(run), **axis),
        chart("Loss of steps", noise, unit="means between records", **axis),
        chart("Learning rate", [Curve("rate", _points(steps, "lr"), 2)], zero=True, **axis),
        chart("Speed", [Curve("rate", speed, 3)], unit="samples a second", zero=True, **axis),
        stacked("A step on rank 0", _phases(steps), unit="mean ms by phase", **axis),
        chart("Gradient noise scale", [Curve("suggests batches of", scale, 4)], unit="samples", **axis),
    )
    shown = "".join(charts)
    if not shown:
        return '<h2>Curves</h2><p class="note">No measurement is recorded yet.</p>'
    return f'<h2>Curves</h2><div class="charts">{shown}</div>'


def _guessing(run: Run) -> str:
    """Return what the entropy of guessing would be."""
    classes = run.result.get("num_outputs") or 0
    return f"guessing among {classes:,} classes has {math.log(classes):.3f}" if classes > 1 else ""


def _phases(steps: list[Record]) -> list[Curve]:
    """Return the time of each phase of a step; the first step also warms up, and is left out."""
    timed = [record for record in steps if isinstance(record.get("step_ms"), dict)]
    timed = [record for record in timed if record["step"] > 1] or timed
    return [
        Curve(name, [(float(r["step"]), float(r["step_ms"].get(name) or 0.0)) for r in timed], color)
        for color, name in enumerate(("compute", "wait", "reduce", "update"))
    ]


def _foot(run: Run) -> str:
    """Return when this was written, and by what the parameters are known."""
    digest = run.result.get("parameters_sha256")
    known = f"Parameters <code>{escape(digest)}</code><br>" if digest else ""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"<footer>{known}<code>{escape(run.path)}</code><br>Written {stamp}.</footer>"
