"""`distbp simulate`: how long a step takes on many hosts, by a model that was fitted to measured exchanges.

The model, what it leaves out, and what its numbers mean stand in `distbp/bench/model.py`.  Its points were
measured between emulated hosts (`python -m benchmarks.hosts`); the error of the model at them is printed with
every answer, also that of a fit which did not know the point.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from distbp.bench.model import Fit, Point, Prediction

__all__ = ["command"]

MEASURED = Path(__file__).resolve().parents[1] / "bench" / "measured_exchanges.json"


@click.command(
    help="Predict the step of a workload on 8 to 4,096 hosts, each with its share of the batch of one.\n\n"
    "Computing and updating are measured here, unless both are given.  The exchange is a model, fitted to "
    "measured points; its errors at them are printed."
)
@click.option("--workload", default="mlp-l", help="One of those of distbp bench step.  [default: mlp-l]")
@click.option(
    "--hosts", default="1,8,16,32,64,128,256,512,1024,2048,4096", help="Numbers of hosts, with commas."
)
@click.option("--rate-mbit", type=click.FloatRange(min=0.001), default=10_000.0, show_default=True)
@click.option("--latency-us", type=click.FloatRange(min=0), default=50.0, show_default=True)
@click.option("--bucket-kib", type=click.IntRange(min=1), default=4096, show_default=True)
@click.option("--compute-ms", type=click.FloatRange(min=0), help="Forward and backward of a host's share.")
@click.option("--update-ms", type=click.FloatRange(min=0), help="Adding in a host, and the update.")
@click.option("--message-us", type=click.FloatRange(min=0), help="Processor's part of a message.  [fitted]")
@click.option("--byte-ns", type=click.FloatRange(min=0), help="Processor's part of a byte.  [fitted]")
@click.option("--points", type=click.Path(dir_okay=False), help="Measured points, from benchmarks.hosts.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(
    workload: str,
    hosts: str,
    rate_mbit: float,
    latency_us: float,
    bucket_kib: int,
    compute_ms: float | None,
    update_ms: float | None,
    message_us: float | None,
    byte_ns: float | None,
    points: str | None,
    as_json: bool,
) -> int:
    """Fit, predict, and print."""
    from dataclasses import replace

    from distbp.bench import model

    counts = _counts(hosts)
    measured = read_points(Path(points) if points else MEASURED)
    fitted = model.fit(measured)
    errors = {
        "fit": [model.exchange_s(fitted, point) / point.seconds - 1 for point in measured],
        "left_out": model.leave_one_out(measured),
    }
    used = replace(
        fitted,
        a=fitted.a if message_us is None else message_us * 1e-6,
        c=fitted.c if byte_ns is None else byte_ns * 1e-9,
    )
    job = _describe(workload, bucket_kib, compute_ms, update_ms)
    predictions = [
        model.predict(
            used,
            count,
            compute_s=job["compute_ms"] / 1e3,
            update_s=job["update_ms"] / 1e3,
            vector_bytes=job["vector_bytes"],
            buckets=job["buckets"],
            rate=rate_mbit * 1e6 / 8,
            latency_s=latency_us * 1e-6,
        )
        for count in counts
    ]
    if as_json:
        print(json.dumps(_record(job, fitted, measured, errors, predictions), indent=1))
    else:
        print("\n".join(_lines(job, fitted, measured, errors, predictions, rate_mbit, latency_us)))
    return 0


def read_points(path: Path) -> list[Point]:
    """Return the points of a file of `benchmarks.hosts`; InputMissing or DataError if it is none."""
    from distbp.bench.model import Point
    from distbp.errors import DataError, InputMissing

    if not path.exists():
        raise InputMissing(f"{path}: expected a file of python -m benchmarks.hosts, found none")
    try:
        found = [
            Point(
                hosts=int(entry["hosts"]),
                vector_bytes=int(entry["vector_bytes"]),
                exchanges=int(entry["exchanges"]),
                blocks=int(entry["blocks"]),
                rate=float(entry["rate_mbit"]) * 1e6 / 8,
                seconds=float(entry["reduce_ms"]) / 1e3,
            )
            for entry in json.loads(path.read_text())["points"]
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: expected points of benchmarks.hosts, got {error!r}; measure again"
        ) from None
    if len(found) < 6 or min(min(p.seconds, p.rate) for p in found) <= 0:
        raise DataError(f"{path}: expected at least six points with positive times, got {len(found)}")
    return found


def _counts(hosts: str) -> list[int]:
    """Return the numbers of hosts; a usage error if one is none."""
    try:
        counts = [int(word) for word in hosts.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise click.UsageError(f"--hosts: expected numbers from 1 up with commas between them, got {hosts!r}")
    return counts


def _describe(
    workload: str, bucket_kib: int, compute_ms: float | None, update_ms: float | None
) -> dict[str, Any]:
    """Return what one host does: gradients, buckets, and times, measured here where none are given."""
    from distbp.bench.training import describe
    from distbp.bench.workloads import chosen

    (chosen_workload,) = chosen(workload)
    vector_bytes, buckets = describe(chosen_workload, bucket_kib)
    job = {"workload": workload, "vector_bytes": vector_bytes, "buckets": buckets, "measured": False}
    if compute_ms is None or update_ms is None:
        phases = _measure(workload)
        job["measured"] = True
        compute_ms = phases["compute"] + phases["wait"] if compute_ms is None else compute_ms
        update_ms = phases["reduce"] + phases["update"] if update_ms is None else update_ms
    return job | {"compute_ms": compute_ms, "update_ms": update_ms}


def _measure(workload: str) -> dict[str, float]:
    """Return the phases of a step of this host, with a worker on each core, at most two."""
    import tempfile

    from distbp.bench.training import train
    from distbp.bench.workloads import WORKLOADS
    from distbp.environment import available_cores

    chosen_workload = WORKLOADS[workload]
    with tempfile.TemporaryDirectory(prefix="distbp-simulate-") as folder:
        run = train(
            chosen_workload,
            Path(folder),
            workers=min(2, available_cores()),
            micro_batch=chosen_workload.batch // 2,
            steps=max(6, chosen_workload.steps // 2),
        )
    return run.phases


def _record(
    job: dict[str, Any],
    fitted: Fit,
    points: Sequence[Point],
    errors: dict[str, list[float]],
    predictions: Sequence[Prediction],
) -> dict[str, Any]:
    """Return everything as JSON."""
    from dataclasses import asdict

    return {
        "job": job,
        "fit": asdict(fitted),
        "points": [
            asdict(point) | {"error": error, "error_left_out": left_out}
            for point, error, left_out in zip(points, errors["fit"], errors["left_out"], strict=True)
        ],
        "predictions": [asdict(prediction) for prediction in predictions],
    }


def _lines(
    job: dict[str, Any],
    fitted: Fit,
    points: Sequence[Point],
    errors: dict[str, list[float]],
    predictions: Sequence[Prediction],
    rate_mbit: float,
    latency_us: float,
) -> list[str]:
    """Return the answer for people."""
    lines = [
        f"model fitted to {len(points)} measured exchanges of {min(p.hosts for p in points)} to "
        f"{max(p.hosts for p in points)} emulated hosts: exchange {fitted.t0 * 1e6:.0f} us, message "
        f"{fitted.a * 1e6:.1f} us, byte in memory {fitted.c * 1e9:.3f} ns, byte on the link "
        f"x {fitted.e:.2f}, and {fitted.q:.2f} more for each sender beside another, up to "
        f"{fitted.most_hosts} hosts"
    ]
    lines.append(
        "emulated hosts share cores: on hosts of their own exchange, message and byte in memory cost less"
    )
    for name, what in (
        ("fit", "error at these points"),
        ("left_out", "error at a point left out of the fit"),
    ):
        sizes = [abs(error) for error in errors[name]]
        lines.append(f"{what}: median {statistics.median(sizes):.0%}, most {max(sizes):.0%}")
    lines += [
        f"{job['workload']}: {job['vector_bytes'] / 1e6:.1f} MB of gradients in {job['buckets']} buckets, "
        f"links of {rate_mbit:g} Mbit/s and {latency_us:g} us; a host computes {job['compute_ms']:.2f} ms, "
        f"adds and updates {job['update_ms']:.2f} ms, {'measured here' if job['measured'] else 'as given'}",
        f"{'hosts':>6} {'exchange ms':>12} {'hidden ms':>10} {'step ms':>9} {'efficiency':>10}",
    ]
    alone = (job["compute_ms"] + job["update_ms"]) / 1e3
    return lines + [
        f"{p.hosts:6} {p.exchange * 1e3:12.2f} {p.hidden * 1e3:10.2f} {p.step * 1e3:9.2f} "
        f"{alone / p.step:10.0%}"
        for p in predictions
    ]
