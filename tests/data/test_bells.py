"""The built-in bells: sounds as a pure function of seed and number, and what they are made of."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from distbp.data import Options, load, prepare
from distbp.data.bells import LENGTH, LOWEST_HZ, NOISE, PARTIALS, RATE, Bells
from distbp.errors import ConfigError, DataError

FEW = Options(samples=40)


def test_a_sound_depends_on_its_number_alone():
    """The same number gives the same bytes, alone or among others, forwards or backwards."""
    bells = Bells("sound", first=0, count=50)
    together = bells.take(np.array([[7, 3], [49, 7]]))
    assert together.shape == (2, 2, LENGTH)
    assert together[0, 0].tobytes() == together[1, 1].tobytes() == bells.take(np.array([7])).tobytes()
    later = Bells("sound", first=7, count=1)
    assert later[:].tobytes() == together[0, 0].tobytes()
    assert Bells("sound", first=0, count=50, seed=1).take(np.array([7])).tobytes() != later[:].tobytes()


def test_answers_are_even_and_belong_to_the_sounds():
    """Notes cover 0 to 99, cents -20 to 20, and the strongest tones are the note's partials."""
    notes, cents = (Bells(part, first=0, count=4000)[:] for part in ("note", "cents"))
    assert np.bincount(notes, minlength=100).min() > 10
    assert len(np.bincount(notes)) == 100
    assert -20 < cents.min() < -19.8
    assert 19.8 < cents.max() < 20
    assert abs(cents.mean()) < 0.6
    for number in range(5):
        sound = Bells("sound", first=number, count=1)[:][0]
        prime = LOWEST_HZ * 2 ** (notes[number] / 24 + cents[number, 0] / 1200)
        strongest = np.argmax(abs(np.fft.rfft(sound * np.hanning(LENGTH)))) * RATE / LENGTH
        assert min(abs(np.log2(strongest / (ratio * prime))) for ratio in PARTIALS) < 30 / 1200


def test_sounds_have_deviation_1_and_noise_at_20_decibels():
    """The sound's power is 1, that of the noise a hundredth."""
    sounds = Bells("sound", first=0, count=20)[:]
    assert sounds.dtype == np.float32
    powers = np.mean(np.square(sounds, dtype=np.float64), axis=1)
    np.testing.assert_allclose(powers, 1 + NOISE**2, rtol=0.02)


@pytest.mark.parametrize(("name", "task"), [("bells", "classification"), ("bells-cents", "regression")])
def test_bells_by_name(name, task):
    """Both names give sounds to train on and a tenth as many others; a schema reads them again."""
    sources = load(name, options=FEW)
    assert sources.train.task == task
    assert (len(sources.train.x), len(sources.validation.x)) == (40, 4)
    assert sources.train.x[:4].tobytes() != sources.validation.x[:].tobytes()
    schema = json.loads(json.dumps(sources.train.schema))
    blind = load(name, schema=schema, labelled=False, options=FEW).train
    assert blind.x[:].tobytes() == sources.train.x[:].tobytes()
    assert not blind.labelled
    assert not blind.y[:].any()
    other = load("digits").train.schema
    with pytest.raises(DataError, match="expected data like those the model was trained on"):
        load(name, schema=other)


def test_cents_are_normalised_and_sounds_are_not():
    """The samples come as they are made; numbers to predict get mean 0 and deviation 1, and can go back."""
    made = prepare(
        load("bells-cents", options=FEW), validation_fraction=0.1, split="auto", normalize="auto", seed=0
    )
    assert made.preprocessing.mode == "targets"
    assert made.train.x[:3].tobytes() == Bells("sound", first=0, count=3)[:].tobytes()
    y = made.train.y[:]
    np.testing.assert_allclose([y.mean(), y.std()], [0, 1], rtol=0, atol=1e-6)
    restored = made.preprocessing.restore_targets(y)
    np.testing.assert_allclose(restored, Bells("cents", first=0, count=40)[:], rtol=0, atol=1e-5)


def test_samples_are_refused_for_other_data():
    """The option is never ignored."""
    with pytest.raises(ConfigError, match=r"data\.samples = 40: expected the note of a struck bell or"):
        load("digits", options=FEW)


def test_the_sounds_stay_the_same():
    """The answers, which hold no logarithm or sine of this machine, are those of the first version."""
    answers = b"".join(Bells(part, first=0, count=200)[:].tobytes() for part in ("note", "cents"))
    assert hashlib.sha256(answers).hexdigest()[:16] == "66f4d308b22c0e40"
