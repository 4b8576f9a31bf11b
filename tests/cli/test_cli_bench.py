"""`distbp bench`: every measurement runs, and says what it compares.  How fast anything is, no test asks."""

from __future__ import annotations

import json

import pytest

from tests.cli.command_line import refuse, succeed

FIGURES = {
    "gemm": ("gflops", "best_gflops"),
    "memory": ("update_gb_s", "copy_gb_s"),
    "barrier": ("barrier_us", "word_us"),
    "allreduce": ("ms", "bound_ms"),
    "checkpoint": ("save_ms", "write_ms"),
    "startup": ("s", "bound_s"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_measurement_has_what_is_reached_and_what_could_be(name, tmp_path):
    """Quick measurements of the parts give positive figures for both."""
    found = json.loads(succeed("bench", name, "--quick", "--json", cwd=tmp_path))
    assert found["measurement"] == name
    assert found["machine"]["cores"] >= 1
    assert found["results"]
    assert all(entry[key] > 0 for entry in found["results"] for key in FIGURES[name])
    assert list(tmp_path.iterdir()) == [], "the measurement left something"


def test_a_step_has_its_bound_and_its_phases(tmp_path):
    """The bound is the sum of its parts, and the ratio is that of bound and step."""
    words = ("step", "--quick", "--json", "--rounds", 1, "--workloads", "mlp-s")
    (row,) = json.loads(succeed("bench", *words, cwd=tmp_path))["results"]
    assert row["bound_ms"] == pytest.approx(row["products_ms"] + sum(row["memory_ms"].values()))
    assert row["ratio"] == pytest.approx(row["bound_ms"] / row["median_ms"])
    assert set(row["rest_ms"]) == set(row["phases_ms"]) == {"compute", "wait", "reduce", "update"}


def test_what_cannot_be_measured_is_refused(tmp_path):
    """An unknown workload is named before anything is measured, and three micro-batches divide no batch."""
    assert "mlp-x" in refuse(2, "bench", "step", "--workloads", "mlp-x", cwd=tmp_path)
    assert "power of two" in refuse(2, "bench", "step", "--micro-batches", 3, cwd=tmp_path)
