"""`distbp inspect`: what a checkpoint holds, and whether every hash of it holds.

Nothing is repaired and nothing falls back: the newest checkpoint of a run is shown even if it is damaged,
with what is wrong, and the exit code is then 65.  It works for checkpoints of scripts too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

__all__ = ["command"]


@click.command(help="Show what a checkpoint, or the newest one of a run, holds and whether it is whole.")
@click.argument("path", metavar="CHECKPOINT|RUN")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all metadata.")
@click.option("--verify", is_flag=True, help="Only judge, but every checkpoint of a run: one line each.")
def command(path: str, as_json: bool, verify: bool) -> int:
    """Return 0 if everything that was looked at is whole, else 65."""
    from distbp import checkpoint
    from distbp.cli.model import checkpoints_of
    from distbp.errors import CheckpointError

    folders = checkpoints_of(path)
    if verify:
        found = [{"path": str(folder), "problems": checkpoint.verify(folder)} for folder in folders]
        print(json.dumps(found, indent=2) if as_json else "\n".join(map(_verdict, found)))
    else:
        found = [checkpoint.describe(folders[0])]
        print(json.dumps(found[0], indent=2) if as_json else "\n".join(_lines(found[0])))
    return CheckpointError.exit_code if any(one["problems"] for one in found) else 0


def _verdict(found: dict[str, Any]) -> str:
    """Return one line on one checkpoint."""
    problems = found["problems"]
    return (
        f"{'DAMAGED' if problems else 'ok':<9}{found['path']}{'  ' if problems else ''}{'; '.join(problems)}"
    )


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield the description of one checkpoint: head, metadata, tensors, files, verdict."""
    yield f"{'checkpoint':<14}{found['path']}"
    yield f"{'step':<14}{'not legible' if found['step'] is None else found['step']}"
    yield f"{'bytes':<14}{sum(file['bytes'] for file in found['files']):,}"
    for name, value in _key_metadata(found["metadata"] or {}).items():
        # As JSON, so that nothing in a file from elsewhere can speak to the terminal.
        yield f"{name:<14}{value if isinstance(value, str) and value.isprintable() else json.dumps(value)}"
    if found["tensors"]:
        yield ""
        yield from _table(
            ("tensor", "dtype", "shape", "bytes"),
            [(t["name"], t["dtype"], str(tuple(t["shape"])), f"{t['bytes']:,}") for t in found["tensors"]],
        )
    if found["files"]:
        yield ""
        yield from _table(
            ("file", "sha256", "verdict", "bytes"),
            [
                (f["name"], f["sha256"][:16], "DAMAGED" if f["problem"] else "ok", f"{f['bytes']:,}")
                for f in found["files"]
            ],
        )
    yield ""
    if not found["problems"]:
        yield "every hash holds"
    for problem in found["problems"]:
        yield f"DAMAGED: {problem}"


def _key_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return what a person wants to know first; whatever a checkpoint does not say is left out."""
    config, identity = _table_of(metadata, "config"), _table_of(metadata, "identity")
    preprocessing, environment = _table_of(metadata, "preprocessing"), _table_of(metadata, "environment")
    classes = preprocessing.get("classes")
    chosen = {
        "data": _table_of(config, "data").get("path"),
        "task": preprocessing.get("task"),
        "classes": len(classes) if isinstance(classes, list) else None,
        "sample shape": identity.get("input_shape"),
        "model": identity.get("model"),
        "loss": _table_of(identity, "loss").get("kind"),
        "optimizer": _table_of(identity, "optimizer").get("kind"),
        "seed": identity.get("seed"),
        "batch size": identity.get("batch_size"),
        "micro-batch": identity.get("micro_batch"),
        "numpy": environment.get("numpy"),
        "blas": _table_of(environment, "blas").get("kernel"),
    }
    return {name: value for name, value in chosen.items() if value is not None}


def _table_of(metadata: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the table `key` of the metadata, empty if a script stored none or something else there."""
    value = metadata.get(key)
    return value if isinstance(value, dict) else {}


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Yield lines with aligned columns, the last one to the right: it holds numbers."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        texts = [cell.ljust(width) for cell, width in zip(row[:-1], widths, strict=False)]
        yield "  ".join([*texts, row[-1].rjust(widths[-1])])
