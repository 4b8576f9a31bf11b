"""Whole local runs: nothing is unpickled, and nobody else may read or enter what they leave."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys

import psutil
import pytest

from tests.audit import Watch
from tests.conftest import wait_until
from tests.soaking import REPOSITORY

OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.epochs=1000",
    "-o", "model.hidden=[32]", "-o", "checkpoint.every_steps=50", "-o", "run.log_samples=true",
]  # fmt: skip
UNPICKLES = "import collections, pickle; pickle.loads(pickle.dumps(collections.Counter()))"
UNMARSHALS = "import marshal; marshal.loads(marshal.dumps(compile('1', 'x', 'eval')))"


@pytest.fixture
def watch(tmp_path):
    """A watch over the processes that run with its environment."""
    return Watch(tmp_path / "audit")


@pytest.mark.parametrize(
    ("code", "event"), [(UNPICKLES, "pickle.find_class"), (UNMARSHALS, "marshal.loads in ")]
)
def test_the_watch_sees_who_unpickles(code, event, watch):
    """A process that unpickles an object, or unmarshals code, is found: the check can fail."""
    subprocess.run([sys.executable, "-c", code], env=os.environ | watch.environment(), check=True)
    assert watch.processes("-c") == 1
    assert [line.startswith(event) for line in watch.found()] == [True]


def test_the_watch_sees_a_worker_that_unpickles(watch, distbp, tmp_path):
    """A worker whose own script unpickles is found, although the launching process does not."""
    script = tmp_path / "train.py"
    script.write_text(f"import distbp\nif distbp.rank() == 1:\n    {UNPICKLES}\n")
    done = distbp("run", "--nproc", 2, script, env=watch.environment(str(REPOSITORY)))
    assert done.returncode == 0, done.stderr
    assert watch.processes("distbp.cli.worker") == 2
    (line,) = watch.found()
    assert "distbp.cli.worker" in line


def test_nothing_is_unpickled_in_a_local_run(watch, start, distbp, tmp_path):
    """Training, a lost worker, saves, resuming, evaluating, predicting: no process unpickles anything."""
    out, environment = tmp_path / "run", watch.environment(str(REPOSITORY))
    options = ["train", "digits", *OPTIONS, "--out", out]
    job = start(*options, "--nproc", 3, "-o", "train.max_steps=1000000", env=environment)
    wait_until(lambda: len(list(out.glob("checkpoints/step-????????"))) >= 2)
    job.workers()[1].kill()
    wait_until(lambda: '"restart"' in (out / "events.jsonl").read_text())
    job.process.terminate()
    assert job.wait().returncode == 75
    steps = 10 + len((out / "samples.log").read_text().splitlines())
    for command in (
        [*options, "--nproc", 2, "-o", f"train.max_steps={steps}"],
        [*options, "--backend", "serial", "-o", f"train.max_steps={steps + 10}"],
        ["evaluate", out, "digits"],
        ["predict", out, "digits", "-o", tmp_path / "predictions.npy"],
        ["inspect", out],
    ):
        done = distbp(*command, env=environment)
        assert done.returncode == 0, done.stderr
    assert watch.processes("distbp.cli.worker") == 3 + 1 + 2
    assert watch.processes("distbp.cli.main") == 6
    assert watch.found() == []


def test_only_the_owner_may_enter_a_run(distbp, tmp_path):
    """Whatever the umask, every directory of a run is 0700 and every file 0600, also after a resume."""
    out = tmp_path / "run"
    before = os.umask(0)
    try:
        for steps in (60, 80):
            done = distbp(
                "train", "digits", *OPTIONS, "--nproc", 2, "-o", f"train.max_steps={steps}", "--out", out
            )
            assert done.returncode == 0, done.stderr
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [out, *out.rglob("*")]}
    wrong = {path: oct(mode) for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)}
    assert not wrong
    names = {path.name for path in modes}
    assert {"config.toml", "lock", "result.json", "events.jsonl", "samples.log", "rank-00001.log"} <= names


@pytest.mark.parametrize("name", ["events.jsonl", "samples.log", "result.json.new", "logs/rank-00000.log"])
def test_a_link_in_a_run_directory_leads_nowhere(name, distbp, tmp_path):
    """What somebody has put there as a symbolic link is not written through, to whatever file it leads."""
    victim, out = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    (out / "logs").mkdir(parents=True)
    (out / name).symlink_to(victim)
    distbp("train", "digits", *OPTIONS, "--backend", "serial", "-o", "train.max_steps=60", "--out", out)
    assert victim.read_text() == "precious"


def test_a_local_job_opens_no_port(start, tmp_path):
    """Neither the launching process nor a worker of the local backend has a network socket."""
    job = start("train", "digits", *OPTIONS, "--nproc", 2, "--out", tmp_path / "run")
    wait_until(lambda: (tmp_path / "run" / "samples.log").exists())
    processes = [psutil.Process(job.pid), *job.workers().values()]
    assert len(processes) == 3
    assert [process.net_connections("inet") for process in processes] == [[], [], []]
    job.kill()


def test_the_document_names_tests_that_exist():
    """Each row of what SECURITY.md says is protected names tests, and they exist."""
    table = (REPOSITORY / "SECURITY.md").read_text().partition("\n## What is not\n")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert len(rows) > 5
    for row in rows:
        tests = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
        assert tests, row
        for file, function in tests:
            assert f"def {function}(" in (REPOSITORY / file).read_text(), f"{file}::{function}"
