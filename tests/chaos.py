"""Disturb runs at random for some minutes, and compare how they end: `make chaos [MINUTES=10] [WHERE=local]`.

    python -m tests.chaos [--where local|mpirun|ray] [--minutes M] [--faults N] [--seed S] [--kinds KIND ...]

A run is started, and again and again something happens to it, drawn from a seed that is printed:

    kill, segv      a worker dies by SIGKILL, by SIGSEGV          two        two of them at once
    again           another one dies while the first is replaced  pause      a worker stops for up to 8 s
    stop            a worker stops until it is replaced           pause_all  the whole job stops for 12 s
    job             every process is killed, and the run started again
    launcher        the launching process alone is killed: mpirun below its script, the driver on Ray
    flip            like job, and a bit of the newest checkpoint is flipped before the next start
    fill            the disk is full until a save has failed
    stop_request    SIGTERM, SIGUSR1 or SIGINT, and the run is started again
    cut             the link between the hosts is cut, and mended (mpirun)
    keeper, node    the keeper of a host's memory, a whole host (Ray)

Each start has another number of workers.  Between two faults training must go on.  When the run has reached
its last step, parameters and state must have the bits of a run in one process that nothing happened to, every
sample must have been taken once per epoch, and nothing may be left: processes, files in /dev/shm or /tmp,
temporary checkpoints, descriptors of the launching process.  (MPICH leaves files when a job is aborted, some
of them where launch/mpirun.sh does not clean up; those are counted.)  Then the next run begins, until the
time is over and the last one has ended.  Whatever is not as it should be ends the program with 1, and with
what was said.

The table at the end: how often each thing happened, and median and worst seconds from it to the first word
about it, and to the next step of training.  For a worker that is replaced the second ends when all were
released to do the step again (I_RESUMED), in every other case when a step was recorded.  A pause has neither.

Needs Linux and root: it lives in namespaces of its own, with a disk of its own, and leaves nothing outside.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distbp.checkpoint import verify
from tests import soaking
from tests.chaos_worlds import open_world
from tests.soaking import checkpoints, descriptors, events, hashes, last_step, samples_are_whole, undisturbed

INSIDE = "CHAOS_INSIDE"
DISK_BYTES = 64 << 20
LAST_STEPS = 600
"""Nothing happens any more when a run has so few steps left: it might end before anybody notices."""

LONG_S = 120.0
"""Whoever waits longer than this waits for something that will not come."""

# Whoever is pid 1 has to reap the orphans of killed jobs, which a shell does by itself.
AS_FIRST_PROCESS = (
    'mount -t tmpfs tmpfs /dev/shm && mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2; "$@"; exit $?'
)
RESUMED = re.compile("I_RESUMED")


class Different(Exception):
    """Something is not as it should be."""


class Chaos:
    """One soak: run after run in a world, and what was measured."""

    def __init__(self, world, arguments, options, wanted):
        self.world = world
        self.rng = random.Random(arguments.seed)
        self.kinds = [kind for kind in world.kinds if not arguments.kinds or kind in arguments.kinds]
        self.until = time.monotonic() + 60 * (arguments.minutes if arguments.faults is None else 10_000)
        self.faults_left = arguments.faults
        self.steps = arguments.steps
        self.figures = {}
        self.runs = self.starts = 0
        self._options = options
        self._wanted = wanted
        self._bag = []
        self._held = None
        self.out = world.disk
        self.kind = "nothing"
        """What happens, or happened last."""

    # ----- runs

    def go(self):
        """Disturb run after run until the time is over and the last one has ended."""
        while not self.is_over():
            self.out = self.world.disk / f"run-{self.runs}"
            self.start()
            while self.may_disturb():
                self.disturb()
            self.finish()
            self.runs += 1

    def start(self):
        """Start the job, or start it again, and return when it trains."""
        self.world.start(self._options, self.out, self.rng)
        self.starts += 1
        self._held = None
        say(f"start {self.starts}: {self.world.started_as}")
        self.await_step()

    def may_disturb(self):
        """Wait a moment; return whether there is time, in this soak and in this run, for another fault."""
        time.sleep(self.rng.uniform(0.1, 1.5))
        if self.ended():
            return False
        return not self.is_over() and last_step(self.out) < self.steps - LAST_STEPS

    def is_over(self):
        """Return whether enough has happened."""
        return self.faults_left == 0 or time.monotonic() >= self.until

    def disturb(self):
        """Let the next thing happen."""
        self.check_descriptors()
        if not self._bag:
            self._bag = self.rng.sample(self.kinds, len(self.kinds))
        kind = self.kind = self._bag.pop()
        step = last_step(self.out)
        measured = getattr(self, f"do_{kind}")()
        if measured is None:
            return
        what, seen, back = measured
        if self.faults_left is not None:
            self.faults_left -= 1
        self.figures.setdefault(kind, []).append((seen, back))
        seconds = after(", noticed after", seen) + after(", back in step after", back)
        say(f"step {step}: {kind}: {what}{seconds}")

    def finish(self):
        """Let the run reach its last step, and compare."""
        code = self.wait_for_end(10 * LONG_S)
        self.must(code == 0, f"the run ended with {code}, expected 0")
        self.must(hashes(self.out) == self._wanted, f"{hashes(self.out)}, expected {self._wanted}")
        self.must(last_step(self.out) == self.steps - 1, f"the last step is {last_step(self.out)}")
        self.must(samples_are_whole(self.out), "steps or samples are missing, or there twice")
        left = list((self.out / "checkpoints").glob("*.tmp-*"))
        self.must(not left, f"left in the run directory: {left}")
        self.check_nothing_left()
        say(f"run {self.runs} ended after {self.steps} steps, with the bits of the undisturbed one")
        shutil.rmtree(self.out)

    # ----- what must be

    def must(self, holds, what):
        """Fail unless it holds."""
        if not holds:
            raise Different(what)

    def ended(self):
        """Return whether the process that was started has ended."""
        return self.world.process.poll() is not None

    def wait_for_end(self, seconds):
        """Return the exit code."""
        try:
            code = self.world.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Different(f"the job has not ended after {seconds:.0f} s") from None
        self.world.said.drain(5)
        return code

    def expect(self, pattern, since, seconds=LONG_S):
        """Return when a line came that matches, among those from number `since` on, and its number."""
        until = time.monotonic() + seconds
        while True:
            over = self.ended()
            if over:
                self.world.said.drain(5)
            if found := self.world.said.find(pattern, since):
                return found[0], found[2]
            self.must(not over, f"the job has ended, and nobody said {pattern.pattern!r}")
            self.must(time.monotonic() < until, f"nobody said {pattern.pattern!r} for {seconds:.0f} s")
            time.sleep(0.005)

    def await_step(self, may_end=False):
        """Return when another step is recorded; a run may go back before it goes on."""
        until = time.monotonic() + LONG_S
        lowest = last_step(self.out)
        while True:
            over = self.ended()
            now = last_step(self.out)
            if now > lowest:
                return time.time()
            lowest = min(lowest, now)
            if over and may_end:
                return None
            self.must(not over, f"the job ended with {self.world.process.returncode} before it made a step")
            self.must(time.monotonic() < until, f"no step was made for {LONG_S:.0f} s")
            time.sleep(0.005)

    def check_descriptors(self):
        """Fail if the launching process has more descriptors than at its first quiet moment."""
        pid = self.world.launching_process()
        held = None if pid is None else descriptors(pid, self.world.counts_sockets)
        if held is None:
            return
        if self._held is None:
            self._held = held
        self.must(held <= self._held, f"the launching process has {held} descriptors, had {self._held}")

    def check_nothing_left(self):
        """Fail if a job that has ended left a process or a file."""
        left = self.world.left_behind()
        self.must(not left, "left behind: " + "; ".join(left))

    # ----- what happens to workers

    def do_kill(self):
        """A worker is killed."""
        return self.lose([self.rng.choice(self.world.workers())], signal.SIGKILL)

    def do_segv(self):
        """A worker crashes."""
        return self.lose([self.rng.choice(self.world.workers())], signal.SIGSEGV)

    def do_two(self):
        """Two workers die at once."""
        workers = self.world.workers()
        return self.lose(self.rng.sample(workers, 2), signal.SIGKILL) if len(workers) > 1 else None

    def do_again(self):
        """Another worker dies while the first one is replaced, or the replacement does."""
        since, begun = len(self.world.said.lines), time.time()
        first = self.rng.choice(self.world.workers())
        os.kill(first.pid, signal.SIGKILL)
        seen, _ = self.expect(first.lost, since)
        time.sleep(self.rng.uniform(0.0, 1.0))
        others = [worker for worker in self.world.workers() if worker.pid != first.pid]
        if not others:
            return f"{first.name}, and nobody else", seen - begun, self.await_resumed(since) - begun
        second = self.rng.choice(others)
        again = time.time()
        with contextlib.suppress(ProcessLookupError):
            os.kill(second.pid, signal.SIGKILL)
        worse, line = self.expect(second.lost, since)
        what = f"{first.name}, and after {again - begun:.2f} s {second.name}"
        return what, max(seen - begun, worse - again), self.await_resumed(line) - again

    def do_pause(self):
        """A worker stops for less than the deadline: nobody may take it for lost."""
        since, worker = len(self.world.said.lines), self.rng.choice(self.world.workers())
        seconds = self.rng.uniform(0.3, 8.0)
        os.kill(worker.pid, signal.SIGSTOP)
        time.sleep(seconds)
        os.kill(worker.pid, signal.SIGCONT)
        self.nobody_lost(since)
        return f"{worker.name} for {seconds:.1f} s", None, None

    def do_pause_all(self):
        """The whole job stops for longer than the deadline, as by Ctrl-Z: nobody may be taken for lost."""
        since = len(self.world.said.lines)
        os.killpg(self.world.process.pid, signal.SIGSTOP)
        time.sleep(12)
        os.killpg(self.world.process.pid, signal.SIGCONT)
        self.nobody_lost(since)
        return "every process for 12 s", None, None

    def nobody_lost(self, since):
        """Fail if training does not go on, or anybody was taken for lost."""
        self.await_step()
        time.sleep(1.0)
        lost = self.world.said.find(self.world.loss, since)
        self.must(lost is None, f"a worker that was paused was taken for lost: {lost and lost[1].string}")

    def do_stop(self):
        """A worker stops for good; when it is woken up it must be gone."""
        worker = self.rng.choice(self.world.workers())
        measured = self.lose([worker], signal.SIGSTOP, kind="stuck" if self.world.replaces_workers else None)
        with contextlib.suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGCONT)
        return measured

    def do_keeper(self):
        """The keeper of a host's memory is killed: a new one takes it over, and nobody stops."""
        since, begun = len(self.world.said.lines), time.time()
        pid, host = self.rng.choice(self.world.actors("HostKeeper"))
        os.kill(pid, signal.SIGKILL)
        seen, _ = self.expect(re.compile("E_LOST_KEEPER .*action=adopt"), since)
        return f"that of {host}", seen - begun, self.await_step() - begun

    def do_node(self):
        """A host vanishes and comes back with an empty memory."""
        since, begun = len(self.world.said.lines), time.time()
        host = self.world.lose_node(self.rng)
        if host is None:
            return None
        seen, line = self.expect(re.compile(f"E_LOST_WORKER .*host={host} "), since)
        self.world.restore_node(host)
        return host, seen - begun, self.await_resumed(line) - begun

    def do_cut(self):
        """The link to the second host is cut, until somebody says so."""
        since, begun = len(self.world.said.lines), time.time()
        self.world.hosts.cut("host1")
        try:
            seen, _ = self.expect(re.compile("culprit: "), since)
        finally:
            self.world.hosts.mend("host1")
        return "host1", seen - begun, self.back_after_restart() - begun

    def lose(self, workers, number, kind=None):
        """Send a signal to workers; return what was measured from then on."""
        since, begun = len(self.world.said.lines), time.time()
        for worker in workers:
            os.kill(worker.pid, number)
        lines = [self.expect(re.compile("E_STUCK_WORKER"), since)] if kind == "stuck" else []
        if self.world.replaces_workers or number != signal.SIGSTOP:
            lines += [self.expect(worker.lost, since) for worker in workers]
        else:
            lines.append(self.expect(re.compile("culprit: "), since))
        seen = lines[0][0] if kind == "stuck" else max(when for when, _ in lines)
        if self.world.replaces_workers:
            back = self.await_resumed(max(line for _, line in lines))
            self.must(kind == "stuck" or self.recorded(begun) >= 1, "events.jsonl has no record of the loss")
        else:
            back = self.back_after_restart()
        return " and ".join(worker.name for worker in workers), seen - begun, back - begun

    def await_resumed(self, since):
        """Return when the workers were released after a loss, and wait for a step of theirs."""
        resumed, _ = self.expect(RESUMED, since)
        self.await_step()
        return resumed

    def recorded(self, begun):
        """Return how many losses were recorded since `begun`."""
        return sum(event["kind"] == "lost" and event["time"] >= begun for event in events(self.out))

    def back_after_restart(self):
        """Return when a job that its launch script starts again trains; if that gave up, start it again."""
        when = self.await_step(may_end=True)
        if when is None:
            code = self.world.process.returncode
            self.must(code == 69, f"the launch script ended with {code}, expected 69")
            self.check_nothing_left()
            self.start()
            when = time.time()
        return when

    # ----- what happens to jobs

    def do_job(self):
        """Every process is killed."""
        begun = time.time()
        self.end_job()
        self.start()
        return "started again", None, time.time() - begun

    def end_job(self):
        """Kill every process; nobody is left to remove files of the MPI library."""
        self.world.kill()
        if self.world.name == "mpirun":
            self.world.forgive_files()
        self.check_nothing_left()

    def do_launcher(self):
        """The launching process is killed alone: its workers have to notice."""
        since, begun = len(self.world.said.lines), time.time()
        pid = self.world.launching_process()
        if pid is None:
            return None
        os.kill(pid, signal.SIGKILL)
        if not self.world.replaces_workers:
            seen, _ = self.expect(re.compile("starting again"), since)
            return "mpirun", seen - begun, self.back_after_restart() - begun
        self.wait_for_end(30)
        while (left := self.world.processes()) and time.time() - begun < 10:
            time.sleep(0.01)
        seen = time.time() - begun
        self.must(not left, f"after the launching process was killed, these are left: {left}")
        self.check_nothing_left()
        self.start()
        return "started again", seen, time.time() - begun

    def do_stop_request(self):
        """A request to stop: the checkpoint is safe, and another start goes on from it."""
        since, begun = len(self.world.said.lines), time.time()
        number = self.rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
        os.kill(self.world.process.pid, number)
        code = self.wait_for_end(60)
        expected = 130 if number == signal.SIGINT else 75
        self.must(code == expected, f"{number.name} ended the job with {code}, expected {expected}")
        seen, _ = self.expect(re.compile("the checkpoint is safe"), since)
        self.check_nothing_left()
        self.start()
        return f"{number.name}, {code}", seen - begun, time.time() - begun

    # ----- what happens to the disk

    def do_flip(self):
        """A bit of the newest checkpoint flips while nobody runs: the one before must be taken."""
        until = time.monotonic() + LONG_S
        while any(verify(path) for path in checkpoints(self.out)[-2:]) or len(checkpoints(self.out)) < 2:
            self.must(time.monotonic() < until, "no two checkpoints that verify were made")
            time.sleep(0.1)
        self.end_job()
        newest = checkpoints(self.out)[-1]
        file = self.rng.choice(sorted(newest.iterdir()))
        place, bit = self.rng.randrange(file.stat().st_size), self.rng.randrange(8)
        with file.open("r+b") as stream:
            (byte,) = os.pread(stream.fileno(), 1, place)
            os.pwrite(stream.fileno(), bytes([byte ^ 1 << bit]), place)
        begun = time.time()
        self.start()
        seen, _ = self.expect(re.compile(f"W_CHECKPOINT_DAMAGED {newest.name}: "), 0)
        what = f"bit {bit} of byte {place} of {newest.name}/{file.name}"
        return what, seen - begun, time.time() - begun

    def do_fill(self):
        """The disk is full until a save has failed: training goes on, and saves succeed afterwards."""
        since, begun = len(self.world.said.lines), time.time()
        filler = self.world.disk / "filler"
        try:
            fill(filler)
            seen, line = self.expect(re.compile("E_SAVE_FAILED"), since)
        finally:
            filler.unlink()
        free = time.time()
        what = self.world.said.lines[line][1].removeprefix("distbp: ")
        while not any(
            e["kind"] == "checkpoint" and e["status"] == "saved" and e["time"] > free for e in self.events()
        ):
            self.must(time.time() < free + LONG_S, "no save has succeeded since there was room again")
            self.must(not self.ended(), "the job has ended")
            time.sleep(0.02)
        self.nobody_lost(since)
        return f"{what[:60]}...", seen - begun, time.time() - free

    def events(self):
        """Return the events of this run."""
        return events(self.out)

    # ----- when something is wrong

    def show_what_there_is(self, problem):
        """Print what the job and its workers have said and where they stand; all of it will be gone."""
        for worker in self.world.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGABRT)  # Whoever can still run prints its stacks.
        states = [state_of(pid) for pid in self.world.processes()]
        time.sleep(2.0)
        print(f"\nNOT AS IT SHOULD BE, {self.kind}: {problem}\nThe job ({self.world.started_as}) has said:")
        print(self.world.said.tail() if self.world.said else "nothing")
        for log in sorted(self.out.glob("logs/rank-*.log")):
            print(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-30:]))
        print("--- processes before that\n" + "\n".join(states), flush=True)


