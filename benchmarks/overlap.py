"""How much of the exchange between two hosts is hidden behind backprop: `python benchmarks/overlap.py`.

Two emulated hosts with one rank each, joined at 1 Gbit/s, train eight layers of 1,024.  The batch is chosen
so that computing takes about as long as exchanging.  Needs Linux, root, iproute2 and `make mpi-environments`;
the machine should be idle.  Runs alternate; medians of the medians of each run are printed.

    hidden = (time without overlap - time with overlap) / time of the exchange

The bound: a layer's bytes can start only when its gradient is there, so the exchange of the first layer, and
whatever is still queued by then, cannot be hidden.  It is computed from the measured times of the layers'
backward passes, which are equal here, and the measured rate of the exchange.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

import numpy as np

from cluster.emulated import EmulatedCluster

REPOSITORY = Path(__file__).resolve().parents[1]
LAYERS, WIDTH = 8, 1024


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--flavour", default="mpich", choices=["mpich", "openmpi"])
    parser.add_argument("--rate-mbit", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    prefix = Path(
        os.environ.get(f"{arguments.flavour.upper()}_PREFIX", REPOSITORY / f".venv-{arguments.flavour}")
    )
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        rng = np.random.default_rng(0)
        np.savez(data, x=rng.standard_normal((2048, WIDTH), np.float32), y=rng.integers(0, WIDTH, 2048))
        with EmulatedCluster(2, rate_mbit=arguments.rate_mbit, shared=[folder, REPOSITORY, prefix]) as hosts:
            times = measure(hosts, prefix, data, Path(folder), arguments)
    report(times, arguments)


def measure(hosts, prefix, data, folder, arguments):
    """Return `{name: [median step in ms of each round]}` and the phases of the runs without overlap."""
    times = {"one host": [], "no overlap": [], "overlap": [], "hashes": set()}
    for number in range(arguments.rounds):
        for name in ("one host", "no overlap", "overlap"):
            out = folder / f"{name.replace(' ', '-')}-{number}"
            result = train(hosts, prefix, data, out, arguments, name)
            times[name].append(result["step_ms_median"])
            if name != "one host":
                times["hashes"].add(result["parameters_sha256"])
    return times


def train(hosts, prefix, data, out, arguments, name):
    """Train a few steps and return the result; "one host" computes half a batch alone, as each host does."""
    ranks = 1 if name == "one host" else 2
    batch = arguments.batch // 2 * ranks
    program = [str(prefix / "bin" / "python"), "-m", "distbp.cli.main", "train", str(data), "--out", str(out)]
    options = {
        "train.batch_size": batch,
        "train.micro_batch": arguments.batch // 2,
        "train.max_steps": arguments.steps,
        "train.epochs": 1000,
        "model.hidden": [WIDTH] * (LAYERS - 1),
        "data.validation_fraction": 0,
        "checkpoint.every_seconds": "none",
        "run.overlap": str(name == "overlap").lower(),
    }
    for key, value in options.items():
        program += ["-o", f"{key}={value}"]
    slots = {"host0": 1, "host1": 1} if ranks == 2 else {"host0": 1}
    environment = {"PYTHONPATH": str(REPOSITORY)}
    flavour = arguments.flavour
    launch = hosts.mpirun(program, ranks, flavour, slots=slots, prefix=prefix, environment=environment)
    done = hosts.run("host0", launch, timeout=300, cwd=out.parent)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads((out / "result.json").read_text())


def report(times, arguments):
    """Print the table and the share that is hidden beside its bound."""
    median = {name: statistics.median(times[name]) for name in ("one host", "no overlap", "overlap")}
    for name, figure in median.items():
        spread = f"{min(times[name]):.0f} to {max(times[name]):.0f}"
        print(f"{name:12s} {figure:7.1f} ms a step ({spread})")
    compute = median["one host"]
    exchange = median["no overlap"] - compute
    hidden = (median["no overlap"] - median["overlap"]) / exchange
    backward = compute * 2 / 3 / LAYERS
    sent = exchange / LAYERS
    ends = 0.0
    for layer in range(1, LAYERS + 1):
        ends = max(ends, layer * backward) + sent
    bound = (LAYERS * (backward + sent) - ends) / exchange
    same = len(times["hashes"]) == 1
    print(f"exchange {exchange:.1f} ms, hidden {hidden:.0%}, bound {bound:.0%}, bits equal: {same}")
    print(f"batch {arguments.batch}, {arguments.rate_mbit} Mbit/s, {arguments.flavour}")


if __name__ == "__main__":
    main()
