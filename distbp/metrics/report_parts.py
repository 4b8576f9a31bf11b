"""The sections of the report below the curves: diagnoses, layers, confusion, timeline, workers, settings.

Each takes a `Run` and returns HTML, empty if the run has nothing to say about it.  Whatever comes from a file
goes through `escape`: names of classes, tensors and hosts are other people's.
"""

from __future__ import annotations

import html
import json
import math
import time
from collections.abc import Sequence
from typing import Any

from distbp.metrics.charts import scale_bar, strip
from distbp.metrics.run_files import RUNNING, Run
from distbp.metrics.words import duration, figure, share

__all__ = [
    "confusion",
    "diagnoses",
    "escape",
    "layers",
    "settings",
    "timeline",
    "words_of",
    "worker_rows",
    "workers",
]

Record = dict[str, Any]

MOST_CLASSES_SHOWN = 20
_MOST_ROWS = 60


def escape(value: object) -> str:
    """Return a value as text that cannot become markup."""
    return html.escape(str(value), quote=True)


def diagnoses(run: Run) -> str:
    """Return what the run found out about itself, each with its remedy."""
    found: dict[str, Record] = {}
    for event in run.of_kind("diagnosis"):
        found[str(event.get("name"))] = event
    cards = []
    for name, event in found.items():
        remedy = f"<p>{escape(event['remedy'])}</p>" if event.get("remedy") else ""
        evidence = event.get("evidence") or {}
        short = {key: value for key, value in evidence.items() if not isinstance(value, dict)}
        listed = "; ".join(f"{escape(key)} {escape(_short(value))}" for key, value in short.items())
        cards.append(
            f'<div class="card warn"><strong>{escape(name.replace("_", " "))}</strong> '
            f"<small>step {escape(event.get('step', '-'))}</small>"
            f"<p>{escape(event.get('message', ''))}</p>{remedy}"
            + (f'<p class="note">{listed}</p>' if listed else "")
            + "</div>"
        )
    return f"<h2>Diagnosis</h2>{''.join(cards)}" if cards else ""


def layers(run: Run) -> str:
    """Return a strip for each tensor: the norm of its gradient, its update, and units that do nothing."""
    records = run.metrics.layers.all()
    parts = [
        _strips(records, "gradient_norm", "Norm of the gradient", "of each tensor"),
        _strips(records, "update_ratio", "Update by weight", "norm of an update by that of the tensor"),
        _strips(records, "inactive", "Inactive units", "share of a layer's units that are dead or saturated"),
    ]
    shown = "".join(filter(None, parts))
    if not shown:
        return ""
    first, last = records[0]["step"], records[-1]["step"]
    where = f"From step {first:,} on the left to {last:,} on the right; the number is the last one."
    where = where if last > first else f"At step {first:,}, the first that was looked at."
    return f"<h2>Layers</h2><p class='note'>{where}</p>{shown}"


def _strips(records: Sequence[Record], field: str, title: str, meaning: str) -> str:
    """Return the strips of one kind of figure."""
    there = [record[field] for record in records if isinstance(record.get(field), dict)]
    fullest: Record = max(there, key=len, default={})  # Early records may lack some.
    names = list(dict.fromkeys([*fullest, *(name for values in there for name in values)]))
    if not names:
        return ""
    plain = field == "inactive"
    rows = {name: [_level(values.get(name), plain) for values in there] for name in names}
    levels = [level for row in rows.values() for level in row if level is not None]
    low, high = (0.0, 1.0) if plain else (min(levels, default=0.0), max(levels, default=0.0))
    long = "tall" if len(rows) > _MOST_ROWS else "short"
    ends = ("0 %", "100 %") if plain else (figure(10**low), figure(10**high))
    body = ""
    for name, row in rows.items():
        last = there[-1].get(name)
        shown = share(last) if plain and isinstance(last, int | float) else figure(last)
        label = escape(name)
        body += f'<span title="{label}">{label}</span>{strip(row, low, high)}<span class="n">{shown}</span>'
    return (
        f'<div class="card"><strong>{title}</strong> '
        f'<small>{meaning}; <span class="nowrap">{ends[0]}{scale_bar()}{ends[1]}</span></small>'
        f'<div class="{long}"><div class="layers">{body}</div></div></div>'
    )