def state_of(pid):
    """Return the number, state and command of a process, and what it waits for in the kernel."""
    try:
        process = Path(f"/proc/{pid}")
        state = (process / "stat").read_text().rpartition(") ")[2][0]
        words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return f"{pid} {state} {(process / 'wchan').read_text()} {words[:100]}"
    except OSError:
        return f"{pid} is gone"


def fill(path):
    """Write until there is no room."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\1" * size) == size:
                    pass


def say(text):
    """Print a line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def after(words, seconds):
    """Return the words with the seconds, or nothing."""
    return "" if seconds is None else f"{words} {seconds:.2f} s"


def print_table(figures):
    """Print how often each thing happened, and how long it took."""
    print("\nfault         count  noticed: median   worst  back in step: median   worst")
    for kind, pairs in sorted(figures.items()):
        words = []
        for column in zip(*pairs, strict=True):
            known = [value for value in column if value is not None]
            words += [f"{statistics.median(known):.2f} s", f"{max(known):.2f} s"] if known else ["-", "-"]
        print(f"{kind:14}{len(pairs):6}{words[0]:>17}{words[1]:>8}{words[2]:>22}{words[3]:>8}")


def soak(arguments):
    """Do it, inside the namespaces; return the exit code."""
    folder = Path(arguments.folder)
    os.environ["PYTHONPATH"] = str(soaking.REPOSITORY)
    options = ["digits", *soaking.OPTIONS, "-o", "checkpoint.every_seconds=1", "-o", "model.hidden=[64]"]
    options += ["-o", f"train.max_steps={arguments.steps}"]
    control = ["--seed", "1"] if arguments.control else []
    wanted = undisturbed([*options, *control], folder / "undisturbed")
    problem = ""
    with open_world(arguments.where, folder / "disk", folder / "tmp") as world:
        chaos = Chaos(world, arguments, options, wanted)
        try:
            chaos.go()
        except (Different, AssertionError) as error:
            problem = str(error)
            chaos.show_what_there_is(problem)
    print_table(chaos.figures)
    faults = sum(map(len, chaos.figures.values()))
    bits = problem or "all with the bits of the undisturbed one, nothing left behind"
    if world.not_ours:
        print(f"\nLeft by MPICH where launch/mpirun.sh does not clean up: {len(world.not_ours)} files")
    print(f"\nseed {arguments.seed}: {faults} faults in {chaos.starts} starts of {chaos.runs} runs, {bits}")
    if arguments.json:
        report = {"where": arguments.where, "seed": arguments.seed, "runs": chaos.runs, "problem": problem}
        Path(arguments.json).write_text(json.dumps(report | {"figures": chaos.figures}) + "\n")
    return 1 if problem or not chaos.runs else 0


