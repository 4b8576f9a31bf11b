"""`distbp/metrics/records.py`: whole lines, and nothing behind the step that a run goes back to."""

from __future__ import annotations

import os
import subprocess

import pytest

from distbp.metrics.records import Records, append_record, read_records


def fill(out, steps, ends):
    """Records of `steps` steps with an epoch's end at each step of `ends`, as a run writes them."""
    records = Records(out)
    for step in range(steps):
        records.samples(step, [step, step + 1])
        records.metric({"kind": "train", "step": step + 1})
        if step + 1 in ends:
            for kind in ("train", "validation"):
                records.metric({"kind": kind, "step": step + 1, "epoch_end": True})
    return records


def test_cut_keeps_what_was_done(tmp_path):
    """Going back to a finished step keeps its epoch's end and drops what came later."""
    records = fill(tmp_path, 9, {3, 6, 9})
    records.cut(6, 6)
    assert [record["step"] for record in records.history()] == [3, 3, 6, 6]
    assert max(record["step"] for record in read_records(tmp_path / "metrics.jsonl")) == 6
    assert len((tmp_path / "samples.log").read_text().splitlines()) == 6


def test_cut_drops_an_unfinished_end_of_an_epoch(tmp_path):
    """When the done-word is behind, the epoch's end at that step will be made, and recorded, again."""
    records = fill(tmp_path, 6, {3, 6})
    records.cut(6, 3)
    assert [record["step"] for record in records.history()] == [3, 3]
    records.cut(6, -1)
    assert [record["step"] for record in records.history()] == [3, 3]


def test_a_line_that_was_cut_off_is_not_read_and_not_kept(tmp_path):
    """A crash in the middle of a line costs that line only."""
    records = fill(tmp_path, 4, {2})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    with (tmp_path / "samples.log").open("a") as file:
        file.write("4\t17 ")
    assert len(read_records(tmp_path / "metrics.jsonl")) == 6
    records.cut(4, 4)
    append_record(tmp_path / "metrics.jsonl", {"kind": "train", "step": 5})
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")][-1] == 5
    assert (tmp_path / "samples.log").read_text().endswith("3\t3 4\n")


def test_a_full_disk_costs_records_and_not_the_run(tmp_path, capfd):
    """Writing fails, is said once, and when there is space again samples.log has every step."""
    out = tmp_path / "small"
    out.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", out], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    try:
        records = Records(out)
        (out / "filler").write_bytes(b"x" * 8192)
        for step in range(600):
            records.samples(step, range(step, step + 4))
            records.metric({"kind": "train", "step": step + 1})
        assert capfd.readouterr().err.count("W_RECORD_LOST") == 1
        assert (out / "samples.log").read_text().endswith("\n")
        written = (out / "samples.log").read_text().count("\n")
        assert written < 600
        subprocess.run(["mount", "-o", "remount,size=1m", out], check=True)
        records.samples(600, [1])
        steps = [int(line.split("\t")[0]) for line in (out / "samples.log").read_text().splitlines()]
        assert steps == list(range(601))
    finally:
        subprocess.run(["umount", out], check=True)
