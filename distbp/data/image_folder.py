"""Folders of image files: one sub-directory for each class, its name the name of the class.

    pets/cat/1.jpg  pets/cat/2.png  pets/dog/a.jpg ...                   samples of the classes cat and dog
    pets/train/cat/1.jpg ...  pets/val/cat/7.jpg ...                     the same with a validation set

The validation folder is called `val`, `valid`, `validation` or `test`.  Without labels, as `predict` reads
them, a folder of files, nested or not, or a single file will do.  Files are taken in the order of their
paths.

Samples are uint8, (H, W) if all images are gray, else (H, W, 3); with a schema they are what the training
images were.  All have one size, or the option `image_size` says to which square they are brought: scaled to
cover it, and what juts out cut off evenly.  Files are decoded by Pillow (the extra `image`), once; all images
are held in memory.  Scaling is Pillow's, so another version of it may give other pixels; the fingerprint of
the data tells.

Hostile files: only common formats are tried, a header that claims too many pixels is refused before anything
is decoded, and whatever the decoder raises becomes a DataError that names the file.  Pillow itself is trusted
as much as its decoders deserve: do not feed it files of strangers on a machine that matters.
"""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Request, Source, Sources
from distbp.data.canonical import array_schema, canonical, check_validation_labels
from distbp.errors import DataError, EnvironmentMismatch

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["matches", "read"]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
DECODERS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
LITTER = {"desktop.ini", "thumbs.db"}
"""Files that a desktop leaves in every folder; hidden ones are passed over as well."""

TRAINING, VALIDATION = "train", ("val", "valid", "validation", "test")

MAX_PIXELS = 1 << 26
"""Pixels of one image; 192 MiB in colour."""

GRAY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"}

# What decoders raise for damaged files, besides OSError.
DAMAGE = (ValueError, SyntaxError, EOFError, struct.error, zlib.error, OverflowError, IndexError, TypeError)


def matches(path: Path) -> bool:
    """Say whether `path` is an image file, or a directory that holds one where a class may have it."""
    if path.is_file():
        return _is_image(path)
    return any(_is_image(found) for place in ("*", "*/*", f"{TRAINING}/*/*") for found in path.glob(place))


def read(request: Request) -> Sources:
    """Return the images of a folder, and those of its validation folder if there is one.

    Raises DataError for what cannot be used, EnvironmentMismatch if Pillow is missing.
    """
    path = request.path
    if not request.labelled:
        return Sources(_unlabelled(request))
    if path.is_file():
        raise DataError(
            f"{path}: expected a folder with a sub-directory of images for each class, got one image; give "
            "the folder, or use `distbp predict`, which needs no classes"
        )
    training, held_out = _parts(path)
    train = _labelled(request, training)
    if held_out is None:
        return Sources(train)
    validation = _labelled(replace(request, schema=request.schema or train.schema), held_out)
    check_validation_labels(train, validation)
    return Sources(train, validation)


def _parts(path: Path) -> tuple[Path, Path | None]:
    """Return the folder of the classes, and that of the validation set if there are two such folders."""
    names = {entry.name: entry for entry in _entries(path) if entry.is_dir()}
    found = next((names[name] for name in VALIDATION if name in names), None)
    if TRAINING not in names or any(_is_image(entry) for entry in _entries(names[TRAINING])):
        return path, None
    return names[TRAINING], found


def _labelled(request: Request, folder: Path) -> Source:
    """Return the images in the sub-directories of `folder`, each with the number of its class."""
    present = [entry for entry in _entries(folder) if entry.is_dir()]
    loose = [entry.name for entry in _entries(folder) if not entry.is_dir()]
    names = tuple(entry.name for entry in present)
    if loose or len(names) < (2 if request.schema is None else 1):
        got = f"the file {loose[0]!r} beside them" if loose else f"{names!r}"
        raise DataError(
            f"{folder}: expected nothing but sub-directories, one for each of at least two classes, got {got}"
        )
    classes = names if request.schema is None else tuple(request.schema["classes"] or ())
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise DataError(
            f"{folder}: expected sub-directories for the classes of the model, {', '.join(classes)}; got "
            f"{unknown[0]!r}"
        )
    files, codes = [], []
    for entry in present:
        inside = _images_below(entry)
        if not inside:
            raise DataError(f"{entry}: expected at least one image of this class, got none; remove it")
        files += inside
        codes += [classes.index(entry.name)] * len(inside)
    x = _decode(request, folder, files)
    schema = array_schema("images", x, "classification", classes, len(classes)) | {
        "image_size": _image_size(request)
    }
    made = canonical(str(folder), "images", x, np.array(codes), schema)
    return replace(made, schema=schema)


