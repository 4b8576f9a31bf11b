"""Run the real command in a process of its own, as a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def distbp(*arguments: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `distbp ARGUMENTS` in `cwd`, with no setting of the caller's environment but those given."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("DISTBP_")}
    return subprocess.run(
        [sys.executable, "-m", "distbp.cli.main", *map(str, arguments)],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def succeed(*arguments: object, cwd: Path, **environment: str) -> str:
    """Run a command that must end with 0, and return what it printed."""
    done = distbp(*arguments, cwd=cwd, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refuse(code: int, *arguments: object, cwd: Path, **environment: str) -> str:
    """Run a command that must end with `code` and no traceback, and return its message."""
    done = distbp(*arguments, cwd=cwd, **environment)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def figures(printed: str) -> dict[str, str]:
    """Return the lines `name   value` of a report."""
    return dict(line.split(maxsplit=1) for line in printed.splitlines() if len(line.split(maxsplit=1)) == 2)
