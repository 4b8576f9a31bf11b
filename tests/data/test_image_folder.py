"""Folders of image files: what becomes of pixels, classes and sizes, and what is refused."""

from __future__ import annotations

import struct
import sys
import zlib

import numpy as np
import pytest

from distbp.data import Options, load
from distbp.errors import ConfigError, DataError, EnvironmentMismatch

Image = pytest.importorskip("PIL.Image", reason="needs Pillow: pip install 'distbp[image]'")


def pixels(seed, shape=(9, 8)):
    """Return random pixels."""
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def write(path, array, **options):
    """Write an image file in the format of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def pets(tmp_path):
    """A folder with three gray cats and two gray dogs, and what desktops leave in folders."""
    folder = tmp_path / "pets"
    for number in range(3):
        write(folder / "cat" / f"{number}.png", pixels(number))
    for number, suffix in ((3, "bmp"), (4, "png")):
        write(folder / "dog" / f"{number}.{suffix}", pixels(number))
    (folder / "dog" / "Thumbs.db").write_bytes(b"litter")
    (folder / ".DS_Store").write_bytes(b"litter")
    return folder


def test_pixels_and_classes(pets):
    """Samples are the very pixels in the order of paths, classes the names of the sub-directories."""
    source = load(str(pets)).train
    assert source.classes == ("cat", "dog")
    assert source.y.tolist() == [0, 0, 0, 1, 1]
    assert source.x.dtype == np.uint8
    assert (source.x == [pixels(number) for number in range(5)]).all()


def test_one_coloured_image_makes_all_coloured(pets):
    """Among gray images a coloured one makes samples (H, W, 3); a gray pixel is then three equal numbers."""
    colour = pixels(9, (9, 8, 3))
    write(pets / "dog" / "5.png", colour)
    x = load(str(pets)).train.x
    assert x.shape == (6, 9, 8, 3)
    assert (x[5] == colour).all()
    assert (x[0] == pixels(0)[..., np.newaxis]).all()


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
def test_train_and_validation_folders(pets, tmp_path, name):
    """A folder `train` with one for validation beside it gives both, with the classes of training."""
    root = tmp_path / "all"
    for part in ("train", name):
        for path in pets.glob("*/*.png"):
            target = root / part / path.relative_to(pets)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    write(root / "train" / "dog" / "7.png", pixels(7))
    sources = load(str(root))
    assert len(sources.train.x) == 5
    assert sources.validation is not None
    assert len(sources.validation.x) == 4
    assert sources.validation.classes == sources.train.classes == ("cat", "dog")


def test_sizes_must_agree_or_be_given(pets):
    """Another size is refused by name; with `image_size` every image is scaled and cut to that square."""
    write(pets / "dog" / "4.png", pixels(9, (20, 30)))
    with pytest.raises(DataError, match=r"4\.png: expected 8 x 9 pixels.*30 x 20.*data\.image_size"):
        load(str(pets))
    source = load(str(pets), options=Options(image_size=6)).train
    assert source.x.shape == (5, 6, 6)
    again = load(str(pets), schema=source.schema).train
    assert (again.x == source.x).all()


def test_scaling_keeps_the_proportions(tmp_path):
    """An image twice as wide as high loses its sides, not its proportions."""
    wide = np.zeros((10, 20), np.uint8)
    wide[:, 3:17] = 200  # What stays is columns 5 to 14; the filter sees a little beyond, and rings.
    for name in ("a", "b"):
        write(tmp_path / name / "x.png", wide)
    x = load(str(tmp_path), options=Options(image_size=5)).train.x
    assert np.abs(x.astype(int) - 200).max() < 10


def test_predicting_needs_no_classes(pets, tmp_path):
    """With the schema of training, nested folders and single files are read, gray or coloured."""
    schema = load(str(pets)).train.schema
    write(tmp_path / "new" / "b.png", pixels(20))
    write(tmp_path / "new" / "below" / "a.png", np.repeat(pixels(21)[..., np.newaxis], 3, axis=2))
    blind = load(str(tmp_path / "new"), schema=schema, labelled=False).train
    assert (blind.x == [pixels(20), pixels(21)]).all()
    single = load(str(tmp_path / "new" / "b.png"), schema=schema, labelled=False).train
    assert (single.x == pixels(20)).all()
    assert len(load(str(pets), schema=schema, labelled=False).train.x) == 5


def test_a_part_of_the_classes_can_be_evaluated(pets, tmp_path):
    """A folder with one of the model's classes keeps its number; an unknown class is refused."""
    schema = load(str(pets)).train.schema
    write(tmp_path / "some" / "dog" / "1.png", pixels(1))
    assert load(str(tmp_path / "some"), schema=schema).train.y.tolist() == [1]
    write(tmp_path / "some" / "fox" / "1.png", pixels(1))
    with pytest.raises(DataError, match="cat, dog; got 'fox'"):
        load(str(tmp_path / "some"), schema=schema)


