"""Read settings from files, the environment, flags and `-o`: each becomes (origin, key, value).

A file is data from outside: its size, length and number of values are limited before or right after parsing,
so that no file of any content takes half a second or memory beyond its own size.  Values of `-o` and of the
environment are TOML, or else the literal text; where a key holds text anyway, `7` and `2024-01-01` are text.

This file knows which keys exist but not which values are right: `config_check.py` decides that.

Rejected: YAML, because `yaml.safe_load("lr: 1e-3")` is the text '1e-3'.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from distbp.config_check import check_value, keys, nearest, shown, tables, takes_text, takes_texts
from distbp.errors import ConfigError, InputMissing

__all__ = ["Problem", "Setting", "from_environment", "from_flags", "from_overrides", "from_tree", "read_file"]

Nested = Mapping[str, object]

SIZE_LIMIT_BYTES = 1_000_000
# tomllib takes 0.8 s for a million bytes of tiny keys, and time quadratic in the parts of a dotted key.  So
# the marks between keys and values are counted first, and keys of more than 8 parts are not parsed.
MARKS = "=,.[{:"
MARK_LIMIT = 40_000
# A text that is not closed ends with its line, so that no character is looked at twice.
_TEXT_OR_COMMENT = re.compile(r""""(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?|\#[^\n]*+""")
_LONG_DOTTED_KEY = re.compile(r"""(?<![\w-])(?:(?:[\w-]++|"")[ \t]*+\.[ \t]*+){8}""")

# Names that the launcher sets for its workers; they are no part of the configuration.
RESERVED = frozenset(f"DISTBP_{name}" for name in ("RANK", "SIZE", "HOST", "RUN", "FAULT", "KEY_FILE"))
SHORTCUTS = {"DISTBP_BACKEND": "run.backend", "DISTBP_NPROC": "run.nproc"}


class Setting(NamedTuple):
    """One key with its checked value, and where it was set."""

    origin: str
    path: str
    value: object


class Problem(NamedTuple):
    """One mistake: where it was made, the key (or what stands for it), and what was expected."""

    origin: str
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.path}: {self.message}"


Found = Iterable[Setting | Problem]


def from_tree(origin: str, tree: object, prefix: str = "") -> Found:
    """Yield a setting or a problem for each key of nested tables; `prefix` is the table that holds `tree`."""
    if prefix in keys():
        yield _checked(origin, prefix, tree)
    elif prefix and prefix not in tables():
        near = nearest(prefix)
        hint = f"; did you mean {near}?" if near else "; `distbp config show` lists all keys"
        yield Problem(origin, prefix, f"expected a known key, got {shown(prefix)}{hint}")
    elif not isinstance(tree, Mapping):
        what = f"a table of keys such as {_first_key(prefix)}" if prefix else "a table"
        yield Problem(origin, prefix or "top level", f"expected {what}, got {shown(tree)}")
    else:
        for name, value in tree.items():
            yield from from_tree(
                origin, value, f"{prefix}.{_printable(name)}" if prefix else _printable(name)
            )


def _checked(origin: str, path: str, value: object) -> Setting | Problem:
    try:
        return Setting(origin, path, check_value(keys()[path], value))
    except ValueError as error:
        return Problem(origin, path, str(error))


def _first_key(table: str) -> str:
    return next(path for path in keys() if path.startswith(table + "."))


def _printable(name: object, pattern: str = r"[\w-]{1,200}") -> str:
    """Return a name as it may stand in a message: quoted as soon as it holds anything unusual.

    A dot is unusual inside one name, so the quoted TOML key "optimizer.lr" is not the key optimizer.lr.
    """
    return name if isinstance(name, str) and re.fullmatch(pattern, name) else shown(name)


def _dotted(path: str) -> str:
    return _printable(path, r"[\w.-]{1,200}")


def from_flags(flags: Mapping[str, object]) -> Found:
    """Yield the settings of command-line flags, given by key; None means that the flag was not used."""
    for path, value in flags.items():
        if value is not None:
            yield from from_tree(f"flag --{path.rpartition('.')[2].replace('_', '-')}", value, path)


def from_overrides(overrides: Sequence[str]) -> Found:
    """Yield the settings of `-o key=value` options, in order."""
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            yield Problem("-o", _dotted(path), f"expected key=value, got {shown(override)}")
        else:
            path = _dotted(path.strip())
            yield from from_tree("-o", _value_of(path, text.strip()), path)


