"""Folders of image files, one sub-directory for each class (class_folders.py says how they lie).

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
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Request, Schema
from distbp.data.class_folders import FileKind
from distbp.errors import DataError, EnvironmentMismatch

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["IMAGES"]

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
DECODERS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 1 << 26
"""Pixels of one image; 192 MiB in colour."""

GRAY_MODES = {"1", "L", "LA"}
COLOUR_MODES = {"RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"}

# What decoders raise for damaged files, besides OSError.
DAMAGE = (ValueError, SyntaxError, EOFError, struct.error, zlib.error, OverflowError, IndexError, TypeError)


def _image_size(request: Request) -> int | None:
    """Return the side of the square that images are brought to, or None if they stay as they are."""
    size = request.options.image_size if request.schema is None else request.schema.get("image_size")
    return None if size is None else int(size)


def _decode(request: Request, where: Path, files: list[Path]) -> tuple[NDArray[np.uint8], Schema]:
    """Return the pixels of all files, (N, H, W) or (N, H, W, 3), and the size that was asked for."""
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
    return x, {"image_size": size}


def _opened(file: Path, use: Callable[[Image], Any]) -> Any:
    """Return what `use` makes of an image whose header has been read and believed possible."""
    try:
        from PIL import Image
    except ImportError as error:
        raise EnvironmentMismatch(
            "folders of images need Pillow, which is not installed: pip install pillow"
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


IMAGES = FileKind("images", "image", SUFFIXES, _decode)
