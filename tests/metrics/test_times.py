"""The times that a run records: those of steps in its result, of phases and processor in its metrics."""

from __future__ import annotations

import json
import resource
import time

import numpy as np

import distbp
from distbp import nn


def run(out, steps):
    """The result of a small run, and its records of single intervals."""
    x = np.random.default_rng(0).standard_normal((64, 5))
    trainer = distbp.Trainer(
        nn.Sequential(nn.Linear(1)), loss="mean_squared_error", lr=0.01, batch_size=16, micro_batch=4
    )
    history = trainer.fit((x, x[:, 0]), epochs=steps // 4, out=out)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return history.result, [record for record in records if "step_ms" in record]


def test_quartiles_of_the_steps_are_in_order(tmp_path):
    """The result has least, quartiles and median of the steps that count, in ms."""
    result, _ = run(tmp_path / "run", 200)
    times = result["step_ms_quartiles"]
    assert len(times) == 4
    assert 0 < times[0] <= times[1] <= times[2] <= times[3]
    # Most steps count, so the two medians are those of nearly the same numbers.
    assert times[1] / 2 < result["step_ms_median"] < times[3] * 2


def test_records_have_the_processor_time_of_their_steps(tmp_path):
    """Together the steps of the records took some processor time, and not more than the process did."""
    before, faults_before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    _, records = run(tmp_path / "run", 200)
    spent = time.process_time() - before
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults_before
    steps = np.diff([0, *(record["step"] for record in records)])
    recorded = sum(record["cpu_ms"] * count for record, count in zip(records, steps, strict=True)) / 1e3
    assert 0 < recorded <= spent + 1e-3
    # Two decimals are kept, so each step may be off by half a hundredth.
    assert 0 <= sum(r["page_faults"] * n for r, n in zip(records, steps, strict=True)) <= faults + 1
    assert set(records[0]["step_ms"]) == {"compute", "wait", "reduce", "update"}


def test_a_run_of_few_steps_has_its_times_too(tmp_path):
    """Three counted steps have quartiles."""
    assert len(run(tmp_path / "run", 4)[0]["step_ms_quartiles"]) == 4
