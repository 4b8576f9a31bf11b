"""Where records go: TensorBoard and Prometheus read what we wrote, and no sink can harm a run."""

from __future__ import annotations

import json
import math
import os
import random
import struct
import sys
import textwrap
import time

import pytest

from distbp.errors import ConfigError
from distbp.metrics.prometheus import Prometheus
from distbp.metrics.records import Records, read_records
from distbp.metrics.sinks import SINKS
from distbp.metrics.tensorboard import TensorBoard, crc32c, event, record, scalars_of
from distbp.metrics.trackers import Tracker
from distbp.planning import check_sinks
from tests.conftest import result_of

TRAIN = {
    "kind": "train",
    "step": 7,
    "epoch": 0.5,
    "samples": 448,
    "loss": 2.25,
    "lr": 0.125,
    "samples_per_second": 1000.5,
    "step_ms": {"compute": 1.5, "wait": 0.25, "reduce": 0.125, "update": 0.0625},
    "entropy": 1.5,
}
VALIDATION = {
    "kind": "validation",
    "step": 8,
    "epoch": 1.0,
    "samples": 512,
    "epoch_end": True,
    "loss": 0.5,
    "accuracy": 0.75,
}
LAYERS = {
    "kind": "layers",
    "step": 9,
    "epoch": 1.1,
    "samples": 576,
    "loss": 2.25,
    "lr": 0.125,
    "gradient_norm": {"0.weight": 0.5, "0.bias": 2.0},
    "inactive": {"1": 0.25},
}
WORKERS = {
    "kind": "workers",
    "step": 9,
    "epoch": 1.1,
    "samples": 576,
    "compute_ms": [8, 9],
    "wait_ms": [1, 0],
}


