"""The script that trains on Ray under Slurm, in front of stand-ins for srun and scontrol.

The stand-in for srun does not start Ray.  It writes down how it was called and what it found in the directory
of the job, leaves distbp's exit code there if a test says so, and may wait for a signal.  Real Ray on two
emulated hosts: `tests/ray/test_ray_jobs.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
SBATCH = REPOSITORY / "launch" / "slurm-ray.sbatch"
TRAIN = ("train", "digits", "--nproc", "16", "--out", "/shared/runs/x")
FAR = "192.0.2.7"
"""An address that is certainly not of the loopback, and needs no name service."""

STAND_IN = """#!{python}
import json, os, signal, sys
from pathlib import Path

here = Path({here!r})
name, words = Path(sys.argv[0]).name, sys.argv[1:]
if name == "scontrol" and words[0] == "show":
    print("\\n".join(words[2].split(",")))
    sys.exit(0)
record = {{"name": name, "words": words, "signal": None}}
part = json.loads((here / "part.json").read_text())

def write_down():
    with (here / "calls.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\\n")

def leave(number=None, frame=None):
    record["signal"] = number and signal.Signals(number).name
    write_down()
    if "code" in part:
        (private / "code").write_text(f"{{part['code']}}\\n")
    os._exit(part.get("srun", 0))

if name == "scontrol":
    write_down()
    sys.exit(0)
private = Path(words[words.index("bash") + 3])
token = private / "token"
record["token"] = [oct(token.stat().st_mode), token.read_text()]
record["mode"] = oct(private.stat().st_mode)
record["environment"] = dict(os.environ)
if part.get("wait"):
    signal.signal(signal.SIGUSR1, leave)
    (here / "ready").write_text(str(os.getpid()))
    while True:
        signal.pause()
