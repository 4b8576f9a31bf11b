"""What the long tests share: runs that are disturbed on purpose, and what has to be true of them afterwards.

`soak.py`, `soak_mpirun.py` and `chaos.py` start real commands, harm them, and compare their end with that of
a run that nothing happened to.  Nothing here knows a backend.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, "-m", "distbp.cli.main", "train"]
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "optimizer.clip_norm=2.0",
    "-o", "optimizer.momentum=0.9", "-o", "schedule.name=cosine", "-o", "run.log_samples=true",
    "-o", "train.epochs=1000",
]  # fmt: skip
"""A training of several workers with everything that could depend on their number."""


# ----- what a run left in its directory


def undisturbed(options, out):
    """Train in one process, with nothing happening to it; return its hashes."""
    command = [*COMMAND, *options, "--backend", "serial", "--out", out]
    subprocess.run(command, check=True, capture_output=True, env=environment())
    return hashes(out)


def hashes(out):
    """Return the two hashes of a finished run, and its validation; None if it has not finished."""
    try:
        result = json.loads((out / "result.json").read_text())
        return result["parameters_sha256"], result["state_sha256"], result["validation"]
    except (OSError, KeyError):
        return None


def events(out):
    """Return the events of a run."""
    path = out / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def checkpoints(out):
    """Return the folders of complete checkpoints, the newest last."""
    return sorted(out.glob("checkpoints/step-????????"))


def last_step(out):
    """Return the last step in samples.log, -1 if there is none; the file may grow meanwhile."""
    try:
        with (out / "samples.log").open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 16384))
            lines = file.read().split(b"\n")
    except OSError:
        return -1
    return int(lines[-2].split(b"\t")[0]) if len(lines) > 1 else -1


def samples_are_whole(out):
    """Return whether every step is there once, in order, and every sample once per epoch."""
    lines = (out / "samples.log").read_text().splitlines()
    if [int(line.split("\t")[0]) for line in lines] != list(range(len(lines))):
        return False
    stream = [int(word) for line in lines for word in line.split("\t")[1].split()]
    size = max(stream) + 1
    epochs = [stream[at : at + size] for at in range(0, len(stream) - size + 1, size)]
    return all(sorted(epoch) == list(range(size)) for epoch in epochs)


# ----- processes


def environment(**own):
    """Return this environment without settings of distbp, which is imported from this repository."""
    known = {name: value for name, value in os.environ.items() if not name.startswith("DISTBP_")}
    return known | {"PYTHONPATH": str(REPOSITORY)} | own


def marked(mark):
    """Return the processes that have the word `mark`, as in NAME=VALUE, in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:  # It has just ended; a zombie has an empty one.
            continue
    return found


def variable(pid, *names):
    """Return the first of these environment variables that a process has; None without any."""
    try:
        words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    known = dict(word.partition("=")[::2] for word in words)
    return next((known[name] for name in names if name in known), None)


def command_line(pid):
    """Return the words of a process that runs; none of one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def launcher_ranks(pids):
    """Return those of the processes that are ranks of mpirun, by the launcher's number."""
    found = {}
    for pid in pids:
        words = command_line(pid)
        if "distbp.cli.main" in words and "python" in words[0]:
            rank = variable(pid, "PMI_RANK", "OMPI_COMM_WORLD_RANK")
            if rank is not None:
                found[int(rank)] = pid
    return found


def descriptors(pid, sockets=True):
    """Return how many descriptors a process has open, or how many that are no sockets; None without one."""
    try:
        links = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    except OSError:  # It has ended, or closes one just now.
        return None
    return sum(sockets or not link.startswith("socket:") for link in links)


class Said:
    """What a process says, line by line, with the time at which each line came; read by a thread."""

    def __init__(self, stream):
        self.lines = []
        self._stream = stream
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self):
        for line in self._stream:
            self.lines.append((time.time(), line.rstrip("\n")))

    def find(self, pattern, since=0):
        """Return time, match and number of the first line from number `since` on that matches, or None."""
        for number, (when, line) in enumerate(self.lines[since:], since):
            if match := pattern.search(line):
                return when, match, number
        return None

    def drain(self, seconds):
        """Return when everybody who could still write has ended, or after so many seconds."""
        self._thread.join(seconds)

    def tail(self, count=40):
        """Return the last lines as one text."""
        return "\n".join(line for _, line in self.lines[-count:])
