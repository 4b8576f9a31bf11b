"""Kill random ranks under `launch/mpirun.sh`: `python tests/soak_mpirun.py PREFIX [--kills N] [--seed S]`.

PREFIX is an environment with mpi4py and an MPI library, as `make mpi-environments` makes them.  After each
kill the script waits for a new checkpoint, so that the restarts make progress.  Each time the rank that was
killed must be named, and in the end the hash must be that of an undisturbed run in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.epochs=1000",
    "-o", "optimizer.clip_norm=2.0", "-o", "checkpoint.every_steps=20",
]  # fmt: skip


def main():
    """Run the job, kill ranks, compare; exit with 1 if the end differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prefix", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="distbp-soak-") as folder:
        reference, out = Path(folder) / "reference", Path(folder) / "run"
        command = [sys.executable, "-m", "distbp.cli.main", "train", "digits", *OPTIONS]
        subprocess.run([*command, "--backend", "serial", "--out", reference], check=True, capture_output=True)
        said = Path(folder) / "stderr"
        job, killed = start(arguments.prefix, out, said), []
        while job.poll() is None and len(killed) < arguments.kills:
            # Survivors of the start before may still save; they are not to be killed as well.
            while job.poll() is None and said.read_text().count("starting again") < len(killed):
                time.sleep(0.02)
            seen = newest(out)
            while job.poll() is None and newest(out) == seen:
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.6))
            running = ranks(job)
            if running:
                rank = rng.choice(sorted(running))
                running[rank].kill()
                killed.append(rank)
        code = job.wait(600)
        wanted, got = (json.loads((path / "result.json").read_text()) for path in (reference, out))
        same = wanted["state_sha256"] == got["state_sha256"]
        named = culprits(said.read_text())
        print(f"{len(killed)} kills, exit code {code}, {'the same bits' if same else 'OTHER BITS'}")
        print("every one was named" if named == killed else f"killed {killed}, NAMED {named}")
        return 0 if same and code == 0 and len(killed) == arguments.kills and named == killed else 1


def culprits(text):
    """Whom the script named; on one host a worker's number is the launcher's rank."""
    lines = re.findall(r"mpirun\.sh: culprit: (.*)", text)
    found = [re.match(r"(?:worker (\d+) on|rank (\d+) of the launcher)", line) for line in lines]
    return [match and int(match[1] or match[2]) for match in found]


def start(prefix, out, said):
    """Start the job on three ranks; what it says goes to the file `said`."""
    environment = os.environ | {
        "PATH": f"{prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "DISTBP_COMMAND": f"{prefix}/bin/python -m distbp.cli.main",
    }
    launch = [REPOSITORY / "launch" / "mpirun.sh", "-n", "3", "--restarts", "5", "--"]
    with said.open("w") as stream:
        return subprocess.Popen(
            [*launch, "train", "digits", *OPTIONS, "--out", out],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
        )


def newest(out):
    """The name of the newest checkpoint, empty if there is none."""
    return max((path.name for path in out.glob("checkpoints/step-????????")), default="")


def ranks(job):
    """The processes of ranks that run now, by the launcher's rank."""
    found = {}
    try:
        children = psutil.Process(job.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return found
    for child in children:
        try:
            if "python" in child.name() and "distbp.cli.main" in child.cmdline():
                environment = child.environ()
                found[int(environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK", "-1")))] = child
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
