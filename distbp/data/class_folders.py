"""Folders of files with a sub-directory for each class: what images and sounds have in common.

    pets/cat/1.jpg  pets/cat/2.png  pets/dog/a.jpg ...                   samples of the classes cat and dog
    pets/train/cat/1.jpg ...  pets/val/cat/7.jpg ...                     the same with a validation set

The validation folder is called `val`, `valid`, `validation` or `test`.  Without labels, as `predict` reads
them, a folder of files, nested or not, or a single file will do.  Files are taken in the order of their
paths.  What is in a file is for the formats to know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Request, Schema, Source, Sources
from distbp.data.canonical import array_schema, canonical, check_validation_labels
from distbp.errors import DataError

__all__ = ["FileKind"]

LITTER = {"desktop.ini", "thumbs.db"}
"""Files that a desktop leaves in every folder; hidden ones are passed over as well."""

TRAINING, VALIDATION = "train", ("val", "valid", "validation", "test")

Decode = Callable[[Request, Path, list[Path]], tuple[NDArray[Any], Schema]]
"""`decode(request, where, files)` returns the samples of one file or more, and what its schema adds."""


@dataclass(frozen=True)
class FileKind:
    """Files that are samples: the format's name, what one is called, its suffixes, and how files are read."""

    format_name: str
    word: str
    suffixes: frozenset[str]
    decode: Decode

    def matches(self, path: Path) -> bool:
        """Say whether `path` is such a file, or a directory that holds one where a class may have it."""
        if path.is_file():
            return self._is_one(path)
        return any(
            self._is_one(found) for place in ("*", "*/*", f"{TRAINING}/*/*") for found in path.glob(place)
        )

    def read(self, request: Request) -> Sources:
        """Return the samples of a folder, and those of its validation folder if there is one.

        Raises DataError for what cannot be used.
        """
        path = request.path
        if not request.labelled:
            return Sources(self._unlabelled(request))
        if path.is_file():
            raise DataError(
                f"{path}: expected a folder with a sub-directory of {self.word}s for each class, got one "
                f"{self.word}; give the folder, or use `distbp predict`, which needs no classes"
            )
        training, held_out = self._parts(path)
        train = self._labelled(request, training)
        if held_out is None:
            return Sources(train)
        validation = self._labelled(replace(request, schema=request.schema or train.schema), held_out)
        check_validation_labels(train, validation)
        return Sources(train, validation)

    def _parts(self, path: Path) -> tuple[Path, Path | None]:
        """Return the folder of the classes, and that of the validation set if there are two such folders."""
        names = {entry.name: entry for entry in _entries(path) if entry.is_dir()}
        found = next((names[name] for name in VALIDATION if name in names), None)
        if TRAINING not in names or any(self._is_one(entry) for entry in _entries(names[TRAINING])):
            return path, None
        return names[TRAINING], found

    def _labelled(self, request: Request, folder: Path) -> Source:
        """Return the files in the sub-directories of `folder`, each with the number of its class."""
        present = [entry for entry in _entries(folder) if entry.is_dir()]
        names = tuple(entry.name for entry in present)
        _check_folder(folder, names, least=2 if request.schema is None else 1)
        classes = names if request.schema is None else tuple(request.schema["classes"] or ())
        unknown = [name for name in names if name not in classes]
        if unknown:
            raise DataError(
                f"{folder}: expected sub-directories for the classes of the model, {', '.join(classes)}; got "
                f"{unknown[0]!r}"
            )
        files, codes = [], []
        for entry in present:
            inside = self._files_below(entry)
            if not inside:
                raise DataError(
                    f"{entry}: expected at least one {self.word} of this class, got none; remove it"
                )
            files += inside
            codes += [classes.index(entry.name)] * len(inside)
        x, more = self.decode(request, folder, files)
        schema = array_schema(self.format_name, x, "classification", classes, len(classes)) | more
        return replace(canonical(str(folder), self.format_name, x, np.array(codes), schema), schema=schema)

    def _unlabelled(self, request: Request) -> Source:
        """Return the files of a folder, or the one file, in the order of their paths."""
        path = request.path
        files = [path] if path.is_file() else self._files_below(path)
        if not files:
            raise DataError(f"{path}: expected at least one {self.word}, got none")
        x, _ = self.decode(request, path, files)
        return canonical(str(path), self.format_name, x, None, request.schema)

    def _files_below(self, folder: Path) -> list[Path]:
        """Return the files of a folder and its sub-directories; DataError for one of another kind."""
        files = []
        for entry in _entries(folder):
            if entry.is_dir():
                files += self._files_below(entry)
            elif self._is_one(entry):
                files.append(entry)
            else:
                raise DataError(
                    f"{entry}: expected {self.word}s ({', '.join(sorted(self.suffixes))}), got another file; "
                    "remove it"
                )
        return files

    def _is_one(self, path: Path) -> bool:
        """Say whether a path is a visible file with one of the suffixes."""
        return path.suffix.lower() in self.suffixes and path.name[0] != "." and path.is_file()


def _check_folder(folder: Path, names: tuple[str, ...], *, least: int) -> None:
    """Raise DataError unless a folder holds sub-directories, enough of them, and nothing else."""
    loose = [entry.name for entry in _entries(folder) if not entry.is_dir()]
    if loose or len(names) < least:
        got = f"the file {loose[0]!r} beside them" if loose else f"{names!r}"
        raise DataError(
            f"{folder}: expected nothing but sub-directories, one for each of at least two classes, got {got}"
        )


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name, without what is hidden or litter."""
    return [
        entry
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name[0] != "." and entry.name.lower() not in LITTER
    ]
