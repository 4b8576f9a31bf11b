"""Check configuration values one by one and against each other, and say what was expected.

msgspec can convert a whole tree, but it stops at the first mistake, accepts infinity, and takes 3.0 for an
integer.  Therefore each value is checked here by itself against the type that `config_schema.py` declares, so
that every mistake of a configuration is reported at once.  Nothing here allocates in proportion to a value: a
width of 10^9 is compared, never used.

This file knows nothing of where a value came from: callers add the origin to the messages.
"""

from __future__ import annotations

import math
from difflib import get_close_matches
from functools import cache
from itertools import pairwise
from typing import NamedTuple

from msgspec import inspect

from distbp.config_schema import OPTIONS_OF, Config, Optimizer

__all__ = [
    "Key",
    "check_value",
    "conflicts",
    "expectation",
    "keys",
    "nearest",
    "shown",
    "tables",
    "takes_text",
    "takes_texts",
]

# Ten thousand million parameters are 40 GB a vector, and a run holds four vectors or more.
_PARAMETER_LIMIT = 10**10
# What people call these keys elsewhere, and what spelling alone would not find.
_OTHER_WORDS = {
    "learning_rate": "optimizer.lr",
    "num_epochs": "train.epochs",
    "num_workers": "run.nproc",
    "workers": "run.nproc",
}


class Key(NamedTuple):
    """One key of the configuration, as `config_schema.py` declares it."""

    path: str
    type: inspect.Type
    optional: bool
    default: object
    description: str


@cache
def keys() -> dict[str, Key]:
    """Return every key by its dotted path, in the order of declaration."""
    found: dict[str, Key] = {}

    def walk(struct: inspect.StructType, prefix: str) -> None:
        for field in struct.fields:
            path = prefix + field.name
            if isinstance(field.type, inspect.StructType):
                walk(field.type, path + ".")
            else:
                found[path] = _key(path, field)

    root = inspect.type_info(Config)
    assert isinstance(root, inspect.StructType), f"Config is a {root!r}"
    walk(root, "")
    return found


def _key(path: str, field: inspect.Field) -> Key:
    """Take the description and the `| None` off a declared type."""
    declared, description = field.type, ""
    while isinstance(declared, inspect.Metadata):
        description = (declared.extra_json_schema or {}).get("description", description)
        declared = declared.type
    optional = False
    if isinstance(declared, inspect.UnionType):
        members = tuple(member for member in declared.types if not isinstance(member, inspect.NoneType))
        optional = len(members) < len(declared.types)
        declared = members[0] if len(members) == 1 else inspect.UnionType(members)
    assert description, f"{path} has no description in config_schema.py"
    return Key(path, declared, optional, field.default, description)


@cache
def tables() -> frozenset[str]:
    """Return the names of the tables, such as `optimizer`."""
    return frozenset(path.partition(".")[0] for path in keys() if "." in path)


def takes_text(key: Key) -> bool:
    """Say whether every value of `key` is a text, so that `7` on the command line means "7"."""
    return isinstance(key.type, inspect.StrType | inspect.LiteralType)


def takes_texts(key: Key) -> bool:
    """Say whether `key` is a list of texts."""
    return isinstance(key.type, inspect.VarTupleType) and isinstance(
        _plain(key.type.item_type), inspect.StrType | inspect.LiteralType
    )


def _plain(kind: inspect.Type) -> inspect.Type:
    """Take the description off a declared type."""
    return kind.type if isinstance(kind, inspect.Metadata) else kind


def check_value(key: Key, value: object) -> object:
    """Return `value` as the configuration stores it, or raise ValueError that says what was expected.

    TOML has no null, so the text "none" stands for it wherever a key may have no value.
    """
    if key.optional and (value is None or value == "none"):
        return None
    if _fits(key.type, value):
        return _stored(key.type, value)
    raise ValueError(f"expected {expectation(key)}, got {shown(value)}")


