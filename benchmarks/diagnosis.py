"""What it costs that a run looks at its own learning: a step of mlp-m with diagnosis and without.

Two workers of one thread, micro-batches of half a batch, `distbp train` itself, runs that alternate; the
same parameters at the end.  For the runs without, a file that Python imports at its start takes the closer
looks, the watched numbers, the rules and the records for TensorBoard away; distbp has no key for that.  A
look comes once in some 25 steps, so the mean counts and not the median of the steps; `cpu` is the mean
processor time of rank 0.  `cost` is the median, over the pairs of runs, of with / without - 1, in percent.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.peers import REPOSITORY, run_distbp
from distbp.bench.workloads import WORKLOADS, make_data

WITHOUT = """import importlib.abc
import importlib.util
import sys


class Blind(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "distbp.closer_look" and name != "distbp.diagnostician":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        sys.meta_path.insert(0, self)
        execute = spec.loader.exec_module

        def take_away(module):
            execute(module)
            if name == "distbp.closer_look":
                module.CloserLook.is_due = lambda self, step: False
                module.CloserLook.follow = lambda self, step, tail, sums: None
                module.CloserLook.write_tail = lambda self, rows, sums: None
            else:
                module.Diagnostician.step = lambda self, step, tail, accepted: []

        spec.loader.exec_module = take_away
        return spec


sys.meta_path.insert(0, Blind())
"""


def main() -> None:
    """Measure, and print a table; `--json` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps, three rounds")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rounds, steps = (3, arguments.steps // 4) if arguments.quick else (arguments.rounds, arguments.steps)
    workload = WORKLOADS["mlp-m"]
    runs: dict[bool, list[dict]] = {True: [], False: []}
    with tempfile.TemporaryDirectory(prefix="distbp-diagnosis-") as name:
        folder = Path(name)
        data = make_data(workload, folder)
        for number in range(rounds):
            for diagnosis in (True, False) if number % 2 else (False, True):
                more = () if diagnosis else ("-o", "run.records=[]")
                environment = environment_with(diagnosis, folder)
                run = run_distbp(workload, steps, data, folder, workload.batch // 2, environment, more)
                runs[diagnosis].append(run)
                said = (
                    f"{'with' if diagnosis else 'without'}: mean {run['mean']:.2f} ms, cpu {run['cpu']:.2f}"
                )
                print(said, file=sys.stderr, flush=True)
    if len({run["sha256"] for several in runs.values() for run in several}) != 1:
        sys.exit("diagnosis changes the parameters")
    result = {"machine": describe_machine(), "results": [summarise(runs, key) for key in ("mean", "cpu")]}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(result["machine"]["line"])
    for row in result["results"]:
        print(", ".join(f"{key} {value}" for key, value in row.items()))


def environment_with(diagnosis: bool, folder: Path) -> dict[str, str]:
    """The environment of a run with diagnosis, or without."""
    if diagnosis:
        return os.environ | {"PYTHONPATH": str(REPOSITORY)}
    (folder / "without").mkdir(exist_ok=True)
    (folder / "without" / "sitecustomize.py").write_text(WITHOUT)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder / "without"), str(REPOSITORY)])}


def summarise(runs: dict[bool, list[dict]], key: str) -> dict[str, object]:
    """A row: medians over the runs, and over the pairs of them."""
    given, blind = ([run[key] for run in runs[diagnosis]] for diagnosis in (True, False))
    costs = [100 * (one / other - 1) for one, other in zip(given, blind, strict=True)]
    low, middle, high = statistics.quantiles(costs)
    return {
        "figure": key,
        "with_ms": round(statistics.median(given), 3),
        "without_ms": round(statistics.median(blind), 3),
        "cost_percent": round(middle, 2),
        "quartiles_percent": f"{low:.2f} to {high:.2f}",
    }


if __name__ == "__main__":
    main()
