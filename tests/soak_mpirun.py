"""Kill random ranks under `launch/mpirun.sh`: `python tests/soak_mpirun.py PREFIX [--kills N] [--seed S]`.

PREFIX is an environment with mpi4py and an MPI library, as `make mpi-environments` makes them.  After each
kill the script waits for a new checkpoint, so that the restarts make progress.  In the end the hash must be
that of an undisturbed run in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
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
        job, killed = start(arguments.prefix, out), 0
        while job.poll() is None and killed < arguments.kills:
            seen = newest(out)
            while job.poll() is None and newest(out) == seen:
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.6))
            running = ranks(job)
            if running:
                rng.choice(running).kill()
                killed += 1
        code = job.wait(600)
        wanted, got = (json.loads((path / "result.json").read_text()) for path in (reference, out))
        same = wanted["state_sha256"] == got["state_sha256"]
        print(f"{killed} kills, exit code {code}, {'the same bits' if same else 'OTHER BITS'}")
        return 0 if same and code == 0 and killed == arguments.kills else 1


def start(prefix, out):
    """Start the job on three ranks."""
    environment = os.environ | {
        "PATH": f"{prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "DISTBP_COMMAND": f"{prefix}/bin/python -m distbp.cli.main",
    }
    launch = [REPOSITORY / "launch" / "mpirun.sh", "-n", "3", "--restarts", "5", "--"]
    return subprocess.Popen(
        [*launch, "train", "digits", *OPTIONS, "--out", out],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def newest(out):
    """The name of the newest checkpoint, empty if there is none."""
    return max((path.name for path in out.glob("checkpoints/step-????????")), default="")


def ranks(job):
    """The rank processes that run now."""
    found = []
    try:
        children = psutil.Process(job.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return found
    for child in children:
        try:
            if "python" in child.name() and "distbp.cli.main" in child.cmdline():
                found.append(child)
        except psutil.Error:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
