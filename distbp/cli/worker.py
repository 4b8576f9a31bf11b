"""The program of a local worker process: `python -m distbp.cli.worker [SCRIPT ARGS...]`.

Signal handlers stand before anything heavy is imported: SIGINT is ignored (the launching process decides what
a Ctrl-C means), SIGUSR1 and SIGTERM sent to this worker alone are passed on to it.  The kernel kills the
worker when the launching process dies.

Without a script the worker waits for a job message, which describes a `distbp train`.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distbp.backends.member import JobMembership

__all__ = ["main"]

_PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> int:
    """Run the worker; return its exit code."""
    early: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        early.append(number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, note)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    from distbp.trainer import membership

    members: JobMembership = membership()  # type: ignore[assignment]
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda received, frame: members.report_stop(received))
    for noted in early:
        members.report_stop(noted)
    return run_reporting(members, arguments)


def run_reporting(members: JobMembership, arguments: list[str]) -> int:
    """Run the program and tell the launching process how it ended."""
    import traceback

    from distbp.errors import DistbpError, Stopped

    code = 0
    try:
        if arguments:
            sys.argv = list(arguments)
            sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            _train(members)
    except Stopped as error:
        code = error.exit_code
    except DistbpError as error:
        _flush()
        members.report_failure(error.exit_code, str(error))
        return error.exit_code
    except SystemExit as leaving:
        if leaving.code not in (None, 0):
            members.report_failure(1, f"worker {members.rank} called sys.exit({leaving.code!r})")
            return 1
    except BaseException:
        text = traceback.format_exc()
        _flush()
        members.report_failure(1, f"worker {members.rank} raised:\n{text}")
        return 1
    _flush()
    members.say_goodbye(code)
    return code


def _flush() -> None:
    """Write what was printed; a closed stream is not this worker's failure."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _train(members: JobMembership) -> None:
    """Receive the job of a `distbp train` and carry it out."""
    from distbp.cli.job import fit_job

    fit_job(*members.receive_job())


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if len(sys.argv) > 1:
        sys.exit(code)  # A script may have asked for work at exit.
    os._exit(code)  # Nothing is left to do; interpreter shutdown would only cost time.
