"""The script that submits Ray jobs, in front of a stand-in for `ray`.

The stand-in plays one part after the other, one a submission: distbp leaves its code in the job's log, or Ray
kills it, or nobody answers.  It writes down how it was called.  Real Ray: `tests/ray/test_ray_jobs.py`.
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

from tests.conftest import wait_until

REPOSITORY = Path(__file__).resolve().parents[1]
SUBMIT = REPOSITORY / "launch" / "ray-submit.sh"
TRAIN = ("train", "digits", "--out", "/shared/runs/x")

RAY = """#!{python}
import json, os, signal, sys, time
from pathlib import Path

here = Path({here!r})
name, words = Path(sys.argv[0]).name, sys.argv[1:]
if words == ["--version"]:
    print("ray, version " + (here / "version").read_text())
    sys.exit(0)
log = here / "calls.jsonl"
calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
with log.open("a") as file:
    kept = {{name: value for name, value in os.environ.items() if name.startswith("RAY_")}}
    file.write(json.dumps({{"name": name, "words": words, "environment": kept}}) + "\\n")
if name == "sleep":
    sys.exit(0)
submitted = sum(call["words"][1:2] == ["submit"] for call in calls)
parts = json.loads((here / "parts.json").read_text())
part = parts[min(max(submitted - 1, 0) if words[1] != "submit" else submitted, len(parts) - 1)]
if isinstance(part, int):
    part = {{"code": part, "state": "failed" if part else "succeeded"}}
verb, job = words[1], words[-1]
if verb == "submit":
    print("Ray's own words")
    sys.exit(part.get("submit", 0))
if verb == "stop":
    (here / ("asked" if part.get("stubborn") else "stopped")).touch()
    sys.exit(0)
if verb == "logs" and "--follow" in words:
    if part.get("wait"):
        signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
        (here / "ready").write_text(str(os.getpid()))
        while not (here / "stopped").exists():
            time.sleep(0.01)
    print("what the job printed")
elif verb == "logs" and "code" in part:
    print(f"ray-submit.sh: {{job}}: distbp ended with {{part['code']}}")
elif verb == "status":
    if "refused" in part:
        sys.exit(part["refused"])
    state = part.get("state", "")
    if state.isupper():
        print(f"Status for job '{{job}}': {{state}}\\nStatus message: Job 'x' failed")
    elif state:
        was = "was " if state == "stopped" else ""
        print(f"Job '{{job}}' {{was}}{{state}}\\nStatus message: it says succeeded")
    else:
        sys.exit(1)
