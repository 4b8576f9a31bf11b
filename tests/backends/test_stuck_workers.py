"""Workers that make no progress: found, replaced, and their replacements not taken for them."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest

from distbp.backends.hang_watch import LEAST_S, Glance, HangWatch
from tests.conftest import result_of, wait_until

STILL = Glance(units=7, phase="compute", slow=False)
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.max_steps=400",
    "-o", "train.epochs=1000", "-o", "model.hidden=[64]", "-o", "run.log_samples=true",
]  # fmt: skip


def test_a_replacement_has_a_countdown_of_its_own():
    """A worker that takes the place of a stuck one, before anybody looks again, is not stuck at once."""
    watch = HangWatch(period_s=0.5)
    now = 100.0
    while not watch.observe(now, {0: STILL, 1: Glance(int(now * 10), "compute", False)}):
        now += 0.5
    assert now == pytest.approx(100.0 + LEAST_S, abs=1.0)
    watch.forget(0)
    for tick in range(1, int(2 * LEAST_S)):
        assert watch.observe(now + 0.5 * tick, {0: STILL}) == []
    assert [stuck.rank for stuck in watch.observe(now + LEAST_S + 1.0, {0: STILL})] == [0]


@pytest.mark.slow  # It takes the ten seconds after which a worker counts as stuck.
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_stopped_worker_is_replaced_once(nproc, start, distbp, tmp_path):
    """SIGSTOP of a worker: named after ten seconds, killed, replaced once, and the same bits at the end."""
    reference, out = tmp_path / "reference", tmp_path / "run"
    assert distbp("train", "digits", *OPTIONS, "--backend", "serial", "--out", reference).returncode == 0
    job = start("train", "digits", *OPTIONS, "--nproc", nproc, "--out", out)
    wait_until(lambda: (out / "samples.log").exists() and (out / "samples.log").stat().st_size > 20_000)
    worker = job.workers()[nproc - 1]
    os.kill(worker.pid, signal.SIGSTOP)
    done = job.wait(100)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(f"E_STUCK_WORKER rank={nproc - 1}") == 1
    assert done.stderr.count("E_LOST_WORKER") == result_of(out)["restarts"] == 1
    assert result_of(out)["state_sha256"] == result_of(reference)["state_sha256"]
    with suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGCONT)
    assert not worker.is_running()
