"""Augmentation: what each transform may do to a sample, and what its random numbers depend on."""

from __future__ import annotations

import numpy as np
import pytest

from distbp.data import Crop, Flip, Noise, transforms
from distbp.errors import ConfigError

MAKERS = {"crop": lambda: Crop(2), "flip": Flip, "noise": lambda: Noise(0.5)}


def images(count=64, shape=(6, 5, 3), seed=0):
    """Return random images."""
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype(np.float32)


def changed(transform, x, seed=1, step=2, micro_batch=3):
    """Return what a transform makes of a copy of `x`."""
    copy = x.copy()
    transform(copy, seed, step, micro_batch)
    return copy


@pytest.mark.parametrize("name", MAKERS)
def test_every_part_of_the_key_counts(name):
    """Another seed, step or micro-batch changes samples in another way; the same key in the same way."""
    transform, x = MAKERS[name](), images()
    base = changed(transform, x)
    assert base.dtype == np.float32
    assert (changed(transform, x) == base).all()
    for key in ({"seed": 2}, {"step": 3}, {"micro_batch": 4}):
        assert (changed(transform, x, **key) != base).any()


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)], ids=str)
def test_a_crop_is_a_move(shape):
    """Every image is moved by at most two pixels each way, its edge repeated, and all 25 moves happen."""
    x = images(400, shape)
    padded = np.pad(x, [(0, 0), (2, 2), (2, 2), *[(0, 0)] * (len(shape) - 2)], mode="edge")
    seen = set()
    for moved, source in zip(changed(Crop(2), x), padded, strict=True):
        fits = [(i, j) for i, j in np.ndindex(5, 5) if (source[i : i + 6, j : j + 5] == moved).all()]
        assert len(fits) == 1
        seen.update(fits)
    assert len(seen) == 25


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3)], ids=str)
def test_a_flip_mirrors_half(shape):
    """Every image is as it was or mirrored left to right; about half are (within 5 standard errors)."""
    x = images(400, shape)
    flipped = changed(Flip(), x)
    mirrored = np.array([(a == b[:, ::-1]).all() for a, b in zip(flipped, x, strict=True)])
    untouched = np.array([(a == b).all() for a, b in zip(flipped, x, strict=True)])
    assert (mirrored ^ untouched).all()
    assert abs(mirrored.mean() - 0.5) < 5 * 0.5 / np.sqrt(400)


def test_noise_has_its_size():
    """What is added has mean 0 and the given deviation, within 5 standard errors of 5,760 draws."""
    x = images()
    added = changed(Noise(0.5), x) - x
    assert abs(added.mean()) < 5 * 0.5 / np.sqrt(x.size)
    assert abs(added.std() - 0.5) < 5 * 0.5 / np.sqrt(2 * x.size)


def test_keys_make_transforms():
    """The keys of the configuration make transforms in one order, and none by default."""
    assert transforms() == ()
    made = transforms(crop=3, flip=True, noise=0.25)
    assert [type(part) for part in made] == [Crop, Flip, Noise]
    assert (made[0].pixels, made[2].size) == (3, 0.25)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Crop(0), "pixels"),
        (lambda: Crop(1.5), "pixels"),
        (lambda: Noise(-1.0), "> 0"),
        (lambda: Noise(float("nan")), "> 0"),
        (lambda: Crop(5).check((6, 5)), "fewer pixels"),
        (lambda: Crop(1).check((64,)), "images"),
        (lambda: Flip().check((2, 3, 4, 5)), "images"),
    ],
)
def test_what_cannot_be_done_is_refused(make, words):
    """Impossible options, and samples that are no images, are a ConfigError."""
    with pytest.raises(ConfigError, match=words):
        make()
