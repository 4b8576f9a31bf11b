"""Who holds the others up is named, and nobody else is."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from distbp.metrics.stragglers import WINDOW, Stragglers
from tests.conftest import result_of, wait_until

QUOTA = Path("/sys/fs/cgroup/cpu")
OPTIONS = [
    "-o", "train.batch_size=512", "-o", "train.micro_batch=64", "-o", "train.epochs=100000",
    "-o", "model.hidden=[1024, 1024]",
]  # fmt: skip


def judged(micro_batches, seconds, windows=1):
    """Return who is named, in which window, when every worker computes for so long in each step."""
    watch, named = Stragglers(micro_batches), []
    for window in range(windows):
        for _ in range(WINDOW):
            watch.add(seconds)
        named += [(window, found) for found in watch.judge(watch.take_medians())]
    return named


def test_a_slow_worker_is_named_with_its_cost():
    """Twice as long as the others: named in the first window that makes it a second, and a minute later."""
    named = judged([2, 2, 2], [0.1, 0.2, 0.1], windows=40)
    assert [(window, found.rank) for window, found in named] == [(0, 1), (30, 1)]
    assert named[0][1].cost == pytest.approx(0.1 * WINDOW)
    assert (named[0][1].seconds, named[0][1].others) == (0.2, 0.1)


@pytest.mark.parametrize(
    ("micro_batches", "seconds"),
    [
        ([2, 2, 2], [0.11, 0.14, 0.10]),  # Less than half as long again.
        ([2, 1, 1], [0.20, 0.10, 0.10]),  # It has more to do.
        ([2, 2, 1], [0.20, 0.20, 0.19]),  # What a step costs anyway is most of it.
        ([8], [0.5]),  # Alone.
    ],
)
def test_others_are_not_named(micro_batches, seconds):
    """Whoever has more to do, is a little slower, or is alone, is no straggler."""
    assert judged(micro_batches, seconds, windows=50) == []


def test_a_pause_is_not_a_median():
    """A worker that pauses now and then, and is as fast as the others otherwise, is not named."""
    watch = Stragglers([1, 1])
    for step in range(WINDOW):
        watch.add([0.1, 8.0 if step % 3 == 0 else 0.1])
    assert watch.judge(watch.take_medians()) == []


def test_medians_begin_anew():
    """Steps of one window do not count in the next."""
    watch = Stragglers([1, 1])
    watch.add([1.0, 3.0])
    assert list(watch.take_medians()) == [1.0, 3.0]
    watch.add([2.0, 2.0])
    assert list(watch.take_medians()) == [2.0, 2.0]
    assert np.isfinite(watch.judge(np.array([2.0, 2.0]))).all()


@pytest.fixture
def slowed():
    """Grant processes a fifth of a processor."""
    group = QUOTA / f"distbp-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_period_us").write_text("5000")
        (group / "cpu.cfs_quota_us").write_text("1000")
    except OSError as error:
        pytest.skip(f"needs control groups of version 1, and root: {error}")
    yield lambda process: (group / "cgroup.procs").write_text(str(process.pid))
    wait_until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_worker_with_little_processor_time_is_named_and_stays(slowed, start, tmp_path):
    """A worker with a fifth of a processor is named with what it costs, and nobody replaces it."""
    out = tmp_path / "run"
    job = start("train", "digits", *OPTIONS, "-o", "train.max_steps=100", "--nproc", 2, "--out", out)
    wait_until(lambda: len(job.workers()) == 2 and (out / "metrics.jsonl").exists())
    slowed(job.workers()[1])
    done = job.wait(120)
    assert done.returncode == 0, done.stderr
    assert "W_STRAGGLER rank=1" in done.stderr
    assert "W_STRAGGLER rank=0" not in done.stderr
    assert result_of(out)["restarts"] == 0
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    assert {event["rank"] for event in events if event["kind"] == "straggler"} == {1}