def _level(value: object, plain: bool) -> float | None:
    """Return where a value lies on the scale of colours; None if it cannot be shown."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if plain:
        return float(value)
    return math.log10(value) if value > 0 else None


def confusion(run: Run) -> str:
    """Return which classes were taken for which: a table for few classes, the commonest errors for many."""
    counts, classes = run.confusion.get("counts"), run.confusion.get("classes")
    if not counts or not classes:
        return ""
    total = sum(map(sum, counts))
    right = sum(counts[index][index] for index in range(len(classes)))
    of = run.confusion.get("of") or total
    part = "" if total >= of else f", a part of the {of:,} that there are"
    head = (
        f'<h2>Confusion</h2><p class="note">{total:,} answers of the validation samples{part}, at step '
        f"{run.confusion.get('step', 0):,}: {right:,} right, {share(right / max(total, 1))}.</p>"
    )
    errors = _commonest_errors(counts, classes)
    few = len(classes) <= MOST_CLASSES_SHOWN
    table = f'<div class="card wide">{_matrix(counts, classes)}</div>' if few else ""
    return f'{head}<div class="pair">{table}{errors}</div>'


def _matrix(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Return a table of counts, darker where a class of the data more often got that answer."""
    head = "".join(f'<th title="{escape(name)}">{escape(_cut(name, 6))}</th>' for name in classes)
    body = ""
    for index, row in enumerate(counts):
        total = sum(row) or 1
        cells = ""
        for column, count in enumerate(row):
            color = "var(--good)" if index == column else "var(--bad)"
            strength = round(100 * (count / total) ** 0.5 * 0.7)
            back = (
                f' style="background:color-mix(in srgb, {color} {strength}%, transparent)"' if count else ""
            )
            title = f"{classes[index]} taken for {classes[column]}: {count}"
            cells += f'<td{back} title="{escape(title)}">{count or ""}</td>'
        body += f'<tr><th class="row">{escape(classes[index])}</th>{cells}</tr>'
    return (
        f'<table class="matrix"><tr><th></th>{head}</tr>{body}</table>'
        '<p class="note">Row: what it is. Column: the answer.</p>'
    )


