"""The chaos in short: a few faults of a local run, and that it finds a run which ends differently."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.soaking import REPOSITORY

SHORT = ["--steps", "3000", "--seed", "3", "--kinds"]


def chaos(*words):
    """Run the chaos; skip, with the reason, where it cannot be."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    if "the chaos needs" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(done.stderr)
    return done


def test_a_run_survives_some_of_everything(tmp_path):
    """Killed and started again, with a damaged checkpoint, a run ends in the bits of the undisturbed one."""
    report = tmp_path / "report.json"
    done = chaos("--faults", "3", "--json", str(report), *SHORT, "kill", "flip", "stop_request")
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(report.read_text())["figures"]
    assert sum(map(len, figures.values())) == 3
    assert "all with the bits of the undisturbed one" in done.stdout


def test_another_end_is_found():
    """Compared with a run of another seed, the same run is not as it should be: the chaos can fail."""
    done = chaos("--faults", "1", "--control", *SHORT, "kill")
    assert done.returncode == 1
    assert "NOT AS IT SHOULD BE" in done.stdout
    assert "expected (" in done.stdout
