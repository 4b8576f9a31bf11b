"""Folders of WAV files: every width of PCM, channels, lengths, and files that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distbp.data import Options, load, prepare
from distbp.data.sound_folder import read_sound
from distbp.errors import DataError
from tests.data.data_files import write_wav


def pcm(values: np.ndarray, width: int) -> bytes:
    """Return numbers from -1 to below 1 as PCM of `width` bytes, value by value."""
    content = b""
    for value in values.reshape(-1).tolist():
        whole = round(value * 2 ** (8 * width - 1))
        content += bytes([whole + 128]) if width == 1 else whole.to_bytes(width, "little", signed=True)
    return content


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_width_of_pcm(tmp_path: Path, width: int, channels: int) -> None:
    """8, 16, 24 and 32 bits give the same numbers, where these fit; channels are averaged."""
    values = np.array([[-1.0, 0.5], [0.0, 0.25], [0.5, -0.5], [0.9921875, 0.0]])[:, :channels]
    write_wav(tmp_path / "a.wav", pcm(values, width), width=width, channels=channels)
    sound, rate = read_sound(tmp_path / "a.wav")
    assert rate == 8000
    assert sound.dtype == np.float32
    assert sound.tolist() == values.mean(axis=1).tolist()


def folder(tmp_path: Path, lengths: tuple[int, ...] = (40, 40), rates: tuple[int, ...] = (8000, 8000)) -> str:
    """Return a folder of two classes with one sound in each."""
    for name, length, rate in zip("ab", lengths, rates, strict=True):
        (tmp_path / name).mkdir()
        tone = np.sin(np.arange(length) * (1 + (name == "b"))) / 2
        write_wav(tmp_path / name / "1.wav", pcm(tone, 2), rate=rate)
    return str(tmp_path)


def test_lengths_are_brought_to_one(tmp_path: Path) -> None:
    """With data.length sounds are cut, or filled up with silence; without it one length is wanted."""
    path = folder(tmp_path, lengths=(30, 50))
    with pytest.raises(DataError, match=r"b/1\.wav: expected 30 numbers.*data\.length"):
        load(path)
    source = load(path, options=Options(length=40)).train
    assert source.x.shape == (2, 40)
    assert not source.x[0, 30:].any()
    assert source.x[1, 1:].all()
    again = load(str(tmp_path / "a" / "1.wav"), schema=source.schema, labelled=False).train
    assert again.x.tobytes() == source.x[:1].tobytes()


def test_another_rate_is_refused(tmp_path: Path) -> None:
    """A file of another rate would be another pitch, in a folder and when predicting."""
    path = folder(tmp_path, rates=(8000, 16000))
    with pytest.raises(DataError, match=r"expected 8000 numbers a second.*got 16000"):
        load(path)


def test_sounds_get_one_mean_and_deviation(tmp_path: Path) -> None:
    """A place in a sound has no meaning of its own, so places are not normalised one by one."""
    sources = load(folder(tmp_path))
    made = prepare(sources, validation_fraction=0, split="auto", normalize="auto", seed=0)
    assert made.preprocessing.mode == "global"


@pytest.mark.parametrize(
    "content", [b"", b"RIFF", b"RIFF\x24\0\0\0WAVEfmt ", b"no sound at all, but some text"]
)
def test_files_that_are_no_sound_are_named(tmp_path: Path, content: bytes) -> None:
    """A damaged file, or one of another kind, is refused by its name."""
    path = folder(tmp_path)
    (tmp_path / "b" / "2.wav").write_bytes(content)
    with pytest.raises(DataError, match=r"b/2\.wav: expected a WAV file of PCM"):
        load(path)


def test_a_header_that_claims_too_much_is_not_believed(tmp_path: Path) -> None:
    """What counts is the bytes that are there: no memory is taken for what a header claims."""
    path = Path(folder(tmp_path)) / "b" / "1.wav"
    content = bytearray(path.read_bytes())
    content[40:44] = (2**31 - 2).to_bytes(4, "little")
    path.write_bytes(content)
    assert read_sound(path)[0].shape == (40,)
