"""The surface of the command line: help, documented options, and what help must not cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest

from distbp.cli.main import COMMANDS

from .command_line import refuse, succeed

# DESIGN section 4, what the user sees.
DOCUMENTED = {
    "train": "-c -o --nproc --backend --epochs --batch-size --micro-batch --seed --target --out --resume "
    "--dry-run",
    "run": "--nproc --backend",
    "evaluate": "--target --json",
    "predict": "-o",
    "generate": "--prompt --length --temperature --seed",
    "export": "-o",
    "inspect": "--json --verify",
    "doctor": "--backend --json --out --ray-insecure",
    "config show": "-c -o --origin --json",
    "config init": "",
    "config check": "",
    "config schema": "",
}

SHOW_HELP = """
import sys
from distbp.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as leaving:
    assert not leaving.code, leaving.code
heavy = {"numpy", "rich", "threadpoolctl", "distbp.trainer"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize("arguments", ["--help", "--version", *(f"{name} --help" for name in COMMANDS)])
def test_help_is_light(arguments: str) -> None:
    """Help and version, of the program and of every command, come without NumPy, rich or the trainer."""
    done = subprocess.run(
        [sys.executable, "-c", SHOW_HELP, *arguments.split()], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(("Usage: distbp", "distbp 0"))


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_options_exist(name: str, tmp_path: Path) -> None:
    """Every option that the documents name is in the help of its command."""
    listed = succeed(*name.split(), "--help", cwd=tmp_path)
    missing = [option for option in DOCUMENTED[name].split() if f"{option} " not in listed + " "]
    assert not [option for option in missing if f"{option}," not in listed]


def test_every_command_has_a_module() -> None:
    """What `distbp --help` lists can be called."""
    from distbp.cli import main

    context = click.Context(main._group)
    for name in COMMANDS:
        assert isinstance(main._group.get_command(context, name), click.Command)


@pytest.mark.parametrize("name", ["evaluate", "generate", "predict", "inspect"])
def test_missing_arguments_are_a_usage_error(name: str, tmp_path: Path) -> None:
    """A command without its arguments ends with 2 and names what is missing."""
    assert "RUN" in refuse(2, name, cwd=tmp_path)


def test_a_command_with_a_slip_is_told_its_name(tmp_path: Path) -> None:
    """A name that nearly is one is answered with it; nothing is guessed for others."""
    assert "No such command 'trian'; did you mean 'train'?" in refuse(2, "trian", "digits", cwd=tmp_path)
    assert "did you mean" not in refuse(2, "xyzzy", cwd=tmp_path)
    assert "distbp evaluate RUN DATA --suspects 20" in refuse(2, "suspects", "runs/x", cwd=tmp_path)
