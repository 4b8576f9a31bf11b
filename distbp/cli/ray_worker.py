"""The program of a worker actor: a script, or the job of a `distbp train`, on a node of a Ray cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from distbp import fault_points
from distbp.backends.ray_worker import joined_job
from distbp.cli.worker import run_reporting

__all__ = ["RayWorker"]


class RayWorker:
    """One worker; Ray makes it on a node, and `work` returns when the program has ended."""

    def work(
        self,
        driver: tuple[str, int],
        key: bytes,
        rank: int,
        size: int,
        start: int,
        arguments: Sequence[str],
        folder: str,
        fault: str,
    ) -> None:
        """Run `arguments`, a script with its options, or the job that the driver sends.

        The script runs in `folder`, the driver's, where that exists on this node; `fault` is the driver's
        DISTBP_FAULT.
        """
        os.environ[fault_points.VARIABLE] = fault
        with joined_job(driver, key, rank, size, start) as members:
            if os.path.isdir(folder):
                os.chdir(folder)
            for number in (signal.SIGUSR1, signal.SIGTERM):
                signal.signal(number, lambda received, frame: members.report_stop(received))
            run_reporting(members, list(arguments))
