"""Flip bits of the state of running jobs: `python tests/flips_memory.py [--count 200] [--seed S]`.

In three parts workers are stopped at random moments, a random bit of the current generation is flipped
through /proc/PID/mem, and they go on.

1. One host, two local workers, `run.verify_every = 1`, COUNT flips in one run: every flip must be found in
   the step that reads it, lane and tensor must be right, and the run must end in the undisturbed bits.
   Flips that come when an update has already read that element for the last time are counted apart: nobody
   can find them, nobody reads them, and the end shows that they change nothing.
2. The same with the default, 100: the share that is found.
3. With --hosts PREFIX, an environment as `make mpi-environments` makes them: two emulated hosts under mpirun
   with the default, a run for each of COUNT / 10 flips.  What is found ends the job with 69 or 80; the rest
   must have left no difference.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.conftest import Job, result_of, wait_until  # noqa: E402  The repository must be importable.
from tests.memory import Memory, corruptions, job_parts  # noqa: E402

STEPS_A_FLIP = 40
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.epochs=100000",
    "-o", "model.hidden=[256]", "-o", "checkpoint.every_steps=25", "-o", "run.max_restarts=100000",
]  # fmt: skip
HOST_STEPS = 500
HOST_OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.epochs=100000",
    "-o", "model.hidden=[512, 512]", "-o", "checkpoint.every_steps=150",
    "-o", "data.validation_fraction=0",
]  # fmt: skip

PIPES = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}


def main():
    """Flip, and print what was found; exit with 1 if part 1 misses anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--parts", type=int, nargs="+", default=[1, 2, 3], choices=[1, 2, 3])
    parser.add_argument("--hosts", type=Path, metavar="PREFIX")
    parser.add_argument("--flavour", choices=["mpich", "openmpi"], default="mpich")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    rng = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(prefix="distbp-flips-") as name:
        folder = Path(name)
        good = 1 not in arguments.parts or flip_every_step(rng, arguments.count, folder)
        if 2 in arguments.parts:
            flip_with_default(rng, arguments.count, folder)
        if 3 in arguments.parts and arguments.hosts is not None:
            good &= flip_on_hosts(rng, arguments, folder)
    return 0 if good else 1


# ----- one host


def flip_every_step(rng, count, folder):
    """Part 1; return whether everything was found and the end is right."""
    options = [*OPTIONS, "-o", f"train.max_steps={STEPS_A_FLIP * (count + 5)}", "-o", "run.verify_every=1"]
    begun = time.monotonic()
    found, missed, late, wrong, result = run_with_flips(rng, count, options, folder / "every")
    spent = time.monotonic() - begun
    wanted = undisturbed(options, folder / "undisturbed")
    same = result["state_sha256"] == wanted["state_sha256"]
    print(
        f"one host, verify_every = 1: found {found} of {found + missed} flips, lane and tensor right in "
        f"{found - wrong}; {late} more came after the last read; {result['restarts']} restarts, "
        f"{result['steps_redone']} steps done again, {spent:.0f} s; "
        f"{'the undisturbed bits' if same else 'OTHER BITS'}",
        flush=True,
    )
    return found >= count and not missed and not wrong and same


def flip_with_default(rng, count, folder):
    """Part 2: how many are found when one state in a hundred is covered, and those that are saved."""
    options = [*OPTIONS, "-o", f"train.max_steps={STEPS_A_FLIP * (count + 5)}"]
    found = total = diverged = 0
    while total < count:
        out = folder / f"default-{total}"
        here, missed, late, _, result = run_with_flips(rng, count - total, options, out)
        found, total = found + here, total + here + missed + late
        diverged += result["exit_code"] == 79
    print(
        f"one host, verify_every = 100: found {found} of {total} flips ({found / total:.1%}); "
        f"{diverged} others let the run end as diverged (79)",
        flush=True,
    )


