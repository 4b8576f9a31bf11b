"""Text: one long sequence of tokens, cut into windows; the model learns what follows each token.

A sample is a window of `context` tokens, its targets are the same window one token further: what follows each
of them.  Window i begins at token `i * stride`; by default windows lie end to end, so that an epoch sees each
token once.  They come in order of the text, and by default the last ones are held out for validation.

The tokens are characters, numbered in the order of their code points as far as they occur, or bytes, of which
there are 256 in any file.  With a schema (another file is read like the training text) the alphabet is that
of training, and a character outside it is an error that names its place.

The whole file is held as text and as tokens while it is read: fine below a gigabyte.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Options, Request, Schema, Source, Sources
from distbp.data.rows import Column
from distbp.data.windows import TokenWindows
from distbp.errors import DataError

__all__ = ["decode", "encode", "matches", "read"]

SUFFIXES = (".txt", ".text")


def matches(path: Path) -> bool:
    """Say whether `path` is called like a text; text has no bytes to recognise it by."""
    return path.is_file() and path.suffix.lower() in SUFFIXES


def read(request: Request) -> Sources:
    """Return the windows of the text; DataError if it is no text, too short, or has an unknown character."""
    schema = request.schema
    if schema is not None and schema.get("format") != "text":
        raise DataError(f"{request.path}: expected data like those the model was trained on, got a text")
    content = request.path.read_bytes()
    if schema is None:
        schema = _learn_schema(request.path, content, request.options)
    tokens = encode(schema, content, str(request.path))
    context, stride = schema["sample_shape"][0], schema["stride"]
    count = (len(tokens) - 1 - context) // stride + 1
    if count < 1:
        raise DataError(
            f"{request.path}: expected more than {context} tokens, got {len(tokens)}; lower data.context, or "
            "give a longer text"
        )
    x, following = (
        TokenWindows(tokens, count=count, length=context, stride=stride, shift=shift) for shift in (0, 1)
    )
    y: Column = following if request.labelled else np.zeros((count, context), np.int64)
    classes = tuple(schema["classes"])
    return Sources(Source(str(request.path), "classification", x, y, classes, schema, request.labelled))


def encode(schema: Schema, content: bytes, name: str) -> NDArray[Any]:
    """Return the tokens of a text as unsigned integers; DataError names the place of an unknown character."""
    if schema["level"] == "byte":
        return np.frombuffer(content, np.uint8)
    points = _code_points(name, content)
    alphabet = np.array([ord(character) for character in schema["classes"]], np.uint32)
    tokens = np.searchsorted(alphabet, points).clip(max=len(alphabet) - 1)
    unknown = np.flatnonzero(alphabet[tokens] != points)
    if unknown.size:
        place = int(unknown[0])
        line = int(np.count_nonzero(points[:place] == ord("\n"))) + 1
        raise DataError(
            f"{name}: line {line}: expected one of the {len(alphabet)} characters of the training text, got "
            f"{chr(points[place])!r}; {unknown.size} characters are unknown: leave them out, or train with "
            "-o data.level=byte"
        )
    return tokens.astype(np.min_scalar_type(len(alphabet) - 1))


def decode(schema: Schema, tokens: NDArray[np.int64]) -> bytes:
    """Return the UTF-8 text, or the bytes, that the tokens stand for."""
    if schema["level"] == "byte":
        return tokens.astype(np.uint8).tobytes()
    return "".join(schema["classes"][token] for token in tokens.tolist()).encode()


def _learn_schema(path: Path, content: bytes, options: Options) -> Schema:
    """Return how to read this text and others."""
    if options.level == "byte":
        classes = [f"{byte:02x}" for byte in range(256)]
    else:
        classes = [chr(point) for point in np.unique(_code_points(str(path), content)).tolist()]
        if len(classes) < 2:
            raise DataError(f"{path}: expected at least two different characters, got {classes!r}")
    return {
        "format": "text",
        "codes": True,
        "ordered": True,
        "level": options.level,
        "sample_shape": [options.context],
        "stride": options.stride or options.context,
        "task": "classification",
        "classes": classes,
        "num_outputs": len(classes),
    }


def _code_points(name: str, content: bytes) -> NDArray[np.uint32]:
    """Return the characters of UTF-8 `content` as code points."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}: line {line}: expected UTF-8 text, got byte {content[error.start]:#04x} "
            f"({error.reason}); convert it, for example with iconv -t UTF-8, or take bytes as they are: "
            "-o data.level=byte"
        ) from error
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)
