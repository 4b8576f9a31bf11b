"""Look a name up in a table of choices; a wrong one is answered with the nearest right one."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TypeVar

from distbp.errors import ConfigError

__all__ = ["choose"]

Choice = TypeVar("Choice")


def choose(table: Mapping[str, Choice], name: str, key: str) -> Choice:
    """Return `table[name]`, or raise ConfigError that names `key`, the choices and the nearest of them."""
    if name in table:
        return table[name]
    close = get_close_matches(name, table, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{key}: expected one of {', '.join(sorted(table))}, got {name!r}{hint}")
