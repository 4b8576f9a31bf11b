"""Whatever happens to the bytes of a checkpoint is found before any of them is used."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from distbp.checkpoint import load, newest_verified, reading, verify
from distbp.errors import CheckpointError
from tests.hostile.corpus import sign_again

from .checkpoint_states import assert_same, holds, save_steps, small_snapshot

FILES = ["manifest.json", "metadata.json", "state.safetensors"]


@pytest.fixture
def checkpoint(tmp_path):
    """One good checkpoint of step 7."""
    (path,) = save_steps(tmp_path / "checkpoints", 7)
    return path


def assert_refused(path: Path, names: str) -> None:
    """Assert that load and verify refuse `path` with 65 and a short message that contains `names`."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert caught.value.exit_code == 65
    assert names in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert any(names in problem for problem in verify(path))


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_is_found(checkpoint, name):
    """Each byte of each file, changed in each single bit and as a whole, is found, and the file is named."""
    file = checkpoint / name
    good = file.read_bytes()
    for position in range(len(good)):
        for flip in (1 << (position % 8), 0x20, 0xFF):
            file.write_bytes(good[:position] + bytes([good[position] ^ flip]) + good[position + 1 :])
            problems = verify(checkpoint)
            assert problems, f"byte {position} xor {flip:#x}"
            assert problems[0].startswith(name)
    file.write_bytes(good)
    assert holds(checkpoint)


@pytest.mark.parametrize("name", FILES)
def test_every_truncation_and_every_extension_is_found(checkpoint, name):
    """A file cut anywhere, or with bytes after its end, is found, and the file is named."""
    file = checkpoint / name
    good = file.read_bytes()
    for changed in [*(good[:length] for length in range(len(good))), good + b"\0", good + b"\n", good + good]:
        file.write_bytes(changed)
        problems = verify(checkpoint)
        assert problems, f"length {len(changed)} of {len(good)}"
        assert problems[0].startswith(name)


def test_random_flips_anywhere_are_found(checkpoint):
    """Two thousand random flips of one bit are found by load itself; the seed is printed."""
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(2000):
        file = checkpoint / rng.choice(FILES)
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(CheckpointError):
            load(checkpoint)
        file.write_bytes(good)
    assert holds(checkpoint)


def test_a_flip_is_also_found_without_sha256(checkpoint):
    """The quick verification that pruning uses finds a flipped bit of the state by its CRC-32."""
    assert reading.verify(checkpoint, only_crc=True) == []
    data = bytearray((checkpoint / "state.safetensors").read_bytes())
    data[-3] ^= 4
    (checkpoint / "state.safetensors").write_bytes(data)
    assert "CRC-32" in reading.verify(checkpoint, only_crc=True)[0]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(checkpoint, name):
    """A checkpoint without one of its files says which is missing."""
    os.unlink(checkpoint / name)
    assert_refused(checkpoint, f"{name}: is missing")


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_checkpoint_is_found(checkpoint, name):
    """A file taken from another good checkpoint of the run is refused, the manifest included."""
    (other,) = save_steps(checkpoint.parent, 8)
    shutil.copyfile(other / name, checkpoint / name)
    if name == "metadata.json":  # These two have equal metadata; anything else would be found by its hash.
        assert holds(checkpoint)
    else:
        assert_refused(checkpoint, name)


def test_swapped_folders_are_found(checkpoint):
    """A folder renamed to another step is refused: its name is what recovery goes by."""
    os.rename(checkpoint, checkpoint.with_name("step-00000009"))
    assert_refused(checkpoint.with_name("step-00000009"), "expected step 9, found step 7")


def test_a_copy_under_any_other_name_loads(checkpoint, tmp_path):
    """A checkpoint may be copied and named freely, with other files beside its own."""
    copy = tmp_path / "best"
    shutil.copytree(checkpoint, copy)
    (copy / "README").write_text("mine")
    assert_same(load(copy), small_snapshot(7))


@pytest.mark.parametrize("version", [0, 2, 1.0, "1", None, True])
def test_another_format_version_says_which_is_needed(checkpoint, version):
    """An older or newer format is not called damaged: the message names both versions."""
    sign_again(checkpoint, format_version=version)
    assert_refused(checkpoint, f"reads checkpoint format version 1, this one has version {version!r}")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    """A foreign folder, a file and a symbolic link in place of a checkpoint are refused with 65."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("{}")
    os.symlink(tmp_path / "folder", tmp_path / "link")
    assert_refused(tmp_path / "folder", "manifest.json: is missing")
    assert_refused(tmp_path / "file", "expected a readable folder")
    assert_refused(tmp_path / "link", "symbolic link")


def test_the_newest_that_verifies_is_chosen_and_damaged_ones_are_reported(tmp_path):
    """Recovery takes the newest whole checkpoint, and says which damaged ones it passed over and why."""
    paths = save_steps(tmp_path, 1, 2, 3, 4)
    os.unlink(paths[3] / "manifest.json")
    (paths[2] / "metadata.json").write_text("{}")
    reported: list[tuple[str, str]] = []
    assert newest_verified(tmp_path, lambda path, why: reported.append((path.name, why))) == paths[1]
    assert [name for name, _ in reported] == ["step-00000004", "step-00000003"]
    assert "manifest.json: is missing" in reported[0][1]
    assert "metadata.json: expected" in reported[1][1]


def test_no_checkpoint_at_all_is_none(tmp_path):
    """A run without checkpoints, or with damaged ones only, has none to start from."""
    assert newest_verified(tmp_path / "checkpoints", lambda path, why: None) is None
    (path,) = save_steps(tmp_path, 1)
    os.unlink(path / "state.safetensors")
    assert newest_verified(tmp_path, lambda path, why: None) is None


def test_the_manifest_is_json_for_everybody(checkpoint):
    """Any JSON parser reads the manifest, and finds the promised fields."""
    fields = json.loads((checkpoint / "manifest.json").read_text())
    assert list(fields) == ["format", "format_version", "step", "config_sha256", "files", "manifest_sha256"]