def from_environment(environment: Mapping[str, str]) -> Found:
    """Yield the settings of `DISTBP_*` variables; `DISTBP_OPTIMIZER__LR` is the key `optimizer.lr`.

    `DISTBP_BACKEND` and `DISTBP_NPROC` are short for `DISTBP_RUN__BACKEND` and `DISTBP_RUN__NPROC`; setting
    both to different texts is a mistake, since one of them would be ignored.
    """
    for name in sorted(environment):
        if not name.startswith("DISTBP_") or name in RESERVED:
            continue
        path = SHORTCUTS.get(name) or _dotted(name.removeprefix("DISTBP_").lower().replace("__", "."))
        origin, text = f"environment {name}", environment[name]
        long_name = "DISTBP_" + path.upper().replace(".", "__")
        if name in SHORTCUTS and environment.get(long_name, text) != text:
            yield Problem(
                origin, path, f"expected the same as {long_name}={environment[long_name]!r}, got {text!r}"
            )
        yield from from_tree(origin, _value_of(path, text), path)


def _value_of(path: str, text: str) -> object:
    """Return a text as the TOML value that it spells, or else the text itself.

    A list of texts may also be written as a shell likes it, without quotes: user,item or [user, item].
    """
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # Broken TOML, too many digits, too deep.
        if path in keys() and takes_texts(keys()[path]) and '"' not in text:
            return [word.strip() for word in text.removeprefix("[").removesuffix("]").split(",")]
        return text
    # A text with a line break could spell a second key; then it is no single value.
    value = parsed["value"] if list(parsed) == ["value"] else text
    is_text_key = path in keys() and takes_text(keys()[path])
    return text if is_text_key and not isinstance(value, str) else value


def read_file(path: Path) -> Nested:
    """Return the tables of a TOML or JSON file.

    Raises:
        InputMissing: there is no such file.
        ConfigError: it cannot be read, or is not TOML or JSON; the message names the line.
    """
    origin = f"file {path}"
    if path.suffix.lower() not in ("", ".toml", ".json"):
        raise ConfigError(f"{origin}: expected a .toml or .json file, got {path.suffix!r}")
    text = _read_text(path, origin)
    try:
        tree = _parse_json(text) if path.suffix.lower() == ".json" else _parse_toml(text)
    except RecursionError:
        raise ConfigError(
            f"{origin}: expected tables of keys, got brackets nested too deep to read"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{origin}: {error}{_quoted_line(text, str(error))}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: expected a table of keys, got {shown(tree)}")
    return tree


def _read_text(path: Path, origin: str) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(SIZE_LIMIT_BYTES + 1)
    except FileNotFoundError:
        raise InputMissing(f"{origin}: expected a configuration file, found none; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path.
        raise ConfigError(f"{origin}: expected a readable file, got: {error}") from None
    if len(content) > SIZE_LIMIT_BYTES:
        raise ConfigError(
            f"{origin}: expected at most {SIZE_LIMIT_BYTES} bytes, got more; is it the right file?"
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ConfigError(
            f"{origin}: expected UTF-8, got byte 0x{byte:02x} at line {line}; save it as UTF-8"
        ) from None
    if sum(map(text.count, MARKS)) > MARK_LIMIT:
        raise ConfigError(
            f"{origin}: expected at most {MARK_LIMIT} keys and values, got more; is it the right file?"
        )
    return text


def _parse_toml(text: str) -> object:
    if long_key := _LONG_DOTTED_KEY.search(_TEXT_OR_COMMENT.sub('""', text)):
        raise ValueError(f"expected keys of two parts, got {shown(long_key[0])} and more")
    return tomllib.loads(text)


def _parse_json(text: str) -> object:
    """Return a JSON document; like TOML, and unlike `json.loads` by itself, it may not repeat a key."""

    def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if len(names) != len(set(names)):
            repeated = next(name for i, name in enumerate(names) if name in names[:i])
            raise ValueError(f"expected each key once, got {shown(repeated)} twice in one table")
        return dict(pairs)

    return json.loads(text, object_pairs_hook=table)


def _quoted_line(text: str, message: str) -> str:
    """Return the line that a parser's message points at; it knows the position but not the key."""
    position = re.search(r"\bline (\d+)", message)
    lines = text.split("\n")
    if position is None or int(position[1]) > len(lines):
        return ""
    return f": {shown(lines[int(position[1]) - 1].strip())}"
