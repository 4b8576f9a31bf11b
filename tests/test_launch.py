"""The scripts that start jobs: `launch/local.sh` in front of a stand-in `distbp`, and of the real one.

The stand-in is a program on PATH, as distbp itself would be: it writes down how it was called and what signal
it got, and ends with the codes that a test lists.  A test that needs it running meets it at a named pipe.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LOCAL = REPOSITORY / "launch" / "local.sh"
SCRIPTS = sorted(
    [*REPOSITORY.glob("launch/*.sh"), *REPOSITORY.glob("cluster/**/*.sh"), REPOSITORY / ".ci" / "run"]
)

STAND_IN = """#!{python}
import json, os, signal, sys
from pathlib import Path

here = Path({here!r})
codes = json.loads((here / "codes.json").read_text())
log = here / "calls.jsonl"
started = len(log.read_text().splitlines()) if log.exists() else 0

def write_down(**record):
    with log.open("a") as file:
        file.write(json.dumps(record) + "\\n")

def stop(number, frame):
    write_down(arguments=sys.argv[1:], signal=signal.Signals(number).name)
    os._exit(codes[started])

if (here / "ready").exists() and started == 0:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    (here / "ready").write_text(str(os.getpid()))
    while True:
        signal.pause()
write_down(arguments=sys.argv[1:], signal=None)
sys.exit(codes[started])
"""


class StandIn:
    """A `distbp` in a directory of its own that ends with one code after the other."""

    def __init__(self, here: Path, *codes: int) -> None:
        self.here = here
        (here / "codes.json").write_text(json.dumps(codes))
        program = here / "distbp"
        program.write_text(STAND_IN.format(python=sys.executable, here=str(here)))
        program.chmod(0o755)

    def environment(self) -> dict[str, str]:
        """Return an environment in which this `distbp` comes first."""
        return {**os.environ, "PATH": f"{self.here}{os.pathsep}{os.environ['PATH']}"}

    def calls(self) -> list[dict[str, object]]:
        """Return what was written down, in order."""
        log = self.here / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `launch/local.sh` in front of this `distbp`."""
        return subprocess.run(
            [str(LOCAL), *arguments], env=self.environment(), capture_output=True, text=True, timeout=60
        )

    @contextlib.contextmanager
    def waiting(self, *arguments: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
        """Start `launch/local.sh`; give it and the number of the `distbp` that now waits for a signal."""
        os.mkfifo(self.here / "ready")
        script = subprocess.Popen([str(LOCAL), *arguments], env=self.environment(), stderr=subprocess.DEVNULL)
        distbp = int((self.here / "ready").read_text())
        try:
            yield script, distbp
        finally:
            if script.poll() is None:  # The test has failed; nothing may be left running.
                script.kill()
                script.wait()
                os.kill(distbp, signal.SIGKILL)


TRAIN = ("train", "digits", "--out", "runs/x")


# ----- starting again


def test_a_lost_worker_starts_the_same_command_again(tmp_path: Path) -> None:
    """After 69 the same command is started again, every word of it intact, until it ends otherwise."""
    stand_in = StandIn(tmp_path, 69, 69, 0)
    words = (*TRAIN, "-o", "data.target=two words", "--dry-run", "*", "")
    ended = stand_in.run("--", *words)
    assert ended.returncode == 0
    assert [call["arguments"] for call in stand_in.calls()] == [list(words)] * 3
    assert "distbp ended with 69" in ended.stderr


@pytest.mark.parametrize("code", [0, 1, 2, 65, 66, 70, 73, 75, 77, 78, 79, 80, 130, 137])
def test_any_other_code_ends_the_loop(tmp_path: Path, code: int) -> None:
    """Codes that would only come back, and a requested stop, are handed on after one start."""
    stand_in = StandIn(tmp_path, code, 0)
    assert stand_in.run(*TRAIN).returncode == code
    assert len(stand_in.calls()) == 1


@pytest.mark.parametrize(("options", "starts"), [((), 4), (("--restarts", "0"), 1), (("--restarts=08",), 9)])
def test_restarts_are_counted(tmp_path: Path, options: tuple[str, ...], starts: int) -> None:
    """`--restarts N` means N + 1 starts, then the last code is handed on; three is the default."""
    stand_in = StandIn(tmp_path, *[69] * 20)
    ended = stand_in.run(*options, *TRAIN)
    assert ended.returncode == 69
    assert len(stand_in.calls()) == starts
    assert "are used up" in ended.stderr


def test_a_requested_stop_is_repeated_only_when_asked(tmp_path: Path) -> None:
    """With `--requeue` a stop that somebody sent to distbp itself is followed by another start."""
    stand_in = StandIn(tmp_path, 75, 69, 75, 0)
    assert stand_in.run("--requeue", *TRAIN).returncode == 0
    assert len(stand_in.calls()) == 4


# ----- signals


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_a_signal_is_passed_on_and_nothing_starts_again(tmp_path: Path, sent: str) -> None:
    """A signal to the script reaches distbp; its code is handed on even if it means "run me again"."""
    stand_in = StandIn(tmp_path, 69, 0)
    with stand_in.waiting("--requeue", *TRAIN) as (script, _):
        script.send_signal(signal.Signals[sent])
        assert script.wait(60) == 69
    received = "SIGTERM" if sent == "SIGHUP" else sent
    assert [call["signal"] for call in stand_in.calls()] == [received]


def test_the_terminal_reaches_distbp_only_through_the_script(tmp_path: Path) -> None:
    """distbp has a process group of its own, so a Ctrl-C cannot arrive twice and mean "at once"."""
    stand_in = StandIn(tmp_path, 130)
    with stand_in.waiting(*TRAIN) as (script, distbp):
        assert os.getpgid(distbp) == distbp
        script.send_signal(signal.SIGINT)
        assert script.wait(60) == 130


def test_a_stopped_distbp_is_waited_for(tmp_path: Path) -> None:
    """A distbp that is stopped and continued has not ended: its later code is the one that counts."""
    stand_in = StandIn(tmp_path, 75, 0)
    with stand_in.waiting(*TRAIN) as (script, distbp):
        os.kill(distbp, signal.SIGSTOP)
        # A script that took the stop for an end would be gone at once; one that is right cannot fail here.
        with pytest.raises(subprocess.TimeoutExpired):
            script.wait(0.3)
        os.kill(distbp, signal.SIGCONT)
        os.kill(distbp, signal.SIGTERM)
        assert script.wait(60) == 75


# ----- what is refused, and what is only shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected a command of distbp"),
        (("--",), "expected a command of distbp"),
        (("--restarts",), "expected a number, got nothing"),
        (("--restarts", "-1", *TRAIN), "got '-1'"),
        (("--restarts", "many", *TRAIN), "got 'many'"),
        (("--restart", "3", *TRAIN), "got '--restart'"),
        (("train", "digits"), "add --out DIR"),
        (("train", "digits", "--output", "runs/x"), "add --out DIR"),
    ],
)
def test_a_wrong_request_starts_nothing(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    """What cannot be meant is refused with 2 and the cure, before distbp is started."""
    stand_in = StandIn(tmp_path, 0)
    ended = stand_in.run(*words)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert stand_in.calls() == []


@pytest.mark.parametrize(
    "words",
    [
        ("train", "digits", "--out=runs/x"),
        ("train", "digits", "-o", "run.out=runs/x"),
        ("--restarts", "0", "train", "digits"),
        ("run", "train.py"),
    ],
)
def test_a_fixed_run_directory_may_be_named_in_several_ways(tmp_path: Path, words: tuple[str, ...]) -> None:
    """`--out`, `-o run.out`, a single start, and a script that names its own directory are all accepted."""
    stand_in = StandIn(tmp_path, 0)
    assert stand_in.run(*words).returncode == 0
    assert len(stand_in.calls()) == 1


def test_a_dry_run_prints_a_command_that_a_shell_reads_back(tmp_path: Path) -> None:
    """`--dry-run` starts nothing and prints the exact words that would be started."""
    stand_in = StandIn(tmp_path, 0)
    words = [*TRAIN, "-o", "data.target=it's two words", "*"]
    shown = stand_in.run("--dry-run", *words)
    assert shown.returncode == 0
    assert shlex.split(shown.stdout) == [str(tmp_path / "distbp"), *words]
    assert stand_in.calls() == []


def test_help_is_the_head_of_the_script(tmp_path: Path) -> None:
    """`--help` explains every option that the script takes."""
    shown = StandIn(tmp_path).run("--help")
    assert shown.returncode == 0
    for option in ("--restarts N", "--requeue", "--dry-run"):
        assert option in shown.stdout


def test_a_missing_distbp_is_named_with_its_cure(tmp_path: Path) -> None:
    """Without distbp on PATH or beside the script the answer is 78 and how to install it."""
    (tmp_path / "launch").mkdir()
    script = shutil.copy(LOCAL, tmp_path / "launch" / "local.sh")
    path = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "distbp").exists()
    )
    ended = subprocess.run(
        [script, *TRAIN], env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 78
    assert "make install" in ended.stderr


# ----- the real thing


def test_a_real_training_ends_with_its_own_code(tmp_path: Path) -> None:
    """In front of the real distbp the script trains, and a second call finds the run finished."""
    folder = Path(sys.executable).parent
    assert (folder / "distbp").exists(), "distbp is not installed beside the Python that runs the tests"
    environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    command = [str(LOCAL), "train", "digits", "--out", str(tmp_path / "run"), "-o", "train.max_steps=3"]
    for says in ("validation accuracy", "already finished"):
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert ended.returncode == 0, ended.stderr
        assert says in ended.stdout + ended.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["steps"], result["exit_code"]) == (3, 0)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_shellcheck_finds_nothing(script: Path) -> None:
    """Every shell script is clean by shellcheck, and may be executed."""
    assert os.access(script, os.X_OK)
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: apt install shellcheck")
    found = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout
