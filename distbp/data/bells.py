"""Built-in sounds: struck bells, made when asked for; `bells` asks for the note, `bells-cents` for the pitch.

A bell has partials that are not multiples of one tone; founders tune the lowest five to hum, prime, tierce,
quint and nominal, in the ratios 1/2, 1, 6/5, 3/2 and 2.  A struck one begins with all of them and loses the
high ones first.  Here is a ring of 100 bells, a quarter tone apart.  Of each sample are drawn: the note, how
far the bell is out of tune (up to 20 cents, hundredths of a half tone, either way), for each partial how far
it is off its ratio, its strength, phase and decay, and noise of a hundredth of the sound's power (20 dB).

Sample i is a pure function of (seed, i): the same bytes for every worker, and as many samples as one wants
(`data.samples`).  A tenth as many validate; they are numbered from 2^40 on, so however many one trains on,
they are others, and the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp.data.base import Request, Source, Sources
from distbp.data.rows import Array, Packer, Rows, Unpacker
from distbp.errors import DataError
from distbp.random import normal, uniform

__all__ = ["Bells", "read_bells", "read_cents"]

RATE = 8000
"""Numbers in a second."""
LENGTH = 4096
LOWEST_HZ = 130.8
"""Prime of the lowest bell, a C; that of the highest is 2,283 Hz."""
NOTES = 100
STEPS_IN_OCTAVE = 24
MOST_CENTS = 20.0
PARTIALS = (0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 2.67, 3.0)
"""Ratios to the prime; what would lie above half the rate is left out, as any recorder does."""
OFF_RATIO_CENTS = 1.5
"""Deviation of a partial from its ratio, which bounds how well anybody can measure."""
NOISE = 0.1
"""Deviation of the noise where that of the sound is 1: 20 dB."""
VALIDATION_FROM = 2**40


class Bells(Rows):
    """Sounds `first` to `first + count - 1`, or what they are: `part` is "sound", "note" or "cents"."""

    def __init__(self, part: str, *, first: int, count: int, seed: int = 0) -> None:
        self._part = part
        self._first = first
        self._seed = seed
        shape, kind = {"sound": ((LENGTH,), np.float32), "note": ((), np.int64), "cents": ((1,), np.float32)}[
            part
        ]
        self.shape = (count, *shape)
        self.dtype = np.dtype(kind)

    def take(self, indices: NDArray[np.int64], out: Array | None = None) -> Array:
        """Return the sounds or their answers; see `Rows.take`."""
        make = {"sound": _sound, "note": _note, "cents": _cents}[self._part]
        result = np.empty((*indices.shape, *self.shape[1:]), self.dtype) if out is None else out
        flat = result.reshape(indices.size, *self.shape[1:])
        for row, index in enumerate(indices.reshape(-1).tolist()):
            flat[row] = make(self._seed, self._first + index)
        return result

    def describe(self, packer: Packer) -> dict[str, Any]:
        """Return the description; see `Rows.describe`."""
        return {"part": self._part, "first": self._first, "count": len(self), "seed": self._seed}

    @classmethod
    def restore(cls, description: Mapping[str, Any], unpacker: Unpacker) -> Bells:
        """Return what was described; see `Rows.restore`."""
        numbers = {name: description[name] for name in ("first", "count", "seed")}
        return cls(description["part"], **numbers)


def read_bells(request: Request) -> Sources:
    """Return sounds and their notes, 0 to 99."""
    return _sources(request, "bells", "note")


def read_cents(request: Request) -> Sources:
    """Return sounds and how far they are out of tune, in cents."""
    return _sources(request, "bells-cents", "cents")


def _sources(request: Request, name: str, part: str) -> Sources:
    """Return the sounds to train on and those to validate."""
    task: Any = "classification" if part == "note" else "regression"
    classes = tuple(str(note) for note in range(NOTES)) if part == "note" else None
    schema = {
        "format": name,
        "sample_shape": [LENGTH],
        "task": task,
        "classes": None if classes is None else list(classes),
        "num_outputs": NOTES if classes else 1,
        "sound": True,
        "scaled": True,
    }
    if request.schema is not None and request.schema != schema:
        raise DataError(f"{name}: expected data like those the model was trained on, got sounds of bells")

    def source(first: int, count: int) -> Source:
        sounds, answers = (Bells(what, first=first, count=count) for what in ("sound", part))
        y = answers if request.labelled else np.zeros(answers.shape, answers.dtype)
        return Source(name, task, sounds, y, classes, schema, request.labelled)

    count = request.options.samples or 20_000
    return Sources(source(0, count), source(VALIDATION_FROM, max(1, count // 10)))


def _note(seed: int, index: int) -> int:
    """Return the note of a sample."""
    return int(uniform(2, seed, "bells", index)[0] * NOTES)


def _cents(seed: int, index: int) -> float:
    """Return how far a sample is out of tune."""
    return float((2 * uniform(2, seed, "bells", index)[1] - 1) * MOST_CENTS)


def _sound(seed: int, index: int) -> NDArray[np.float32]:
    """Return one sound, of deviation 1, with its noise."""
    pitch = _note(seed, index) / STEPS_IN_OCTAVE + _cents(seed, index) / 1200
    drawn = uniform(3 * len(PARTIALS), seed, "bells/partials", index).reshape(3, -1)
    off = normal(len(PARTIALS), seed, "bells/ratios", index) * (OFF_RATIO_CENTS / 1200)
    cycles = LOWEST_HZ / RATE * np.array(PARTIALS) * 2.0 ** (pitch + off)
    strength = (0.3 + 0.7 * drawn[0]) * (cycles < 0.49)
    lifetime = RATE * (0.15 + 0.3 * drawn[1]) / np.sqrt(PARTIALS)
    time = np.arange(LENGTH)
    turns = time * cycles[:, np.newaxis] + drawn[2][:, np.newaxis]
    turns -= np.floor(turns)  # Reduced in float64, so that float32 is enough for the sine.
    waves = np.sin((2 * np.pi * turns).astype(np.float32))
    waves *= np.exp((-time / lifetime[:, np.newaxis]).astype(np.float32))
    sound = np.add.reduce(strength.astype(np.float32)[:, np.newaxis] * waves, axis=0, dtype=np.float64)
    sound /= np.sqrt(np.mean(np.square(sound)))
    sound += NOISE * normal(LENGTH, seed, "bells/noise", index)
    result: NDArray[np.float32] = sound.astype(np.float32)
    return result
