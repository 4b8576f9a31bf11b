"""What a measurement must say about the machine it was made on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from distbp.environment import available_cores

__all__ = ["describe_machine"]


def describe_machine() -> dict[str, object]:
    """Processor, cores, load, and the variables that choose a BLAS kernel; `line` has it all in one line."""
    model, vector = "unknown processor", "no AVX"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                model = value.strip()
            if name.strip() == "flags":
                flags = value.split()
                vector = next((v for v in ("avx512f", "avx2", "avx") if v in flags), vector)
                break
    variables = {name: os.environ.get(name) for name in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")}
    shown = ", ".join(f"{name} {value or 'unset'}" for name, value in variables.items())
    cores, load = available_cores(), os.getloadavg()[0]
    line = (
        f"{model} ({vector}), {cores} cores, load {load:.1f}, Python {platform.python_version()}, "
        f"Linux {platform.release()}; {shown}"
    )
    return {
        "cpu": model,
        "vector": vector,
        "cores": cores,
        "load": load,
        "variables": variables,
        "line": line,
    }
