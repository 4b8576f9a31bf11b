"""What checkpoints cost: `python benchmarks/checkpoint.py [--minutes 4] [--rounds 2] [--every auto]`.

Two workers of one thread train 784-4096-4096-10, 20 million parameters (160 MB of state with momentum), on
random data, 128 samples a step.  Runs with and without checkpoints alternate.  Printed are

    the mean time of a step with and without (whole runs, everything counted);
    for each save: the median step while it was written beside the median of as many steps before and after;
    what the saves of a run cost, as a share of it: the time that training stood still, and by how much the
    steps during the saves were longer than their neighbours.

The first comparison needs an idle machine; the second and third compare steps with their neighbours, and bear
a load that changes slowly.  The load average is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SIZES = (784, 4096, 4096, 10)
BATCH = 128


def main() -> None:
    """Run the comparison, or inside of a run be its script."""
    if "DISTBP_RANK" in os.environ:
        train(*sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="how long each run trains")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--every", default="auto", help='seconds between two checkpoints, or "auto"')
    parser.add_argument("--on", default=None, help="folder on the disk to save to")
    arguments = parser.parse_args()
    means: dict[str, list[float]] = {"none": [], arguments.every: []}
    with tempfile.TemporaryDirectory(dir=arguments.on) as folder:
        for number in range(arguments.rounds):
            for every in means:
                out = Path(folder) / f"{every}-{number}"
                command = [sys.executable, "-m", "distbp.cli.main", "run", "--nproc", "2", __file__]
                command += [str(out), every, str(60 * arguments.minutes)]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                means[every].append(report(out, every))
    for every, values in means.items():
        print(
            f"every {every:6}: {statistics.median(values) * 1e3:.1f} ms a step, median of {len(values)} runs"
        )


def train(out: str, every: str, seconds: str) -> None:
    """Train for `seconds`, and write down when each step began and ended, and whether a save was going on."""
    import distbp
    from distbp import nn, worker
    from distbp.errors import Stopped

    log: list[tuple[float, float, bool]] = []
    make_step = worker.Worker._make_step

    def timed(self: worker.Worker) -> None:
        begun = time.perf_counter()
        make_step(self)
        if self.seat.rank == 0:
            log.append((begun, time.perf_counter(), self.after.saver.in_flight))
            if log[-1][1] - log[0][0] > float(seconds):
                self.arena.request_stop()

    worker.Worker._make_step = timed  # type: ignore[method-assign]
    rng = np.random.default_rng(0)
    data = rng.standard_normal((4096, SIZES[0]), np.float32), rng.integers(0, SIZES[-1], 4096)
    layers = [layer for width in SIZES[1:] for layer in (nn.Linear(width), nn.ReLU())][:-1]
    trainer = distbp.Trainer(nn.Sequential(*layers), batch_size=BATCH, micro_batch=BATCH // 2)
    interval = None if every == "none" else every if every == "auto" else float(every)
    with contextlib.suppress(Stopped):
        trainer.fit(data, epochs=100_000, out=out, checkpoint_every_seconds=interval)
    if distbp.rank() == 0:
        np.save(Path(out) / "steps.npy", np.array(log))


def report(out: Path, every: str) -> float:
    """Print what one run shows, and return the mean seconds of a step."""
    begun, ended, saving = np.load(out / "steps.npy")[
        5:
    ].T  # The first steps touch memory for the first time.
    mean = (ended[-1] - begun[0]) / len(begun)
    load = os.getloadavg()[0]
    print(f"every {every:6}: {mean * 1e3:.1f} ms a step on average, {len(begun)} steps, load {load:.1f}")
    ratios, extra = [], 0.0
    for first, last in saves(saving.astype(bool)):
        around = neighbours(begun, ended, first, last)
        if not len(around):
            continue
        during = ended[first:last] - begun[first:last]
        # A step is counted from the end of the one before: the copy is made in between.
        whole = ended[first:last] - ended[first - 1 : last - 1]
        ratios.append(float(np.median(during) / np.median(around)))
        extra += float(whole.sum() - len(whole) * around.mean())
    if ratios:
        records = map(json.loads, (out / "events.jsonl").read_text().splitlines())
        events = [event for event in records if event.get("status") == "saved"]
        spent = [event["stalled_seconds"] + event["cpu_seconds"] for event in events[:-1]]
        seconds = [event["seconds"] for event in events[:-1]]
        print(
            f"    {len(ratios)} saves of {statistics.median(seconds):.1f} s; median step in a save beside "
            f"its neighbours: x {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n"
            f"    cost of all saves: {extra / (ended[-1] - begun[0]):.2%} of the run by the steps; "
            f"by stalls and processor time, from above: {sum(spent) / (ended[-1] - begun[0]):.2%}"
        )
    return float(mean)


def saves(saving: np.ndarray) -> list[tuple[int, int]]:
    """Return the first step of each save and the first after it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], saving, [False]]).astype(int)))
    return [(first, last) for first, last in edges.reshape(-1, 2).tolist() if first]


def neighbours(begun: np.ndarray, ended: np.ndarray, first: int, last: int) -> np.ndarray:
    """Return the durations of as many steps before and after a save as it took; none at the run's end."""
    count = last - first
    if first - count < 0 or last + count > len(begun):
        return np.empty(0)
    durations = ended - begun
    return np.concatenate([durations[first - count : first], durations[last : last + count]])


if __name__ == "__main__":
    main()
