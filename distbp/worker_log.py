"""A worker's own log, `RUN/logs/rank-00000.log`: who it was, and what it had to say at its end.

A crash inside compiled code writes its stack there too, and SIGUSR2 those of all threads.  `launch/mpirun.sh`
reads these lines to name the culprit of a job that ended badly.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import socket
import threading
import time
from pathlib import Path

__all__ = ["WorkerLog"]


class WorkerLog:
    """Lines with the time of day, appended; a log that cannot be written costs nobody anything.

    The first line says which process this was; under a launcher also its number there, which is another one
    where the launcher does not place ranks host by host.
    """

    def __init__(self, out: Path, rank: int, size: int, launcher_rank: int | None = None) -> None:
        path = out / "logs" / f"rank-{rank:05d}.log"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._file = os.fdopen(os.open(path, flags, 0o600), "a", buffering=1)
        faulthandler.enable(self._file)
        if hasattr(signal, "SIGUSR2") and threading.current_thread() is threading.main_thread():
            faulthandler.register(signal.SIGUSR2, self._file)
        launched = "" if launcher_rank is None else f", launcher rank {launcher_rank}"
        self.write(f"worker {rank} of {size}, pid {os.getpid()}, host {socket.gethostname()}{launched}")

    def write(self, text: str) -> None:
        """Append one entry."""
        with contextlib.suppress(OSError, ValueError):
            self._file.write(f"{time.strftime('%H:%M:%S')} {text}\n")
