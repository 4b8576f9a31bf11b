"""The model of `distbp simulate`: it finds the numbers that made its points, and predicts what they mean."""

from __future__ import annotations

import dataclasses
import json

import pytest

from distbp.bench.model import Fit, Point, exchange_s, fit, leave_one_out, predict, unhidden
from tests.cli.command_line import refuse, succeed

TRUE = Fit(t0=200e-6, a=30e-6, c=0.5e-9, e=1.08, q=0.1, most_hosts=6)


def points(wrong=1.0):
    """Points that the model explains, the last one `wrong` times as long as it should be."""
    made = []
    for rate in (12.5e6, 1250e6):
        for hosts in (2, 3, 4, 6):
            for size in (70_000, 550_000, 2_700_000):
                point = Point(hosts, size, 2 + size // 1_000_000, 1, rate, 1.0)
                made.append(dataclasses.replace(point, seconds=exchange_s(TRUE, point)))
    made[-1] = dataclasses.replace(made[-1], seconds=made[-1].seconds * wrong)
    return made


def test_the_fit_finds_the_numbers_that_made_the_points():
    """Without noise they come back, and no point is a surprise."""
    found = fit(points())
    assert dataclasses.asdict(found) == pytest.approx(dataclasses.asdict(TRUE), rel=1e-6)
    assert max(map(abs, leave_one_out(points()))) < 1e-6


def test_no_number_is_negative():
    """A point of no cost but its bytes cannot make a message cost less than nothing."""
    cheap = [dataclasses.replace(p, seconds=2 * p.vector_bytes / p.rate / p.hosts) for p in points()]
    assert min(dataclasses.asdict(fit(cheap)).values()) >= 0


def test_a_wrong_point_shows_when_it_is_left_out():
    """The error of a point that took twice as long is near a half; the others' is small."""
    errors = leave_one_out(points(wrong=2.0))
    assert errors[-1] == pytest.approx(-0.5, abs=0.02)
    assert errors[-1] == min(errors)


def test_buckets_hide_what_backprop_has_time_for():
    """One bucket hides nothing; of four that are faster than backprop only the last one shows."""
    assert unhidden(0.4, 1.0, 1) == pytest.approx(0.4)
    assert unhidden(0.4, 1.0, 4) == pytest.approx(0.1)
    assert unhidden(4.0, 1.0, 4) == pytest.approx(4.0 - 0.75)


def test_a_prediction_is_the_sum_of_its_parts():
    """Computing and updating are there on one host; the link's rate and latency count as given."""
    job = {"compute_s": 0.03, "update_s": 0.01, "vector_bytes": 10**7, "buckets": 1, "rate": 1.25e9}
    assert predict(TRUE, 1, latency_s=1.0, **job).step == pytest.approx(0.04)
    near, far = (predict(TRUE, 8, latency_s=latency, **job) for latency in (0.0, 1e-3))
    moved = 2 * 10**7 * 7 / 8
    own = 2 * TRUE.t0 + 2 * 7 * TRUE.a + moved * TRUE.c
    link = moved * (TRUE.e + 4 * TRUE.q) / 1.25e9
    expected = max(own, link)
    assert near.exchange == pytest.approx(expected)
    assert near.step == pytest.approx(0.04 + expected)
    assert far.step - near.step == pytest.approx(4e-3)


def test_the_command_prints_hosts_up_to_4096_with_its_error(tmp_path):
    """The shipped points are fitted, and more hosts never have a faster step."""
    words = ["simulate", "--workload", "mlp-m", "--compute-ms", 10, "--update-ms", 1, "--json"]
    found = json.loads(succeed(*words, cwd=tmp_path))
    assert [entry["hosts"] for entry in found["predictions"]][-1] == 4096
    steps = [entry["step"] for entry in found["predictions"]]
    assert steps == sorted(steps)
    assert steps[0] == pytest.approx(0.011)
    assert len(found["points"]) >= 20
    assert all({"error", "error_left_out"} <= set(point) for point in found["points"])
    own = json.loads(succeed(*words, "--message-us", 0, "--byte-ns", 0, cwd=tmp_path))["predictions"]
    assert all(
        mine["exchange"] <= fitted["exchange"] for mine, fitted in zip(own, found["predictions"], strict=True)
    )
    assert own[-1]["exchange"] < found["predictions"][-1]["exchange"]
    assert "error at these points" in succeed(*words[:-1], cwd=tmp_path)


def test_points_that_are_none_are_refused(tmp_path):
    """A file of something else, too few points, and no file are named."""
    (tmp_path / "other.json").write_text('{"points": [{"hosts": 2}]}')
    (tmp_path / "few.json").write_text('{"points": []}')
    words = ["simulate", "--compute-ms", 1, "--update-ms", 1, "--points"]
    assert "vector_bytes" in refuse(65, *words, "other.json", cwd=tmp_path)
    assert "six" in refuse(65, *words, "few.json", cwd=tmp_path)
    assert "none.json" in refuse(66, *words, "none.json", cwd=tmp_path)
    assert "from 1 up" in refuse(2, "simulate", "--hosts", "8,x", cwd=tmp_path)
