"""`distbp watch`, `report`, `compare` and `ls`: real runs, a real terminal, a real browser."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest

from tests.conftest import result_of, wait_until
from tests.metrics.browser import dump, needs_browser
from tests.metrics.made_runs import RESULT, growing, make_failed, make_run

from .command_line import distbp, refuse, succeed

TMUX = shutil.which("tmux")
needs_tmux = pytest.mark.skipif(TMUX is None, reason="needs tmux: apt install tmux")


class Terminal:
    """A terminal of a given size in which a command runs; `text` is what stands on it."""

    def __init__(self, folder: Path, width: int = 100, height: int = 40) -> None:
        self._socket = str(folder / "tmux")
        hidden = ("TMUX", "COLUMNS", "LINES")  # The size is that of the terminal.
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self._environment = environment | {"LC_ALL": "C.UTF-8"}
        self._tmux("-f", os.devnull, "new-session", "-d", "-x", str(width), "-y", str(height), "sh")

    def _tmux(self, *words: str) -> str:
        command = [str(TMUX), "-u", "-S", self._socket, *words]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, timeout=30, check=True
        )
        return done.stdout

    def type(self, text: str) -> None:
        self._tmux("send-keys", text, "Enter")

    def press(self, key: str) -> None:
        self._tmux("send-keys", key)

    def text(self) -> str:
        return self._tmux("capture-pane", "-p")

    def close(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def terminal(tmp_path):
    """A terminal of 100 x 40 that is closed in the end."""
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


def command(*arguments: object) -> str:
    """A distbp command as one types it."""
    return " ".join([sys.executable, "-m", "distbp.cli.main", *map(str, arguments)])


@needs_tmux
def test_watch_follows_a_run_to_its_end(terminal, start, tmp_path):
    """In a terminal the figures change while the run goes on, and the last picture stays when it ends."""
    job = start("train", "digits", "--epochs", 2000, "--nproc", 2, "--out", tmp_path / "run")
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), timeout=60)
    terminal.type(command("watch", tmp_path / "run"))

    def step() -> int:
        found = re.search(r"step ([\d,]+) of 50,532", terminal.text())
        return int(found[1].replace(",", "")) if found else 0

    first = wait_until(step, timeout=60)
    wait_until(lambda: step() > first, timeout=60)
    text = terminal.text()
    assert re.search(r"run +running +mlp on digits", text)
    assert re.search(r"training loss +[\d.e-]+ +[▁▂▃▄▅▆▇█]+", text)
    assert re.search(r"\d+ (s|min \d+ s) left", text)
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait().returncode == 75
    wait_until(lambda: "stopped on request" in terminal.text())
    terminal.type("echo done-$?")
    wait_until(lambda: "done-0" in terminal.text())


@needs_tmux
def test_watch_ends_with_ctrl_c_and_the_run_goes_on(terminal, tmp_path):
    """Ctrl-C ends the watching with exit code 0 and a usable terminal."""
    from distbp.run_directory import RunDirectory

    out = make_run(tmp_path / "run")
    job = RunDirectory.open(str(out), "run")
    try:
        terminal.type(command("watch", out) + "; echo code-$?")
        wait_until(lambda: "running" in terminal.text(), timeout=60)
        terminal.press("C-c")
        wait_until(lambda: "code-0" in terminal.text())
    finally:
        job.close()


@needs_tmux
@pytest.mark.parametrize(("width", "height"), [(100, 40), (60, 12)])
def test_watch_fits_the_terminal(tmp_path, width, height):
    """Nothing wraps or scrolls away, in a small terminal either; a finished run is shown and left."""
    small = Terminal(tmp_path, width, height)
    try:
        small.type(f"clear; {command('watch', make_run(tmp_path / 'run', RESULT))}; echo code-$?")
        wait_until(lambda: "code-0" in small.text(), timeout=60)
        lines = small.text().splitlines()
        assert any("validation loss" in line for line in lines), lines
        curves = [line for line in lines if "▁" in line]
        assert len(curves) >= 3
        assert all(len(line) <= width for line in lines)
    finally:
        small.close()


def test_watch_in_a_pipe_prints_once(tmp_path):
    """Without a terminal it says how things stand, without escape sequences, and ends."""
    make_run(tmp_path / "run", RESULT)
    text = succeed("watch", "run", cwd=tmp_path)
    assert "\x1b" not in text
    for words in (
        "run  finished  mlp on digits.csv, 2 workers",
        "step 100 of 100, epoch 10.0, took 1 min 2 s",
        "validation accuracy",
        "cost 1.5 s",
        "! vanishing gradient at step 90: the gradient vanishes before layer 0.weight",
        "set model.activation=relu",
        "worker 1 on host alpha lost at step 61: signal 9 (SIGKILL)",
    ):
        assert words in text, words
    bars = [line.count("█") for line in text.splitlines() if re.match(r" +[01] +4\d ", line)]
    assert len(bars) == 2
    assert bars[0] < bars[1]


def test_watch_of_a_failed_run_names_the_culprit(tmp_path):
    """Code and message stand there; control characters from files do not reach the terminal."""
    out = make_failed(tmp_path / "run")
    message = "the loss\x1b]0;evil\x07 was not finite"
    (out / "result.json").write_text(json.dumps({"status": "failed", "exit_code": 79, "message": message}))
    text = succeed("watch", "run", cwd=tmp_path)
    assert "exit code 79: the loss ]0;evil" in text
    assert "\x1b" not in text
    assert "\x07" not in text


def test_watch_as_json(tmp_path):
    """A program gets state, figures, workers, diagnoses and losses."""
    make_run(tmp_path / "run", RESULT)
    found = json.loads(succeed("watch", "run", "--json", cwd=tmp_path))
    assert (found["state"], found["step"], found["total_steps"]) == ("done", 100, 100)
    assert [row["rank"] for row in found["workers"]] == [0, 1]
    assert found["diagnoses"][0]["name"] == "vanishing_gradient"
    assert found["validation"]["step"] == 100


def test_wrong_calls_are_refused(tmp_path):
    """What is no run, and options that do not fit, end with the documented codes and the cure."""
    assert "distbp ls" in refuse(66, "watch", "nothing", cwd=tmp_path)
    assert "a directory without one" in refuse(66, "report", ".", cwd=tmp_path)
    assert "--http" in refuse(2, "watch", ".", "--port", 80, cwd=tmp_path)
    assert "nothing" in refuse(66, "ls", "nowhere", cwd=tmp_path)
    make_run(tmp_path / "run", RESULT)
    refuse(66, "compare", "run", "other", cwd=tmp_path)


# ----- the live page


@pytest.fixture
def served(start, tmp_path):
    """A run, and the address at which it is served."""
    out = make_run(tmp_path / "run")
    job = start("watch", "run", "--http")
    return out, job, urllib.parse.urlsplit(job.process.stdout.readline().strip())


def get(address, path, **headers):
    """Ask for a page; return status and text."""
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=20)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_live_page_is_always_up_to_date(served):
    """Each request shows the run as it is now; Ctrl-C ends the serving."""
    out, job, address = served
    status, text = get(address, address.path)
    assert status == 200
    assert "ended without a word" in text
    (out / "result.json").write_text(json.dumps(RESULT))
    assert "finished" in get(address, address.path)[1]
    os.kill(job.pid, signal.SIGINT)
    assert job.wait().returncode == 0


def test_the_live_page_is_for_whoever_knows_its_address(served):
    """Another path, or a request under another name, is refused; it listens on the loopback alone."""
    _, job, address = served
    assert address.hostname == "127.0.0.1"
    assert get(address, "/")[0] == 404
    assert get(address, "/result.json")[0] == 404
    assert get(address, address.path + "../run/result.json")[0] == 404
    assert get(address, address.path, Host="evil.example")[0] == 404
    assert get(address, address.path, Host=f"localhost:{address.port}")[0] == 200
    listening = Path(f"/proc/{job.pid}/net/tcp").read_text()
    assert f"0100007F:{address.port:04X}" in listening
    assert f"00000000:{address.port:04X}" not in listening


def test_a_port_that_is_taken_is_named(served, tmp_path):
    """A second server on the same port ends with 78."""
    _, _, address = served
    assert str(address.port) in refuse(78, "watch", "run", "--http", "--port", address.port, cwd=tmp_path)


@needs_browser
def test_the_live_page_renews_itself_in_a_browser(served):
    """A page that stays open shows what has happened since, without being asked, and complains of nothing."""
    out, _, address = served
    begun = time.monotonic()

    def finish() -> None:
        time.sleep(1.0)
        growing(out, 1)

    changing = threading.Thread(target=finish)
    changing.start()
    # Ten minutes of the page's own time: it asks 300 times, each time really, and that takes seconds.
    text, complaints = dump(address.geturl(), "--virtual-time-budget=600000")
    changing.join()
    assert time.monotonic() - begun > 1
    assert "101 of 100" in text, "the step that was made after the page was opened"
    assert [line for line in complaints if "favicon" not in line] == []


# ----- report, compare, ls


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two equal runs on one and two workers, and one with another seed."""
    folder = tmp_path_factory.mktemp("compared")
    common = ("train", "digits", "--epochs", 2, "-o", "checkpoint.every_steps=20", "-o", "data.split=tail")
    succeed(*common, "--nproc", 1, "--out", "runs/one", cwd=folder)
    succeed(*common, "--nproc", 2, "--out", "runs/two", cwd=folder)
    succeed(*common, "--nproc", 2, "--out", "runs/seed", "--seed", 1, cwd=folder)
    return folder


