"""`distbp/metrics/run_files.py`: what a run's files say, without disturbing the run."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import socket
import time

import pytest

from distbp.errors import InputMissing
from distbp.metrics.records import append_record
from distbp.metrics.run_files import DONE, FAILED, LOST, RUNNING, STOPPED, Metrics, Series, read_run
from distbp.run_directory import RunDirectory

from .made_runs import RESULT, growing, make_failed, make_run, write_lines


def test_everything_that_is_there_is_found(tmp_path):
    """Configuration, result, events and every kind of record, each where it belongs."""
    run = read_run(make_run(tmp_path / "run", RESULT))
    assert (run.state, run.step, run.total_steps, run.batch_size) == (DONE, 100, 100, 64)
    assert len(run.metrics.train.all()) == 100
    assert len(run.metrics.epochs.all()) == len(run.metrics.validation.all()) == 10
    assert len(run.metrics.layers.all()) == len(run.metrics.workers.all()) == 20
    assert run.table("model")["name"] == "mlp"
    assert len(run.of_kind("lost", "diagnosis")) == 2
    assert run.seconds_left is None


@pytest.mark.parametrize(("status", "state"), [("done", DONE), ("stopped", STOPPED), ("failed", FAILED)])
def test_a_result_says_the_state(tmp_path, status, state):
    """A run that said how it ended is in that state, whatever else there is."""
    assert read_run(make_run(tmp_path / "run", RESULT | {"status": status})).state == state


def test_a_job_that_holds_the_lock_is_running_and_is_not_disturbed(tmp_path):
    """The state of a run is read without touching its lock: a job that begins meanwhile gets it."""
    out = make_run(tmp_path / "run")
    assert read_run(out).state == LOST
    job = RunDirectory.open(str(out), "run")
    try:
        assert read_run(out).state == RUNNING
    finally:
        job.close()
    assert read_run(out).state == LOST
    descriptor = os.open(out / "lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(descriptor)


def test_the_time_left_does_not_jump_with_one_record(tmp_path):
    """The last record may lie in a moment when others had the processor."""
    out = make_run(tmp_path / "run")
    append_record(out / "metrics.jsonl", {"kind": "train", "step": 100, "samples_per_second": 7.0})
    assert 20000 <= read_run(out).samples_per_second <= 20600


def test_a_job_on_another_host_is_judged_by_its_records(tmp_path):
    """A lock of another host cannot be seen from here, so fresh records mean that the run goes on."""
    out = make_run(tmp_path / "run")
    (out / "lock").write_text(json.dumps({"pid": 1, "host": "not-" + socket.gethostname()}))
    assert read_run(out).state == RUNNING
    long_ago = time.time() - 3600
    os.utime(out / "metrics.jsonl", (long_ago, long_ago))
    assert read_run(out).state == LOST


def test_what_is_no_run_is_named(tmp_path):
    """An empty directory, a file and nothing at all are refused with the cure."""
    (tmp_path / "file").write_text("")
    for name, found in ((".", "a directory"), ("file", "a file"), ("none", "nothing")):
        with pytest.raises(InputMissing, match=found):
            read_run(tmp_path / name)


def test_damaged_files_do_not_hide_the_rest(tmp_path):
    """Broken JSON, records of other shapes and torn lines are passed over."""
    out = make_run(tmp_path / "run", RESULT)
    (out / "config.toml").write_text("[[[")
    (out / "confusion.json").write_text("[1, 2")
    with (out / "metrics.jsonl").open("a") as file:
        file.write(
            '7\n[]\n{"kind": "train"}\n{"kind": "validation", "step": 101, "loss": NaN}\n{"kind": "tra'
        )
    run = read_run(out)
    assert run.config == run.confusion == {}
    assert len(run.metrics.train.all()) == 100
    assert run.metrics.validation.newest["step"] == 101


def test_a_growing_file_is_read_on(tmp_path):
    """Each call reads what is new, a line that is not whole yet only when it is."""
    out = make_run(tmp_path / "run")
    metrics = Metrics(out / "metrics.jsonl")
    assert metrics.update()
    assert not metrics.update()
    growing(out, 5)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 106,')
    assert metrics.update()
    assert metrics.train.newest["step"] == 105
    with (out / "metrics.jsonl").open("a") as file:
        file.write(' "loss": 1.0}\n')
    assert metrics.update()
    assert metrics.train.newest["step"] == 106
    assert metrics.train.count == 106


def test_a_file_that_was_cut_is_read_anew(tmp_path):
    """After a loss records are cut off and made again, perhaps more than there were; none is shown twice."""
    out = make_run(tmp_path / "run")
    metrics = Metrics(out / "metrics.jsonl")
    metrics.update()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    again = [json.loads(line) | {"epoch": 0.0} for line in lines[50:]]
    write_lines(out / "metrics.jsonl", [*map(json.loads, lines[:50]), *again, *again[-1:]])
    metrics.update()
    steps = [record["step"] for record in metrics.train.all()]
    assert steps == sorted(set(steps))
    assert metrics.train.all()[-1]["epoch"] == 0.0


@pytest.mark.parametrize("count", [0, 1, 99, 100, 101, 1000, 12345])
def test_a_long_series_is_thinned_evenly(count):
    """However long, a bounded number is kept, evenly spaced, with the first and the last."""
    series = Series(100)
    for step in range(count):
        series.add(json.dumps({"kind": "train", "step": step}).encode())
    steps = [record["step"] for record in series.all()]
    assert len(steps) <= 101
    assert steps[:1] == [0][:count]
    assert steps[-1:] == [count - 1][:count]
    gaps = {after - before for before, after in itertools.pairwise(steps[:-1])}
    assert len(gaps) <= 1


def test_a_start_that_only_looked_is_not_counted(tmp_path):
    """A command that opens a run twice, to check and to train, began once."""
    out = make_failed(tmp_path / "run")
    start = {"time": 1000.0, "kind": "start", "step": 0, "total_steps": 5, "host": "a"}
    later = start | {"time": 2000.0}
    write_lines(out / "events.jsonl", [start, start | {"time": 1000.5}, later])
    assert [event["time"] for event in read_run(out).events] == [1000.5, 2000.0]
    shutil.rmtree(out)
