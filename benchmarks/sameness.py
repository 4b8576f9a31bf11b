"""The price of sameness: a step in 2, 4, 8, 16 micro-batches, on both kernels.

The number of micro-batches decides how many workers can give the same bits, and what a step costs: smaller
products, and more gradients to add.  Two workers of one thread, `distbp train` itself, runs that alternate.
`price` is the median over that with 2 micro-batches of the same kernel.  The kernels are those of OpenBLAS:
the one that it takes by itself, and the one of a processor without AVX-512.
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
from benchmarks.peers import run_distbp
from distbp.bench.workloads import chosen, make_data

MICRO_BATCHES = (2, 4, 8, 16)
KERNELS = {"own": None, "Haswell": "Haswell"}


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
            runs = {(kernel, m): [] for kernel in arguments.kernels.split(",") for m in MICRO_BATCHES}
            for _ in range(arguments.rounds):
                for kernel, m in runs:
                    environment = with_kernel(KERNELS[kernel])
                    micro_batch = max(1, workload.batch // m)
                    run = run_distbp(workload, steps, data, Path(name), micro_batch, environment, more)
                    runs[kernel, m].append(run)
                    print(
                        f"{workload.name} {kernel} {m}: {run['median']:.2f} ms", file=sys.stderr, flush=True
                    )
            rows += summarise(workload.name, runs)
            data.unlink()
    result = {"machine": describe_machine(), "table": rows}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def with_kernel(kernel: str | None) -> dict[str, str]:
    """The environment in which OpenBLAS takes that kernel, or its own choice."""
    variables = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    environment = {name: value for name, value in os.environ.items() if name not in variables}
    return environment if kernel is None else environment | {"OPENBLAS_CORETYPE": kernel}


def summarise(workload: str, runs: dict) -> list[dict]:
    """A row for each kernel and number of micro-batches."""
    rows = []
    for (kernel, m), entries in runs.items():
        figures = {
            key: statistics.median(entry[key] for entry in entries)
            for key in ("median", "least", "cpu")
            if all(entry[key] is not None for entry in entries)
        }
        own = {"workload": workload, "kernel": kernel, "micro_batches": m, "blas": entries[0]["blas"]}
        first = next((row for row in rows if row["kernel"] == kernel), figures)
        rows.append(own | figures | {"price": figures["median"] / first["median"]})
    return rows


def table(result: dict) -> str:
    """The rows as text."""
    lines = [
        result["machine"]["line"],
        *sorted({f"{row['kernel']}: {row['blas']}" for row in result["table"]}),
    ]
    lines.append(
        f"{'workload':9} {'kernel':8} {'M':>3} {'median ms':>10} {'least':>9} {'cpu':>9} {'price':>6}"
    )
    for row in result["table"]:
        cpu = f"{row['cpu']:.2f}" if "cpu" in row else "-"
        lines.append(
            f"{row['workload']:9} {row['kernel']:8} {row['micro_batches']:3} {row['median']:10.2f} "
            f"{row['least']:9.2f} {cpu:>9} {row['price']:6.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
