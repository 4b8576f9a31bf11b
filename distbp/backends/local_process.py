"""One worker process of the local backend, seen from the launching process: its start and its end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from distbp.backends.local_worker import PacketChannel
from distbp.environment import thread_variables
from distbp.fault_points import VARIABLE

__all__ = ["WorkerProcess"]


@dataclass
class WorkerProcess:
    """A child process, this end of its channel, and a descriptor that becomes readable when it ends.

    `unwatch` takes descriptors out of the loop of whoever waits for them, before they are closed.
    """

    popen: subprocess.Popen[bytes]
    channel: PacketChannel
    pidfd: int
    said_goodbye: bool = False
    verdict: str | None = None
    host: str = field(default_factory=socket.gethostname)
    unwatch: Callable[..., None] = lambda *watched: None

    @classmethod
    def start(
        cls, rank: int, size: int, threads: int, arguments: Sequence[str], faults: str
    ) -> WorkerProcess:
        """Start worker `rank` of `size` with `threads` BLAS threads and `faults` on purpose."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = os.environ | thread_variables(threads)
        environment |= {
            "DISTBP_RANK": str(rank),
            "DISTBP_SIZE": str(size),
            "DISTBP_HOST": f"fd:{theirs.fileno()}",
            VARIABLE: faults,
        }
        popen = subprocess.Popen(
            [sys.executable, "-m", "distbp.cli.worker", *arguments],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        return cls(popen, PacketChannel(ours), os.pidfd_open(popen.pid))

    @property
    def pid(self) -> int:
        """Return the process number."""
        return self.popen.pid

    def tell(self, message: Mapping[str, Any], descriptor: int | None = None) -> None:
        """Send a message; `OSError` when the worker has gone."""
        self.channel.send(message, descriptor)

    def wait(self, seconds: float) -> None:
        """Return when the process has ended, or after `seconds`."""
        with suppress(subprocess.TimeoutExpired):
            self.popen.wait(seconds)

    def dump_stacks(self) -> None:
        """Let the process write its stacks (`WorkerLog`); one that is stopped will not."""
        self.popen.send_signal(signal.SIGUSR2)

    def end(self) -> None:
        """Kill the process; its pidfd tells when it is gone."""
        self.popen.kill()

    def kill(self) -> None:
        """End the process if it still runs, wait for it, and give back the descriptors; idempotent."""
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait()
        self.close()

    def close(self) -> None:
        """Give back the descriptors; idempotent."""
        if self.pidfd >= 0:
            self.unwatch(self.channel, self.pidfd)
            self.channel.close()
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
