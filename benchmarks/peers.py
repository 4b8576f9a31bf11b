"""distbp beside PyTorch and scikit-learn: `python -m benchmarks.peers --torch PYTHON`.

The same networks, batches and data, in runs that alternate, so that a busy minute of the machine hits all of
them.  The peers:

    distbp b/2    `distbp train` itself, two workers of one thread, micro-batches of half a batch
    distbp b/8    the same with the default micro-batch
    ddp           DistributedDataParallel over gloo, two processes of one thread
    torch         one PyTorch process with two threads
    compile       the same with torch.compile; needs a C++ compiler
    sklearn       scikit-learn's MLPClassifier, with the threads it takes; small MLPs only

PYTHON is that of an environment with torch, and scikit-learn for that peer:

    python -m venv /tmp/venv-torch && /tmp/venv-torch/bin/pip install torch numpy scikit-learn

Of each run the first quarter of the steps, at most 20, does not count.  `median` and `quartiles` are medians
over the rounds of what each run had, `least` is the fastest step of all, and `mean` is the wall time of the
counted steps divided by their number, with what happens between steps (records, the next epoch's order).
`cpu` is the processor time of a step on one core (rank 0's; of two threads half of both): on a machine that
others use it says more than the wall, but a thread that waits by spinning counts as busy.
Unset OPENBLAS_CORETYPE and OPENBLAS_L2_SIZE, as users have it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from benchmarks.machine import describe_machine
from distbp.bench.workloads import Workload, chosen, make_data, options

REPOSITORY = Path(__file__).resolve().parents[1]
PEERS = ("distbp b/2", "distbp b/8", "ddp", "torch", "compile", "sklearn")
ONCE = ("compile",)
"""Measured in the first round only: it compiles for half a minute and more."""
RUN_TIMEOUT_S = 600


def main() -> None:
    """Measure, and print a table; `--json` keeps every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="a Python that has torch")
    parser.add_argument("--workloads", default="all", help="names with commas between them")
    parser.add_argument("--peers", default=",".join(PEERS), help="names with commas between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a quarter of the steps")
    parser.add_argument("--json", metavar="FILE", help="write every run to FILE")
    arguments = parser.parse_args()
    peers = arguments.peers.split(",")
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers: expected some of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    runs = []
    with tempfile.TemporaryDirectory(prefix="distbp-peers-") as folder:
        for workload in chosen(arguments.workloads):
            steps = max(6, workload.steps // (4 if arguments.quick else 1))
            data = make_data(workload, Path(folder))
            for number in range(arguments.rounds):
                for peer in peers:
                    if peer in ONCE and number:
                        continue
                    run = measure(peer, workload, steps, data, Path(folder), arguments.torch)
                    runs.append({"workload": workload.name, "peer": peer, "round": number} | run)
                    print(f"{workload.name} {peer} {number}: {brief(run)}", file=sys.stderr, flush=True)
            data.unlink()
    result = {"machine": describe_machine(), "table": summarise(runs), "runs": runs}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def measure(
    peer: str, workload: Workload, steps: int, data: Path, folder: Path, torch_python: str
) -> dict[str, object]:
    """Run one peer once; what a run has is in `steady`, or under `error` why there is none."""
    try:
        if peer.startswith("distbp"):
            micro_batch = workload.batch // 2 if peer.endswith("b/2") else None
            return run_distbp(workload, steps, data, folder, micro_batch)
        if peer == "sklearn":
            if workload.name not in ("mlp-s", "mlp-m"):
                return {"error": "not for this network"}
            return run_other("sklearn_peer.py", 1, workload, steps, data, folder, torch_python, {})
        more = {"threads": 1 if peer == "ddp" else 2, "compile": peer == "compile"}
        ranks = 2 if peer == "ddp" else 1
        return run_other("torch_peer.py", ranks, workload, steps, data, folder, torch_python, more)
    except (subprocess.SubprocessError, OSError) as error:
        words = getattr(error, "stderr", None) or str(error)
        return {"error": words.strip().splitlines()[-1]}


def run_distbp(
    workload: Workload,
    steps: int,
    data: Path,
    folder: Path,
    micro_batch: int | None,
    environment: dict[str, str] | None = None,
    more: tuple[str, ...] = (),
) -> dict[str, object]:
    """Train with the command that users type, and read the times from its own records."""
    out = tempfile.mkdtemp(dir=folder)
    words = [
        sys.executable,
        "-m",
        "distbp.cli.main",
        "train",
        str(data),
        "--nproc",
        "2",
        "--out",
        f"{out}/run",
    ]
    words += [*options(workload, steps, micro_batch), *more]
    environment = environment or os.environ | {"PYTHONPATH": str(REPOSITORY)}
    subprocess.run(
        words, check=True, capture_output=True, text=True, cwd=folder, env=environment, timeout=RUN_TIMEOUT_S
    )
    result = json.loads(Path(out, "run/result.json").read_text())
    least, low, median, high = result["step_ms_quartiles"]
    records = [json.loads(line) for line in Path(out, "run/metrics.jsonl").read_text().splitlines()]
    return {
        "least": least,
        "quartiles": [low, high],
        "median": median,
        "mean": mean_step_ms(records),
        "cpu": cpu_ms(records),
        "num_parameters": result["num_parameters"],
        "blas": "{name} {version} ({kernel})".format(**result["blas"]),
        "phases": phases(records),
        "sha256": result["parameters_sha256"],
    }


def mean_step_ms(records: list[dict]) -> float | None:
    """Mean wall time of the steps behind the first record, what happens between them included."""
    before, seconds, samples, batch = None, 0.0, 0, 1
    for record in records:
        if "samples_per_second" not in record:
            continue
        if before is None:
            batch = record["samples"]  # The first record follows the first step.
        else:
            seconds += (record["samples"] - before) / record["samples_per_second"]
            samples += record["samples"] - before
        before = record["samples"]
    return 1e3 * seconds * batch / samples if samples else None


def cpu_ms(records: list[dict]) -> float | None:
    """Mean processor time of a step on rank 0, in ms, behind the first record."""
    steady = [record for record in records if "cpu_ms" in record]
    steps = [after["samples"] - before["samples"] for before, after in pairwise(steady)]
    if not steps:
        return None
    return sum(r["cpu_ms"] * count for r, count in zip(steady[1:], steps, strict=True)) / sum(steps)


def phases(records: list[dict]) -> dict[str, float] | None:
    """Median over the records of the mean ms that rank 0 spent in each phase of a step."""
    steady = [record["step_ms"] for record in records if "step_ms" in record][1:]
    if not steady:
        return None
    return {name: statistics.median(entry[name] for entry in steady) for name in steady[0]}


def run_other(
    script: str,
    ranks: int,
    workload: Workload,
    steps: int,
    data: Path,
    folder: Path,
    python: str,
    more: dict[str, object],
) -> dict[str, object]:
    """Run a script of this directory in another environment, as `ranks` processes."""
    out = tempfile.mkdtemp(dir=folder)
    specification = {"data": str(data), "shape": workload.shape, "outputs": workload.outputs, "steps": steps}
    specification |= {"model": workload.model, "batch": workload.batch, "out": f"{out}/found.json"} | more
    Path(out, "specification.json").write_text(json.dumps(specification))
    words = [python, str(REPOSITORY / "benchmarks" / script), f"{out}/specification.json"]
    errors = [open(f"{out}/errors-{rank}", "w+") for rank in range(ranks)]  # noqa: SIM115 (closed below)
    environments = [other_environment(folder, rank, ranks, more.get("threads")) for rank in range(ranks)]
    processes = [
        subprocess.Popen(words, env=environment, stderr=file, cwd=out)
        for environment, file in zip(environments, errors, strict=True)
    ]
    try:
        for process, file in zip(processes, errors, strict=True):
            code = process.wait(RUN_TIMEOUT_S)
            if code:
                file.seek(0)
                raise subprocess.CalledProcessError(code, words, stderr=file.read())
    finally:
        for process, file in zip(processes, errors, strict=True):
            process.kill()
            process.wait()
            file.close()
    found = json.loads(Path(out, "found.json").read_text())
    times, cpu = found.pop("step_s"), found.pop("cpu_s", [])
    if cpu:
        found["cpu"] = 1e3 * statistics.fmean(counted(cpu)) / found.pop("threads")
    return steady(times) | found


def other_environment(folder: Path, rank: int, ranks: int, threads: object) -> dict[str, str]:
    """The variables of one process of a peer."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    return environment | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})


def steady(times: list[float]) -> dict[str, object]:
    """Least, quartiles, median and mean in ms, without the first steps, as distbp's own result has them."""
    kept = [1e3 * seconds for seconds in counted(times)]
    low, median, high = statistics.quantiles(kept)
    return {"least": min(kept), "quartiles": [low, high], "median": median, "mean": statistics.fmean(kept)}


def counted(times: list[float]) -> list[float]:
    """The steps that count: all but the first ones."""
    return times[min(20, len(times) // 4) :]


def summarise(runs: list[dict]) -> list[dict]:
    """One row for each workload and peer: medians over the rounds, the least of all."""
    rows: dict[tuple[str, str], list[dict]] = {}
    for run in runs:
        rows.setdefault((run["workload"], run["peer"]), []).append(run)
    table = []
    for (workload, peer), entries in rows.items():
        good = [entry for entry in entries if "error" not in entry]
        row = {"workload": workload, "peer": peer}
        if not good:
            table.append(row | {"error": entries[0]["error"]})
            continue
        row |= {
            "median": statistics.median(entry["median"] for entry in good),
            "quartiles": [statistics.median(entry["quartiles"][side] for entry in good) for side in (0, 1)],
            "least": min(entry["least"] for entry in good),
            "mean": median_of(good, "mean"),
            "cpu": median_of(good, "cpu"),
            "num_parameters": good[0]["num_parameters"],
            "blas": good[0].get("blas"),
            "phases": good[-1].get("phases"),
        }
        table.append(row)
    return table


def median_of(entries: list[dict], key: str) -> float | None:
    """Median over the runs that have the figure."""
    values = [entry[key] for entry in entries if entry.get(key) is not None]
    return statistics.median(values) if values else None


def table(result: dict) -> str:
    """The rows as text, each with how often slower it is than distbp with half-batch micro-batches."""
    rows = result["table"]
    lines = [result["machine"]["line"]]
    lines += sorted({f"{row['peer']}: {row['blas']}" for row in rows if row.get("blas")})
    lines.append(
        f"{'workload':9} {'peer':11} {'median ms':>10} {'quartiles':>19} {'least':>9} {'mean':>9} {'cpu':>9} "
        f"{'median/distbp':>13} {'least/':>7} {'cpu/':>7}"
    )
    base = {row["workload"]: row for row in rows if row["peer"] == "distbp b/2" and "error" not in row}
    for row in rows:
        start = f"{row['workload']:9} {row['peer']:11}"
        if "error" in row:
            lines.append(f"{start} {row['error']}")
            continue
        own = base.get(row["workload"])
        low, high = row["quartiles"]
        ratios = [ratio(row, own, key) for key in ("median", "least", "cpu")]
        lines.append(
            f"{start} {row['median']:10.2f} {low:9.2f}-{high:9.2f} {row['least']:9.2f} "
            f"{shown(row['mean']):>9} {shown(row['cpu']):>9} "
            f"{ratios[0]:>13} {ratios[1]:>7} {ratios[2]:>7}"
        )
    return "\n".join(lines)


def ratio(row: dict, own: dict | None, key: str) -> str:
    """How often more a peer takes than distbp."""
    return shown(row[key] / own[key]) if own and own[key] and row[key] else "-"


def shown(value: float | None) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}"


def brief(run: dict) -> str:
    """One run in a few words."""
    return (
        run["error"]
        if "error" in run
        else f"{run['median']:.2f} ms, least {run['least']:.2f}, cpu {shown(run.get('cpu'))}"
    )


if __name__ == "__main__":
    main()