def _commonest_errors(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Return the errors that were made most often."""
    found = [
        (count, index, column)
        for index, row in enumerate(counts)
        for column, count in enumerate(row)
        if index != column and count
    ]
    if not found:
        return ""
    found.sort(key=lambda error: (-error[0], error[1], error[2]))
    rows = "".join(
        f'<tr><td>{escape(classes[index])}</td><td>{escape(classes[column])}</td><td class="n">{count:,}</td>'
        f'<td class="n">{share(count / max(1, sum(counts[index])))}</td></tr>'
        for count, index, column in found[:12]
    )
    return (
        '<div class="card wide"><strong>Commonest errors</strong><table><tr><th>it is</th><th>the answer</th>'
        f'<th class="n">times</th><th class="n">of that class</th></tr>{rows}</table></div>'
    )


_MARKS = {"start": "begin", "checkpoint": "save", "diagnosis": "word", "straggler": "word"}
"""Kind of an event -> how it is marked; all others are losses."""


def timeline(run: Run) -> str:
    """Return when the run began, was interrupted, saved and ended."""
    timed = [event for event in run.events if isinstance(event.get("time"), int | float)]
    began = run.began
    if not timed or began is None:
        return ""
    end = time.time() if run.state == RUNNING else (run.changed or began)
    span = max(end - began, 1e-3)

    def place(moment: float) -> float:
        return round(100 * min(max((moment - began) / span, 0.0), 1.0), 2)

    starts = [event["time"] for event in timed if event["kind"] == "start"] or [began]
    bars = ""
    for number, begun in enumerate(starts):
        until = end
        if number + 1 < len(starts):
            until = max([event["time"] for event in timed if event["time"] < starts[number + 1]] + [begun])
        bars += f'<i class="bar" style="left:{place(begun)}%;width:{place(until) - place(begun):.2f}%"></i>'
    # Marks that nobody could tell from each other are drawn once.
    spots = {(_MARKS.get(event["kind"], "loss"), round(place(event["time"]) * 2)): event for event in timed}
    marks = "".join(
        f'<i class="mark {kind}" style="left:{place(event["time"])}%" title="{escape(words_of(event))}"></i>'
        for (kind, _), event in spots.items()
    )
    told = [event for event in timed if event["kind"] != "checkpoint" or event.get("status") != "saved"]
    hidden = max(0, len(told) - _MOST_ROWS)
    listed = told[: _MOST_ROWS // 2] + told[len(told) - _MOST_ROWS // 2 :] if hidden else told
    rows = "".join(
        f'<tr><td class="n">{duration(event["time"] - began)}</td><td>{escape(words_of(event))}</td></tr>'
        for event in listed
    )
    saved = [e for e in timed if e["kind"] == "checkpoint" and e.get("status") == "saved"]
    several = f"{len(saved):,} checkpoint{'s' if len(saved) > 1 else ''} saved, the last"
    notes = f"{several} of step {saved[-1].get('step', 0):,}. " if saved else ""
    notes += f"{hidden} events in the middle are left out." if hidden else ""
    stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))
    return (
        f'<h2>Timeline</h2><div class="card timeline"><div class="track">{bars}{marks}</div>'
        f'<div class="ends"><span>{stamp}</span><span>{duration(span)} later</span></div>'
        f'<p class="note">{notes}</p><div class="tall"><table>{rows}</table></div></div>'
    )


def words_of(event: Record) -> str:
    """Return an event in words."""
    kind, step = event.get("kind"), event.get("step")
    at = f" at step {step:,}" if isinstance(step, int) and step >= 0 else ""
    if kind == "start":
        return f"start {event.get('start', '')} on host {event.get('host', '?')}, from step {step or 0:,}"
    if kind == "checkpoint":
        reason = f": {event['reason']}" if event.get("reason") else ""
        return f"checkpoint {event.get('status', '')}{at}{reason}"
    if kind == "lost":
        cause = event.get("cause", "")
        return f"worker {event.get('rank', '?')} on host {event.get('host', '?')} lost{at}: {cause}"
    if kind == "stuck":
        return f"worker {event.get('rank', '?')} stuck{at}: {event.get('cause', event.get('phase', ''))}"
    if kind == "restart":
        return f"training goes on{at}"
    if kind == "corrupt":
        return f"state corrupted{at}, tensor {event.get('tensor', '?')} on host {event.get('host', '?')}"
    if kind == "straggler":
        return (
            f"worker {event.get('rank')} holds the others up{at}: {_ms(event.get('seconds'))} a step, "
            f"the others {_ms(event.get('others'))}, {figure(event.get('cost'))} s lost so far"
        )
    if kind == "diagnosis":
        return f"{str(event.get('name', '')).replace('_', ' ')}{at}: {event.get('message', '')}"
    rest = {key: value for key, value in event.items() if key not in ("time", "kind", "step")}
    return f"{kind}{at} {_short(rest) if rest else ''}"


def worker_rows(run: Run) -> list[Record]:
    """Return compute, wait and cost in seconds of each worker, as far as the run knows them.

    A finished run has the sums of all steps; one that goes on has means of those that were recorded, in
    milliseconds a step.
    """
    found = run.result.get("workers")
    if isinstance(found, list) and found:
        return [row for row in found if isinstance(row, dict)]
    records = run.metrics.workers.all()[-60:]
    size = max((len(record.get("compute_ms") or []) for record in records), default=0)
    rows = []
    for rank in range(size):
        row: Record = {"rank": rank}
        for phase in ("compute", "wait"):
            values = [
                record[f"{phase}_ms"][rank]
                for record in records
                if rank < len(record.get(f"{phase}_ms") or [])
            ]
            row[f"{phase}_ms"] = sum(values) / len(values) if values else 0.0
        rows.append(row)
    return rows


def workers(run: Run) -> str:
    """Return who computed, who waited, and who held the others up."""
    rows = worker_rows(run)
    named = {str(event.get("rank")): event for event in run.of_kind("straggler")}
    lost: dict[str, int] = {}
    for event in run.of_kind("lost", "stuck"):
        lost[str(event.get("rank"))] = lost.get(str(event.get("rank")), 0) + 1
    if not rows:
        rows = [{"rank": rank} for rank in sorted({*named, *lost})]
    if not rows:
        return ""
    unit = "s" if any("compute_s" in row for row in rows) else "ms"
    hosts = len({row.get("host") for row in rows}) > 1
    head = '<th class="n">hosts s</th>' if hosts else ""
    note = " Hosts: what its host waited for the slowest one." if hosts else ""
    body = ""
    for row in rows:
        rank = str(row.get("rank"))
        cost = row.get("cost_s", named.get(rank, {}).get("cost"))
        body += _worker(row, unit, [row.get("host_wait_s")] if hosts else [], [cost, lost.get(rank) or None])
    span = "of the whole run" if unit == "s" else "a step, mean of the last records"
    return (
        '<h2>Workers</h2><div class="card wide"><div class="tall"><table class="workers"><tr><th>rank</th>'
        f'<th class="n">computed {unit}</th><th class="n">waited {unit}</th>'
        f'{head}<th class="n">cost s</th><th class="n">lost</th></tr>{body}</table></div><p class="note">'
        '<span class="key"><i class="c0"></i>compute</span> <span class="key"><i class="c1"></i>wait</span>, '
        f"{span}. Cost: what the others waited for this worker. Lost: how often it was replaced.{note}"
        "</p></div>"
    )


def _worker(row: Record, unit: str, between: list[object], rest: list[object]) -> str:
    """Return the figures of one worker, and below them the shares of its time as a bar."""
    values = (row.get(f"compute_{unit}"), row.get(f"wait_{unit}"))
    compute, wait = (value if isinstance(value, int | float) else 0.0 for value in values)
    host = row.get("host") if between or not isinstance(row.get("host"), int) else None
    name = escape(row.get("rank")) + ("" if host is None else f" <small>on {escape(host)}</small>")
    cells = "".join(f'<td class="n">{escape(_short(value))}</td>' for value in (*values, *between, *rest))
    figures = f"<tr><td>{name}</td>{cells}</tr>"
    if not compute + wait > 0:
        return figures
    share_of_compute = 100 * compute / (compute + wait)
    return (
        f'{figures}<tr class="bars"><td colspan="6"><div class="share">'
        f'<i class="c0" style="width:{share_of_compute:.1f}%"></i>'
        f'<i class="c1" style="width:{100 - share_of_compute:.1f}%"></i></div></td></tr>'
    )


def settings(run: Run) -> str:
    """Return configuration and environment, folded away."""
    flat = []
    for name, value in run.config.items():
        entries = value.items() if isinstance(value, dict) else [("", value)]
        flat += [(f"{name}.{key}".rstrip("."), entry) for key, entry in entries]
    parts = []
    if flat:
        parts.append(_folded("Configuration", flat))
    if run.environment:
        parts.append(_folded("Environment", list(run.environment.items())))
    result = [(key, value) for key, value in run.result.items() if key != "workers"]
    if result:
        parts.append(_folded("Result", result))
    return f"<h2>Details</h2>{''.join(parts)}" if parts else ""


def _folded(title: str, rows: Sequence[tuple[str, object]]) -> str:
    """Return a table that opens when it is asked for."""
    body = "".join(
        f"<tr><td>{escape(name)}</td><td><code>{escape(_short(value, 300))}</code></td></tr>"
        for name, value in rows
    )
    return f'<details><summary>{title}</summary><div class="card wide"><table>{body}</table></div></details>'


def _short(value: object, most: int = 160) -> str:
    """Return a value on one line, figures with four digits."""
    if value is None or isinstance(value, float):
        return figure(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return _cut(text, most)


def _cut(text: str, most: int) -> str:
    """Return the text, cut if it is too long."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _ms(seconds: object) -> str:
    """Return seconds as milliseconds."""
    return f"{seconds * 1e3:.1f} ms" if isinstance(seconds, int | float) else "-"
