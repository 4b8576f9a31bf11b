"""Flips bits of the state while a job runs: through /proc/PID/mem, where /proc/PID/maps names the arena.

Workers are stopped for the moment of a flip, so that the step in which it falls is known.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from distbp.arena import ArenaLayout
from distbp.backends.base import host_layout
from distbp.cli.job import build_trainer, fit_options, load_data
from distbp.cli.train_command import read_config
from distbp.exchange import cut_pieces
from distbp.job import PHASES, UPDATE
from distbp.nn import Layout, Network
from distbp.optim import norm

_COMMITTED, _FIRST_LINE, _LINE, _PHASE = 8 * 8, 4096, 256, 3 * 8
"""Places in bytes: the committed-step word, the workers' lines, and the phase in a line."""


@dataclass(frozen=True)
class Flip:
    """A bit that was flipped: after `step` steps, in `vector`, at `element`; the phases of workers then."""

    step: int
    vector: str
    element: int
    bit: int
    phases: tuple[int, ...]

    @property
    def late(self):
        """Whether an update was going on, which may have read the element for the last time."""
        return UPDATE in self.phases

    def __str__(self):
        phases = "/".join(PHASES[phase] for phase in self.phases)
        return f"after step {self.step}, {self.vector}[{self.element}] bit {self.bit}, in {phases}"


@dataclass(frozen=True)
class JobParts:
    """What is known of a job from outside: the layout of its arena, and the places of its parameters."""

    layout: ArenaLayout
    parameters: Layout
    lanes: int

    def place(self, vector, element):
        """The lane and the tensor that hold an element, as a message names them; for one host."""
        if vector == "scalars":
            return 0, "scalars"
        blocks = norm.blocks(self.parameters.borders())
        lanes = [
            cut_pieces(blocks, self.parameters.size, [0], self.lanes, lane) for lane in range(self.lanes)
        ]
        owner = next(lane for lane, (piece,) in enumerate(lanes) if piece.low <= element < piece.high)
        tensor = max(index for index, start in enumerate(self.parameters.offsets) if start <= element)
        return owner, f"{vector}/{self.parameters.names[tensor]}"


def job_parts(data, options, host_sizes=(1,)):
    """The parts of the job that `distbp train DATA OPTIONS` is, as its first host has them."""
    overrides = tuple(value for flag, value in zip(options[::2], options[1::2], strict=True) if flag == "-o")
    config = read_config(data, None, overrides, {}).config
    prepared = load_data(config)
    trainer = build_trainer(config, prepared.preprocessing)
    fit = fit_options(config, prepared.preprocessing, None)
    plan = trainer.plan(prepared.train, prepared.validation, workers=sum(host_sizes), **fit)
    network = Network(trainer.model, prepared.train.x.shape[1:], trainer.loss)
    return JobParts(host_layout(plan, host_sizes, 0), network.layout, min(host_sizes))


class Memory:
    """The arena that the processes `workers` share; its `layout` is that of the job."""

    def __init__(self, workers, layout):
        self.workers = list(workers)
        self.layout = layout
        self.places, _ = layout.places()
        maps = Path(f"/proc/{self.workers[0].pid}/maps").read_text().splitlines()
        starts = [int(line.split("-")[0], 16) for line in maps if "memfd:distbp-arena" in line]
        assert starts, f"process {self.workers[0].pid} has no arena"
        self._start = starts[0]
        self._file = os.open(f"/proc/{self.workers[0].pid}/mem", os.O_RDWR)

    def close(self):
        """Give back the descriptor."""
        os.close(self._file)

    def word(self, place):
        """A 64-bit word."""
        return int.from_bytes(os.pread(self._file, 8, self._start + place), "little", signed=True)

    @property
    def committed(self):
        """The committed step."""
        return self.word(_COMMITTED)

    @contextmanager
    def stopped(self):
        """Stop every worker, wait until none runs, and let them go on afterwards."""
        for worker in self.workers:
            worker.send_signal(signal.SIGSTOP)
        try:
            while any(worker.status() != psutil.STATUS_STOPPED for worker in self.workers):
                time.sleep(0.0002)
            yield
        finally:
            for worker in self.workers:
                worker.send_signal(signal.SIGCONT)

    def flip(self, rng, vector=None, bit=None):
        """Flip a random bit of the current generation, of `vector` if one is named, and say which."""
        with self.stopped():
            step = self.committed
            assert step >= 0, "no state is held"
            names = [name for name in self.layout.vectors for _ in range(99)] + ["scalars"]
            vector = vector or rng.choice(names)
            start, dtype, shape = self.places[f"{vector}/{step & 1}"]
            size = int(dtype[1:])
            element = rng.randrange(shape[0])
            bit = rng.randrange(8 * size) if bit is None else bit
            place = self._start + start + size * element + bit // 8
            (byte,) = os.pread(self._file, 1, place)
            os.pwrite(self._file, bytes([byte ^ 1 << bit % 8]), place)
            phases = [
                self.word(_FIRST_LINE + _LINE * worker + _PHASE) for worker in range(self.layout.workers)
            ]
        return Flip(step, vector, element, bit, tuple(phases))

    def flip_in_time(self, rng, out, **options):
        """Flip until one was not too late, or was found in the run `out` nevertheless; return that one."""
        while True:
            flip = self.flip(rng, **options)
            if not flip.late:
                return flip
            while not corruptions(out) and self.committed < flip.step + 2:
                time.sleep(0.001)
            if corruptions(out):
                return flip


def corruptions(out):
    """The corruptions that the run in `out` has recorded."""
    path = Path(out) / "events.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record for record in map(json.loads, lines) if record["kind"] == "corrupt"]


def new_seed():
    """A seed, printed so that the test can be done again."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    return seed
