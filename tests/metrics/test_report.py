"""`distbp report`: one file for every state of a run, readable in a real browser, wide and narrow."""

from __future__ import annotations

import html.parser
import json
import re

import pytest

from distbp.metrics import charts
from distbp.metrics.charts import Curve, chart, decimated, stacked, strip, ticks
from distbp.metrics.records import append_record
from distbp.metrics.report import page, try_to_report, write_report
from distbp.metrics.report_parts import words_of
from distbp.metrics.run_files import read_run
from distbp.metrics.words import compact, figure
from distbp.run_directory import RunDirectory

from .browser import dump, measure, needs_browser
from .made_runs import RESULT, events, make_failed, make_run, write_lines


class Structure(html.parser.HTMLParser):
    """Checks that every element that is opened is closed, in order."""

    VOID = frozenset({"meta", "br", "line", "path", "rect", "circle"})

    def __init__(self):
        super().__init__()
        self.open, self.scripts, self.texts = [], 0, []

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parsed(text):
    """The structure of a page, which must be sound."""
    structure = Structure()
    structure.feed(text)
    assert structure.open == []
    return structure


HOSTS = [
    {
        "rank": rank,
        "host": rank // 2,
        "compute_s": 1400.25,
        "wait_s": 103.75,
        "host_wait_s": 35.125,
        "cost_s": 35.125,
    }
    for rank in range(4)
]
STATES = {
    "finished": lambda path: make_run(path, RESULT),
    "killed": make_run,
    "failed": make_failed,
    "stopped": lambda path: make_run(path, RESULT | {"status": "stopped"}),
    "long": lambda path: make_run(path, RESULT, steps=3000, epochs=600),
    "hosts": lambda path: make_run(path, RESULT | {"hosts": 2, "workers": HOSTS}),
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_has_a_sound_page(tmp_path, state):
    """The page is well formed, says the state, and asks no other place for anything."""
    text = write_report(STATES[state](tmp_path / "run")).read_text()
    structure = parsed(text)
    assert structure.scripts == 1
    foreign = re.findall(r"(?:src|href)=|url\(|@import|https?:[^\"]*", text)
    assert foreign == ["http://www.w3.org/2000/svg"], "a name, which nobody fetches"
    words = {
        "killed": "ended without a word",
        "long": "finished",
        "hosts": "on 2 hosts",
        "stopped": "stopped on request",
    }
    assert words.get(state, state) in "".join(structure.texts)


def test_the_page_has_every_section(tmp_path):
    """A run that says everything gets every section, with its figures."""
    text = write_report(make_run(tmp_path / "run", RESULT)).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["Diagnosis", "Curves", "Layers", "Confusion", "Timeline", "Workers", "Details"]
    titles = re.findall(r"<figcaption><strong>(.*?)</strong>", text)
    assert titles == [
        "Loss",
        "Accuracy",
        "Entropy of predictions",
        "Loss of steps",
        "Learning rate",
        "Speed",
        "A step on rank 0",
        "Gradient noise scale",
    ]
    for words in (
        "set model.activation=relu",
        "50,826 parameters",
        "signal 9 (SIGKILL)",
        "Norm of the gradient",
    ):
        assert words in text


def test_what_a_run_does_not_say_is_left_out(tmp_path):
    """A run with nothing but its first record has no empty sections."""
    text = write_report(make_failed(tmp_path / "run")).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == ["Curves", "Timeline", "Workers", "Details"]
    assert "Failed with exit code 79" in text
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "lock").write_text("")
    assert "No measurement is recorded yet" in write_report(tmp_path / "empty").read_text()


def test_a_failed_run_shows_the_last_step_that_anything_is_known_of(tmp_path):
    """Measurements are written now and then; a diagnosis names the step that it is about."""
    out = make_failed(tmp_path / "run")
    append_record(out / "events.jsonl", {"kind": "diagnosis", "name": "loss_spike", "step": 6})
    assert "<b>6 of 100</b>" in write_report(out).read_text()


def test_a_share_is_drawn_on_an_even_axis():
    """Of 0.1 and 100 % right the logarithm says nothing to anybody."""
    curve = [Curve("training", [(1.0, 0.1), (2.0, 100.0)])]
    even = chart("Accuracy", curve, x_last=2, x_label="step", linear=True)
    assert 'data-y="0.0 100.0 192 10 0"' in even
    assert 'data-y="0.1 100.0 192 10 1"' in chart("Loss", curve, x_last=2, x_label="step")


def test_what_comes_from_files_cannot_become_markup(tmp_path):
    """Classes, messages, hosts and keys are other people's words, and stay words."""
    evil = "<script>alert(1)</script>\"'>"
    out = make_run(
        tmp_path / "run", RESULT | {"message": evil, "backend": evil, "status": "failed"}, classes=(evil, "b")
    )
    told = [
        event | {"host": evil, "message": evil, "remedy": evil, "cause": evil, "name": evil}
        for event in events()
    ]
    write_lines(out / "events.jsonl", told)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "layers":
            record["gradient_norm"] = {evil: 1.0}
    write_lines(out / "metrics.jsonl", records)
    (out / "config.toml").write_text(f"[data]\npath = '''{evil}'''\n[model]\nname = '''{evil}'''\n")
    text = write_report(out).read_text()
    assert parsed(text).scripts == 1
    assert "<script>alert" not in text


def test_a_page_of_a_long_run_stays_small(tmp_path):
    """Thousands of steps, hundreds of epochs and thousands of events make a page below 400 kB."""
    out = make_run(tmp_path / "run", RESULT, steps=20000, epochs=500)
    write_lines(out / "events.jsonl", events() * 1000)
    assert write_report(out).stat().st_size < 400_000


