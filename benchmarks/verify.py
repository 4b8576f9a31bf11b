"""What it costs to verify the state in memory: `python -m benchmarks.verify`.

The networks of `benchmarks.backends`, two local workers.  `run.verify_every` = 0, 100 and 1 alternate, so
that a busy minute of the machine hits all of them.  The table gives the medians of `step_ms_median`, the
ratio to 0 of each round, and says whether all ended with the same parameters.  With 100 two steps of a
hundred are verified (one writes checksums, the next one checks them), which a median does not show: their
cost is that of verifying every step, twice in a hundred.

`--update` measures the update of mlp-m by one of two workers alone, in processor time of its thread: of use
where other work disturbs whole steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.backends import NETWORKS, command, report
from distbp.arena import Arena, ArenaLayout
from distbp.backends.base import Seat
from distbp.exchange import cut_pieces
from distbp.nn import arrange
from distbp.optim import SGD, Update, norm
from distbp.optim.chunks import new_scratch
from distbp.verify import StateCheck, cover_state

EVERY = ("0", "100", "1")


def main() -> None:
    """Measure, and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--update", action="store_true")
    arguments = parser.parse_args()
    if arguments.update:
        report_update(arguments.rounds)
        return
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


def report_update(rounds):
    """Print the processor time of an update with and without checks, least and median of 60 a round."""
    print(f"{'every':5} {'least ms':>9} {'median ms':>9}")
    for _ in range(rounds):
        for every in (0, 1):
            times = [1e3 * seconds for seconds in time_updates(every, 60)]
            print(f"{every:5} {min(times):9.3f} {statistics.median(times):9.3f}", flush=True)


def time_updates(every, count):
    """Yield the seconds of processor time of each update of the first of two lanes."""
    layout = arrange([("0.weight", (784, 1024)), ("0.bias", (1024,)), ("1.weight", (1024, 1024))])
    blocks = norm.blocks(layout.borders())
    arena = Arena.create(
        ArenaLayout(layout.size, ("parameters", "momentum"), (1, 1), len(blocks), 0, 8, 8), 0
    )
    arena.slots[0][0][:] = np.random.default_rng(0).standard_normal(layout.size)
    nothing = lambda *ignored: None  # noqa: E731
    seat = Seat(0, (2,), arena, None, nothing, nothing, nothing)
    cover_state(arena, layout, 0, every)
    check = StateCheck(seat, layout, every)
    check.open(cut_pieces(blocks, layout.size, [0], 2, 0), [0], None)
    optimizer = SGD()
    scratch = new_scratch(optimizer.scratch_rows)
    for step in range(count):
        begun = time.thread_time()
        for span in check.begin(step, covered=False):
            part = slice(span.low, span.high)
            update = Update(
                gradient=arena.slots[0][0][part],
                scale=1e-3,
                lr=0.1,
                number=step + 1,
                current={name: vector[part] for name, vector in arena.vectors(step).items()},
                following={name: vector[part] for name, vector in arena.vectors(step + 1).items()},
                scratch=scratch,
            )
            optimizer.apply(update)
            check.follow(span)
        check.follow_scalars()
        yield time.thread_time() - begun
        check.commit()
    check.conclude()
    arena.close()


if __name__ == "__main__":
    main()
