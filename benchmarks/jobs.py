"""Whole jobs beside PyTorch, their memory and their first step: `python -m benchmarks.jobs --torch PYTHON`.

Memory is the sum of the proportional set sizes of all processes of a job, sampled every 50 ms from its start
to its end: what is shared counts once.  The jobs are those of `benchmarks.peers`: `distbp train` with two
workers, and two processes of DistributedDataParallel, started without a launcher of their own.

Time is that from the command to the end of the first step of training on the digits, and that of
`distbp --help`; runs alternate, medians and the least are printed.  Needs Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import distbp
from benchmarks.machine import describe_machine
from benchmarks.peers import REPOSITORY, RUN_TIMEOUT_S, other_environment
from distbp.bench.workloads import Workload, chosen, make_data, options

SAMPLE_EVERY_S = 0.05
MEMORY_STEPS = 6


def main() -> None:
    """Measure both, and print two tables; `--json` keeps them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="a Python that has torch")
    parser.add_argument("--workloads", default="all", help="for memory; names with commas between them")
    parser.add_argument("--rounds", type=int, default=5, help="for times")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    rounds = 2 if arguments.quick else arguments.rounds
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    with tempfile.TemporaryDirectory(prefix="distbp-jobs-") as name:
        folder = Path(name)
        memory = [measure_memory(w, folder, arguments.torch) for w in chosen(arguments.workloads)]
        times = measure_times(folder, arguments.torch, rounds)
    result = {"machine": describe_machine(), "memory": memory, "times": times}
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def measure_memory(workload: Workload, folder: Path, torch_python: str) -> dict[str, object]:
    """Peak MB of both jobs, with micro-batches of half a batch and with the default ones."""
    data = make_data(workload, folder)
    peaks: dict[str, object] = {"workload": workload.name}
    for peer, micro_batch in (("distbp b/2", workload.batch // 2), ("distbp b/8", None)):
        words = [*train_words(str(data), folder), *options(workload, MEMORY_STEPS, micro_batch)]
        peaks[peer] = peak_of(start(words, folder)) / 1e6
    peaks["ddp"] = (
        peak_of(*start_ddp(workload, data, folder, torch_python), found=folder / "found.json") / 1e6
    )
    data.unlink()
    print(peaks, file=sys.stderr, flush=True)
    return peaks


def train_words(data: str, folder: Path) -> list[str]:
    """`distbp train DATA` with two workers, into a new run directory."""
    out = tempfile.mkdtemp(dir=folder)
    return [sys.executable, "-m", "distbp.cli.main", "train", data, "--nproc", "2", "--out", f"{out}/run"]


def start(words: list[str], folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a process whose output nobody reads."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=quiet, stderr=quiet)


def start_ddp(workload: Workload, data: Path, folder: Path, python: str) -> list[subprocess.Popen]:
    """Start the two processes of `torch_peer.py`; the last one's specification lies in `folder`."""
    out = tempfile.mkdtemp(dir=folder)
    specification = {"data": str(data), "shape": workload.shape, "outputs": workload.outputs, "threads": 1}
    specification |= {"model": workload.model, "batch": workload.batch, "steps": MEMORY_STEPS}
    specification |= {"out": str(folder / "found.json")}
    Path(out, "specification.json").write_text(json.dumps(specification))
    (folder / "found.json").unlink(missing_ok=True)
    (folder / "found.json.meeting").unlink(missing_ok=True)
    words = [python, str(REPOSITORY / "benchmarks/torch_peer.py"), f"{out}/specification.json"]
    return [start(words, folder, other_environment(folder, rank, 2, 1)) for rank in range(2)]


def peak_of(*processes: subprocess.Popen, found: Path | None = None) -> float:
    """Most bytes that the processes and all their children had at one time; they must end well."""
    most, until = 0, time.monotonic() + RUN_TIMEOUT_S
    while any(process.poll() is None for process in processes):
        roots = {process.pid for process in processes}
        most = max(most, sum(map(proportional_bytes, descendants(roots))))
        if time.monotonic() > until:
            raise SystemExit(f"{processes[0].args}: still running after {RUN_TIMEOUT_S} s")
        time.sleep(SAMPLE_EVERY_S)
    refuse_failed(processes, found)
    return most


def refuse_failed(processes: Sequence[subprocess.Popen], found: Path | None = None) -> None:
    """Wait for processes; end with an error if one failed before it wrote what it had `found`.

    Gloo now and then aborts when a job of it is over ("terminate called without an active exception").
    """
    for process in processes:
        if process.wait(RUN_TIMEOUT_S) and not (found is not None and found.exists()):
            raise SystemExit(f"{process.args}: exit code {process.returncode}")


def descendants(roots: set[int]) -> set[int]:
    """The processes with these numbers, their children, and so on."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, grown = set(), set(roots)
    while grown - found:
        found |= grown
        grown = found | {number for number, parent in parents.items() if parent in found}
    return found


def proportional_bytes(number: int) -> int:
    """Proportional set size of a process, 0 when it has ended meanwhile."""
    try:
        lines = Path(f"/proc/{number}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def measure_times(folder: Path, torch_python: str, rounds: int) -> list[dict[str, object]]:
    """Seconds to the first step on the digits, of both, and to the help."""
    digits = folder / "digits.npz"
    train, _ = distbp.load_data("digits")
    x, y = train.batch(np.arange(len(train)))
    np.savez(digits, x=x.reshape(len(x), -1), y=y)
    # The network that `distbp train digits` takes by itself.
    model = Workload("digits", (64,), 10, 64, {"name": "mlp", "hidden": [256, 128]}, 1, 1797)
    times: dict[str, list[float]] = {"distbp train digits": [], "the same with ddp": [], "distbp --help": []}
    for _ in range(rounds):
        times["distbp train digits"].append(seconds_to_first_step(folder))
        begun = time.time()
        processes = start_ddp(model, digits, folder, torch_python)
        refuse_failed(processes, folder / "found.json")
        found = json.loads((folder / "found.json").read_text())
        times["the same with ddp"].append(found["first_step_at"] - begun)
        begun = time.time()
        start([sys.executable, "-m", "distbp.cli.main", "--help"], folder).wait()
        times["distbp --help"].append(time.time() - begun)
    return [
        {"command": name, "median_s": statistics.median(values), "least_s": min(values)}
        for name, values in times.items()
    ]


def seconds_to_first_step(folder: Path) -> float:
    """Seconds from the command to the record of the first step."""
    words = [*train_words("digits", folder), "-o", "train.max_steps=20"]
    records = Path(words[-3]) / "metrics.jsonl"
    begun = time.time()
    process = start(words, folder)
    while not (records.exists() and records.stat().st_size):
        if process.poll() is not None:
            raise SystemExit("distbp train digits made no step")
        time.sleep(0.002)
    seconds = time.time() - begun
    process.wait(RUN_TIMEOUT_S)
    return seconds


def table(result: dict) -> str:
    """Both tables as text."""
    lines = [
        result["machine"]["line"],
        f"{'workload':9} {'distbp b/2 MB':>14} {'distbp b/8 MB':>14} {'ddp MB':>8} {'ddp/distbp b/2':>15}",
    ]
    for row in result["memory"]:
        own, default, peer = row["distbp b/2"], row["distbp b/8"], row["ddp"]
        lines.append(f"{row['workload']:9} {own:14.0f} {default:14.0f} {peer:8.0f} {peer / own:15.2f}")
    lines += [
        f"{row['command']:20} {row['median_s']:.2f} s, least {row['least_s']:.2f}" for row in result["times"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