def test_a_damaged_run_costs_the_report_only(tmp_path, capfd):
    """At the end of a run nothing that is wrong with the report raises."""
    out = make_run(tmp_path / "run", RESULT)
    (out / "events.jsonl").write_text('{"kind": "lost", "time": "x", "step": []}\n{"time": 1}\n')
    try_to_report(out)
    try_to_report(tmp_path / "nothing")
    assert "W_REPORT_LOST" in capfd.readouterr().err


def test_the_report_is_written_when_a_run_ends(tmp_path):
    """Whoever writes a result leaves a page; a job that only looked leaves none."""
    job = RunDirectory.open(str(tmp_path / "run"), "run")
    job.close()
    assert not (tmp_path / "run" / "report.html").exists()
    job = RunDirectory.open(str(tmp_path / "run"), "run")
    job.write_result({"status": "failed", "exit_code": 79, "message": "the loss was not finite"})
    job.close()
    assert "the loss was not finite" in (tmp_path / "run" / "report.html").read_text()


@needs_browser
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("state", STATES)
def test_the_page_can_be_read_in_a_browser(tmp_path, state, width):
    """At both widths nothing overlaps, leaves its drawing or is cut off, and nothing scrolls sideways."""
    report = write_report(STATES[state](tmp_path / "run"))
    found = measure(report, width, tmp_path)
    assert found["width"] == width
    assert found["page"] <= width
    assert found["texts"] > 10
    for wrong in ("overlaps", "outside", "clipped", "small"):
        assert found[wrong] == [], wrong
    if state == "finished":
        assert re.fullmatch(
            r"step \d+ training [\d.]+, validation [\d.]+", found["hover"].replace(", training", " training")
        )


@needs_browser
def test_the_browser_has_nothing_to_complain_about(tmp_path):
    """The page as it is, policy included, runs without a complaint."""
    text, complaints = dump(write_report(make_run(tmp_path / "run", RESULT)).as_uri())
    assert complaints == []
    assert "validation accuracy" in text


def test_every_event_has_words():
    """Kinds that nobody knows yet are told as they are."""
    for event in events():
        assert words_of(event)
    assert words_of({"kind": "news", "step": 3, "what": "x"}) == 'news at step 3 {"what": "x"}'
    assert "SIGKILL" in words_of(events()[2])


@pytest.mark.parametrize(
    ("low", "high"),
    [(0, 1), (0.1, 0.2), (-3, 7), (1e-9, 2e-9), (0, 123456), (5, 5), (-1, -0.999), (1e15, 3e15)],
)
def test_ticks_are_round_and_enclose(low, high):
    """Marks of an axis are few, evenly spaced, and leave no value outside."""
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 13
    assert len({compact(mark) for mark in found}) == len(found)


def test_thinning_keeps_the_extremes():
    """A curve of many points is drawn as means, with a band that reaches every value."""
    points = [(float(x), float(x % 10)) for x in range(10_080)]
    found = decimated(points)
    assert len(found) <= charts.MOST_POINTS
    assert all((least, most) == (0.0, 9.0) for _, least, most in found)


@pytest.mark.parametrize(
    "values",
    [
        [],
        [1.0],
        [0.0, 0.0],
        [float("nan")],
        [1.0, float("inf"), 2.0],
        [1e-300, 1e300],
        [-1.0, 1.0],
        [5e-324] * 3,
    ],
)
def test_charts_of_odd_values_are_sound(values):
    """No value, however odd, breaks a drawing."""
    points = [(float(x), value) for x, value in enumerate(values)]
    drawn = chart("odd", [Curve("a", points)], x_last=3, x_label="step")
    parsed(drawn)
    assert "nan" not in drawn.lower().replace("not finite", "")
    assert (drawn == "") == (not any(abs(value) < float("inf") for value in values))
    parsed(strip([*values, None], 0.0, 1.0))


def test_stacked_areas_lie_upon_each_other():
    """The upper edge of the last area is the sum of all."""
    curves = [Curve("a", [(0.0, 1.0), (1.0, 2.0)], 0), Curve("b", [(0.0, 3.0), (1.0, 2.0)], 1)]
    drawn = stacked("times", curves, x_last=1, x_label="step")
    parsed(drawn)
    tops = [
        re.findall(r"[\d.]+ ([\d.]+)", path)[:2] for path in re.findall(r'class="area c\d" d="(.*?)"', drawn)
    ]
    assert len(tops) == 2
    assert tops[1][0] == tops[1][1]
    assert tops[0][0] > tops[0][1]


def test_figures_are_short_and_true():
    """Figures keep four digits, and say what they cannot."""
    values = (None, 0.0, 1234567.0, 0.12345, 0.9996e-3, 1e-7, 3.13e9, "nan", float("inf"), "x")
    assert [figure(value) for value in values] == [
        "-", "0", "1,234,567", "0.1235", "0.0009996", "1.00e-07", "3.13e+09", "not a number", "infinite", "x",
    ]  # fmt: skip
    assert [compact(value) for value in (0, 0.25, 1500, 2e6, 3e-5, 1.5e-7, 1e35)] == [
        "0",
        "0.25",
        "1.5k",
        "2M",
        "3e-5",
        "1.5e-7",
        "1e35",
    ]


def test_the_live_page_may_ask_its_own_server_only(tmp_path):
    """The page of `watch --http` renews itself; the one in the file does not try."""
    run = read_run(make_run(tmp_path / "run", RESULT))
    assert "connect-src 'self'" in page(run, live=True)
    assert "fetch(" in page(run, live=True)
    assert "connect-src" not in page(run)
    assert "fetch(" not in page(run)
