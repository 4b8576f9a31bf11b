"""Cut the power in the middle of saves: `python -m tests.power_cuts [--cuts N] [--seed S] [--without-fsync]`.

A process saves checkpoints one after the other on a disk of its own, an ext4 file system on a loop device,
and says of each that it is saved as soon as `save` has returned.  At a random instant the power goes: the
file system is told to shut down at once without writing anything more, neither pages nor its journal
(EXT4_IOC_SHUTDOWN, as xfstests does it).  What had reached the disk is all that is left.  The file system is
mounted again, as after a boot, and must hold

    every checkpoint that was acknowledged and is among the two that are kept, whole;
    nothing under a complete name that is not whole and bit for bit what was saved;
    as the newest that verifies: the last acknowledged one, or the next, if that was on the disk already.

The next process goes on from there, on the same disk.  `--without-fsync` is the control: saves that sync
nothing must be caught, or this program proves nothing.  What it does not do: drop what a disk has in a cache
of its own, or tear a sector; a disk that loses what it said was flushed loses checkpoints too.

Needs Linux, root and mkfs.ext4.  The mounts are made in a mount namespace and vanish with it.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import random
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from distbp.checkpoint import Snapshot, list_checkpoints, load, newest_verified, remove_leftovers, save
from tests.checkpoint.checkpoint_states import assert_same

EXT4_IOC_SHUTDOWN = 0x8004587D
NO_LOG_FLUSH = 2
DISK_BYTES = 96 << 20
INSIDE = "POWER_CUTS_INSIDE"


def why_not() -> str:
    """Return why the power cannot be cut here; "" if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "mounting a disk needs Linux and root"
    missing = [tool for tool in ("mkfs.ext4", "mount", "umount", "unshare") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return "" if Path("/dev/loop-control").exists() else "there are no loop devices"


def state(step: int) -> Snapshot:
    """Return the state of `step`: of a size between some bytes and 4 MB, and every value follows from it."""
    rng = np.random.default_rng(step)
    values = rng.integers(0, 255, int(rng.integers(1, 4 << 20)), np.uint8)
    return Snapshot(step, {"values": values, "step": np.array([step])}, {"identity": step})


class Disk:
    """An ext4 file system in a file, mounted at `at`."""

    def __init__(self, folder: Path) -> None:
        self.image, self.at = folder / "image", folder / "disk"
        self.at.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(DISK_BYTES)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)
        self.mount()

    def mount(self) -> None:
        """Mount it; ext4 replays its journal, as after a boot."""
        subprocess.run(["mount", "-o", "loop", self.image, self.at], check=True)

    def cut_power(self) -> None:
        """Let nothing more reach the disk, from this instant on."""
        descriptor = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(descriptor)

    def unmount(self) -> None:
        """Take it away; a process that was killed may hold it for another moment."""
        until = time.monotonic() + 10
        while subprocess.run(["umount", self.at], capture_output=True, check=False).returncode:
            assert time.monotonic() < until, f"{self.at} stays busy"
            time.sleep(0.01)


def save_for_ever(directory: Path, step: int, said: int, *, without_fsync: bool) -> None:
    """Save the states of `step` and after, and write each number to `said` once its save has returned."""
    if without_fsync:
        os.fsync = lambda descriptor: None
    while True:
        save(directory, state(step), keep=2)
        os.write(said, struct.pack("q", step))
        step += 1


def run_until_cut(disk: Disk, first: int, seconds: float, *, without_fsync: bool) -> int:
    """Let a process save from step `first` on, cut the power after `seconds`; return the last it said.

    Without fsync the time begins when the first save was acknowledged.
    """
    listening, said = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(listening)
            save_for_ever(disk.at / "checkpoints", first, said, without_fsync=without_fsync)
        finally:
            os._exit(1)
    os.close(said)
    if without_fsync:  # Only what was acknowledged can be lost.
        select.select([listening], [], [], 60)
    time.sleep(seconds)
    disk.cut_power()
    # What was said before the cut is in the pipe; a save that returns after it has nothing to return for.
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    last = first - 1
    while select.select([listening], [], [], 0)[0] and (data := os.read(listening, 8)):
        (last,) = struct.unpack("q", data)
    os.close(listening)
    return last


def examine(directory: Path, last: int) -> tuple[int, str]:
    """Return the step that recovery chooses, -1 for none, and what is wrong; `last` was acknowledged."""
    problems = []
    held = []
    for path in list_checkpoints(directory):
        step = int(path.name.removeprefix("step-"))
        try:
            assert_same(load(path), state(step))
            held.append(step)
        except Exception as error:
            problems.append(f"{path.name} is not what was saved: {error!r:.200}")
    chosen = newest_verified(directory, lambda path, why: None)
    newest = -1 if chosen is None else int(chosen.name.removeprefix("step-"))
    if last > 0 and newest not in (last, last + 1):
        problems.append(f"step {last} was acknowledged, recovery finds {newest}")
    if last > 1 and len(held) < 2:
        problems.append(f"two checkpoints are kept, found {held}")
    return newest, "; ".join(problems)


def cut_again_and_again(folder: Path, arguments: argparse.Namespace) -> int:
    """Cut the power as often as asked; return how often something was lost."""
    rng = random.Random(arguments.seed)
    disk = Disk(folder)
    last = losses = acknowledged = unsaid = leftovers = 0
    begun = time.monotonic()
    for number in range(arguments.cuts):
        before = last
        seconds = rng.uniform(0.0, arguments.longest)
        last = run_until_cut(disk, last + 1, seconds, without_fsync=arguments.without_fsync)
        acknowledged += last - before
        disk.unmount()
        disk.mount()
        directory = disk.at / "checkpoints"
        leftovers += len(remove_leftovers(directory))
        newest, problem = examine(directory, last)
        if problem:
            losses += 1
            print(f"cut {number} after {seconds:.3f} s: {problem}", flush=True)
            shutil.rmtree(directory, ignore_errors=True)
            last = 0
        elif newest > last:
            unsaid += 1
            last = newest
    disk.unmount()
    print(
        f"{arguments.cuts} power cuts, {losses} with a loss; {acknowledged} saves were acknowledged, "
        f"{leftovers} were cut in the middle, {unsaid} were whole on the disk before it was said; "
        f"{time.monotonic() - begun:.0f} s"
    )
    return losses


def main() -> int:
    """Run the cuts in a mount namespace; exit with 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cuts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--longest", type=float, default=0.25, help="seconds of saving before a cut, at most")
    parser.add_argument("--without-fsync", action="store_true", help="the control: this must lose something")
    arguments = parser.parse_args()
    if reason := why_not():
        sys.exit(f"cannot cut the power here: {reason}")
    if INSIDE not in os.environ:
        again = [sys.executable, "-m", "tests.power_cuts", *sys.argv[1:], "--seed", str(arguments.seed)]
        os.execvpe("unshare", ["unshare", "--mount", *again], os.environ | {INSIDE: "1"})
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: end with whoever started this.
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="distbp-power-") as folder:
        return 1 if cut_again_and_again(Path(folder), arguments) else 0


if __name__ == "__main__":
    sys.exit(main())
