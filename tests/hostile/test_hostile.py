"""Checkpoints from elsewhere are refused, however they are made, before they cost anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from distbp.checkpoint import describe, load, newest_verified, verify
from distbp.checkpoint.layout import DTYPES
from distbp.errors import CheckpointError
from tests.checkpoint.checkpoint_states import save_steps, small_snapshot
from tests.conftest import COMMAND

from . import corpus
from .corpus import ACCEPTED, REFUSED, build

FOR_THE_COMMAND_LINE = ["pickle-as-state", "shape-2-60", "json-deep", "symlink-as-state", "file-traversal"]
"""One of each kind; a command takes half a second to start."""


def distbp(*arguments, cwd):
    """Run a command that may not take long, and return how it ended."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DISTBP_")}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.parametrize("name", REFUSED)
def test_the_hostile_is_refused_at_small_cost(name, tmp_path):
    """Refused with 65 by load and verify, in a short message; memory follows the real size of the files."""
    path = build(name, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert caught.value.exit_code == 65
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable(), "a message may not speak to the terminal"
    assert verify(path)
    assert corpus.peak_of(path) < 3 * corpus.size_of(path) + (64 << 10)


@pytest.mark.parametrize("name", REFUSED)
def test_the_hostile_can_be_looked_at(name, tmp_path):
    """`describe`, which shows what is legible of a damaged checkpoint, returns JSON and names the problem."""
    shown = describe(build(name, tmp_path))
    assert shown["problems"]
    json.dumps(shown)


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_stands_at_a_limit_is_accepted(name, tmp_path):
    """Exactly at a limit a checkpoint loads; one beyond is among the refused."""
    path = build(name, tmp_path)
    assert verify(path) == []
    assert load(path).step == 7


def test_a_file_name_at_its_limit_is_a_name(tmp_path):
    """Of 128 characters a file name is taken for one, and is unknown; of 129 it is no name."""
    for length, expected in ((128, "expected exactly"), (129, "names of 1 to 128")):
        (path,) = save_steps(tmp_path / f"{length}", 7)
        corpus.listed_files(corpus.renamed("a" * length))(path)
        with pytest.raises(CheckpointError, match=expected):
            load(path)


@pytest.mark.parametrize("code", [*DTYPES, "O", "U1", "F8_E4M3", "BF16", "f4", "C64", "V8", "M8", "S1", ""])
def test_only_the_listed_types_are_read(code, tmp_path):
    """Each listed type is read; objects, texts, dates and whatever else NumPy or others know are not."""
    (path,) = save_steps(tmp_path, 7)
    size = DTYPES[code].itemsize if code in DTYPES else 1
    entry = {"dtype": code, "shape": [1], "data_offsets": [0, size]}
    corpus.put_tensors(path, {"a": entry}, bytes(size))
    if code in DTYPES:
        assert load(path).tensors["a"].dtype == DTYPES[code]
    else:
        with pytest.raises(CheckpointError, match="expected a dtype of"):
            load(path)


def test_recovery_passes_over_the_hostile(tmp_path):
    """Planted as the newest checkpoints of a run, all of them are passed over, named, for the good one."""
    run = tmp_path / "checkpoints"
    (good,) = save_steps(run, 7)
    for step, name in enumerate(REFUSED, start=8):
        build(name, tmp_path).rename(run / f"step-{step:08d}")
    reported: list[str] = []
    assert newest_verified(run, lambda path, why: reported.append(path.name)) == good
    assert len(reported) == len(REFUSED)


def test_no_more_memory_than_the_machine_has(tmp_path):
    """A state too large for the memory of the process is refused with its size, not with a traceback."""
    program = (
        "import resource, sys; from pathlib import Path; from distbp.checkpoint import load\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "load(Path(sys.argv[1]))\n"
    )
    (path,) = save_steps(tmp_path, 7)
    size = 1 << 40
    header = json.dumps(
        {
            "__metadata__": {"step": "7"},
            "a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]},
        }
    ).encode()
    with open(path / corpus.STATE, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)  # A hole: it takes no room on the disk.
    record = {"size": 8 + len(header) + size, "crc32": 0, "sha256": "0" * 64}
    corpus.listed_files(lambda files: files.update({corpus.STATE: record}))(path)
    done = subprocess.run(
        [sys.executable, "-c", program, path], capture_output=True, text=True, timeout=60, check=False
    )
    assert "CheckpointError" in done.stderr.splitlines()[-1]
    assert f"{size} bytes" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", FOR_THE_COMMAND_LINE)
def test_the_commands_answer_with_65(name, tmp_path):
    """`inspect`, `evaluate` and `--resume` answer with 65 and the file's name, and fall back to nothing."""
    path = build(name, tmp_path)
    for arguments in (
        ("inspect", path),
        ("inspect", path, "--verify"),
        ("evaluate", path, "digits"),
        (
            "train",
            "digits",
            "--backend",
            "serial",
            "--epochs",
            1,
            "--resume",
            path,
            "--out",
            tmp_path / "run",
        ),
    ):
        done = distbp(*arguments, cwd=tmp_path)
        assert done.returncode == 65, done.stderr
        assert any(file in done.stdout + done.stderr for file in ("manifest", "metadata", "state.safe"))
        assert "Traceback" not in done.stderr


def test_what_a_checkpoint_says_cannot_speak_to_the_terminal(tmp_path):
    """Metadata and names with control characters are shown as JSON by `inspect`."""
    evil = "\x1b]0;mine\x07\x1b[2Jgood"
    (path,) = save_steps(tmp_path, 7)
    corpus.put_metadata(path, json.dumps({"config": {"data": {"path": evil}}, evil: evil}).encode())
    for option in ((), ("--json",), ("--verify",)):
        done = distbp("inspect", path, *option, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        assert "\x07" not in done.stdout + done.stderr


def test_nothing_is_unpickled(tmp_path):
    """While the whole corpus is read, no pickle is loaded and no program is run: an audit hook listens."""
    for name in REFUSED:
        build(name, tmp_path)
    program = (
        "import sys; from pathlib import Path\n"
        "from distbp.checkpoint import describe, verify\n"
        "seen = []\n"
        "watched = ('pickle.find_class', 'exec', 'os.exec', 'os.system', 'subprocess.Popen')\n"
        "sys.addaudithook(lambda event, _: seen.append(event) if event in watched else None)\n"
        "for path in sorted(Path(sys.argv[1]).iterdir()):\n"
        "    if path.is_dir():\n"
        "        assert verify(path) and describe(path)['problems'], path\n"
        "print(seen)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


def test_the_readme_says_what_each_is():
    """README.md lists the corpus of today; `python -m tests.hostile.corpus readme` writes it anew."""
    assert corpus.README.read_text() == corpus.readme()


def test_the_good_one_is_good(tmp_path):
    """What the builders begin from is whole: without the change it would load."""
    (path,) = save_steps(tmp_path, 7)
    assert load(path).step == small_snapshot(7).step == 7
    assert Path(corpus.README).exists()
