"""What the machine around a job does: memory that runs out, a clock that jumps."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import COMMAND, result_of, wait_until

MEMORY = Path("/sys/fs/cgroup/memory")
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.max_steps=800",
    "-o", "train.epochs=1000", "-o", "model.hidden=[32]",
]  # fmt: skip

HUNGRY = """
import distbp
import numpy as np
from distbp import nn

if distbp.rank() == 1:
    hoard = [np.ones(10_000_000) for _ in range(100)]
train, validation = distbp.load_data("digits")
model = nn.Sequential(nn.Flatten(), nn.Linear(10))
distbp.Trainer(model, batch_size=64).fit(train, val=validation, epochs=1, out="run")
"""


@pytest.fixture
def little_memory():
    """A control group of 500 MB, as words in front of a command."""
    group = MEMORY / f"distbp-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(500_000_000))
    except OSError as error:
        pytest.skip(f"needs control groups of version 1, and root: {error}")
    yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    wait_until(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


def test_a_worker_that_the_kernel_kills_for_memory_is_named(little_memory, tmp_path):
    """Out of memory is called that; the same worker in the same place three times ends the job with 70."""
    (tmp_path / "train.py").write_text(HUNGRY)
    command = [*little_memory, *COMMAND, "run", "--nproc", "2", "train.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 70, done.stderr
    assert "E_LOST_WORKER rank=1" in done.stderr
    assert "cause=out of memory action=respawn(2/10)" in done.stderr
    assert "worker 1 was lost again (out of memory): 3 times before the first step" in done.stderr
    assert "more memory" in done.stderr


JUMPING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

/* Every second the time of day jumps by two days, forwards and backwards in turn. */
static long jump(long seconds) { return seconds % 2 ? 86400 : -86400; }

int clock_gettime(clockid_t clock, struct timespec *now) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int answer = real(clock, now);
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) now->tv_sec += jump(now->tv_sec);
    return answer;
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec precise;
    int answer = clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec, now->tv_usec = precise.tv_nsec / 1000;
    return answer;
}

time_t time(time_t *where) {
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    if (where) *where = precise.tv_sec;
    return precise.tv_sec;
}
"""

ASK = """
import time
times = [(time.sleep(0.5), time.time())[1] for _ in range(4)]
print(max(times) - min(times))
"""


@pytest.fixture(scope="module")
def jumping_clock(tmp_path_factory):
    """An environment in which the time of day jumps every second."""
    if not (compiler := shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("clock")
    (folder / "jumping.c").write_text(JUMPING)
    library = folder / "jumping.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "jumping.c", "-ldl"], check=True)
    environment = os.environ | {"LD_PRELOAD": str(library)}
    done = subprocess.run(
        [COMMAND[0], "-c", ASK], env=environment, capture_output=True, text=True, check=True
    )
    assert float(done.stdout) > 86_400, "the clock was meant to jump"
    return {"LD_PRELOAD": str(library)}


def test_a_clock_that_jumps_has_no_effect(jumping_clock, distbp, tmp_path):
    """No decision reads the time of day: nobody is ended, saves go on, and the bits are the same."""
    options = [*OPTIONS, "-o", "checkpoint.every_seconds=1"]
    calm, jumped = tmp_path / "calm", tmp_path / "jumped"
    done = distbp("train", "digits", *options, "--nproc", 2, "--out", calm)
    assert done.returncode == 0, done.stderr
    fault = {"DISTBP_FAULT": "400:apply:1:kill"}
    done = distbp("train", "digits", *options, "--nproc", 2, "--out", jumped, env=jumping_clock | fault)
    assert done.returncode == 0, done.stderr
    assert "E_STUCK" not in done.stderr
    assert result_of(jumped)["restarts"] == 1
    assert result_of(jumped)["state_sha256"] == result_of(calm)["state_sha256"]
