"""`load`: find out what a path is and hand it to the reader of its format.

It knows which formats exist and how to help someone who mistyped a path; it knows nothing about any format.
"""

from __future__ import annotations

import difflib
import stat
from dataclasses import fields
from pathlib import Path

from distbp.data import arrays, idx, parquet, table, text
from distbp.data.base import Format, Options, Request, Schema, Sources
from distbp.data.bells import read_bells, read_cents
from distbp.data.digits import read_digits
from distbp.data.image_folder import IMAGES
from distbp.data.sound_folder import SOUNDS
from distbp.errors import ConfigError, DataError, InputMissing

__all__ = ["BUILT_INS", "SOURCES", "has_columns", "load"]

TABLES = ("parquet", "table")
"""The formats that have named columns, one of which may be the target."""

# Asked in this order: formats that are recognised by content before those that are recognised by name.
SOURCES: dict[str, Format] = {
    "idx": Format("IDX files as MNIST has them (also .gz)", idx.matches, idx.read),
    "arrays": Format(
        "NumPy arrays x and y (.npz, or x.npy and y.npy)", arrays.matches, arrays.read, options=("on_disk",)
    ),
    "images": Format(
        "folders of image files, one for each class",
        IMAGES.matches,
        IMAGES.read,
        options=("image_size",),
    ),
    "parquet": Format(
        "tables in Parquet files",
        parquet.matches,
        parquet.read,
        options=("categorical", "categories"),
    ),
    "sounds": Format(
        "folders of WAV files, one for each class", SOUNDS.matches, SOUNDS.read, options=("length",)
    ),
    "table": Format(
        "tables with a header line (.csv, .tsv)",
        table.matches,
        table.read,
        options=("categorical", "categories"),
    ),
    "text": Format(
        "texts for language models (.txt)", text.matches, text.read, options=("context", "level", "stride")
    ),
}


def _matches_no_path(path: Path) -> bool:
    """Return False: what is built in is asked for by its name."""
    return False


BUILT_INS: dict[str, Format] = {
    "bells": Format("the note of a struck bell", _matches_no_path, read_bells, options=("samples",)),
    "bells-cents": Format(
        "how far a struck bell is out of tune", _matches_no_path, read_cents, options=("samples",)
    ),
    "digits": Format("handwritten digits", _matches_no_path, read_digits),
}


def load(
    path: str,
    *,
    target: str | None = None,
    schema: Schema | None = None,
    labelled: bool = True,
    options: Options | None = None,
) -> Sources:
    """Return the data set at `path`: a file, a directory, or a built-in name (`./digits` is the file).

    `target` is the column of a table that holds the labels.  With `schema`, another file is read as the
    training data were: same columns, categories, classes.  With `labelled=False` labels are neither needed
    nor read.  `options` decides what the format leaves open.

    Raises InputMissing if nothing is there, DataError if it cannot be used, ConfigError if `target` is wrong.
    """
    request = Request(Path(path), target, schema, labelled, options or Options())
    if path in BUILT_INS:
        _refuse_target(request)
        _refuse_options(request, BUILT_INS[path].options)
        return BUILT_INS[path].read(request)
    try:
        kind = request.path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise InputMissing(_missing(request.path)) from error
    except OSError as error:
        raise InputMissing(f"{path}: expected a readable file or directory, got: {error.strerror}") from error
    # Opening a pipe would wait for ever for a writer.
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
        raise DataError(
            f"{path}: expected a file or a directory, got a device or pipe; write it to a file first"
        )
    try:
        return _read(request)
    except OSError as error:
        raise DataError(
            f"{path}: expected to read it, got: {error}; check its permissions and disk"
        ) from error


def has_columns(path: str) -> bool:
    """Return whether `path` is a table, the columns of which have names."""
    return path not in BUILT_INS and any(SOURCES[name].matches(Path(path)) for name in TABLES)


def _read(request: Request) -> Sources:
    """Return what the first format that recognises the path makes of it."""
    if request.path.is_file() and request.path.stat().st_size == 0:
        raise DataError(f"{request.path}: expected data, got an empty file")
    for name, source in SOURCES.items():
        if source.matches(request.path):
            if name not in TABLES:
                _refuse_target(request)
            _refuse_options(request, source.options)
            return source.read(request)
    known = "; ".join(source.description for source in SOURCES.values())
    if request.path.is_dir():
        names = sorted(p.name for p in request.path.iterdir())
        listed = ", ".join(map(repr, names[:8])) + (" ..." if len(names) > 8 else "")
        raise DataError(f"{request.path}: expected a directory with {known}; got {listed or 'an empty one'}")
    with request.path.open("rb") as stream:
        start = stream.read(8)
    raise DataError(f"{request.path}: expected {known}; got a file that begins with {start!r}")


def _refuse_target(request: Request) -> None:
    """Raise ConfigError if a target column was named for data that have no columns."""
    if request.target is not None:
        raise ConfigError(
            f"--target {request.target!r}: expected a table (.csv, .tsv) to take the column from, got "
            f"{str(request.path)!r}, which has no columns; leave --target out"
        )


def _refuse_options(request: Request, known: tuple[str, ...]) -> None:
    """Raise ConfigError if an option was given that means nothing to the format of these data."""
    for field in fields(request.options):
        value = getattr(request.options, field.name)
        if field.name in known or value == field.default:
            continue
        formats = [*SOURCES.values(), *BUILT_INS.values()]
        owners = [source.description for source in formats if field.name in source.options]
        raise ConfigError(
            f"data.{field.name} = {value!r}: expected {' or '.join(owners)}, got {str(request.path)!r}; "
            "leave the key out"
        )


def _missing(path: Path) -> str:
    """Return the message for a path that does not exist, with the names that come nearest."""
    folder = path.parent
    if not folder.is_dir():
        return f"{path}: expected an existing file, but there is no directory {str(folder)!r}"
    try:
        present = sorted(p.name for p in folder.iterdir() if p.name[0] != ".")
    except OSError:
        present = []
    near = difflib.get_close_matches(str(path), list(BUILT_INS), n=1)
    near += [str(folder / n) for n in difflib.get_close_matches(path.name, present, n=2)]
    hint = f"did you mean {' or '.join(map(repr, near))}?"
    built_in = ", ".join(BUILT_INS)
    text = f"{str(path)!r}: expected a file, a directory or a built-in name ({built_in}), found nothing"
    return f"{text}; {hint}" if near else f"{text}; check the spelling"
