"""Write a configuration out: as TOML, as plain dictionaries, as a JSON schema, as a list of keys.

`to_toml` is what makes a run repeatable: `config.toml` in a run directory reads back equal to the last bit,
because Python's `repr` of a float is exact and TOML reads it as IEEE double.  TOML has no null: the text
"none" is written instead, and `config_check.py` reads it so.

This file knows nothing of how configurations are read or checked.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import msgspec

from distbp.config_check import expectation, keys
from distbp.config_schema import Config

__all__ = ["Described", "describe", "schema", "to_dict", "to_toml"]


class Described(NamedTuple):
    """What the documents and `distbp config init` say of one key; `default` is spelled as TOML."""

    key: str
    type: str
    default: str
    description: str


def to_dict(config: Config) -> dict[str, Any]:
    """Return nested dictionaries of JSON types; `from_dict` turns them back."""
    plain: dict[str, Any] = json.loads(msgspec.json.encode(config))
    return plain


def to_toml(config: Config, *, comments: bool = False) -> str:
    """Return TOML text with every key; with `comments`, each key is explained above its line.

    A configuration that was read through `resolve` or `from_dict` reads back equal.
    """
    lines: list[str] = []
    table = ""
    for path, key in keys().items():
        prefix, _, name = path.rpartition(".")
        if prefix != table:
            table = prefix
            lines += ["", f"[{table}]"]
        if comments:
            lines.append(f"# {key.description} ({expectation(key)})")
        lines.append(f"{name} = {_toml_value(_value_at(config, path))}")
    return "\n".join(lines) + "\n"


def schema() -> dict[str, Any]:
    """Return the JSON schema of a configuration (JSON files may hold null where TOML says "none")."""
    return msgspec.json.schema(Config)


def describe() -> list[Described]:
    """Return every key with its type and range in words, its default and its description."""
    return [
        Described(key.path, expectation(key), _toml_value(key.default), key.description)
        for key in keys().values()
    ]


def _value_at(config: Config, path: str) -> object:
    value: object = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _toml_value(value: object) -> str:
    if value is None:
        return '"none"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    assert isinstance(value, str), f"no configuration value is {value!r}"
    # A JSON text is a TOML text, but for DEL, which only TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
