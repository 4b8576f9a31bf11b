"""One worker process of the local backend, seen from the launching process: its start and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from distbp.environment import thread_variables

__all__ = ["WorkerProcess"]


@dataclass
class WorkerProcess:
    """A child process, this end of its channel, and a descriptor that becomes readable when it ends."""

    popen: subprocess.Popen[bytes]
    channel: socket.socket
    pidfd: int
    said_goodbye: bool = False

    @classmethod
    def start(cls, rank: int, size: int, threads: int, arguments: Sequence[str]) -> WorkerProcess:
        """Start worker `rank` of `size` with `threads` BLAS threads."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | thread_variables(threads)
        environment |= {
            "DISTBP_RANK": str(rank),
            "DISTBP_SIZE": str(size),
            "DISTBP_HOST": f"fd:{theirs.fileno()}",
        }
        popen = subprocess.Popen(
            [sys.executable, "-m", "distbp.cli.worker", *arguments],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        return cls(popen, ours, os.pidfd_open(popen.pid))

    def kill(self) -> None:
        """End the process if it still runs, and wait for it."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()

    def close(self) -> None:
        """Give back the descriptors; idempotent."""
        self.channel.close()
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1

    def cause(self) -> str:
        """Return how the process ended: 'SIGKILL' or 'exit 3'."""
        code = self.popen.returncode
        if code >= 0:
            return f"exit {code}"
        try:
            return signal.Signals(-code).name
        except ValueError:
            return f"signal {-code}"
