"""The long form of the fault tests: `python -m tests.soak stops|kills [--count N] [--seed S] [DATA]`.

    stops   end a whole job at a random moment, by SIGUSR1 or by kill -9 of every process, some of them during
            start-up and during a save; go on with another worker count until it is finished
    kills   kill -9 one or two workers of a running job at random moments

After each round the hashes must be those of the undisturbed run and samples.log must hold every step once and
every sample once per epoch.  The seed is printed; the figures printed at the end are medians and worst cases.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests import soaking
from tests.soaking import events, hashes, last_step, samples_are_whole, undisturbed

OPTIONS = [*soaking.OPTIONS, "-o", "checkpoint.every_steps=20"]


def main():
    """Run the rounds; exit with 1 if any of them ended differently."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", choices=["stops", "kills"])
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    print(
        f"seed {arguments.seed}, {arguments.count} rounds of {arguments.kind} on {arguments.data}", flush=True
    )
    folder = Path(tempfile.mkdtemp(prefix="distbp-soak-"))
    options = [arguments.data, *OPTIONS, "-o", f"train.max_steps={arguments.steps}"]
    try:
        wanted = undisturbed(options, folder / "undisturbed")
        rounds = stops if arguments.kind == "stops" else kills
        failures = rounds(options, folder, wanted, rng, arguments)
    finally:
        shutil.rmtree(folder)
    print(f"{arguments.count - failures} of {arguments.count} ended with the bits of the undisturbed run")
    return 1 if failures else 0


def stops(options, folder, wanted, rng, arguments):
    """End jobs as a whole, and finish them with other worker counts."""
    failures = 0
    for number in range(arguments.count):
        out, story = folder / f"stop-{number}", []
        often = [*options, "-o", "checkpoint.every_steps=1"] if number % 4 == 3 else options
        for _ in range(rng.randint(1, 3)):
            nproc = rng.randint(1, 5)
            job = begin(often, out, nproc)
            when = rng.uniform(0.02, 0.5) if number % 4 == 0 else rng.uniform(0.5, 2.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(when)
            how = rng.choice(["SIGUSR1", "kill -9"])
            if job.poll() is None:
                if how == "SIGUSR1":
                    os.kill(job.pid, signal.SIGUSR1)
                else:
                    os.killpg(job.pid, signal.SIGKILL)
                    end_orphans(job)
            code = job.wait(30)
            story.append(f"{nproc} workers, {how} after {when:.2f} s after step {last_step(out)}: {code}")
        nproc = rng.randint(1, 5)
        job = begin(often, out, nproc)
        code = job.wait(120)
        failures += not report(number, [*story, f"{nproc} workers: {code}"], out, wanted, code)
        shutil.rmtree(out, ignore_errors=True)
    return failures


def kills(options, folder, wanted, rng, arguments):
    """Kill workers of running jobs."""
    failures, detected, back = 0, [], []
    for number in range(arguments.count):
        out, nproc = folder / f"kill-{number}", rng.randint(1, 4)
        job = begin(options, out, nproc)
        time.sleep(rng.uniform(0.2, 1.6))
        victims = rng.sample(workers(job), k=min(len(workers(job)), rng.choice([1, 1, 1, 2])))
        for victim in victims:
            victim.kill()
        killed = time.time()
        code = job.wait(120)
        story = f"{nproc} workers, {len(victims)} killed: {code}"
        for event in events(out):
            if event["kind"] == "lost":
                detected.append(event["time"] - killed)
            elif event["kind"] == "restart":
                back.append(event["time"] - killed)
        failures += not report(number, [story], out, wanted, code)
        shutil.rmtree(out, ignore_errors=True)
    for name, seconds in (("seen after", detected), ("back in step after", back)):
        if seconds:
            print(f"{name}: median {statistics.median(seconds):.3f} s, worst {max(seconds):.3f} s")
    return failures


def begin(options, out, nproc):
    """Start a job in a session of its own."""
    return subprocess.Popen(
        [*soaking.COMMAND, *options, "--nproc", str(nproc), "--out", out],
        env=soaking.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def workers(job):
    """The worker processes of a job."""
    try:
        return [child for child in psutil.Process(job.pid).children() if child.status() != "zombie"]
    except psutil.NoSuchProcess:
        return []


def end_orphans(job):
    """Wait until nobody of the job's session is left."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        left = [p for p in psutil.process_iter() if p.pid != job.pid and session_of(p.pid) == job.pid]
        if not left:
            return
        time.sleep(0.01)
    raise AssertionError(f"left behind: {left}")


def session_of(pid):
    """The session of a process that still runs, or None."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state == "Z" else int(fields[2])


def report(number, story, out, wanted, code):
    """Print one round; return whether it ended as it should."""
    good = code == 0 and hashes(out) == wanted and samples_are_whole(out)
    left = list((out / "checkpoints").glob("*.tmp-*"))
    print(
        f"{number:4d} {'same bits' if good and not left else 'DIFFERENT'}  " + " | ".join(story), flush=True
    )
    return good and not left


if __name__ == "__main__":
    sys.exit(main())