"""


class StandIn:
    """A directory with a `ray` that plays one part for each submission."""

    def __init__(self, here: Path, *parts: object, version: str = "2.60.0") -> None:
        self.here = here
        (here / "version").write_text(version)
        (here / "parts.json").write_text(json.dumps(list(parts) or [0]))
        (here / "work").mkdir()
        (here / "token").write_text("ab" * 32)
        (here / "token").chmod(0o600)
        self.install("ray")

    def install(self, name: str) -> None:
        """Put the stand-in under a name on the PATH."""
        (self.here / name).write_text(RAY.format(python=sys.executable, here=str(self.here)))
        (self.here / name).chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        """Return an environment in which this `ray` comes first, with a cluster and its token."""
        foreign = ("RAY_", "SLURM_", "DISTBP_", "OPENBLAS_", "NPY_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        return {
            **kept,
            "PATH": f"{self.here}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.here),
            "RAY_ADDRESS": "http://127.0.0.1:8265",
            "RAY_AUTH_TOKEN_PATH": str(self.here / "token"),
            **more,
        }

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `launch/ray-submit.sh` in front of this `ray`, in a directory of its own."""
        given = {name: value for name, value in self.environment(**environment).items() if value is not None}
        return subprocess.run(
            [str(SUBMIT), *arguments],
            env=given, cwd=self.here / "work", capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def calls(self, verb: str) -> list[dict[str, object]]:
        """Return how `ray job VERB` was called, in order."""
        log = self.here / "calls.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [record for record in records if record["words"][1:2] == [verb]]

    def shown(self, *arguments: str, **environment: str) -> list[str]:
        """Return the words of the command that `--dry-run` prints."""
        ended = self.run("--dry-run", *arguments, **environment)
        assert ended.returncode == 0, ended.stderr
        assert self.calls("submit") == []
        return shlex.split(ended.stdout)

    @contextlib.contextmanager
    def waiting(self, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """Start the script; give it when the job runs and its log is followed."""
        os.mkfifo(self.here / "ready")
        process = subprocess.Popen(
            [str(SUBMIT), *arguments],
            env=self.environment(), cwd=self.here / "work", stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        follower = int((self.here / "ready").read_text())
        try:
            yield process
        finally:
            if process.poll() is None:  # The test has failed; nothing may be left running.
                process.kill()
                os.kill(follower, signal.SIGKILL)
            process.communicate()


def runtime_env(command: list[str]) -> dict[str, object]:
    """Return the runtime environment in the words of a submission."""
    return dict(json.loads(command[command.index("--runtime-env-json") + 1]))


# ----- what is submitted


def test_the_job_is_distbp_on_the_ray_backend(tmp_path: Path) -> None:
    """The entry point is the command with every word intact, and with the backend after its name."""
    words = [*TRAIN, "--nproc", "8", "-o", "data.target=it's two words", "*"]
    command = StandIn(tmp_path).shown("--", *words)
    assert command[:3] == [str(tmp_path / "ray"), "job", "submit"]
    entry = command[command.index("--") + 1 :]
    assert entry[:2] == ["bash", "-c"]
    assert entry[3] == command[command.index("--submission-id") + 1]
    assert entry[4:] == ["distbp", "train", "--backend", "ray", *words[1:]]


@pytest.mark.parametrize(
    ("options", "words", "expected"),
    [
        ((), ("run", "train.py", "--x"), ["distbp", "run", "--backend", "ray", "train.py", "--x"]),
        ((), ("doctor",), ["distbp", "doctor"]),
        (
            ("--insecure",),
            ("run", "train.py"),
            ["distbp", "run", "--backend", "ray", "--ray-insecure", "train.py"],
        ),
        (
            ("--insecure",),
            TRAIN,
            ["distbp", "train", "--backend", "ray", "-o", "run.ray_insecure=true", *TRAIN[1:]],
        ),
    ],
)
def test_only_what_trains_gets_a_backend(
    tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...], expected: list[str]
) -> None:
    """`train` and `run` get the backend, and its permission if it is insecure; other commands nothing."""
    command = StandIn(tmp_path).shown(*options, *words)
    assert command[command.index("--") + 5 :] == expected


def test_what_is_left_out_and_handed_on(tmp_path: Path) -> None:
    """Environments, runs and data stay here; distbp's variables and time to save go along as JSON."""
    given = {"DISTBP_SEED": '"7\\', "OPENBLAS_CORETYPE": "Haswell", "DISTBP_COMMAND": "python -m x"}
    command = StandIn(tmp_path).shown("--exclude", '*.b"in', "--exclude=two words", *TRAIN, **given)
    described = runtime_env(command)
    assert {".git", ".venv*", "/runs", "/data", '*.b"in', "two words"} <= set(described["excludes"])
    assert described["env_vars"] == {
        "RAY_JOB_STOP_WAIT_TIME_S": "300",
        "DISTBP_SEED": '"7\\',
        "OPENBLAS_CORETYPE": "Haswell",
    }
    assert command[command.index("--") + 5 :][:4] == ["python", "-m", "x", "train"]


def test_data_that_are_named_are_sent(tmp_path: Path) -> None:
    """data/ at the top is sent along when the command names something in it."""
    command = StandIn(tmp_path).shown("train", "data/x.csv", "--out", "/shared/x")
    assert "/data" not in runtime_env(command)["excludes"]


def test_the_address_that_is_asked_for_is_used(tmp_path: Path) -> None:
    """--address wins over both variables that Ray reads."""
    stand_in = StandIn(tmp_path)
    other = {"RAY_ADDRESS": "http://a:1", "RAY_API_SERVER_ADDRESS": "http://b:1"}
    assert stand_in.run("--address", "http://c:1", *TRAIN, **other).returncode == 0
    environment = stand_in.calls("submit")[0]["environment"]
    assert environment["RAY_ADDRESS"] == "http://c:1"
    assert "RAY_API_SERVER_ADDRESS" not in environment
    assert environment["RAY_AUTH_MODE"] == "token"


# ----- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected a command of distbp"),
        (("--restarts",), "expected a value, got nothing"),
        (("--restarts", "many", *TRAIN), "--restarts: expected a whole number"),
        (("--max-mib=x", *TRAIN), "--max-mib: expected a whole number"),
        (("--adress", "x", *TRAIN), "got '--adress'"),
        (("train", "digits"), "expected an --out that begins with /"),
        (("train", "digits", "--out", "runs/x"), "got 'runs/x'"),
        (("train", "digits", "-o", "run.out=runs/x"), "got 'runs/x'"),
        (("--exclude", "a\nb", *TRAIN), "without control characters"),
    ],
)
def test_a_wrong_request_submits_nothing(tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    """What cannot be meant is refused with 2 and the cure, before Ray is asked for anything."""
    stand_in = StandIn(tmp_path)
    ended = stand_in.run(*words)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert stand_in.calls("submit") == []


def test_no_cluster_is_started_silently(tmp_path: Path) -> None:
    """Without an address the answer is 2 and where one would come from."""
    ended = StandIn(tmp_path).run(*TRAIN, RAY_ADDRESS="")
    assert ended.returncode == 2
    assert "none is started here" in ended.stderr


@pytest.mark.parametrize(("version", "code"), [("2.54.0", 0), ("2.53.1", 78), ("2.9.3", 78), ("3.0.0", 0)])
def test_an_old_ray_is_refused(tmp_path: Path, version: str, code: int) -> None:
    """Ray below 2.54, which can be taken over, is 78 with the cure."""
    ended = StandIn(tmp_path, version=version).run(*TRAIN)
    assert ended.returncode == code, ended.stderr
    assert ("CVE-2026-27482" in ended.stderr) == (code == 78)


def test_a_missing_ray_is_named_with_its_cure(tmp_path: Path) -> None:
    """Without ray on PATH or beside the script the answer is 78 and how to install it."""
    programs = ("env", "bash", "dirname", "sed")
    for name in programs:
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    stand_in = StandIn(tmp_path)
    (tmp_path / "ray").unlink()
    (tmp_path / "launch").mkdir()
    script = shutil.copy(SUBMIT, tmp_path / "launch")
    environment = stand_in.environment(PATH=str(tmp_path))
    ended = subprocess.run([script, *TRAIN], env=environment, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 78
    assert "ray[default]" in ended.stderr


def test_the_token_is_there_and_private(tmp_path: Path) -> None:
    """No token, or one that others may read, is 77 before anything is sent; --insecure asks for none."""
    stand_in = StandIn(tmp_path)
    (tmp_path / "token").chmod(0o640)
    ended = stand_in.run(*TRAIN)
    assert ended.returncode == 77
    assert "chmod 600" in ended.stderr
    assert stand_in.run(*TRAIN, RAY_AUTH_TOKEN="ab").returncode == 0
    (tmp_path / "token").unlink()
    ended = stand_in.run(*TRAIN)
    assert ended.returncode == 77
    assert "found none" in ended.stderr
    assert stand_in.run("--insecure", *TRAIN).returncode == 0
    assert "RAY_AUTH_MODE" not in stand_in.calls("submit")[-1]["environment"]


def test_too_much_is_refused_before_it_is_packed(tmp_path: Path) -> None:
    """More than the limit is 2 with the largest files; what is left out does not count."""
    stand_in = StandIn(tmp_path)
    work = tmp_path / "work"
    for name in ("runs/x", ".venv-ray/x", "ignored.bin", "also.bin", "data/x", "pkg/data/x"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        with (work / name).open("wb") as file:
            file.truncate(3 << 20)
    (work / ".gitignore").write_text("ignored.bin\n")
    (work / ".rayignore").write_text("also.bin\n")
    ended = stand_in.run("--max-mib", "3", *TRAIN)
    assert ended.returncode == 2
    assert "got 3, the largest:\n3145728\tpkg/data/x\n" in ended.stderr
    assert "also.bin" not in ended.stderr
    assert stand_in.calls("submit") == []
    assert stand_in.run("--max-mib", "4", *TRAIN).returncode == 0
    assert stand_in.run("--max-mib", "3", "--exclude", "pkg", *TRAIN).returncode == 0
    assert stand_in.run("--max-mib", "3", "--working-dir", "", *TRAIN).returncode == 0
    assert "--working-dir" not in stand_in.calls("submit")[-1]["words"]
    ended = stand_in.run("--max-mib", "6", "train", "data/x", "--out", "/shared/x")
    assert ended.returncode == 2, "data that are named count"


def test_a_job_that_ray_does_not_take_is_no_loss(tmp_path: Path) -> None:
    """A submission that fails is 78 and is not repeated."""
    stand_in = StandIn(tmp_path, {"submit": 1})
    ended = stand_in.run(*TRAIN)
    assert ended.returncode == 78
    assert len(stand_in.calls("submit")) == 1
    refusing = {"submit": 1, "refused": "ray.exceptions.AuthenticationError: Invalid token"}
    (tmp_path / "parts.json").write_text(json.dumps([refusing]))
    assert stand_in.run(*TRAIN).returncode == 77


# ----- how it ended


@pytest.mark.parametrize("code", [0, 1, 2, 65, 66, 70, 73, 75, 77, 78, 79, 80, 130])
def test_the_code_is_distbps_own(tmp_path: Path, code: int) -> None:
    """Whatever Ray's client says, the code in the job's log is handed on after one submission."""
    stand_in = StandIn(tmp_path, code, 0)
    assert stand_in.run(*TRAIN).returncode == code
    assert len(stand_in.calls("submit")) == 1


def test_a_loss_submits_the_same_command_again(tmp_path: Path) -> None:
    """After 69, or a distbp that a signal killed, the same command is submitted under another name."""
    stand_in = StandIn(tmp_path, 69, 137, 0)
    ended = stand_in.run(*TRAIN)
    assert ended.returncode == 0
    assert "killed by signal 9" in ended.stderr
    words = [call["words"] for call in stand_in.calls("submit")]
    names = [command[command.index("--submission-id") + 1] for command in words]
    assert len(set(names)) == 3
    assert len({json.dumps(words[i]).replace(names[i], "") for i in range(3)}) == 1


@pytest.mark.parametrize(("options", "starts"), [((), 4), (("--restarts", "0"), 1), (("--restarts=01",), 2)])
def test_restarts_are_counted(tmp_path: Path, options: tuple[str, ...], starts: int) -> None:
    """`--restarts N` means N + 1 submissions, then 69 is handed on."""
    stand_in = StandIn(tmp_path, 69)
    ended = stand_in.run(*options, *TRAIN)
    assert ended.returncode == 69
    assert len(stand_in.calls("submit")) == starts
    assert "are used up" in ended.stderr


def test_a_stop_by_somebody_else_is_repeated_only_when_asked(tmp_path: Path) -> None:
    """75 ends the script, and with --requeue the job is submitted again."""
    stand_in = StandIn(tmp_path, 75, 0)
    assert stand_in.run("--requeue", *TRAIN).returncode == 0
    assert len(stand_in.calls("submit")) == 2


@pytest.mark.parametrize(("state", "code"), [("succeeded", 0), ("failed", 69), ("stopped", 69)])
def test_without_a_code_ray_is_believed(tmp_path: Path, state: str, code: int) -> None:
    """A job without a last word was killed or lost its node, unless Ray says that it succeeded."""
    ended = StandIn(tmp_path, {"state": state}).run("--restarts", "0", *TRAIN)
    assert ended.returncode == code
    assert (f"which Ray calls {state}" in ended.stderr or f"{state}, but" in ended.stderr) == (code != 0)


def test_a_log_that_breaks_off_is_not_the_end(tmp_path: Path) -> None:
    """While Ray calls the job running, the script waits for its end and its code."""
    stand_in = StandIn(tmp_path, {"state": "RUNNING"})
    # The state changes when the script has looked at it some times: the stand-in for sleep counts.
    counter = tmp_path / "sleep"
    counter.write_text(
        f"#!/bin/sh\necho >>{tmp_path}/naps\n"
        f'[ "$(wc -l <{tmp_path}/naps)" -lt 8 ] || '
        f'echo \'[{{"code": 79, "state": "failed"}}]\' >{tmp_path}/parts.json\n'
    )
    counter.chmod(0o755)
    assert stand_in.run(*TRAIN).returncode == 79
    assert len(stand_in.calls("submit")) == 1


def test_a_ray_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    """When nobody answers any more the answer is 69 and the job's name, and nothing is submitted again."""
    stand_in = StandIn(tmp_path, {"state": ""})
    stand_in.install("sleep")
    ended = stand_in.run(*TRAIN)
    assert ended.returncode == 69
    assert "may still run" in ended.stderr
    assert len(stand_in.calls("submit")) == 1


@pytest.mark.parametrize(
    ("sent", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGUSR2", 75), ("SIGHUP", 75), ("SIGINT", 130)]
)
def test_a_signal_stops_the_job(tmp_path: Path, sent: str, code: int) -> None:
    """A signal becomes `ray job stop`, and the code that distbp leaves then is handed on."""
    stand_in = StandIn(tmp_path, {"code": 75, "wait": True, "state": "RUNNING"}, 0)
    with stand_in.waiting("--requeue", *TRAIN) as script:
        script.send_signal(signal.Signals[sent])
        assert script.wait(60) == code
    submitted = stand_in.calls("submit")[0]["words"]
    name = submitted[submitted.index("--submission-id") + 1]
    assert [call["words"] for call in stand_in.calls("stop")] == [["job", "stop", "--no-wait", name]]
    assert len(stand_in.calls("submit")) == 1


def test_a_second_signal_ends_the_script(tmp_path: Path) -> None:
    """The second signal ends the script at once, and what it had started here."""
    stand_in = StandIn(tmp_path, {"wait": True, "stubborn": True, "state": "RUNNING"})
    with stand_in.waiting(*TRAIN) as script:
        script.send_signal(signal.SIGTERM)
        wait_until((tmp_path / "asked").exists)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 128 + signal.SIGTERM
        assert "goes on stopping" in script.stderr.read()


def test_help_is_the_head_of_the_script(tmp_path: Path) -> None:
    """--help explains every option that the script takes."""
    text = StandIn(tmp_path).run("--help").stdout
    options = ("--address URL", "--working-dir DIR", "--exclude PATTERN", "--max-mib N", "--restarts N")
    for option in (*options, "--requeue", "--insecure", "--dry-run"):
        assert option in text