def test_train_leaves_a_report_with_a_true_confusion_matrix(runs):
    """The page is there when `distbp train` ends, and its right answers are the accuracy that it reported."""
    out = runs / "runs" / "two"
    text = (out / "report.html").read_text()
    assert "Confusion" in text
    counts = json.loads((out / "confusion.json").read_text())["counts"]
    right, total = sum(counts[index][index] for index in range(10)), sum(map(sum, counts))
    assert total == 180
    assert right / total == pytest.approx(result_of(out)["validation"]["accuracy"])


def test_report_makes_the_page_anew(runs):
    """The command says where the page is, and finds checkpoint and data again."""
    out = runs / "runs" / "one"
    before = json.loads((out / "confusion.json").read_text())
    for name in ("report.html", "confusion.json"):
        (out / name).unlink()
    assert succeed("report", "runs/one", cwd=runs).strip() == str(out / "report.html")
    assert json.loads((out / "confusion.json").read_text()) == before
    found = json.loads(succeed("report", "runs/one", "--json", "--no-data", cwd=runs))
    assert (found["state"], found["report"]) == ("done", str(out / "report.html"))


def test_report_of_a_script_and_of_missing_data_says_what_is_missing(tmp_path):
    """Without data or a checkpoint the page is written all the same, and the reason is said."""
    make_failed(tmp_path / "run")
    done = distbp("report", "run", cwd=tmp_path)
    assert done.returncode == 0
    assert "no new confusion matrix: there is no checkpoint" in done.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_compare_of_runs_with_the_same_bits(runs):
    """Worker count differs, curves, checkpoints and parameters do not."""
    text = succeed("compare", "runs/one", "runs/two", cwd=runs)
    assert re.search(r"run\.nproc +1 +2", text)
    assert "the same at the ends of all epochs that both have, up to step 51" in text
    assert "checkpoint  step 40: the same state" in text
    assert "parameters  the same bits" in text


