"""JSON as a checkpoint may contain it: bounded, without duplicate keys, without NaN.

The standard parser is used, and guarded on both sides.  Before it runs, values and depth are counted on the
raw bytes with methods that run at the speed of memory; this is what keeps `[[[[...` away from the recursion
limit and `{},{},...` away from the allocator.  While it runs, hooks refuse what Python accepts and a
checkpoint must not contain.

A hand-written parser was rejected: slower by an order of magnitude and one more thing to trust.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
from typing import Any, NoReturn

from distbp.errors import CheckpointError

__all__ = ["MAX_DEPTH", "dump_json", "parse_object", "shown"]

MAX_DEPTH = 16
# Possessive, and content with the end of the input in place of the last quote: it never tries twice, so that
# no input takes quadratic time.
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_MISSING = object()  # None is a value in JSON.
_TO_ROUND = bytes.maketrans(b"[]{}", b"()()")
_ALL_BUT_ROUND = bytes(set(range(256)) - set(b"()"))


def shown(value: object) -> str:
    """Return `value!r` shortened: a hostile file must not choose the length of an error message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


def dump_json(value: dict[str, Any]) -> bytes:
    """Return `value` as indented JSON, keys in their order; ValueError or TypeError if it is none."""
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode("ascii")


def parse_object(data: bytes | bytearray, *, where: str, max_values: int) -> dict[str, Any]:
    """Return the JSON object in `data`; raise CheckpointError that begins with `where` for anything else.

    `max_values` bounds the number of values and the number of quotes, because one byte of input can cost an
    allocation of 60.  Brackets, commas and quotes inside strings are counted too: the bound is meant to be
    wide.
    """
    values = data.count(b"{") + data.count(b"[") + data.count(b",")
    if max(values, data.count(b'"')) > max_values:
        raise CheckpointError(f"{where}: expected at most {max_values} JSON values, found more")
    if _is_too_deep(data):
        raise CheckpointError(f"{where}: expected JSON whose brackets match, at most {MAX_DEPTH} deep")
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_without_duplicates,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors.
        raise CheckpointError(f"{where}: expected JSON, found damage: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {shown(value)}")
    return value


def _is_too_deep(data: bytes | bytearray) -> bool:
    """Return whether brackets outside of strings nest deeper than MAX_DEPTH, or are not balanced.

    One pass of `replace` removes exactly the innermost pairs, so MAX_DEPTH passes remove everything that is
    no deeper than that.  Nothing here grows with the depth.
    """
    brackets = _STRING.sub(b"", data).translate(_TO_ROUND).translate(None, delete=_ALL_BUT_ROUND)
    for _ in range(MAX_DEPTH):
        brackets = brackets.replace(b"()", b"")
    return bool(brackets)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object, refusing a key that occurs twice: two parsers would believe two different values."""
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        # Taking each key out of the result once leaves the first that occurs again.
        twice = next(key for key in keys if result.pop(key, _MISSING) is _MISSING)
        raise ValueError(f"key {shown(twice)} occurs twice")
    return result


def _refuse_constant(literal: str) -> NoReturn:
    """Refuse NaN, Infinity and -Infinity, which Python accepts and JSON does not know."""
    raise ValueError(f"{literal} is not a JSON number")


def _finite(literal: str) -> float:
    """Return the number, refusing those that overflow to infinity."""
    value = float(literal)
    if not math.isfinite(value):
        raise ValueError(f"number {shown(literal)} is out of range")
    return value
