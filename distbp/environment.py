"""What machine and software are: recorded in every checkpoint, compared at resume and between workers.

Only what can decide about bits, or what a person needs to repeat the run, is listed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import os
import platform
from typing import Any

from distbp.cgroups import cpu_quota

__all__ = [
    "available_cores",
    "describe_environment",
    "limit_threads",
    "return_freed_memory",
    "thread_variables",
]

_THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")


def available_cores() -> int:
    """Return how many cores this process may use: its affinity mask, and the quota of its control groups."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def thread_variables(threads: int) -> dict[str, str]:
    """Return the environment variables that give a new process `threads` BLAS threads."""
    return dict.fromkeys(_THREAD_VARIABLES, str(threads))


def limit_threads(threads: int) -> Any:
    """Limit BLAS to `threads` threads here; `restore_original_limits()` of the returned object undoes it."""
    import threadpoolctl

    return threadpoolctl.threadpool_limits(threads, user_api="blas")


def return_freed_memory() -> None:
    """Give back what was freed and the C library keeps for later; only glibc has a call for that."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def describe_environment() -> dict[str, Any]:
    """Return versions, BLAS kernel, CPU features and libc of this process."""
    import numpy as np
    import threadpoolctl

    pools = [pool for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
    blas = {
        "name": pools[0]["internal_api"] if pools else "unknown",
        "version": pools[0]["version"] if pools else None,
        "kernel": pools[0].get("architecture") if pools else None,
        "threads": pools[0]["num_threads"] if pools else None,
    }
    return {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "blas": blas,
        "cpu_features": _cpu_features(),
        "libc": " ".join(platform.libc_ver()),
        "machine": platform.machine(),
        "system": platform.system(),
    }


def _cpu_features() -> list[str]:
    """Return the CPU features that NumPy's own loops use here, as NumPy names them."""
    try:
        umath = importlib.import_module("numpy._core._multiarray_umath")
        features: dict[str, bool] = umath.__cpu_features__
    except (ImportError, AttributeError):  # Private names: a NumPy that moved them is recorded without.
        return []
    return sorted(name for name, present in features.items() if present)
