"""Measure everything and write docs/BENCHMARKS.md with its plot: `make bench`.

Each section is one command, which stands above its table.  What a command found is kept as JSON in
`build/bench/`; `--keep` measures only what is missing there, so that an interrupted report goes on, and
`--only NAME,NAME` only those sections.  The document is then written of all that is there.

All of it takes about 25 minutes on an idle machine with two cores, `--quick` about 8.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import tables
from benchmarks.plot import bars

REPOSITORY = Path(__file__).resolve().parents[1]
BUILD = REPOSITORY / "build" / "bench"
DOCUMENT = REPOSITORY / "docs" / "BENCHMARKS.md"
PLOT = REPOSITORY / "docs" / "benchmarks.svg"
KERNEL_VARIABLES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")

HEAD = """# Benchmarks

distbp beside PyTorch and scikit-learn, and beside what the machine can do. `make bench` writes this file
(`benchmarks/report.py`); what a column means stands in the docstring of the command above its table. Figures
are of one machine on one day: trust ratios, and measure on yours. Older measurements, and what did not help,
are in [LOG.md](LOG.md).

The networks, all with SGD and momentum 0.9:

| name | network | batch |
|---|---|---|
| mlp-s | 784-128-10 | 64 |
| mlp-m | 784-1024-1024-10 | 256 |
| mlp-l | 784-4096-4096-10 | 128 |
| cnn | 5 x 5 convolutions of 32 and 64 channels, each with a pool, 1,024 connected units; 28 x 28 | 128 |
| resnet20 | residual network of 20 layers; 32 x 32 x 3 | 128 |
| charlm | transformer: 4 layers, width 256, 4 heads, context 128, 65 symbols | 32 |
"""


@dataclass(frozen=True)
class Section:
    """A part of the document: its title, the command behind it, and how its JSON becomes lines."""

    title: str
    words: tuple[str, ...]
    lines: Callable[[dict], list[str]]
    as_it_is: bool = False
    """Whether the variables that choose a kernel stay as they are."""


SECTIONS = {
    "peers": Section("A step beside its peers", ("-m", "benchmarks.peers", "--torch", "TORCH"), tables.peers),
    "peers-as-it-is": Section(
        "The same with the environment as it is",
        ("-m", "benchmarks.peers", "--torch", "TORCH", "--peers", "distbp b/2,distbp b/8,ddp,torch"),
        tables.peers,
        as_it_is=True,
    ),
    "jobs": Section("Memory and the first step", ("-m", "benchmarks.jobs", "--torch", "TORCH"), tables.jobs),
    "step-2": Section(
        "A step beside the machine's limit, 2 micro-batches",
        ("-m", "distbp.cli.main", "bench", "step", "--micro-batches", "2"),
        tables.steps,
    ),
    "step-8": Section(
        "The same with the default, 8 micro-batches", ("-m", "distbp.cli.main", "bench", "step"), tables.steps
    ),
    "scaling": Section(
        "More workers",
        ("-m", "distbp.cli.main", "bench", "scaling", "--rounds", "1"),
        tables.plain(
            "workload", "kind", "workers", "batch", "median_ms", "speed_up", "speed_up_bound", "ratio"
        ),
    ),
    "sameness": Section("The price of sameness", ("-m", "benchmarks.sameness"), tables.sameness),
    "diagnosis": Section("The price of diagnosis", ("-m", "benchmarks.diagnosis"), tables.plain()),
    "gemm": Section("Products", ("-m", "distbp.cli.main", "bench", "gemm"), tables.plain()),
    "memory": Section("Memory", ("-m", "distbp.cli.main", "bench", "memory"), tables.plain()),
    "barrier": Section("The barrier", ("-m", "distbp.cli.main", "bench", "barrier"), tables.plain()),
    "allreduce": Section(
        "Adding gradients in shared memory", ("-m", "distbp.cli.main", "bench", "allreduce"), tables.plain()
    ),
    "checkpoint": Section(
        "Checkpoints", ("-m", "distbp.cli.main", "bench", "checkpoint", "--on", "."), tables.plain()
    ),
    "startup": Section("Starting", ("-m", "distbp.cli.main", "bench", "startup"), tables.plain()),
}


def main() -> None:
    """Measure what is asked for, then write the document of everything there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--torch", default=sys.executable, metavar="PYTHON", help="a Python that has torch")
    parser.add_argument("--only", default=",".join(SECTIONS), metavar="NAMES")
    parser.add_argument("--keep", action="store_true", help="measure only what build/bench does not hold")
    parser.add_argument("--quick", action="store_true", help="rough figures")
    arguments = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    for name in arguments.only.split(","):
        if name not in SECTIONS:
            parser.error(f"--only: expected some of {', '.join(SECTIONS)}, got {name!r}")
        if SECTIONS[name].as_it_is and not any(variable in os.environ for variable in KERNEL_VARIABLES):
            continue  # It would be the section before it.
        if not (arguments.keep and (BUILD / f"{name}.json").exists()):
            measure(name, arguments.torch, arguments.quick)
    write()


def measure(name: str, torch_python: str, quick: bool) -> None:
    """Run the command of a section, and keep what it found with the command and the day."""
    section = SECTIONS[name]
    own = [torch_python if word == "TORCH" else word for word in section.words]
    own += ["--quick"] if quick else []
    file = BUILD / f"{name}.found"
    printing = "distbp.cli.main" in own
    words = [sys.executable, *own, "--json", *([] if printing else [str(file)])]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    if not section.as_it_is:
        environment = {key: value for key, value in environment.items() if key not in KERNEL_VARIABLES}
    print(f"{name}: {shlex.join(words)}", file=sys.stderr, flush=True)
    done = subprocess.run(
        words, env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout if printing else file.read_text())
    file.unlink(missing_ok=True)
    day = datetime.date.today().isoformat()
    kept = {"day": day, "command": shown_command(section, quick), "found": found}
    (BUILD / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def shown_command(section: Section, quick: bool) -> str:
    """The command of a section as one types it."""
    words = " ".join(shlex.quote(word) for word in section.words) + (" --quick" if quick else "")
    words = words.replace("-m distbp.cli.main", "distbp") if "distbp.cli.main" in words else f"python {words}"
    words = words.replace("TORCH", "PYTHON")
    return words if section.as_it_is else f"env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE {words}"


def write() -> None:
    """Write document and plot of everything that was measured."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        path = BUILD / f"{name}.json"
        if not path.exists():
            continue
        kept = json.loads(path.read_text())
        machine = kept["found"]["machine"]
        line = machine.get("line") or ", ".join(f"{key} {value}" for key, value in machine.items())
        parts.append(f"## {section.title}\n\n`{kept['command']}`\n\n{kept['day']}; {line}.\n")
        if name == "peers":
            PLOT.write_text(bars(kept["found"]["table"]))
            parts.append(f"![a step of each peer, in steps of distbp]({PLOT.name})\n")
        parts.append("\n".join(section.lines(kept["found"])) + "\n")
    DOCUMENT.write_text("\n".join(parts))
    print(f"wrote {DOCUMENT.relative_to(REPOSITORY)}", file=sys.stderr)


if __name__ == "__main__":
    main()
