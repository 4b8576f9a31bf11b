"""Allreduce between two Ray actors, beside Ray's own GLOO: `python -m benchmarks.ray_collective`.

The same two actors are in a group of each backend and take turns, so that a busy moment of the machine hits
both; a round is a barrier and then as many sums as `--bytes` allows.  GLOO gets torch tensors, its own kind
of array, ours gets NumPy's.  The table gives the medians of the rounds in milliseconds for a call, the least
and the most, and the median of the ratios of neighbouring rounds.  The slower rank of a round counts.

`one` is one node, `two` are two emulated nodes (Linux, root), whose network is memory: what is measured there
is the cost of the software, or with `--rate-mbit` a link.

Run it in an environment that has Ray and torch: `pip install '.[ray]' torch`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = [4_096, 100_000, 1_000_000, 10_000_000, 100_000_000]
BACKENDS = ["distbp", "gloo"]


def main():
    """Measure where it is asked for, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--where", nargs="+", default=["one", "two"], choices=["one", "two"])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="bytes of float32")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--bytes", type=int, default=200_000_000, help="what a round sums at most, in 3 to 200 calls"
    )
    parser.add_argument("--backends", nargs="+", default=BACKENDS)
    parser.add_argument("--rate-mbit", type=float, help="limit of the links between emulated nodes")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.inside:
        measure(arguments, *arguments.inside)
        return
    options = ["--rounds", arguments.rounds, "--bytes", arguments.bytes, "--backends", *arguments.backends]
    command = [sys.executable, "-m", "benchmarks.ray_collective", *options, "--sizes", *arguments.sizes]
    command = [str(word) for word in command]
    for where in arguments.where:
        if where == "one":
            with tempfile.TemporaryDirectory(prefix="ray") as home:
                environment = os.environ | {"HOME": home, "RAY_USAGE_STATS_ENABLED": "0"}
                subprocess.run([*command, "--inside", "one", ""], env=environment, cwd=REPOSITORY, check=True)
        else:
            on_two_nodes(command, arguments.rate_mbit)


def on_two_nodes(command, rate_mbit):
    """Run this program on the first of two emulated nodes."""
    from cluster.emulated import EmulatedCluster
    from cluster.ray import RayNodes

    prefix = Path(sys.prefix)
    with (
        EmulatedCluster(2, shared=[prefix, REPOSITORY], rate_mbit=rate_mbit) as hosts,
        RayNodes(hosts, prefix, {"host0": 1, "host1": 1}) as nodes,
    ):
        where = f"two at {rate_mbit:g} Mbit/s" if rate_mbit else "two"
        inside = [*command, "--inside", where, ",".join(hosts.addresses.values())]
        environment = nodes.environment() | {"PYTHONPATH": str(REPOSITORY)}
        with hosts.start("host0", inside, env=environment, cwd=REPOSITORY) as process:
            code = process.wait(1800)
        if code != 0:
            sys.exit(f"the benchmark on two nodes ended with {code}")


def measure(arguments, where, addresses):
    """Start two actors, let them measure, print the lines of one table."""
    import ray

    logging = {"log_to_driver": False, "logging_level": "ERROR"}
    if addresses:
        ray.init(address="auto", **logging)
        places = [{f"node:{address}": 0.001} for address in addresses.split(",")]
    else:
        ray.init(address="local", num_cpus=2, include_dashboard=False, **logging)
        places = [{}, {}]
    kind = ray.remote(num_cpus=1)(Rank)
    ranks = [kind.options(resources=place).remote(rank) for rank, place in enumerate(places)]
    for backend in arguments.backends:
        ray.get([rank.join.remote(backend) for rank in ranks])
    print(
        f"{'nodes':6} {'bytes':>11}",
        *(f"{name:>9} ms {'least':>8} {'most':>8}" for name in arguments.backends),
        "   ratio  load",
    )
    for size in arguments.sizes:
        calls = max(3, min(200, arguments.bytes // size))
        times = ray.get(
            [rank.measure.remote(arguments.backends, size, arguments.rounds, calls) for rank in ranks]
        )
        report(where, size, arguments.backends, times)
    ray.shutdown()


def report(where, size, backends, times):
    """Print one line; `times[rank][backend]` lists milliseconds."""
    slower = {
        backend: [max(pair) for pair in zip(*(of[backend] for of in times), strict=True)]
        for backend in backends
    }
    cells = [f"{statistics.median(v):12.4f} {min(v):8.4f} {max(v):8.4f}" for v in slower.values()]
    ours, *others = slower.values()
    ratios = [
        f"{statistics.median(b / a for a, b in zip(ours, theirs, strict=True)):8.2f}" for theirs in others
    ]
    load = Path("/proc/loadavg").read_text().split()[0]
    print(f"{where:6} {size:11,}", *cells, *ratios, f"{load:>5}", flush=True)


class Rank:
    """One actor, in a group of each backend."""

    def __init__(self, rank):
        from distbp.backends.ray_collective import register

        register()
        self.rank = rank

    def join(self, backend):
        """Join the group of a backend."""
        from ray.util import collective

        collective.init_collective_group(2, self.rank, backend=backend, group_name=backend)

    def measure(self, backends, size, rounds, calls):
        """Return the milliseconds of a call in each round, for each backend."""
        import time

        import numpy as np
        from ray.util import collective

        times = {backend: [] for backend in backends}
        arrays = {backend: np.full(size // 4, self.rank + 1, np.float32) for backend in backends}
        tensors = dict(arrays)
        if "gloo" in backends:
            import torch

            tensors["gloo"] = torch.from_numpy(arrays["gloo"])
        for backend in backends:  # Also warms up.
            collective.allreduce(tensors[backend], backend)
            assert (arrays[backend] == 3).all(), f"{backend} gave a wrong sum"
            arrays[backend][:] = 0
        for _ in range(rounds):
            for backend in backends:
                tensor = tensors[backend]
                collective.barrier(backend)
                begun = time.perf_counter()
                for _ in range(calls):
                    collective.allreduce(tensor, backend)
                times[backend].append((time.perf_counter() - begun) / calls * 1e3)
        return times


if __name__ == "__main__":
    main()