def _fits(kind: inspect.Type, value: object) -> bool:
    """Say whether `value` is of the declared type and in its range; bool is no number, 3.0 no integer."""
    match kind:
        case inspect.BoolType():
            return isinstance(value, bool)
        case inspect.LiteralType():
            return isinstance(value, str) and value in kind.values
        case inspect.IntType():
            return isinstance(value, int) and not isinstance(value, bool) and _in_range(kind, value)
        case inspect.FloatType():
            return (
                isinstance(value, int | float)
                and not isinstance(value, bool)
                and _is_finite(value)
                and _in_range(kind, value)
            )
        case inspect.StrType():
            return isinstance(value, str) and _is_plain(value) and len(value) >= (kind.min_length or 0)
        case inspect.VarTupleType():
            return (
                isinstance(value, list | tuple)
                and (kind.min_length or 0) <= len(value) <= (kind.max_length or math.inf)
                and all(_fits(kind.item_type, item) for item in value)
            )
        case inspect.UnionType():
            return any(_fits(member, value) for member in kind.types)
    raise AssertionError(f"config_check.py does not know how to check {kind!r}")


def _stored(kind: inspect.Type, value: object) -> object:
    """Turn a fitting value into its stored form: numbers of float keys into float, lists into tuples."""
    if isinstance(kind, inspect.UnionType):
        return _stored(next(member for member in kind.types if _fits(member, value)), value)
    if isinstance(kind, inspect.FloatType) and isinstance(value, int | float):
        return float(value)
    if isinstance(kind, inspect.VarTupleType) and isinstance(value, list | tuple):
        return tuple(_stored(kind.item_type, item) for item in value)
    return value


def _in_range(kind: inspect.IntType | inspect.FloatType, value: float) -> bool:
    return (
        (kind.gt is None or value > kind.gt)
        and (kind.ge is None or value >= kind.ge)
        and (kind.lt is None or value < kind.lt)
        and (kind.le is None or value <= kind.le)
    )


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # An integer too long for a float.
        return False


def _is_plain(text: str) -> bool:
    """Say whether a text can be written to a UTF-8 file and given to the operating system as a path."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def expectation(key: Key) -> str:
    """Return what `key` accepts, in words: 'a number >= 0 and < 1, or "none"'."""
    return _in_words(key.type) + (', or "none"' if key.optional else "")


def _in_words(kind: inspect.Type) -> str:
    match kind:
        case inspect.BoolType():
            return "true or false"
        case inspect.LiteralType():
            return "one of " + ", ".join(f'"{choice}"' for choice in kind.values)
        case inspect.IntType():
            return "an integer" + _range_in_words(kind)
        case inspect.FloatType():
            return "a finite number" + _range_in_words(kind)
        case inspect.StrType():
            return "a text that is not empty" if kind.min_length else "a text"
        case inspect.VarTupleType():
            least = f"{kind.min_length} to" if kind.min_length else "at most"
            return f"a list of {least} {kind.max_length} items, each {_in_words(kind.item_type)}"
        case inspect.UnionType():
            return ", or ".join(_in_words(member).removeprefix("one of ") for member in kind.types)
    raise AssertionError(f"config_check.py has no words for {kind!r}")


def _range_in_words(kind: inspect.IntType | inspect.FloatType) -> str:
    bounds = [(">", kind.gt), (">=", kind.ge), ("<", kind.lt), ("<=", kind.le)]
    named = [f"{sign} {bound}" for sign, bound in bounds if bound is not None]
    return " " + " and ".join(named) if named else ""


def shown(value: object) -> str:
    """Return `repr(value)`, cut to a line; a number of a million digits must not become the message."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # An integer above Python's digit limit, or deep nesting.
        text = f"a value of type {type(value).__name__} too long to show"
    return text if len(text) <= 80 else text[:60] + f"... ({len(text)} characters)"


def nearest(path: str) -> str | None:
    """Return the known key or table that `path` most likely means, or None.

    The same last name in another table wins over a similar name in the same table, which wins over a similar
    name elsewhere: `train.lr` is `optimizer.lr`, `train.epoch` is `train.epochs`.
    """
    if len(path) > 64:  # No name is that long, and comparing would take time.
        return None
    table, _, name = path.rpartition(".")
    by_name = {known.rpartition(".")[2]: known for known in keys()}
    if name in _OTHER_WORDS or name in by_name:
        return _OTHER_WORDS.get(name) or by_name[name]
    inside = [known for known in keys() if known.rpartition(".")[0] == table] if table else []
    outside = [*keys(), *tables()]
    for close in (
        get_close_matches(path, inside, n=1, cutoff=0.75),
        get_close_matches(path, outside, n=1, cutoff=0.75),
        [by_name[close] for close in get_close_matches(name, by_name, n=1)],
    ):
        if close:
            return close[0]
    return None


