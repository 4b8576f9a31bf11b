"""Run directories made by hand, with everything that a run may say about itself."""

from __future__ import annotations

import json
import math
import socket
import time

BEGAN = 1_700_000_000.0


def write_lines(path, records):
    """A file of one record a line."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def metrics(steps, epochs, workers=2):
    """The records of a run that learns: steps, epochs, layers and workers."""
    found = []
    ends = {round(steps * (number + 1) / epochs) for number in range(epochs)}
    for step in range(1, steps + 1):
        common = {"step": step, "epoch": step * epochs / steps, "samples": step * 64}
        loss = 2.3 * math.exp(-4 * step / steps) * (1 + 0.2 * math.sin(step * 7.3))
        times = {"compute": 2.0 + step % 3, "wait": 0.5, "reduce": 0.3, "update": 0.4}
        rate = {
            "lr": 0.1 * (1 - step / steps),
            "samples_per_second": 20000.0 + 100 * (step % 7),
            "step_ms": times,
        }
        found.append({"kind": "train"} | common | {"loss": loss, "entropy": loss / 2} | rate)
        if step % 5 == 0:
            norms = {
                f"{layer}.{part}": 10.0 ** (layer - 6) for layer in range(6) for part in ("weight", "bias")
            }
            closer = {"gradient_norm": norms, "update_ratio": norms, "inactive": {"1 ReLU": 0.25}}
            found.append({"kind": "layers"} | common | closer)
            spent = {"compute_ms": [3.0 + rank for rank in range(workers)], "wait_ms": [1.0] * workers}
            found.append({"kind": "workers"} | common | spent)
        if step in ends:
            end = common | {"epoch_end": True, "accuracy": 1 - loss / 3}
            found.append({"kind": "train"} | end | {"loss": loss, "noise_scale": 300.0 + step})
            found.append({"kind": "validation"} | end | {"loss": loss * 1.2, "entropy": loss})
    return found


def events():
    """What happened to that run."""
    saved = {"kind": "checkpoint", "status": "saved", "step": 50}
    found = [
        {"kind": "start", "start": 1, "step": 0, "total_steps": 100, "host": "alpha"},
        saved,
        {"kind": "lost", "rank": 1, "host": "alpha", "pid": 7, "step": 61, "cause": "signal 9 (SIGKILL)"},
        {"kind": "restart", "step": 61, "attempt": 1},
        {"kind": "straggler", "step": 80, "rank": 1, "seconds": 0.02, "others": 0.005, "cost": 1.5},
        {
            "kind": "diagnosis",
            "name": "vanishing_gradient",
            "step": 90,
            "message": "the gradient vanishes before layer 0.weight",
            "remedy": "set model.activation=relu",
            "evidence": {"factor": 100000.0, "layers": ["0.weight"]},
        },
        saved | {"step": 100},
    ]
    return [{"time": BEGAN + 10.0 * number} | event for number, event in enumerate(found)]


CONFIG = """
seed = 0
[data]
path = "somewhere/digits.csv"
[model]
name = "mlp"
[optimizer]
lr = 0.1
"""

RESULT = {
    "status": "done",
    "exit_code": 0,
    "steps": 100,
    "parameters_sha256": "ab" * 32,
    "wall_seconds": 61.5,
    "samples_per_second": 20123.4,
    "step_ms_median": 3.2,
    "world_size": 2,
    "hosts": 1,
    "num_parameters": 50826,
    "num_outputs": 3,
    "restarts": 1,
    "backend": "local",
    "workers": [
        {"rank": 0, "host": "alpha", "compute_s": 40.0, "wait_s": 10.0, "cost_s": 0.0},
        {"rank": 1, "host": "alpha", "compute_s": 45.0, "wait_s": 5.0, "cost_s": 1.5},
    ],
}


def make_run(path, result=None, *, steps=100, epochs=10, classes=("cat", "dog", "<b>cow</b>")):
    """A run directory; without a result it looks like one that was killed."""
    path.mkdir(parents=True)
    write_lines(path / "metrics.jsonl", metrics(steps, epochs))
    write_lines(path / "events.jsonl", events())
    (path / "config.toml").write_text(CONFIG)
    (path / "environment.json").write_text('{"numpy": "2.4"}')
    (path / "lock").write_text(json.dumps({"pid": 1, "host": socket.gethostname()}))
    if result:
        (path / "result.json").write_text(json.dumps(result))
    counts = [
        [10 * (row == column) + (row + column) % 3 for column in range(len(classes))]
        for row in range(len(classes))
    ]
    confusion = {"step": 100, "classes": list(classes), "counts": counts, "of": 1000}
    (path / "confusion.json").write_text(json.dumps(confusion))
    return path


def make_failed(path):
    """A run that failed early, with little to show."""
    path.mkdir(parents=True)
    write_lines(path / "metrics.jsonl", metrics(100, 10)[:1])
    message = "the loss was not finite 3 times in a row; lower optimizer.lr <script>alert(1)</script>"
    (path / "result.json").write_text(json.dumps({"status": "failed", "exit_code": 79, "message": message}))
    write_lines(path / "events.jsonl", events()[:3])
    return path


def growing(path, count):
    """Append `count` steps to the records of a run, as a run does that goes on."""
    with (path / "metrics.jsonl").open("a") as file:
        for step in range(101, 101 + count):
            file.write(
                json.dumps({"kind": "train", "step": step, "epoch": 11.0, "samples": step * 64, "loss": 0.5})
                + "\n"
            )
            file.flush()
            time.sleep(0)
