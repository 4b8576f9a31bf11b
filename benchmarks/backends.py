"""A step under `mpirun` or Ray beside the same step of the local backend: `python -m benchmarks.backends`.

One host, two workers of one thread, the networks of the speed table: mlp-m 784-1024-1024-10 at batch 256 and
mlp-l 784-4096-4096-10 at batch 128, micro-batches of half a batch, momentum 0.9.  Backends alternate, so that
a busy minute of the machine hits all of them; the table gives the medians of `step_ms_median` and the ratio
to `local` of each round, and says whether all ended with the same parameters.

The environments are those of `make mpi-environments` and `make ray-environment`, or where MPICH_PREFIX,
OPENMPI_PREFIX and RAY_PREFIX say.  Unset OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE, as users have them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]
NETWORKS = {"mlp-m": ("[1024, 1024]", 256), "mlp-l": ("[4096, 4096]", 128)}
LAUNCHERS = {
    "mpich": ["mpiexec", "-n", "2"],
    "openmpi": ["mpirun", "--allow-run-as-root", "--bind-to", "none", "-n", "2"],
}


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backends", nargs="+", default=["local", "mpich", "openmpi"])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distbp-benchmark-") as folder:
        data = Path(folder) / "data.npz"
        rng = np.random.default_rng(0)
        np.savez(data, x=rng.standard_normal((8192, 784), np.float32), y=rng.integers(0, 10, 8192))
        print(f"{'network':8} {'backend':9} {'ms a step':>9} {'least':>7} {'most':>7} {'to local':>9}")
        for network in arguments.networks:
            report(network, *measure(network, arguments, data, Path(folder)))


def measure(network, arguments, data, folder):
    """Return `{backend: [median step in ms of each round]}` and the set of parameter hashes."""
    times, hashes = {backend: [] for backend in arguments.backends}, set()
    for number in range(arguments.rounds):
        for backend in arguments.backends:
            out = folder / f"{network}-{backend}-{number}"
            subprocess.run(
                command(backend, network, arguments.steps, data, out),
                check=True,
                cwd=folder,
                capture_output=True,
            )
            result = json.loads((out / "result.json").read_text())
            times[backend].append(result["step_ms_median"])
            hashes.add(result["parameters_sha256"])
    return times, hashes


def command(backend, network, steps, data, out):
    """The command that trains `network` with two workers of `backend`."""
    flavour = {"local": "mpich"}.get(backend, backend)
    prefix = Path(os.environ.get(f"{flavour.upper()}_PREFIX", REPOSITORY / f".venv-{flavour}"))
    hidden, batch = NETWORKS[network]
    settings = {
        "model.hidden": hidden,
        "train.batch_size": batch,
        "train.micro_batch": batch // 2,
        "train.max_steps": steps,
        "optimizer.momentum": 0.9,
        "checkpoint.every_steps": steps,
        "data.validation_fraction": 0,
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    train = [prefix / "bin/python", "-m", "distbp.cli.main", "train", data, *options, "--out", out]
    if backend in LAUNCHERS:
        launcher, *rest = LAUNCHERS[backend]
        return [prefix / "bin" / launcher, *rest, *train]
    return [*train, "--backend", backend, "--nproc", "2"]


def report(network, times, hashes, first="local"):
    """Print the lines of one network; ratios are to `first`."""
    base = times.get(first)
    for backend, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True)) if base else float("nan")
        print(
            f"{network:8} {backend:9} {statistics.median(values):9.2f} {min(values):7.2f} {max(values):7.2f} "
            f"{ratio:9.3f}",
            flush=True,
        )
    print(f"{network:8} {'the same parameters' if len(hashes) == 1 else f'DIFFERENT PARAMETERS: {hashes}'}")


if __name__ == "__main__":
    main()