def live_apart(arguments):
    """Start this program again in namespaces of its own, where all ends with it; return its exit code."""
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("unshare") is None:
        sys.exit("the chaos needs Linux, root and unshare: it makes namespaces and mounts a disk of its own")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder:
        for name in ("disk", "tmp"):
            os.mkdir(f"{folder}/{name}")
        again = [sys.executable, "-m", "tests.chaos", *sys.argv[1:]]
        again += ["--seed", str(arguments.seed), "--folder", folder]
        namespaces = ["--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        shell = ["bash", "-c", AS_FIRST_PROCESS, "bash", str(DISK_BYTES), f"{folder}/disk"]
        inner = subprocess.Popen(
            ["unshare", *namespaces, *shell, *again],
            cwd=soaking.REPOSITORY,
            env=os.environ | {INSIDE: "1"},
        )
        try:
            return inner.wait()
        finally:
            inner.kill()
            inner.wait()


def main():
    """Read the arguments; exit with 0 only if everything was as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--where", choices=["local", "mpirun", "ray"], default="local")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--faults", type=int, help="so many faults, however long that takes")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--steps", type=int, default=12_000, help="of each run")
    parser.add_argument("--kinds", nargs="+", help="only these faults")
    parser.add_argument("--control", action="store_true", help="compare with another run; this must fail")
    parser.add_argument("--json", type=os.path.abspath, help="write the figures there")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if INSIDE not in os.environ:
        return live_apart(arguments)
    length = f"{arguments.minutes:g} minutes" if arguments.faults is None else f"{arguments.faults} faults"
    print(f"seed {arguments.seed}, {arguments.where}, {length}", flush=True)
    return soak(arguments)


if __name__ == "__main__":
    sys.exit(main())