def run_with_flips(rng, count, options, out):
    """Flip until `count` flips were found or missed; return how many of each, and the result."""
    parts = job_parts("digits", options, (2,))
    job = Job(["train", "digits", *options, "--nproc", "2", "--out", out], out.parent, None)
    found = missed = late = wrong = 0
    try:
        wait_until(lambda: any(out.glob("checkpoints/step-????????")))
        memory = Memory(job.workers().values(), parts.layout)
        while found + missed < count and job.process.poll() is None:
            target = memory.committed + rng.randrange(1, STEPS_A_FLIP // 2)
            wait_for(job, lambda target: memory.committed >= target, target)
            time.sleep(rng.uniform(0, 0.004))
            before = len(corruptions(out))
            try:
                flip = memory.flip(rng)
            except (psutil.Error, AssertionError):
                continue  # The job is over, or going back to its checkpoint.
            # What is found ends the attempt before the step is committed; two commits show that it was not.
            wait_for(
                job, lambda n, s: len(corruptions(out)) > n or memory.committed >= s, before, flip.step + 2
            )
            events = corruptions(out)[before:]
            if not events:
                late, missed = late + flip.late, missed + (not flip.late)
                if not flip.late and "run.verify_every=1" in options:
                    print(f"MISSED {flip}", flush=True)
                continue
            found += 1
            if (events[0]["lane"], events[0]["tensor"]) != parts.place(flip.vector, flip.element):
                wrong += 1
                print(f"WRONG PLACE {flip}: {events[0]}", flush=True)
        memory.close()
        done = job.wait(600)
        # Without a check of every step a flip may spoil everything that follows.
        assert done.returncode == 0 or (done.returncode == 79 and missed), done.stderr[-3000:]
    finally:
        if job.process.poll() is None:
            job.kill()
    return found, missed, late, wrong, result_of(out)


def wait_for(job, condition, *arguments):
    """Wait until a condition holds, or the job is over."""
    wait_until(lambda: condition(*arguments) or job.process.poll() is not None)


def undisturbed(options, out):
    """The result of one worker to which nothing happens."""
    done = Job(["train", "digits", *options, "--backend", "serial", "--out", out], out.parent, None).wait(600)
    assert done.returncode == 0, done.stderr
    return result_of(out)


# ----- two emulated hosts


def flip_on_hosts(rng, arguments, folder):
    """Part 3; return whether what was not found left no difference that a comparison could have seen."""
    from cluster.emulated import EmulatedCluster

    options = [*HOST_OPTIONS, "-o", f"train.max_steps={HOST_STEPS}"]
    parts = job_parts("digits", options, (1, 1))
    wanted = undisturbed(options, folder / "alone")["state_sha256"]
    found, named, harmless, bad = 0, 0, 0, []
    count = max(1, arguments.count // 10)
    with EmulatedCluster(2, shared=[folder, REPOSITORY, arguments.hosts]) as cluster:
        for number in range(count):
            out = folder / f"hosts-{number}"
            code, flip, text = run_on_hosts(rng, arguments, cluster, options, parts, out)
            events = corruptions(out)
            if code in (69, 80) and events:  # 80: before the first checkpoint.
                found += 1
                named += events[0]["host"] == f"host{flip.host}"
            elif code == 0 and result_of(out)["state_sha256"] == wanted:
                harmless += 1
            else:
                bad.append(f"{flip.flip} on host {flip.host}: code {code} {text[-300:]}")
    print(
        f"two hosts under mpirun, verify_every = 100: found {found} of {count} flips ({found / count:.0%}), "
        f"the host named in {named}; {harmless} left no difference; {len(bad)} not found",
        *bad,
        sep="\n  ",
        flush=True,
    )
    return not bad


class HostFlip:
    """A flip and the host on which it was."""

    def __init__(self, flip, host):
        self.flip, self.host = flip, host


def run_on_hosts(rng, arguments, cluster, options, parts, out):
    """Run one job on two hosts and flip a bit on one of them; return its exit code, the flip, its words."""
    python = str(arguments.hosts / "bin" / "python")
    command = [python, "-m", "distbp.cli.main", "train", "digits", *options, "--out", str(out)]
    launch = cluster.mpirun(
        command,
        2,
        arguments.flavour,
        slots={"host0": 1, "host1": 1},
        prefix=arguments.hosts,
        environment={"PYTHONPATH": str(REPOSITORY)},
    )
    job = cluster.start(cluster.hosts[0], launch, cwd=out.parent, **PIPES)
    host = rng.randrange(2)
    memory = wait_until(lambda: memory_of(out, host, parts.layout), 60)
    target = rng.randrange(1, HOST_STEPS - 110)
    wait_until(lambda: memory.committed >= target, 60)
    flip = memory.flip_in_time(rng, out)
    memory.close()
    _, text = job.communicate(timeout=120)
    return job.returncode, HostFlip(flip, host), text


def memory_of(out, host, layout):
    """The arena of the rank on `host`, as soon as it holds a state."""
    for process in psutil.process_iter(["cmdline"]):
        try:
            words = process.info["cmdline"] or []
            if "distbp.cli.main" not in words or str(out) not in words or "python" not in process.name():
                continue
            environment = process.environ()
            rank = environment.get("PMI_RANK", environment.get("OMPI_COMM_WORLD_RANK"))
            if rank == str(host) and "distbp-arena" in Path(f"/proc/{process.pid}/maps").read_text():
                memory = Memory([process], layout)
                if memory.committed >= 0:
                    return memory
                memory.close()
        except (psutil.Error, OSError):
            continue
    return None


if __name__ == "__main__":
    sys.exit(main())