def _unlabelled(request: Request) -> Source:
    """Return the images of a folder, or the one image, in the order of their paths."""
    path = request.path
    files = [path] if path.is_file() else _images_below(path)
    x = _decode(request, path, files)
    return canonical(str(path), "images", x, None, request.schema)


def _entries(folder: Path) -> list[Path]:
    """Return what is in a folder, sorted by name, without what is hidden or litter."""
    return [
        entry
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name[0] != "." and entry.name.lower() not in LITTER
    ]


def _images_below(folder: Path) -> list[Path]:
    """Return the images of a folder and its sub-directories; DataError for a file that is none."""
    files = []
    for entry in _entries(folder):
        if entry.is_dir():
            files += _images_below(entry)
        elif _is_image(entry):
            files.append(entry)
        else:
            raise DataError(
                f"{entry}: expected images ({', '.join(sorted(SUFFIXES))}), got another file; remove it"
            )
    return files


def _is_image(path: Path) -> bool:
    """Say whether a path is a visible file that is called like an image."""
    return path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file()


def _image_size(request: Request) -> int | None:
    """Return the side of the square that images are brought to, or None if they stay as they are."""
    size = request.options.image_size if request.schema is None else request.schema.get("image_size")
    return None if size is None else int(size)


def _decode(request: Request, where: Path, files: Sequence[Path]) -> NDArray[np.uint8]:
    """Return the pixels of all files, (N, H, W) or (N, H, W, 3)."""
    if not files:
        raise DataError(f"{where}: expected at least one image, got none")
    size = _image_size(request)
    if request.schema is None:
        colour = any(_opened(file, _is_coloured) for file in files)
    else:
        colour = len(request.schema.get("sample_shape", ())) == 3
    first = _opened(files[0], lambda image: _pixels(files[0], image, colour, size))
    x = np.empty((len(files), *first.shape), np.uint8)
    for row, file in zip(x, files, strict=True):
        pixels = _opened(file, lambda image, file=file: _pixels(file, image, colour, size))  # type: ignore[misc]
        if pixels.shape != row.shape:
            raise DataError(
                f"{file}: expected {first.shape[1]} x {first.shape[0]} pixels, as {files[0].name} has, got "
                f"{pixels.shape[1]} x {pixels.shape[0]}; bring them to one size, or set data.image_size"
            )
        row[:] = pixels
    return x


def _opened(file: Path, use: Callable[[Image], Any]) -> Any:
    """Return what `use` makes of an image whose header has been read and believed possible."""
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentMismatch(
            "folders of images need Pillow, which is not installed: pip install 'distbp[image]'"
        ) from error
    try:
        with warnings.catch_warnings():
            # Pillow warns of large images, which have a limit here, and of oddities that it can read.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=DECODERS) as image:
                width, height = image.size
                if not 0 < width * height <= MAX_PIXELS:
                    raise DataError(
                        f"{file}: expected at most {MAX_PIXELS} pixels, its header claims {width} x "
                        f"{height}; scale it down"
                    )
                return use(image)
    except (OSError, Image.DecompressionBombError, *DAMAGE) as error:
        raise DataError(f"{file}: expected a whole image, got: {error}; repair or remove it") from error


def _is_coloured(image: Image) -> bool:
    """Say whether an image may have colours."""
    return image.mode not in GRAY_MODES


def _pixels(file: Path, image: Image, colour: bool, size: int | None) -> NDArray[np.uint8]:
    """Return the pixels of one image as it is meant to be seen, of shape (H, W) or (H, W, 3)."""
    from PIL import Image, ImageOps

    if image.mode not in GRAY_MODES | COLOUR_MODES:
        raise DataError(
            f"{file}: expected 8 bits for a pixel and channel, got the mode {image.mode!r}; convert it"
        )
    images = getattr(image, "n_frames", 1)
    if images > 1:
        raise DataError(f"{file}: expected one image, got {images}; store them in files of their own")
    upright = ImageOps.exif_transpose(image)
    if "A" in upright.mode or "transparency" in upright.info:
        alpha = upright.convert("RGBA").getchannel("A")
        if alpha.getextrema()[0] != 255:
            raise DataError(f"{file}: expected an opaque image, got transparent pixels; put it on a ground")
    converted = upright.convert("RGB" if colour else "L")
    if size is not None:
        converted = ImageOps.fit(converted, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(converted, np.uint8)
