"""Flip bits of a checkpoint, one at a time: `python -m tests.flips [--count 10000] [--seed S]`.

A real run on the digits leaves two checkpoints.  Then, again and again, one bit of the newer one is flipped,
or its file is cut off at a random byte, and put right again.  Each time

    `load` refuses the newer one with 65 and names the file, and nothing of it is returned;
    recovery says that it is damaged and takes the older one;
    `prune`'s quick look, by CRC-32 alone, finds a flipped bit too.

Half of the places are drawn over all bytes, half over the files first, because the two small files are the
ones that a parser reads.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from distbp.checkpoint import load, newest_verified, verify
from distbp.errors import CheckpointError

OPTIONS = ["--epochs", "2", "--backend", "serial", "-o", "checkpoint.every_steps=40"]


def two_checkpoints(folder: Path) -> tuple[Path, Path]:
    """Train for some steps, and return the older and the newer of the last two checkpoints."""
    command = [sys.executable, "-m", "distbp.cli.main", "train", "digits", *OPTIONS, "--out", folder / "run"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    older, newer = sorted((folder / "run" / "checkpoints").iterdir())[-2:]
    return older, newer


def choose(rng: random.Random, files: list[Path]) -> tuple[Path, int]:
    """Return a file and a place in it."""
    if rng.random() < 0.5:
        file = rng.choice(files)
    else:
        file = rng.choices(files, [file.stat().st_size for file in files])[0]
    return file, rng.randrange(file.stat().st_size)


def flip(file: Path, place: int, bit: int) -> None:
    """Flip one bit where it is; doing it twice puts it right."""
    with open(file, "r+b") as stream:
        (byte,) = os.pread(stream.fileno(), 1, place)
        os.pwrite(stream.fileno(), bytes([byte ^ 1 << bit]), place)


def missed(older: Path, newer: Path, name: str) -> str:
    """Return how the damage to the file `name` of the newer checkpoint was not found; "" if it was."""
    try:
        load(newer)
        return "load returned it"
    except CheckpointError as error:
        if error.exit_code != 65 or name not in str(error):
            return f"load said {error}"
    reported: list[str] = []
    chosen = newest_verified(newer.parent, lambda path, why: reported.append(path.name))
    if chosen != older or reported != [newer.name]:
        return f"recovery took {chosen} and reported {reported}"
    return "" if verify(newer, only_crc=True) else "the quick look passed it"


def damage(folder: Path, rng: random.Random, count: int) -> int:
    """Flip `count` bits, and cut a file off a tenth as often; return how often it was not found."""
    older, newer = two_checkpoints(folder)
    files = sorted(newer.iterdir())
    failures = cuts = 0
    for number in range(count):
        file, place = choose(rng, files)
        bit = rng.randrange(8)
        flip(file, place, bit)
        problems = {f"bit {bit} of byte {place} flipped": missed(older, newer, file.name)}
        flip(file, place, bit)
        if number % 10 == 9:
            good = file.read_bytes()
            os.truncate(file, place)
            problems[f"cut off at byte {place}"] = missed(older, newer, file.name)
            file.write_bytes(good)
            cuts += 1
        for what, problem in problems.items():
            if problem:
                failures += 1
                print(f"{number}: {file.name}, {what}: {problem}", flush=True)
    assert verify(newer) == [], "the checkpoint was not put right"
    size = sum(file.stat().st_size for file in files)
    print(f"{count} flips and {cuts} cuts in {size:,} bytes of {len(files)} files: {failures} missed")
    return failures


def main() -> int:
    """Flip as often as asked; exit with 1 if anything was missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="distbp-flips-") as folder:
        return 1 if damage(Path(folder), random.Random(arguments.seed), arguments.count) else 0


if __name__ == "__main__":
    sys.exit(main())