def conflicts(config: Config) -> list[tuple[tuple[str, ...], str]]:
    """Return what does not fit together: the keys involved, the one to blame first, and the message."""
    found: list[tuple[tuple[str, ...], str]] = []
    train, optimizer, loss = config.train, config.optimizer, config.loss
    if train.micro_batch is not None and train.batch_size % train.micro_batch:
        message = _nearest_fits(train.batch_size, train.micro_batch)
        found.append((("train.micro_batch", "train.batch_size"), message))
    if optimizer.nesterov and optimizer.momentum == 0:
        message = "expected a momentum > 0 with optimizer.nesterov = true, got 0.0"
        found.append((("optimizer.momentum", "optimizer.nesterov"), message))
    if loss.name not in ("auto", "cross_entropy") and loss.label_smoothing:
        message = f"expected 0 with loss.name = {loss.name!r}, got {loss.label_smoothing!r}"
        found.append((("loss.label_smoothing", "loss.name"), message))
    if loss.name not in ("auto", "cross_entropy") and loss.class_weights is not None:
        message = f'expected "none" with loss.name = {loss.name!r}, got {shown(loss.class_weights)}'
        found.append((("loss.class_weights", "loss.name"), message))
    if loss.name != "huber" and loss.delta is not None:
        message = f"expected \"none\" unless loss.name = 'huber', got {loss.delta!r}"
        found.append((("loss.delta", "loss.name"), message))
    if loss.class_weights is not None and not any(loss.class_weights):
        found.append((("loss.class_weights",), "expected at least one weight above 0, got zeros only"))
    found += _misplaced_options(optimizer)
    if config.schedule.warmup_epochs is not None and config.schedule.warmup_steps:
        message = f"expected steps or epochs, got both, {config.schedule.warmup_steps} steps and these"
        found.append((("schedule.warmup_epochs", "schedule.warmup_steps"), message))
    hidden = config.model.hidden or ()
    num_parameters = sum(rows * columns for rows, columns in pairwise(hidden))
    if num_parameters > _PARAMETER_LIMIT:
        message = f"expected at most {_PARAMETER_LIMIT} weights between hidden layers, got {num_parameters}"
        found.append((("model.hidden",), message))
    return found


def _misplaced_options(optimizer: Optimizer) -> list[tuple[tuple[str, ...], str]]:
    """Return the options that were given to an update rule which has no use for them."""
    every = sorted({option for options in OPTIONS_OF.values() for option in options})
    found: list[tuple[tuple[str, ...], str]] = []
    for option in every if optimizer.name != "auto" else ():
        value = getattr(optimizer, option)
        if value is None or value is False or option in OPTIONS_OF[optimizer.name]:
            continue
        fitting = ", ".join(name for name, options in OPTIONS_OF.items() if option in options)
        message = (
            f"optimizer.name = {optimizer.name!r} has no such option, got {value!r}; it is for {fitting}"
        )
        found.append(((f"optimizer.{option}", "optimizer.name"), message))
    return found


def _nearest_fits(batch_size: int, micro_batch: int) -> str:
    """Say which micro-batch divides `batch_size`, and which batch `micro_batch` divides, near the given."""
    small = [n for n in range(1, math.isqrt(batch_size) + 1) if batch_size % n == 0]
    divisors = {*small, *(batch_size // n for n in small)}
    below = max((n for n in divisors if n < micro_batch), default=None)
    above = min((n for n in divisors if n > micro_batch), default=None)
    divisor = " or ".join(str(n) for n in (below, above) if n is not None)
    floor = batch_size // micro_batch * micro_batch
    multiple = " or ".join(str(n) for n in (floor, floor + micro_batch) if n)
    return (
        f"expected a divisor of train.batch_size = {batch_size}, got {micro_batch}; "
        f"nearest: micro_batch {divisor}, or batch_size {multiple}"
    )