def read_back(folder):
    """What TensorBoard itself finds in a folder: tag -> [(step, value)]."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_the_checksum_is_castagnolis():
    """The check value of CRC-32C, and those of RFC 3720, B.4."""
    assert crc32c(b"123456789") == 0xE3069283
    assert crc32c(bytes(32)) == 0x8A9136AA
    assert crc32c(bytes(range(32))) == 0x46DD794E


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 511, 512, 1000, 5000])
def test_long_messages_have_the_same_checksum(size):
    """Blocks at once give what one byte after the other does."""
    data = random.Random(size).randbytes(size)
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    assert crc32c(data) == crc ^ 0xFFFFFFFF


def test_tensorboard_reads_every_number(tmp_path):
    """Every measurement of every kind of record comes back under its tag, in the precision of the format."""
    sink = TensorBoard(tmp_path)
    for metric in (TRAIN, VALIDATION, LAYERS, WORKERS):
        sink.write(metric)
    sink.close()
    assert read_back(tmp_path / "tensorboard") == {
        "train/loss": [(7, 2.25)],
        "learning_rate": [(7, 0.125)],
        "samples_per_second": [(7, 1000.5)],
        "step_ms/compute": [(7, 1.5)],
        "step_ms/wait": [(7, 0.25)],
        "step_ms/reduce": [(7, 0.125)],
        "step_ms/update": [(7, 0.0625)],
        "train/entropy": [(7, 1.5)],
        "validation/loss": [(8, 0.5)],
        "validation/accuracy": [(8, 0.75)],
        "gradient_norm/0.weight": [(9, 0.5)],
        "gradient_norm/0.bias": [(9, 2.0)],
        "inactive/1": [(9, 0.25)],
        "compute_ms/rank0": [(9, 8.0)],
        "compute_ms/rank1": [(9, 9.0)],
        "wait_ms/rank0": [(9, 1.0)],
        "wait_ms/rank1": [(9, 0.0)],
    }


@pytest.mark.parametrize("value", ["nan", "inf", 1e300, -1e300, None, "a text"])
def test_odd_numbers_do_not_stop_tensorboard(tmp_path, value):
    """What is not finite, too large for the format or no number at all is written as near as it can be."""
    sink = TensorBoard(tmp_path)
    sink.write({"kind": "train", "step": 1, "loss": value, "lr": 1.0})
    sink.close()
    found = read_back(tmp_path / "tensorboard")
    assert found["learning_rate"] == [(1, 1.0)]
    expected = {"nan": math.nan, "inf": math.inf, 1e300: 3.4e38, -1e300: -3.4e38}.get(value)
    if expected is None:
        assert "train/loss" not in found
    else:
        assert found["train/loss"][0][1] == pytest.approx(expected, nan_ok=True)


def test_steps_that_are_made_again_appear_once(tmp_path):
    """After a loss, and after a new start, TensorBoard shows the second figures and no second line."""
    first = Records(tmp_path, ("tensorboard",))
    first.cut(0, -1)
    for step in range(1, 10):
        first.metric({"kind": "train", "step": step, "loss": float(step)})
    first.cut(5, 5)
    for step in range(6, 9):
        first.metric({"kind": "train", "step": step, "loss": step + 0.5})
    first.close()
    second = Records(tmp_path, ("tensorboard",))
    second.cut(7, 7)
    second.metric({"kind": "train", "step": 8, "loss": 80.0})
    second.close()
    curve = read_back(tmp_path / "tensorboard")["train/loss"]
    assert curve == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6.5), (7, 7.5), (8, 80)]
    written = read_records(tmp_path / "metrics.jsonl")
    assert curve == [(metric["step"], metric["loss"]) for metric in written]


def test_a_clock_that_was_set_back_does_not_mix_starts(tmp_path, monkeypatch):
    """Files are read in the order of their names, which is that of the starts whatever the clock says."""
    monkeypatch.setattr(time, "time", lambda: 2e9)
    one = TensorBoard(tmp_path)
    one.write(TRAIN)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    other = TensorBoard(tmp_path)
    other.go_back(7)
    other.write(TRAIN | {"loss": 9.0})
    one.close()
    other.close()
    assert read_back(tmp_path / "tensorboard")["train/loss"] == [(7, 9.0)]


def test_a_torn_event_costs_itself(tmp_path):
    """A killed process may leave part of an event; what came before is read."""
    sink = TensorBoard(tmp_path)
    sink.write(TRAIN)
    sink.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    with path.open("ab") as file:
        file.write(record(event(8, 0.0, scalars={"train/loss": 1.0}))[:-5])
    assert read_back(tmp_path / "tensorboard")["train/loss"] == [(7, 2.25)]


def test_a_step_of_many_bytes_is_encoded():
    """Numbers above 127 take several bytes, seven bits in each."""
    assert event(300, 0.0) == b"\x09" + struct.pack("<d", 0.0) + b"\x10\xac\x02"


def test_prometheus_reads_the_text(tmp_path):
    """The parser of Prometheus' own client accepts the file, and finds every value with its labels."""
    from prometheus_client.parser import text_string_to_metric_families

    out = tmp_path / 'a "run"\\'
    out.mkdir()
    sink = Prometheus(out)
    for metric in (TRAIN, VALIDATION, LAYERS, WORKERS, TRAIN | {"loss": "nan"}):
        sink.write(metric)
    sink.close()
    families = list(text_string_to_metric_families((out / "metrics.prom").read_text()))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    samples = {}
    for sample in (sample for family in families for sample in family.samples):
        assert sample.labels.pop("run") == 'a "run"\\'
        samples[(sample.name, *sample.labels.values())] = sample.value
    assert samples["distbp_step",] == 7
    assert samples["distbp_samples_total",] == 448
    assert math.isnan(samples["distbp_loss", "train"])
    assert samples["distbp_loss", "validation"] == 0.5
    assert ("distbp_loss", "layers") not in samples
    assert samples["distbp_accuracy", "validation"] == 0.75
    assert samples["distbp_step_seconds", "compute"] == pytest.approx(0.0015)
    assert samples["distbp_worker_seconds", "compute", "1"] == pytest.approx(0.009)


def test_the_prometheus_file_is_always_whole(tmp_path):
    """It is replaced by a rename, so a reader in between sees the old file or the new one."""
    sink = Prometheus(tmp_path)
    sink.write(VALIDATION)
    before = (tmp_path / "metrics.prom").stat().st_ino
    sink.write(VALIDATION)
    assert (tmp_path / "metrics.prom").stat().st_ino != before
    assert os.listdir(tmp_path) == ["metrics.prom"]


class Broken:
    def __init__(self, out):
        self.written = 0

    def write(self, metric):
        self.written += 1
        if self.written == 2:
            raise RuntimeError("the server\nis gone")

    def go_back(self, step):
        raise ValueError

    def close(self):
        raise KeyError("x")


def test_a_sink_that_raises_is_left_alone(tmp_path, monkeypatch, capfd):
    """Its error is said once, the other sinks and the record files get every record."""
    monkeypatch.setitem(SINKS, "broken", Broken)
    records = Records(tmp_path, ("broken", "tensorboard"))
    for step in range(1, 6):
        records.metric({"kind": "train", "step": step, "loss": 1.0})
    records.cut(5, 5)
    records.close()
    records.close()
    assert capfd.readouterr().err.count("W_SINK_LOST broken") == 1
    assert len(read_back(tmp_path / "tensorboard")["train/loss"]) == 5
    assert len(read_records(tmp_path / "metrics.jsonl")) == 5


