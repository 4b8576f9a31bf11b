"""`distbp inspect`: what a checkpoint holds, and that damage is found, named and answered with 65."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from .command_line import distbp, refuse, succeed


@pytest.fixture
def run(digits_run: Path, tmp_path: Path) -> Path:
    """Return a copy of a run that may be damaged."""
    return Path(shutil.copytree(digits_run, tmp_path / "run"))


def newest(run: Path) -> Path:
    """Return the newest checkpoint of a run."""
    return max((run / "checkpoints").iterdir())


def test_a_whole_checkpoint_is_described(digits_run: Path) -> None:
    """Step, tensors with type, shape and size, and the key metadata are shown."""
    printed = succeed("inspect", newest(digits_run), cwd=digits_run)
    assert ["parameters/1.weight", "F32", "(64,", "16)", "4,096"] in map(str.split, printed.splitlines())
    assert "data          digits" in printed
    assert "classes       10" in printed
    assert printed.endswith("every hash holds\n")


def test_json_holds_everything(digits_run: Path) -> None:
    """The JSON form names step, tensors, files and metadata of the newest checkpoint of a run."""
    found = json.loads(succeed("inspect", digits_run, "--json", cwd=digits_run))
    assert found["step"] == json.loads((digits_run / "result.json").read_text())["steps"]
    assert found["problems"] == []
    assert found["metadata"]["config"]["data"]["path"] == "digits"
    sizes = {tensor["name"]: tensor["bytes"] for tensor in found["tensors"]}
    assert sizes["parameters/1.weight"] == 64 * 16 * 4


@pytest.mark.parametrize("name", ["state.safetensors", "metadata.json", "manifest.json"])
def test_one_flipped_bit_is_found(run: Path, name: str) -> None:
    """A bit that flips in any file of the newest checkpoint is 65 and the file is named."""
    path = newest(run) / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for option in ((), ("--verify",), ("--json",)):
        done = distbp("inspect", run, *option, cwd=run)
        assert done.returncode == 65
        assert name in done.stdout
        assert "Traceback" not in done.stderr
    damaged = distbp("inspect", newest(run), cwd=run)
    assert "DAMAGED" in damaged.stdout
    assert "every hash holds" not in damaged.stdout


@pytest.mark.parametrize("name", ["state.safetensors", "metadata.json", "manifest.json"])
def test_a_missing_file_is_damage(run: Path, name: str) -> None:
    """A checkpoint that lacks a file is damaged, not missing, also under another name."""
    (newest(run) / name).unlink()
    copy = newest(run).rename(run / "copy")
    assert distbp("inspect", copy, cwd=run).returncode == 65


def test_verify_judges_every_checkpoint(run: Path) -> None:
    """`--verify` says of each checkpoint of a run whether it is whole, newest first."""
    folders = sorted((run / "checkpoints").iterdir(), reverse=True)
    (folders[1] / "metadata.json").write_text("{}")
    done = distbp("inspect", run, "--verify", cwd=run)
    assert done.returncode == 65
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "DAMAGED", *["ok"] * (len(folders) - 2)]
    assert [line.split()[1] for line in lines] == list(map(str, folders))
    shutil.rmtree(folders[1])
    found = json.loads(succeed("inspect", run, "--verify", "--json", cwd=run))
    assert [one["problems"] for one in found] == [[]] * (len(folders) - 1)


def test_what_is_no_checkpoint_is_named(tmp_path: Path) -> None:
    """A path that does not exist, a file, and a directory without checkpoints are 66."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    assert "found nothing" in refuse(66, "inspect", "gone", cwd=tmp_path)
    assert "found a file" in refuse(66, "inspect", "file", cwd=tmp_path)
    assert "holds no checkpoint" in refuse(66, "inspect", "empty", cwd=tmp_path)