def test_compare_says_where_curves_part(runs):
    """Another seed is named, with the first epoch and the first checkpoint that differ."""
    text = succeed("compare", "runs/one", "runs/seed", cwd=runs)
    assert re.search(r"seed +0 +1", text)
    assert re.search(r"curves      differ first at step 26: training loss 0\.\d{1,6} and 0\.\d{1,6}\n", text)
    assert re.search(r"validation loss +0\.\d{1,7} +0\.\d{1,7}\n", text)
    assert "checkpoint  step 20: different states" in text
    assert "parameters  different bits" in text
    found = json.loads(succeed("compare", "runs/one", "runs/seed", "--json", cwd=runs))
    assert found["configuration"]["seed"] == [0, 1]
    assert (found["same_parameters"], found["curves"]["differs_at"]) == (False, 26)


def test_ls_lists_the_newest_first(runs, tmp_path):
    """Every run below the directory has a line with state, data, model and result."""
    lines = succeed("ls", cwd=runs).splitlines()
    assert lines[0].split()[:4] == ["run", "state", "data", "model"]
    assert [line.split()[0] for line in lines[1:]] == ["runs/seed", "runs/two", "runs/one"]
    accuracy = result_of(runs / "runs" / "one")["validation"]["accuracy"]
    assert f"{accuracy * 100:.4g} %" in lines[3]
    found = json.loads(succeed("ls", ".", "--json", cwd=runs))
    assert [row["state"] for row in found] == ["done"] * 3
    (tmp_path / "runs").mkdir()
    assert "no run" in succeed("ls", cwd=tmp_path)