def test_a_sink_that_cannot_be_made_is_left_out(tmp_path, capfd):
    """A file, or a link to elsewhere, where the folder should be costs TensorBoard and nothing else."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("file", "link"):
        out = tmp_path / name
        out.mkdir()
        if name == "file":
            (out / "tensorboard").write_text("")
        else:
            (out / "tensorboard").symlink_to(tmp_path / "elsewhere")
        records = Records(out, ("tensorboard",))
        records.metric(TRAIN)
        assert "W_SINK_LOST tensorboard" in capfd.readouterr().err
        assert len(read_records(out / "metrics.jsonl")) == 1
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_name_that_is_no_sink_is_refused():
    """A script learns which names there are."""
    check_sinks(["prometheus"])
    for wrong in (["prom"], "prometheus"):
        with pytest.raises(ConfigError, match="tensorboard"):
            check_sinks(wrong)


def test_a_slow_server_does_not_hold_training_up(capfd):
    """Records wait in a queue of limited length, and at the end nobody waits longer than the grace."""
    calls = []

    def connect():
        def log(scalars, step):
            calls.append(step)
            time.sleep(60)

        return log, lambda: None

    tracker = Tracker("slow", connect, grace_s=0.1)
    for step in range(5000):
        tracker.write({"kind": "train", "step": step, "loss": 1.0})
    tracker.close()
    assert len(calls) <= 1
    assert "W_SINK_LOST slow" in capfd.readouterr().err


STAND_INS = {
    "mlflow": """
        import json
        def start_run(run_name): _write("start", run_name)
        def log_params(params): _write("params", params)
        def log_metrics(scalars, step): _write("metrics", [scalars, step])
        def end_run(): _write("end", 0)
        """,
    "wandb": """
        class Run:
            def define_metric(self, name, step_metric): pass
            def log(self, scalars): _write("metrics", [scalars, scalars.pop("step")])
            def finish(self): _write("end", 0)
        def init(name, dir, config):
            _write("start", name)
            _write("params", config)
            return Run()
        """,
}
"""The calls that we make of each library, each written down as a line."""


@pytest.mark.parametrize("library", STAND_INS)
def test_a_tracker_gets_the_whole_run(distbp, tmp_path, library):
    """A real run hands its configuration and every measurement to the library that was asked for."""
    program = textwrap.dedent(STAND_INS[library]) + textwrap.dedent("""
        import json, os
        def _write(kind, value):
            with open(os.environ["CALLS"], "a") as file:
                file.write(json.dumps([kind, value]) + "\\n")
        """)
    (tmp_path / f"{library}.py").write_text(program)
    environment = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "CALLS": str(tmp_path / "calls"),
    }
    options = ("--epochs", 2, "--nproc", 2, "-o", f"run.records=[{library}, prometheus]", "--out", "run")
    done = distbp("train", "digits", *options, env=environment)
    assert done.returncode == 0, done.stderr
    assert "W_SINK_LOST" not in done.stderr

    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[0] == ["start", "run"]
    assert calls[1][1]["train.epochs"] == "2"
    assert calls[-1] == ["end", 0]
    logged = [value for kind, value in calls if kind == "metrics"]
    expected = [scalars_of(metric) for metric in read_records(tmp_path / "run" / "metrics.jsonl")]
    assert [scalars for scalars, step in logged] == expected
    assert (tmp_path / "run" / "metrics.prom").exists()
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_sinks_change_no_bit_and_what_is_missing_is_named(distbp, tmp_path):
    """With libraries that are not there, or that raise at import, a run ends with the same parameters."""
    (tmp_path / "mlflow.py").write_text("raise ImportError('no such module')")
    (tmp_path / "wandb.py").write_text("raise OSError('broken installation')")
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    common = ("train", "digits", "--epochs", 1, "--backend", "serial")
    assert distbp(*common, "--out", "plain", "-o", "run.records=[]").returncode == 0
    records = "run.records=[mlflow, wandb, tensorboard, prometheus]"
    done = distbp(*common, "--out", "all", "-o", records, env=environment)
    assert done.returncode == 0, done.stderr
    assert "W_SINK_LOST mlflow: it is not installed: pip install mlflow" in done.stderr
    assert "W_SINK_LOST wandb: broken installation" in done.stderr
    one, other = result_of(tmp_path / "plain"), result_of(tmp_path / "all")
    assert one["parameters_sha256"] == other["parameters_sha256"]
    assert not (tmp_path / "plain" / "tensorboard").exists()
    assert read_back(tmp_path / "all" / "tensorboard")["validation/accuracy"]
