"""One measurement in several processes at the same moment: what a core can do beside busy ones.

`together` starts processes that share a memory file, gives each the same list of items, and collects what
they answer.  What a process does stands in `distbp/bench/probe.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from distbp.bench.probe import CONTROL_BYTES
from distbp.errors import UserCodeError

__all__ = ["together"]

DEADLINE_S = 300.0


def together(measure: str, items: Sequence[Any], processes: int, shared_bytes: int = 0) -> list[list[Any]]:
    """Return for each item what every process measured; `measure` is a name in `probe.MEASURES`.

    `shared_bytes` are for the measurement, behind the pages of the barrier.  UserCodeError if a process
    fails or gives no answer.
    """
    descriptor = os.memfd_create("distbp-bench", os.MFD_CLOEXEC)
    started: list[subprocess.Popen[str]] = []
    try:
        os.ftruncate(descriptor, CONTROL_BYTES + shared_bytes)
        for rank in range(processes):
            question = {"measure": measure, "items": items, "rank": rank, "size": processes}
            words = [sys.executable, "-m", "distbp.bench.probe", str(descriptor), json.dumps(question)]
            started.append(
                subprocess.Popen(
                    words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, pass_fds=(descriptor,)
                )
            )
        found = [_answer(process) for process in started]
    finally:
        os.close(descriptor)
        for process in started:
            process.kill()
            with contextlib.suppress(ValueError):
                process.communicate()
    return [list(measured) for measured in zip(*found, strict=True)]


def _answer(process: subprocess.Popen[str]) -> list[Any]:
    """Return what one process measured."""
    try:
        out, errors = process.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        raise UserCodeError(f"a measuring process gave no answer within {DEADLINE_S:g} s") from None
    if process.returncode:
        raise UserCodeError(f"a measuring process ended with {process.returncode}: {errors.strip()}")
    measured: list[Any] = json.loads(out)
    return measured
