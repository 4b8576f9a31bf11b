"""Kill random ranks under `launch/mpirun.sh`: `python -m tests.soak_mpirun PREFIX [--kills N] [--seed S]`.

PREFIX is an environment with mpi4py and an MPI library, as `make mpi-environments` makes them.  After each
kill the script waits for a new checkpoint, so that the restarts make progress.  Each time the rank that was
killed must be named, and in the end the hash must be that of an undisturbed run in one process.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests import soaking
from tests.soaking import REPOSITORY, checkpoints, hashes, launcher_ranks, undisturbed

OPTIONS = [*soaking.OPTIONS, "-o", "checkpoint.every_steps=20"]


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
        wanted = undisturbed(["digits", *OPTIONS], reference)
        said = Path(folder) / "stderr"
        job, killed = start(arguments.prefix, out, said), []
        while job.poll() is None and len(killed) < arguments.kills:
            # Survivors of the start before may still save; they are not to be killed as well.
            while job.poll() is None and said.read_text().count("starting again") < len(killed):
                time.sleep(0.02)
            seen = checkpoints(out)[-1:]
            while job.poll() is None and checkpoints(out)[-1:] == seen:
                time.sleep(0.02)
            time.sleep(rng.uniform(0.0, 0.6))
            running = ranks(job)
            if running:
                rank = rng.choice(sorted(running))
                os.kill(running[rank], signal.SIGKILL)
                killed.append(rank)
        code = job.wait(600)
        same = hashes(out) == wanted
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
    environment = soaking.environment(
        PATH=f"{prefix}/bin:{os.environ['PATH']}",
        DISTBP_COMMAND=f"{prefix}/bin/python -m distbp.cli.main",
    )
    launch = [REPOSITORY / "launch" / "mpirun.sh", "-n", "3", "--restarts", "5", "--"]
    with said.open("w") as stream:
        return subprocess.Popen(
            [*launch, "train", "digits", *OPTIONS, "--out", out],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=stream,
            start_new_session=True,
        )


def ranks(job):
    """The processes of ranks that run now, by the launcher's rank."""
    try:
        children = psutil.Process(job.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return {}
    return launcher_ranks(child.pid for child in children)


if __name__ == "__main__":
    sys.exit(main())
