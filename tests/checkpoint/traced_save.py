"""A save in a process of its own, under strace, which kills it or makes one of its system calls fail.

The process is forked and waits on a pipe until strace has attached, so that only the calls of the save are
counted and each try costs milliseconds instead of the start of an interpreter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from distbp.checkpoint import save
from distbp.errors import DistbpError

from .checkpoint_states import small_snapshot

KILLED = -9


@dataclass(frozen=True)
class Outcome:
    """How a traced save ended: `code` is 0, an exit code, or -9; `calls` are the lines of strace."""

    code: int
    message: str
    calls: list[str]


def why_not() -> str:
    """Return why a save cannot be traced here; "" if it can."""
    if shutil.which("strace") is None:
        return "strace is not installed (apt install strace)"
    child = subprocess.Popen(["sleep", "10"])
    try:
        attach = subprocess.run(
            ["strace", "-p", str(child.pid), "-e", "trace=none", "-o", "/dev/null"],
            capture_output=True, text=True, timeout=1, check=False,
        )  # fmt: skip
        return f"strace may not attach to processes here: {attach.stderr.strip()}"
    except subprocess.TimeoutExpired:
        return ""  # Still attached after a second: it works.
    finally:
        child.kill()
        child.wait()


def traced_save(directory: Path, step: int, *, keep: int, inject: str = "", log: Path) -> Outcome:
    """Save the small snapshot of `step` under strace, which injects `inject` (for its -e inject=)."""
    go_read, go_write = os.pipe()
    out_read, out_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(go_write)  # Else the child itself would keep the pipe open that it waits on.
        _child(directory, step, keep, go_read, out_write)
    os.close(go_read)
    os.close(out_write)
    command = ["strace", "-f", "-y", "-p", str(pid), "-o", str(log)]
    command += ["-e", f"inject={inject}"] if inject else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        assert strace.stderr is not None
        attached = strace.stderr.readline()
        os.close(go_write)  # The end of the pipe is the sign to go; it needs no write that could be counted.
        _, status = os.waitpid(pid, 0)
        assert "attached" in attached, attached
        strace.wait()
    with open(out_read, encoding="utf-8") as pipe:
        message = pipe.read()
    return Outcome(os.waitstatus_to_exitcode(status), message, log.read_text().splitlines())


def _child(directory: Path, step: int, keep: int, go: int, out: int) -> None:
    """Save and leave; never return into the test that was forked."""
    code = 1
    try:
        os.read(go, 1)
        save(directory, small_snapshot(step), keep=keep)
        code = 0
    except DistbpError as error:
        code = error.exit_code
        os.writev(out, [str(error).encode()])  # Not "write", which may be the call that fails.
    finally:
        os._exit(code)