def test_the_camera_may_have_been_turned(tmp_path):
    """A photograph is read the way up that its EXIF orientation asks for."""
    image = Image.fromarray(pixels(0, (8, 12)))
    exif = image.getexif()
    exif[0x0112] = 6  # Turn by 90 degrees clockwise.
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "x.png", exif=exif)
    assert (load(str(tmp_path)).train.x[0] == np.rot90(pixels(0, (8, 12)), -1)).all()


def test_opaque_alpha_is_dropped(tmp_path):
    """An alpha channel that hides nothing is read over."""
    opaque = np.dstack([pixels(0, (9, 8, 3)), np.full((9, 8), 255, np.uint8)])
    for name in ("a", "b"):
        write(tmp_path / name / "x.png", opaque)
    assert (load(str(tmp_path)).train.x == opaque[..., :3]).all()


def bomb(width, height):
    """Return a PNG whose header claims a size that its data do not have."""

    def chunk(kind, content):
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


REFUSED = {
    "text": (lambda path: path.write_bytes(b"not an image"), "whole image"),
    "empty": (lambda path: path.write_bytes(b""), "whole image"),
    "truncated": (lambda path: path.write_bytes(write(path, pixels(0)).read_bytes()[:-40]), "whole image"),
    "flipped": (
        lambda path: path.write_bytes(write(path, pixels(0)).read_bytes().replace(b"IDAT", b"IDAX")),
        "whole image",
    ),
    "more than can be": (lambda path: path.write_bytes(bomb(9000, 9000)), "header claims 9000 x 9000"),
    "far more": (lambda path: path.write_bytes(bomb(2**31 - 1, 2**31 - 1)), "expected"),
    "transparent": (lambda path: write(path, pixels(0, (9, 8, 4))), "opaque"),
    "16 bits": (lambda path: write(path, pixels(0).astype(np.uint16)), "8 bits"),
    "moving": (
        lambda path: Image.fromarray(pixels(0)).save(
            path, "GIF", save_all=True, append_images=[Image.fromarray(pixels(1))]
        ),
        "got 2",
    ),
    "postscript": (lambda path: path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "whole image"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_images_are_refused_by_name(pets, name):
    """A file that is no whole, single, opaque 8-bit image of a possible size is a DataError that names it."""
    damage, words = REFUSED[name]
    damage(pets / "dog" / "9.png")
    with pytest.raises(DataError, match=rf"9\.png.*{words}"):
        load(str(pets))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pets: (pets / "dog" / "notes.txt").write_text("x"), r"notes\.txt: expected images"),
        (lambda pets: (pets / "fox").mkdir(), "fox: expected at least one image"),
        (lambda pets: write(pets / "9.png", pixels(0)), r"'9\.png' beside them"),
        (
            lambda pets: [p.unlink() for p in (pets / "dog").iterdir()] + [(pets / "dog").rmdir()],
            "two classes",
        ),
    ],
    ids=["other file", "empty class", "loose image", "one class"],
)
def test_bad_folders_are_refused(pets, change, words):
    """What is no folder of classes with images, and nothing else, is a DataError that names the place."""
    change(pets)
    with pytest.raises(DataError, match=words):
        load(str(pets))


def test_a_single_image_cannot_be_trained_on(pets):
    """A file where a folder of classes is wanted says so."""
    with pytest.raises(DataError, match="got one image"):
        load(str(pets / "cat" / "0.png"))


def test_a_size_for_other_data_is_refused():
    """`image_size` for data that are no image files is a ConfigError, not ignored."""
    with pytest.raises(ConfigError, match=r"data\.image_size"):
        load("digits", options=Options(image_size=8))


def test_without_pillow_the_cure_is_named(pets, monkeypatch):
    """Where Pillow is missing the error says what to install."""
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(EnvironmentMismatch, match="pip install pillow"):
        load(str(pets))


def test_the_command_learns_from_a_folder(distbp, tmp_path):
    """`train`, `evaluate` and `predict` work on folders: bright and dark images are told apart."""
    rng = np.random.default_rng(0)
    for name, level in (("bright", 160), ("dark", 60)):
        for number in range(40):
            image = np.clip(rng.normal(level, 40, (9, 9, 3)), 0, 255).astype(np.uint8)
            write(tmp_path / "light" / name / f"{number}.png", image)
    options = (
        "-o",
        "data.image_size=8",
        "-o",
        "data.augment_flip=true",
        "--epochs",
        "3",
        "--batch-size",
        "16",
    )
    done = distbp("train", "light", "-o", "model.name=lenet", *options, "--out", "run")
    assert done.returncode == 0, done.stderr
    evaluated = distbp("evaluate", "run", "light")
    assert float(evaluated.stdout.split("accuracy")[1].split()[0]) > 0.9, evaluated.stderr
    predicted = distbp("predict", "run", "light/dark", "-o", "p.csv")
    assert predicted.returncode == 0, predicted.stderr
    answers = [line.split(",")[0] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    assert answers.count("dark") > 30
