"""The report of the benchmarks: its tables and its plot say what was measured."""

from __future__ import annotations

import os
from xml.etree import ElementTree

import pytest

from benchmarks import tables
from benchmarks.jobs import descendants
from benchmarks.peers import counted, cpu_ms, mean_step_ms, summarise
from benchmarks.plot import bars
from benchmarks.report import SECTIONS, shown_command


def run(peer, median, number=0, **more):
    """What one run of a peer leaves."""
    figures = {"least": median / 2, "quartiles": [median - 1, median + 1], "median": median, "mean": median}
    return (
        {"workload": "cnn", "peer": peer, "round": number, "cpu": 3.0, "num_parameters": 5} | figures | more
    )


RUNS = [
    run("distbp b/2", 10.0),
    run("distbp b/2", 30.0, 1),
    run("distbp b/2", 20.0, 2),
    run("ddp", 50.0, blas="a library"),
    {"workload": "cnn", "peer": "compile", "round": 0, "error": "no compiler"},
]


def test_a_table_has_the_median_over_the_rounds_and_the_least_of_all():
    """Three rounds of 10, 30 and 20 ms are 20 ms; the fastest step was 5."""
    own, peer, failed = summarise(RUNS)
    assert (own["median"], own["least"]) == (20.0, 5.0)
    assert own["quartiles"] == [19.0, 21.0]
    assert peer["median"] / own["median"] == 2.5
    assert failed["error"] == "no compiler"
    lines = tables.peers({"table": [own, peer, failed]})
    assert any(line.startswith("| cnn | ddp | 50.0 |") and "| 2.5 |" in line for line in lines)
    assert any("no compiler" in line for line in lines)


def test_the_plot_has_a_bar_for_each_peer_that_ran():
    """It is XML, and the longer step has the longer bar."""
    picture = ElementTree.fromstring(bars(summarise(RUNS)))
    widths = [float(shape.attrib["width"]) for shape in picture if shape.tag.endswith("rect")][1:]
    assert len(widths) == 2
    assert widths[1] == pytest.approx(2.5 * widths[0], rel=0.01)


def test_the_mean_counts_what_happens_between_steps():
    """Two records of 4 steps each, at 100 and at 400 samples a second: 8 steps of 10 samples in 0.5 s."""
    first = {"samples": 10, "samples_per_second": 1.0, "cpu_ms": 99.0}
    records = [
        first,
        {"samples": 50, "samples_per_second": 100.0, "cpu_ms": 2.0},
        {"epoch_end": True, "samples": 60},
        {"samples": 90, "samples_per_second": 400.0, "cpu_ms": 4.0},
    ]
    assert mean_step_ms(records) == pytest.approx(1e3 * 0.5 / 8)
    assert cpu_ms(records) == pytest.approx(3.0)
    assert mean_step_ms([first]) is None


def test_first_steps_do_not_count():
    """A quarter of them, at most 20."""
    assert counted([1.0, 2.0, 3.0, 4.0]) == [2.0, 3.0, 4.0]
    assert len(counted([0.0] * 1000)) == 980


def test_commands_in_the_document_can_be_typed():
    """They name no program of the machine that measured, and unset what chooses a kernel."""
    for section in SECTIONS.values():
        command = shown_command(section, quick=False)
        assert command.startswith("env -u OPENBLAS_CORETYPE") or section.as_it_is
        assert "TORCH" not in command
        assert "main" not in command


def test_children_of_a_job_are_found():
    """This process is a child of its parent, and its own descendant."""
    assert os.getpid() in descendants({os.getppid()})
    assert os.getppid() not in descendants({os.getpid()})
