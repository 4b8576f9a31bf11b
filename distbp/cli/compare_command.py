"""`distbp compare`: in what two runs differ: configuration, software, curves, results, bits.

Curves are compared where both runs measured the same thing: at the ends of epochs, whose figures are sums
over whole epochs, and at checkpoints of the same step, whose content is compared by hash.  Records between
them are means since the record before, at times that differ from run to run, and say nothing about equality.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from distbp.metrics.run_files import Run

__all__ = ["command"]

_WHERE_IT_RAN = ("run.out", "run.resume")
"""Keys that differ between any two runs."""

_FIGURES = (
    ("status", "state"),
    ("steps", "steps"),
    ("train_loss", "training loss"),
    ("validation.loss", "validation loss"),
    ("validation.accuracy", "validation accuracy"),
    ("wall_seconds", "seconds"),
    ("samples_per_second", "samples a second"),
    ("world_size", "workers"),
    ("restarts", "lost workers replaced"),
)


@click.command(help="Say in what the runs A and B differ: configuration, curves, results, bits.")
@click.argument("one", metavar="A")
@click.argument("other", metavar="B")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(one: str, other: str, as_json: bool) -> None:
    """Print the comparison."""
    from distbp.metrics.run_files import read_run

    runs = read_run(one), read_run(other)
    found = {
        "runs": [str(run.path) for run in runs],
        "configuration": _differing([_flat(run.config) for run in runs]),
        "environment": _differing([_flat(run.environment) for run in runs]),
        "results": {name: [_figure(run, key) for run in runs] for key, name in _FIGURES},
        "curves": _curves(*runs),
        "checkpoints": _checkpoints(*runs),
        "same_parameters": _same_parameters(*runs),
    }
    print(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found, one, other)))


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the values of nested tables by dotted names."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= {f"{name}.{key}": entry for key, entry in _flat(value).items()}
        else:
            found[name] = value
    return found


def _differing(tables: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the names under which two tables have different values, with both."""
    one, other = tables
    return {
        name: [one.get(name), other.get(name)]
        for name in {**one, **other}
        if one.get(name) != other.get(name) and name not in _WHERE_IT_RAN
    }


def _figure(run: Run, key: str) -> Any:
    """Return a figure of the result, or what the records say of a run that has none."""
    value: Any = run.result
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None and key in ("status", "steps"):
        return run.state if key == "status" else run.step
    if value is None and key.startswith("validation."):
        return (run.metrics.validation.newest or {}).get(key.partition(".")[2])
    return value


def _curves(one: Run, other: Run) -> dict[str, Any]:
    """Return up to which step the figures of epochs are the same, and the first where they differ."""
    same_to, differs_at, where = None, None, None
    epochs: list[dict[tuple[str, int], tuple[Any, Any]]] = []
    for run in (one, other):
        records = [*run.metrics.epochs.all(), *run.metrics.validation.all()]
        epochs.append({(r["kind"], r["step"]): (r.get("loss"), r.get("accuracy")) for r in records})
    shared = sorted(epochs[0].keys() & epochs[1].keys(), key=lambda key: (key[1], key[0]))
    for kind, step in shared:
        if repr(epochs[0][kind, step]) != repr(epochs[1][kind, step]):  # NaN equals NaN here.
            differs_at, where = step, kind
            break
        same_to = step
    losses = [found[where, differs_at][0] for found in epochs] if where and differs_at else None
    return {
        "compared": len(shared),
        "same_to": same_to,
        "differs_at": differs_at,
        "in": where,
        "loss": losses,
    }


def _checkpoints(one: Run, other: Run) -> dict[str, Any]:
    """Return at which steps both runs have a checkpoint, and whether those hold the same state."""
    held = [_state_hashes(run) for run in (one, other)]
    shared = sorted(held[0].keys() & held[1].keys())
    return {str(step): held[0][step] == held[1][step] for step in shared}


def _state_hashes(run: Run) -> dict[int, str]:
    """Return the hash of the state in every checkpoint, by step, as its manifest says."""
    found = {}
    for manifest in (run.path / "checkpoints").glob("step-*/manifest.json"):
        try:
            files = json.loads(manifest.read_text())["files"]
            found[int(manifest.parent.name.removeprefix("step-"))] = files["state.safetensors"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def _same_parameters(one: Run, other: Run) -> bool | None:
    """Return whether both runs ended with the same parameters; None if one has no result."""
    hashes = [run.result.get("parameters_sha256") for run in (one, other)]
    return None if None in hashes else hashes[0] == hashes[1]


def _lines(found: dict[str, Any], one: str, other: str) -> Iterator[str]:
    """Yield the comparison as text."""
    yield from _pairs("configuration", found["configuration"], one, other)
    yield from _pairs("environment", found["environment"], one, other)
    yield "results"
    rows = [(name, *_shown_beside(pair)) for name, pair in found["results"].items() if pair != [None, None]]
    yield from _columns([("", one, other), *rows])
    curves = found["curves"]
    yield ""
    if not curves["compared"]:
        yield "curves      no epoch ended at the same step in both"
    elif curves["differs_at"] is None:
        yield f"curves      the same at the ends of all epochs that both have, up to step {curves['same_to']}"
    else:
        first, second = _shown_beside(curves["loss"])
        before = f"the same up to step {curves['same_to']}, " if curves["same_to"] else ""
        kind = "training" if curves["in"] == "train" else "validation"
        where = f"{before}differ first at step {curves['differs_at']}"
        yield f"curves      {where}: {kind} loss {first} and {second}"
    for step, same in found["checkpoints"].items():
        yield f"checkpoint  step {step}: {'the same state' if same else 'different states'}"
    verdict = {True: "the same bits", False: "different bits", None: "not known: a run has no result"}
    yield f"parameters  {verdict[found['same_parameters']]}"


def _pairs(title: str, differing: dict[str, list[Any]], one: str, other: str) -> Iterator[str]:
    """Yield the values that differ, or that none does."""
    if not differing:
        yield f"{title}: no difference"
    else:
        yield title
        yield from _columns(
            [("", one, other), *((name, *map(_shown, pair)) for name, pair in differing.items())]
        )
    yield ""


def _columns(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield lines with aligned columns; names in a file from elsewhere cannot speak to the terminal."""
    rows = [tuple("".join(c if c.isprintable() else "?" for c in cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _shown_beside(pair: list[Any]) -> list[str]:
    """Return two values as cells: numbers with six digits, and with all where those would look the same."""
    one, other = (f"{value:.6g}" if isinstance(value, float) else _shown(value) for value in pair)
    return [_shown(value) for value in pair] if one == other and pair[0] != pair[1] else [one, other]


def _shown(value: Any) -> str:
    """Return a value as a cell: equal texts for equal values only."""
    if value is None:
        return "-"
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= 40 else text[:39] + "…"
