"""The price of sameness: a step in 2, 4, 8, 16 micro-batches, on both kernels.

The number of micro-batches decides how many workers can give the same bits, and what a step costs:
smaller products, and more gradients to add.  Two workers of one thread, `distbp train` itself, runs that
alternate.  `price` is the median over that with 2 micro-batches of the same kernel, `cpu price` the same
of the processor time.  `joined` says whether rows of several micro-batches may go into one product, and
gradients of weights be made in pieces, where a probe shows the same bits (`distbp/nn/product.py`).  For
the rows without, a file that Python imports at its start takes the probes' answers away; distbp has no
key for it.  The kernels are those of OpenBLAS: the one that it takes by itself, and the one of a
processor without AVX-512.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.machine import describe_machine
from benchmarks.peers import REPOSITORY, run_distbp, shown
from distbp.bench.workloads import chosen, make_data

MICRO_BATCHES = (2, 4, 8, 16)
KERNELS = {"own": None, "Haswell": "Haswell"}
NEVER_JOINED = """import functools

from distbp.nn import product

product.keeps_bits = functools.cache(lambda *shape: False)
product.cut_product = functools.cache(lambda *shape: ())
"""


def main() -> None:
    """Measure, and print a table; `--json` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--workloads", default="all", help="names with commas between them")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="names with commas between them")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="for distbp train")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    more = tuple(word for option in arguments.option for word in ("-o", option))
    rows = []
    with tempfile.TemporaryDirectory(prefix="distbp-sameness-") as name:
        for workload in chosen(arguments.workloads):
            data = make_data(workload, Path(name))
            steps = max(6, workload.steps // (8 if arguments.quick else 2))
            wanted = itertools.product(arguments.kernels.split(","), (True, False), MICRO_BATCHES)
            # With 2 micro-batches each worker has one, and there is nothing to join.
            runs = {key: [] for key in wanted if key[1] or key[2] > 2}
            for _ in range(arguments.rounds):
                for kernel, joined, m in runs:
                    environment = environment_with(KERNELS[kernel], joined, Path(name))
                    micro_batch = max(1, workload.batch // m)
                    run = run_distbp(workload, steps, data, Path(name), micro_batch, environment, more)
                    runs[kernel, joined, m].append(run)
                    said = f"{workload.name} {kernel} {'joined' if joined else 'apart'} {m}"
                    print(f"{said}: {run['median']:.2f} ms", file=sys.stderr, flush=True)
            refuse_other_bits(runs)
            rows += summarise(workload.name, runs)
            data.unlink()
    result = {"machine": describe_machine(), "table": rows}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def environment_with(kernel: str | None, joined: bool, folder: Path) -> dict[str, str]:
    """The environment in which OpenBLAS takes that kernel, or its own, and rows are joined or never."""
    variables = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    environment |= {} if kernel is None else {"OPENBLAS_CORETYPE": kernel}
    if joined:
        return environment | {"PYTHONPATH": str(REPOSITORY)}
    (folder / "apart").mkdir(exist_ok=True)
    (folder / "apart" / "sitecustomize.py").write_text(NEVER_JOINED)
    return environment | {"PYTHONPATH": os.pathsep.join([str(folder / "apart"), str(REPOSITORY)])}


def refuse_other_bits(runs: dict) -> None:
    """End with an error if runs with the same kernel and micro-batches have other parameters at their end."""
    hashes: dict[tuple[str, int], set[str]] = {}
    for (kernel, _, m), entries in runs.items():
        hashes.setdefault((kernel, m), set()).update(entry["sha256"] for entry in entries)
    if different := [key for key, found in hashes.items() if len(found) > 1]:
        sys.exit(f"joined rows have other bits: {different}")


def summarise(workload: str, runs: dict) -> list[dict]:
    """A row for each kernel and number of micro-batches."""
    rows = []
    for (kernel, joined, m), entries in runs.items():
        figures = {
            key: statistics.median(entry[key] for entry in entries)
            for key in ("median", "least", "cpu")
            if all(entry[key] is not None for entry in entries)
        }
        own = {"workload": workload, "kernel": kernel, "joined": joined, "micro_batches": m}
        own["blas"] = entries[0]["blas"]
        first = next((row for row in rows if row["kernel"] == kernel), figures)
        own |= figures | {"price": figures["median"] / first["median"]}
        rows.append(own | {"cpu_price": figures["cpu"] / first["cpu"] if "cpu" in figures else None})
    return rows


def table(result: dict) -> str:
    """The rows as text."""
    lines = [
        result["machine"]["line"],
        *sorted({f"{row['kernel']}: {row['blas']}" for row in result["table"]}),
    ]
    lines.append(
        f"{'workload':9} {'kernel':8} {'joined':6} {'M':>3} {'median ms':>10} {'least':>9} {'cpu':>9} "
        f"{'price':>6} {'cpu price':>9}"
    )
    for row in result["table"]:
        joined = "yes" if row["joined"] else "no"
        lines.append(
            f"{row['workload']:9} {row['kernel']:8} {joined:6} {row['micro_batches']:3} "
            f"{row['median']:10.2f} {row['least']:9.2f} {shown(row.get('cpu')):>9} {row['price']:6.2f} "
            f"{shown(row['cpu_price']):>9}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
