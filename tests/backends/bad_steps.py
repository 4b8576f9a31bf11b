"""A script whose data are read from a file while it trains, for the tests of steps that are not finite.

    python bad_steps.py OUT DATA RATE

DATA holds 96 samples of 8 numbers; a global batch is all of them, so one bad sample spoils every step.
"""

from __future__ import annotations

import os
import sys

import numpy as np

import distbp
from distbp import nn

SAMPLES, FEATURES = 96, 8


class Disk(distbp.ArrayDataset):
    """Samples that are read when they are asked for: nobody has looked at them before."""

    def __init__(self, path):
        super().__init__(np.zeros((SAMPLES, FEATURES), np.float32), np.arange(SAMPLES) % 3)
        self._file = os.open(path, os.O_RDONLY)

    def batch(self, indices, x_out=None, y_out=None):
        x, y = super().batch(indices, x_out, y_out)
        for row, index in zip(x, indices, strict=True):
            assert os.preadv(self._file, [row], 4 * FEATURES * int(index)) == 4 * FEATURES
        return x, y


def main():
    """Train, and print how many steps were skipped."""
    out, data, rate = sys.argv[1:]
    trainer = distbp.Trainer(
        nn.Sequential(nn.Linear(6), nn.ReLU(), nn.Linear(3)),
        schedule=distbp.Schedule(lr=float(rate), name="constant"),
        batch_size=SAMPLES,
        micro_batch=8,
    )
    history = trainer.fit(Disk(data), epochs=40, out=out, checkpoint_every_steps=1, keep=0)
    distbp.print("skipped", history.result["skipped_steps"])


if __name__ == "__main__":
    main()
