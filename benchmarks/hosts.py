"""Measure the exchange between emulated hosts, for `distbp simulate`.

    python -m benchmarks.hosts --json FILE

Two to eight emulated hosts with one rank each, links of 100 and 1,000 Mbit/s, gradients of three sizes,
without overlap.  A point is the time of the phase `reduce` of rank 0, the lower quartile of its records: the
exchange with its barriers.  `distbp simulate --points FILE` fits the model of `distbp/bench/model.py`;
the points that it takes by itself lie in `distbp/bench/measured_exchanges.json`.

Needs Linux, root, iproute2 and `make mpi-environments`.  Emulated hosts share this machine's cores.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.machine import describe_machine
from cluster.emulated import EmulatedCluster
from distbp.exchange import bucket_starts
from distbp.nn import Network, build_loss, build_model

REPOSITORY = Path(__file__).resolve().parents[1]
FEATURES, MICRO_BATCH, BUCKET_KIB = 256, 8, 1024
NETWORKS = (([64], 150), ([512], 50), ([512, 1024], 16))
"""Widths of the networks, with 0.07, 0.5 and 2.6 MB of gradients, and steps for some seconds of each."""


def main() -> None:
    """Measure every point, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--flavour", default="mpich", choices=["mpich", "openmpi"])
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 3, 4, 6, 8])
    parser.add_argument("--rates", type=int, nargs="+", default=[100, 1000], metavar="MBIT")
    parser.add_argument("--json", metavar="FILE", required=True)
    arguments = parser.parse_args()
    prefix = Path(
        os.environ.get(f"{arguments.flavour.upper()}_PREFIX", REPOSITORY / f".venv-{arguments.flavour}")
    )
    points = []
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data.npz"
        rng = np.random.default_rng(0)
        np.savez(data, x=rng.standard_normal((1024, FEATURES), np.float32), y=rng.integers(0, 10, 1024))
        for rate in arguments.rates:
            with EmulatedCluster(
                max(arguments.hosts), rate_mbit=rate, shared=[name, REPOSITORY, prefix]
            ) as cluster:
                for count in arguments.hosts:
                    for hidden, steps in NETWORKS:
                        point = measure(cluster, prefix, data, arguments.flavour, count, hidden, steps)
                        points.append(point | {"rate_mbit": rate})
                        print(points[-1], file=sys.stderr, flush=True)
    command = " ".join(["python -m benchmarks.hosts", *sys.argv[1:]])
    result = {"day": datetime.date.today().isoformat(), "command": command}
    result |= {"machine": describe_machine(), "points": points}
    Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")


def measure(cluster, prefix, data, flavour, hosts, hidden, steps) -> dict[str, object]:
    """Train on `hosts` hosts, and return what the exchange was and how long it took."""
    out = Path(tempfile.mkdtemp(dir=data.parent)) / "run"
    program = [str(prefix / "bin" / "python"), "-m", "distbp.cli.main", "train", str(data), "--out", str(out)]
    options = {
        "train.batch_size": MICRO_BATCH * hosts,
        "train.micro_batch": MICRO_BATCH,
        "train.max_steps": steps,
        "train.epochs": 1000,
        "model.hidden": hidden,
        "data.validation_fraction": 0,
        "checkpoint.every_seconds": "none",
        "run.overlap": "false",
        "run.bucket_kib": BUCKET_KIB,
        "run.verify_every": 0,
    }
    for key, value in options.items():
        program += ["-o", f"{key}={value}"]
    launch = cluster.mpirun(
        program,
        hosts,
        flavour,
        slots={f"host{index}": 1 for index in range(hosts)},
        prefix=prefix,
        environment={"PYTHONPATH": str(REPOSITORY)},
    )
    done = cluster.run("host0", launch, timeout=300, cwd=out.parent)
    if done.returncode:
        raise SystemExit(done.stderr)
    lines = (out / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "step_ms" in record][1:]
    if len(records) < 2:
        raise SystemExit(f"{hosts} hosts: too few records; the steps of NETWORKS are too few here")
    phases = {
        name: statistics.quantiles([record["step_ms"][name] for record in records])[0]
        for name in ("compute", "reduce", "update")
    }
    size, buckets = size_and_buckets(hidden)
    return {
        "hosts": hosts,
        "vector_bytes": size,
        "exchanges": buckets + 1,
        "blocks": 1,
        "reduce_ms": phases["reduce"],
        "compute_ms": phases["compute"],
        "update_ms": phases["update"],
    }


def size_and_buckets(hidden) -> tuple[int, int]:
    """Bytes of the gradients of a network, and how many buckets they are cut into."""
    network = Network(build_model("mlp", outputs=10, hidden=hidden), (FEATURES,), build_loss("cross_entropy"))
    starts = bucket_starts(network.layout.borders(), BUCKET_KIB * 1024 // 4)
    return network.layout.size * 4, len(starts)


if __name__ == "__main__":
    main()
