"""The trial gradient: workers that compute other bits are found before step 1, although their plans agree."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from distbp import nn
from distbp.backends.threads import ThreadsJob
from distbp.data import ArrayDataset
from distbp.errors import EnvironmentMismatch
from distbp.trainer import Trainer


class OtherBits(ArrayDataset):
    """Data whose last bit differs for worker `rank` alone, as another product of matrices would."""

    def __init__(self, rank):
        rng = np.random.default_rng(0)
        super().__init__(rng.standard_normal((96, 7)).astype(np.float32), rng.integers(0, 3, 96))
        self._name = f"worker-{rank}"

    def batch(self, indices, x_out=None, y_out=None):
        x, y = super().batch(indices, x_out, y_out)
        if threading.current_thread().name == self._name:
            x = np.nextafter(x, np.float32(9))
        return x, y


@pytest.mark.parametrize(
    ("host_sizes", "rank", "message"),
    [
        ((2,), 1, r"workers \[1\] and worker 0 of the same host compute different bits"),
        ((3,), 2, r"workers \[2\] and worker 0 of the same host"),
        ((1, 1), 1, r"hosts \[1\] compute other bits than host 0"),
        ((1, 1, 1), 2, r"hosts \[2\] compute other bits than host 0"),
        ((2, 2), 3, r"workers \[3\] and worker 2 of the same host"),
    ],
)
def test_other_bits_are_found_before_the_first_step(host_sizes, rank, message, tmp_path):
    """A worker or host whose gradient of the same micro-batch has other bits ends the job: 78, the cure."""

    def program(members):
        trainer = Trainer(nn.Sequential(nn.Linear(3)), batch_size=48, micro_batch=8)
        return trainer.fit(OtherBits(rank), epochs=1, out=tmp_path, members=members)

    job = ThreadsJob(program, host_sizes)
    with pytest.raises(EnvironmentMismatch, match=message):
        job.run()
    errors = [str(error) for error in job.errors.values()]
    assert any("OPENBLAS_CORETYPE" in error and "NPY_DISABLE_CPU_FEATURES" in error for error in errors)
    assert not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text()
