"""What it costs to verify the state in memory: `python -m benchmarks.verify`.

The networks of `benchmarks.backends`, two local workers.  `run.verify_every` = 0, 100 and 1 alternate, so
that a busy minute of the machine hits all of them.  The table gives the medians of `step_ms_median`, the
ratio to 0 of each round, and says whether all ended with the same parameters.  With 100 two steps of a
hundred are verified (one writes checksums, the next one checks them), which a median does not show: their
cost is that of verifying every step, twice in a hundred.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.backends import NETWORKS, command, report

EVERY = ("0", "100", "1")


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="distbp-benchmark-") as folder:
        data = Path(folder) / "data.npz"
        rng = np.random.default_rng(0)
        np.savez(data, x=rng.standard_normal((8192, 784), np.float32), y=rng.integers(0, 10, 8192))
        print(f"{'network':8} {'every':9} {'ms a step':>9} {'least':>7} {'most':>7} {'to 0':>9}")
        for network in arguments.networks:
            report(network, *measure(network, arguments, data, Path(folder)), EVERY[0])


def measure(network, arguments, data, folder):
    """Return `{every: [median step in ms of each round]}` and the set of parameter hashes."""
    times, hashes = {every: [] for every in EVERY}, set()
    for number in range(arguments.rounds):
        for every in EVERY:
            out = folder / f"{network}-{every}-{number}"
            subprocess.run(
                [*command("local", network, arguments.steps, data, out), "-o", f"run.verify_every={every}"],
                check=True,
                cwd=folder,
                capture_output=True,
            )
            result = json.loads((out / "result.json").read_text())
            times[every].append(result["step_ms_median"])
            hashes.add(result["parameters_sha256"])
    return times, hashes


if __name__ == "__main__":
    main()
