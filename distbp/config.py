"""The run's configuration: one call joins defaults, file, environment, flags and `-o`, and checks everything.

Last wins: defaults < TOML or JSON file < `DISTBP_*` environment < flags < `-o a.b=c`.  Each layer is checked
whole, also where a later one overrides it: a mistake that has no effect today is still a mistake.  All are
reported by one ConfigError, one line each, with the place where they were made.

    config_schema.py   which keys there are: name, type, range, default, description
    config_check.py    is this value right, do these values fit together, what is the nearest name
    config_read.py     files, environment, flags and -o, each as (origin, key, value)
    config_write.py    TOML, dictionaries, JSON schema, list of keys

None of these imports NumPy: `distbp --help` and a refused configuration cost milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from distbp.config_check import conflicts, keys
from distbp.config_read import (
    Found,
    Problem,
    Setting,
    from_environment,
    from_flags,
    from_overrides,
    from_tree,
    read_file,
)
from distbp.config_schema import Checkpoint, Config, Data, Loss, Model, Optimizer, Run, Schedule, Train
from distbp.config_write import Described, describe, schema, to_dict, to_toml
from distbp.errors import ConfigError

__all__ = [
    "Checkpoint",
    "Config",
    "Data",
    "Described",
    "Loss",
    "Model",
    "Optimizer",
    "Resolved",
    "Run",
    "Schedule",
    "Train",
    "describe",
    "from_dict",
    "resolve",
    "schema",
    "to_dict",
    "to_toml",
]

# Nobody reads more, and finding the nearest name for each of a million wrong keys would take minutes.
_PROBLEM_LIMIT = 100


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """A checked configuration, and for each dotted key where its value was set: "default", "-o", ..."""

    config: Config
    origin: dict[str, str]


def resolve(
    *,
    file: Path | None = None,
    environment: Mapping[str, str] | None = None,
    flags: Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
) -> Resolved:
    """Return the configuration of a run from all its sources, the last one winning.

    `flags` maps dotted keys to values, None for a flag that was not used; `overrides` are `key=value` texts.

    Raises:
        InputMissing: `file` does not exist.
        ConfigError: anything is wrong; the message has a line for every mistake.
    """
    layers = (
        from_tree(f"file {file}", read_file(file)) if file else (),
        from_environment(environment or {}),
        from_flags(flags or {}),
        from_overrides(overrides),
    )
    return _join(layers)


def from_dict(tree: Mapping[str, object], *, origin: str = "dictionary") -> Config:
    """Return the configuration that nested dictionaries describe, checked as strictly as a file."""
    return _join((from_tree(origin, tree),)).config


def _join(layers: Sequence[Found]) -> Resolved:
    values = {path: key.default for path, key in keys().items()}
    origin = dict.fromkeys(values, "default")
    problems: list[Problem] = []
    for layer in layers:
        for found in layer:
            if isinstance(found, Setting):
                values[found.path] = found.value
                origin[found.path] = found.origin
            else:
                problems.append(found)
            if len(problems) > _PROBLEM_LIMIT:
                raise _refusal(problems)
    config = _build(values)
    wrong = {problem.path for problem in problems}
    for involved, message in conflicts(config):
        # A value that was refused above must not be blamed twice, nor judged by its default.
        if wrong.isdisjoint(involved):
            made = next((origin[path] for path in involved if origin[path] != "default"), "default")
            problems.append(Problem(made, involved[0], message))
    if problems:
        raise _refusal(problems)
    return Resolved(config=config, origin=origin)


def _build(values: Mapping[str, object]) -> Config:
    tree: dict[str, Any] = {}
    for path, value in values.items():
        table, _, name = path.rpartition(".")
        (tree.setdefault(table, {}) if table else tree)[name] = value
    # The values are checked already; that msgspec agrees is a second lock on the same door.
    return msgspec.convert(tree, Config)


def _refusal(problems: Sequence[Problem]) -> ConfigError:
    listed = [str(problem) for problem in problems[:_PROBLEM_LIMIT]]
    if len(problems) == 1:
        return ConfigError(listed[0])
    if len(problems) > _PROBLEM_LIMIT:
        listed.append("and more; correct these first")
    count = len(problems) if len(problems) <= _PROBLEM_LIMIT else f"more than {_PROBLEM_LIMIT}"
    return ConfigError("\n  ".join([f"the configuration has {count} mistakes:", *listed]))