leave()
"""


class StandIn:
    """A directory with a `srun` and a `scontrol` that only write down how they were called."""

    def __init__(self, here: Path, **part: object) -> None:
        self.here = here
        (here / "part.json").write_text(json.dumps(part))
        (here / "submitted from").mkdir()
        for name in ("srun", "scontrol"):
            (here / name).write_text(STAND_IN.format(python=sys.executable, here=str(here)))
            (here / name).chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of a batch job on two nodes."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "SLURM_", "DISTBP_"))}
        slurm = {
            "SLURM_JOB_ID": "1234567",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_CPUS_PER_TASK": "8",
            "SLURM_JOB_NODELIST": f"{FAR},192.0.2.8",
            "SLURM_SUBMIT_DIR": str(self.here / "submitted from"),
        }
        return {**kept, "PATH": f"{self.here}{os.pathsep}{os.environ['PATH']}", **slurm, **more}

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `launch/slurm-ray.sbatch` in front of these programs."""
        given = self.environment(**environment)
        return subprocess.run(
            [str(SBATCH), *arguments], env=given, cwd=self.here, capture_output=True, text=True, timeout=60
        )

    def calls(self, name: str) -> list[dict[str, object]]:
        """Return how the program `name` was called, in order."""
        log = self.here / "calls.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [record for record in records if record["name"] == name]

    def left(self) -> list[str]:
        """Return what the job left where it was submitted."""
        return os.listdir(self.here / "submitted from")

    @contextlib.contextmanager
    def waiting(self, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """Start the script; give it when srun waits for a signal."""
        os.mkfifo(self.here / "ready")
        script = subprocess.Popen(
            [str(SBATCH), *arguments], env=self.environment(), cwd=self.here, stderr=subprocess.DEVNULL
        )
        srun = int((self.here / "ready").read_text())
        try:
            yield script
        finally:
            if script.poll() is None:  # The test has failed; nothing may be left running.
                script.kill()
                script.wait()
                os.kill(srun, signal.SIGKILL)


def option(words: list[str], name: str) -> str:
    """Return the value of an option among words."""
    return words[words.index(name) + 1]


def test_every_node_starts_ray_and_the_first_one_distbp(tmp_path: Path) -> None:
    """One task a node runs symmetric-run, told all that it needs, and that runs distbp."""
    stand_in = StandIn(tmp_path, code=0)
    assert stand_in.run(*TRAIN).returncode == 0
    (call,) = stand_in.calls("srun")
    words = call["words"]
    assert words[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert words[words.index("ray") + 1] == "symmetric-run"
    assert option(words, "--address") == f"{FAR}:{20000 + 1234567 % 12000}"
    assert (option(words, "--min-nodes"), option(words, "--num-cpus")) == ("2", "8")
    assert option(words, "--temp-dir") == "/tmp/ray-1234567-0"
    entry = words[words.index("--") + 1 :]
    assert entry[:2] == ["bash", "-c"]
    assert entry[4:] == ["distbp", "train", "--backend", "ray", *TRAIN[1:]]
    environment = call["environment"]
    assert environment["RAY_ADDRESS"] == option(words, "--address")
    assert environment["SRUN_CPUS_PER_TASK"] == "8"


def test_the_token_is_the_jobs_own(tmp_path: Path) -> None:
    """Each job makes a token of 32 bytes that only its user may read, and removes it when it ends."""
    tokens = []
    for _ in range(2):
        shutil.rmtree(tmp_path, ignore_errors=True)
        tmp_path.mkdir()
        stand_in = StandIn(tmp_path, code=1)
        assert stand_in.run(*TRAIN, RAY_AUTH_TOKEN="another").returncode == 1
        (call,) = stand_in.calls("srun")
        mode, token = call["token"]
        assert stat.S_IMODE(int(mode, 8)) == 0o600
        assert stat.S_IMODE(int(call["mode"], 8)) == 0o700
        assert len(bytes.fromhex(token)) == 32
        assert call["environment"]["RAY_AUTH_MODE"] == "token"
        assert call["environment"]["RAY_AUTH_TOKEN_PATH"].endswith("/token")
        assert "RAY_AUTH_TOKEN" not in call["environment"]
        assert token not in " ".join(call["words"])
        assert stand_in.left() == []
        tokens.append(token)
    assert tokens[0] != tokens[1]


@pytest.mark.parametrize(
    ("part", "answer"),
    [
        *(({"code": code, "srun": srun}, code) for code in (0, 1, 2, 69, 73, 130) for srun in (0, 1)),
        ({"code": 137, "srun": 137}, 69),
        ({"srun": 0}, 78),
        ({"srun": 1}, 1),
    ],
)
def test_the_code_is_distbps_own(tmp_path: Path, part: dict[str, int], answer: int) -> None:
    """distbp's code counts, not srun's; a killed distbp is a loss, and success without distbp is none."""
    stand_in = StandIn(tmp_path, **part)
    ended = stand_in.run(*TRAIN)
    assert ended.returncode == answer, ended.stderr
    assert stand_in.calls("scontrol") == []
    assert stand_in.left() == []


def test_what_was_saved_goes_back_into_the_queue(tmp_path: Path) -> None:
    """75 puts the job back and is handed on."""
    stand_in = StandIn(tmp_path, code=75, srun=75)
    assert stand_in.run(*TRAIN).returncode == 75
    assert [call["words"] for call in stand_in.calls("scontrol")] == [["requeue", "1234567"]]


def test_a_requeued_job_has_a_directory_of_its_own(tmp_path: Path) -> None:
    """What the first start left on a node that crashed is not in the way of the second."""
    stand_in = StandIn(tmp_path, code=0)
    assert stand_in.run(*TRAIN, SLURM_RESTART_COUNT="3").returncode == 0
    assert option(stand_in.calls("srun")[0]["words"], "--temp-dir") == "/tmp/ray-1234567-3"


@pytest.mark.parametrize(("sent", "requeued"), [("SIGUSR1", 1), ("SIGTERM", 0)])
def test_signals_reach_distbp_as_a_request_to_save(tmp_path: Path, sent: str, requeued: int) -> None:
    """SIGUSR1 and SIGTERM to the batch script become SIGUSR1 to srun; a cancelled job is not requeued."""
    stand_in = StandIn(tmp_path, code=75, srun=75, wait=True)
    with stand_in.waiting(*TRAIN) as script:
        script.send_signal(signal.Signals[sent])
        assert script.wait(60) == 75
    assert [call["signal"] for call in stand_in.calls("srun")] == ["SIGUSR1"]
    assert len(stand_in.calls("scontrol")) == requeued
    assert stand_in.left() == []


@pytest.mark.parametrize(
    ("words", "environment", "code", "message"),
    [
        ((), {}, 2, "expected a command"),
        (("train", "digits"), {}, 2, "add --out DIR"),
        (TRAIN, {"SLURM_JOB_NODELIST": "127.0.1.1,192.0.2.8"}, 78, "mend /etc/hosts"),
        (TRAIN, {"SLURM_JOB_NODELIST": "no-such-host.invalid"}, 78, "found none"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, words: tuple[str, ...], environment: dict[str, str], code: int, message: str
) -> None:
    """A missing command or directory, and a first node without a proper address, end before srun."""
    stand_in = StandIn(tmp_path, code=0)
    ended = stand_in.run(*words, **environment)
    assert ended.returncode == code
    assert message in ended.stderr
    assert stand_in.calls("srun") == []


def test_a_single_node_may_be_called_anything(tmp_path: Path) -> None:
    """On one node a name that leads to the loopback does no harm."""
    one = {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    assert StandIn(tmp_path, code=0).run(*TRAIN, **one).returncode == 0


def test_a_dry_run_needs_no_slurm(tmp_path: Path) -> None:
    """--dry-run prints the command and starts nothing, in a job and outside of one."""
    stand_in = StandIn(tmp_path, code=0)
    shown = shlex.split(stand_in.run("--dry-run", *TRAIN).stdout)
    assert shown[0] == "srun"
    assert shown[-len(TRAIN) - 2 :] == ["train", "--backend", "ray", *TRAIN[1:]]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    outside = subprocess.run(
        [str(SBATCH), "--dry-run", *TRAIN], env=environment, capture_output=True, text=True, timeout=60
    )
    assert outside.returncode == 0, outside.stderr
    assert stand_in.calls("srun") == []
    assert stand_in.left() == []


def test_shellcheck_finds_nothing() -> None:
    """The script is clean by shellcheck, and may be executed."""
    assert os.access(SBATCH, os.X_OK)
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: apt install shellcheck")
    found = subprocess.run([shellcheck, str(SBATCH)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout
