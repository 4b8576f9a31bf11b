"""The scripts that start MPI jobs, in front of stand-ins for the launchers and the schedulers.

The stand-in for `mpirun` is a program on PATH that answers `--version` as Open MPI or MPICH do and plays one
part after the other, one a start: it ends with a code, kills itself, leaves something behind, or waits for a
signal.  It writes down how it was called.  What only real launchers can show is not tried here.
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
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
LAUNCH = REPOSITORY / "launch"
MPIRUN = LAUNCH / "mpirun.sh"
OPEN_MPI = "mpirun (Open MPI) 5.0.11"
MPICH = "HYDRA build details:\n    Version:                                 5.0.2"
INTEL = "Intel(R) MPI Library for Linux* OS, Version 2021.18"

STAND_IN = """#!{python}
import json, mmap, os, signal, subprocess, sys, time
from pathlib import Path

here = Path({here!r})
name = Path(sys.argv[0]).name
if sys.argv[1:] == ["--version"]:
    print((here / "version").read_text())
    sys.exit(0)
log = here / "calls.jsonl"
calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
starts = sum(call["name"] == name for call in calls)

def write_down(**record):
    with log.open("a") as file:
        file.write(json.dumps(record | {{"name": name, "arguments": sys.argv[1:]}}) + "\\n")

parts = json.loads((here / "parts.json").read_text()).get(name, [0])
part = parts[min(starts, len(parts) - 1)]
run = here / "run"

def write_log(rank, text):
    (run / "logs").mkdir(parents=True, exist_ok=True)
    with (run / "logs" / f"rank-{{rank:05d}}.log").open("a") as file:
        process = f"pid {{1000 + rank}}, host a, launcher rank {{1 - rank}}"  # Dealt out backwards.
        file.write(f"12:00:00 worker {{rank}} of 2, {{process}}\\n" + text)

def stop(number, frame):
    write_down(signal=signal.Signals(number).name)
    if number == signal.SIGUSR1 and part.get("stubborn"):
        (here / "ready").write_text("again")
        return
    os._exit(part["wait"])

if isinstance(part, dict) and "wait" in part:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, stop)
    (here / "ready").write_text(str(os.getpid()))
    while True:
        signal.pause()
write_down(signal=None)
if isinstance(part, int):
    sys.exit(part)
for rank, text in part.get("logs", {{}}).items():
    write_log(int(rank), text)
if "checkpoint" in part:
    (run / "checkpoints" / part["checkpoint"]).mkdir(parents=True)
if "lost" in part:
    (run / "events.jsonl").write_text(json.dumps({{"kind": "lost"}} | part["lost"]) + "\\n")
if "result" in part:
    (run / "result.json").write_text(json.dumps({{"status": part["result"]}}))
if "session" in part:
    (here / f"ompi.{{os.getpid()}}").mkdir()
    (here / f"ompi.{{os.getppid()}}").mkdir()
if "leave" in part:
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    (here / "left").write_text(str(child.pid))
if "data" in part:
    with open(part["data"], "w+b") as file:
        file.truncate(4096)
        data = mmap.mmap(file.fileno(), 4096)
if "segment" in part:
    with open(part["segment"], "w+b") as file:
        file.truncate(4096)
        segment = mmap.mmap(file.fileno(), 4096)
    while not any(part["segment"] in noted.read_text() for noted in here.glob("tmp.*/segments")):
        time.sleep(0.01)
print(part.get("stdout", ""), flush=True)
print(part.get("stderr", ""), file=sys.stderr, flush=True)
if "linger" in part:
    signal.pause()
if part.get("code") == "SIGKILL":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(part["code"])
"""


class StandIn:
    """A directory with launchers and scheduler commands that only write down how they were called."""

    def __init__(self, here: Path, *parts: object, version: str = MPICH, **others: list[object]) -> None:
        self.here = here
        (here / "version").write_text(version)
        (here / "parts.json").write_text(json.dumps({"mpirun": list(parts) or [0]} | others))
        for name in ("mpirun", "distbp", "srun", "scontrol", "qsub"):
            program = here / name
            program.write_text(STAND_IN.format(python=sys.executable, here=str(here)))
            program.chmod(0o755)

    def environment(self, **more: str) -> dict[str, str]:
        """Return an environment in which these programs come first, and no scheduler shows."""
        foreign = ("SLURM_", "PBS_", "LSB_", "LS_", "DISTBP_", "OPENBLAS_", "NPY_", "PYTHONPATH", "OMP_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        path = f"{self.here}{os.pathsep}{os.environ['PATH']}"
        return {**kept, "PATH": path, "TMPDIR": str(self.here), **more}

    def calls(self, name: str = "mpirun") -> list[dict[str, object]]:
        """Return how the program `name` was called, in order."""
        log = self.here / "calls.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [record for record in records if record["name"] == name]

    def run(
        self, *arguments: str, script: Path = MPIRUN, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a script of launch/ in front of these programs."""
        return subprocess.run(
            [str(script), *arguments],
            env=self.environment(**environment),
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def train(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run `launch/mpirun.sh OPTIONS train` with a run directory in this directory."""
        return self.run(*options, *self.words())

    def words(self) -> tuple[str, ...]:
        """Return a command of distbp that names the run directory."""
        return ("train", "digits", "--out", str(self.here / "run"))

    @contextlib.contextmanager
    def waiting(
        self, *arguments: str, script: Path = MPIRUN, **environment: str
    ) -> Iterator[subprocess.Popen[str]]:
        """Start a script; give it when its launcher waits for a signal."""
        os.mkfifo(self.here / "ready")
        process = subprocess.Popen(
            [str(script), *arguments],
            env=self.environment(**environment),
            cwd=REPOSITORY,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=listen_to_signals,
        )
        launcher = int(self.meet())
        try:
            yield process
        finally:
            if process.poll() is None:  # The test has failed; nothing may be left running.
                process.kill()
                os.kill(launcher, signal.SIGKILL)
            process.communicate()

    def meet(self) -> str:
        """Return what the waiting launcher says next."""
        return (self.here / "ready").read_text()


def listen_to_signals() -> None:
    """Forget that the tests may run under nohup: a shell cannot catch what it was started to ignore."""
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


# ----- which launcher, and what it is told


def shown(stand_in: StandIn, *arguments: str, **environment: str) -> list[str]:
    """Return the words of the command that `--dry-run` prints."""
    ended = stand_in.run("--dry-run", *arguments, **environment)
    assert ended.returncode == 0, ended.stderr
    assert stand_in.calls() == []
    return shlex.split(ended.stdout)


@pytest.mark.parametrize("version", [MPICH, INTEL])
def test_hydra_is_told_ranks_and_hosts(tmp_path: Path, version: str) -> None:
    """MPICH and Intel MPI get -n and -f and nothing else; the words of the command stay intact."""
    stand_in = StandIn(tmp_path, version=version)
    (tmp_path / "hosts").write_text("a:2\nb:2\n")
    words = [*stand_in.words(), "-o", "data.target=two words", "*"]
    hosts = str(tmp_path / "hosts")
    command = shown(stand_in, "-n", "3", "--hostfile", hosts, "--mpirun", "-ppn 1", "--", *words)
    expected = ["-n", "3", "-f", hosts, "-ppn", "1", str(tmp_path / "distbp"), *words]
    assert command == [str(tmp_path / "mpirun"), *expected]


def test_open_mpi_is_told_not_to_bind(tmp_path: Path) -> None:
    """Open MPI gets --bind-to none, as root its permission, and the variables that choose kernels."""
    stand_in = StandIn(tmp_path, version=OPEN_MPI)
    command = shown(stand_in, "-n", "1", *stand_in.words(), OPENBLAS_CORETYPE="Haswell")
    assert command[1:3] == ["--bind-to", "none"]
    assert ("--allow-run-as-root" in command) == (os.geteuid() == 0)
    assert command[command.index("-x") + 1] == "OPENBLAS_CORETYPE"
    assert "--map-by" not in command


@pytest.mark.parametrize(
    ("hosts", "options", "oversubscribed"),
    [
        (None, (), True),
        ("a slots=500000\nb slots = 500000\n", (), False),
        ("# a comment\n\na slots=2 max_slots=4\n", (), True),
        ("a\nb slots=1\n", (), False),
        (None, ("--mpirun", "--map-by node"), False),
    ],
)
def test_open_mpi_may_oversubscribe_only_when_needed(
    tmp_path: Path, hosts: str | None, options: tuple[str, ...], oversubscribed: bool
) -> None:
    """More ranks than cores or slots add :OVERSUBSCRIBE and say so; unknown slots or own mapping do not."""
    stand_in = StandIn(tmp_path, version=OPEN_MPI)
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
        options = (*options, "--hostfile", str(tmp_path / "hosts"))
    ended = stand_in.run("--dry-run", "-n", "1000000", *options, *stand_in.words())
    assert (":OVERSUBSCRIBE" in shlex.split(ended.stdout)) == oversubscribed
    assert ("OVERSUBSCRIBE" in ended.stderr) == oversubscribed


def test_a_scheduler_says_how_many_slots_there_are(tmp_path: Path) -> None:
    """Inside an allocation this machine's cores are no limit, so nothing is added."""
    stand_in = StandIn(tmp_path, version=OPEN_MPI)
    assert "--map-by" not in shown(stand_in, "-n", "1000000", *stand_in.words(), SLURM_JOB_ID="7")


def test_another_distbp_may_be_named(tmp_path: Path) -> None:
    """$DISTBP_COMMAND replaces distbp and is not handed to it, where it would be an unknown key."""
    stand_in = StandIn(tmp_path, version=OPEN_MPI)
    command = shown(stand_in, *stand_in.words(), DISTBP_COMMAND="python -m distbp.cli.main")
    assert command[-7:] == ["python", "-m", "distbp.cli.main", *stand_in.words()]
    assert "-x" not in command


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "expected a command of distbp"),
        (("-n",), 2, "expected a value, got nothing"),
        (("-n", "0", "train", "digits", "--out", "x"), 2, "got '0'"),
        (("--restarts", "many", "train", "digits", "--out", "x"), 2, "got 'many'"),
        (("--np", "2", "train"), 2, "got '--np'"),
        (("train", "digits"), 2, "add --out DIR"),
        (("--hostfile", "/nowhere", "train", "digits", "--out", "x"), 66, "got '/nowhere'"),
    ],
)
def test_a_wrong_request_starts_nothing(
    tmp_path: Path, words: tuple[str, ...], code: int, message: str
) -> None:
    """What cannot be meant is refused with its code and the cure, before anything is started."""
    stand_in = StandIn(tmp_path)
    ended = stand_in.run(*words)
    assert ended.returncode == code
    assert message in ended.stderr
    assert stand_in.calls() == []


def test_an_unknown_launcher_is_refused(tmp_path: Path) -> None:
    """A launcher of neither kind is 78 and quoted, rather than started with the wrong options."""
    ended = StandIn(tmp_path, version="mpirun of another world 1.0").train()
    assert ended.returncode == 78
    assert "another world" in ended.stderr


def test_a_script_that_was_copied_alone_is_refused(tmp_path: Path) -> None:
    """Without the file that finds the culprit the answer is 78, before anything is started."""
    shutil.copy(MPIRUN, tmp_path / "alone.sh")
    stand_in = StandIn(tmp_path)
    ended = stand_in.run(*stand_in.words(), script=tmp_path / "alone.sh")
    assert ended.returncode == 78
    assert "expected culprit.awk beside this script" in ended.stderr
    assert stand_in.calls() == []


def test_a_missing_launcher_is_refused(tmp_path: Path) -> None:
    """Without mpirun and mpiexec the answer is 78 and where one comes from."""
    needed = ("env", "bash", "dirname", "sed")
    for name in needed:
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    stand_in = StandIn(tmp_path)
    (tmp_path / "mpirun").unlink()
    ended = stand_in.run(*stand_in.words(), PATH=str(tmp_path))
    assert ended.returncode == 78
    assert "MPI module" in ended.stderr


# ----- exit codes


@pytest.mark.parametrize(
    ("version", "launchers", "answer"),
    [
        *((version, code, code) for version in (MPICH, OPEN_MPI) for code in (0, 1, 2, 70, 79, 130)),
        (MPICH, 9, 69),
        (MPICH, 11, 69),
        (MPICH, 137, 69),
        (OPEN_MPI, 137, 69),
        (OPEN_MPI, 139, 69),
        (OPEN_MPI, 9, 69),
        *((version, code, code) for version in (MPICH, OPEN_MPI) for code in (126, 127, 213, 255)),
    ],
)
def test_codes_of_launchers_become_those_of_distbp(
    tmp_path: Path, version: str, launchers: int, answer: int
) -> None:
    """A rank that was killed or left with a strange code is 69; codes of distbp or a failed start stay."""
    stand_in = StandIn(tmp_path, launchers, version=version)
    assert stand_in.train("--restarts", "0").returncode == answer
    assert len(stand_in.calls()) == 1


def test_a_launcher_that_is_killed_is_a_loss(tmp_path: Path) -> None:
    """SIGKILL of the launcher itself is 69 as well."""
    assert StandIn(tmp_path, {"code": "SIGKILL"}).train("--restarts", "0").returncode == 69


@pytest.mark.parametrize(("result", "answer"), [(None, 69), ("stopped", 69), ("done", 0)])
def test_success_is_believed_only_of_a_finished_run(tmp_path: Path, result: str | None, answer: int) -> None:
    """A launcher that says 0 although workers trained and the run is not done has lost one of them."""
    part = {"code": 0, "logs": {"0": ""}} | ({} if result is None else {"result": result})
    assert StandIn(tmp_path, part).train("--restarts", "0").returncode == answer


def test_the_log_knows_better_than_hydra(tmp_path: Path) -> None:
    """Hydra may answer 9 when it killed the others because one rank failed: that rank's own code counts."""
    part = {"code": 9, "logs": {"0": "", "1": "12:00:01 failed with 79: loss is nan\n"}}
    assert StandIn(tmp_path, part).train().returncode == 79


# ----- starting again


def test_a_loss_starts_the_same_command_again(tmp_path: Path) -> None:
    """After a loss the same command is started again until it ends otherwise."""
    stand_in = StandIn(tmp_path, 69, 9, 0)
    ended = stand_in.train("-n", "2")
    assert ended.returncode == 0
    assert len({str(call["arguments"]) for call in stand_in.calls()}) == 1
    assert len(stand_in.calls()) == 3


@pytest.mark.parametrize("code", [1, 213, 255])
def test_a_launcher_that_does_not_reach_its_hosts_again_is_a_loss(code: int, tmp_path: Path) -> None:
    """A launcher that fails without a word is tried again if the run has begun before, and not at first."""
    stand_in = StandIn(tmp_path, 69, code, code, 0)
    assert stand_in.train("--restarts", "3").returncode == 0
    assert len(stand_in.calls()) == 4
    again = tmp_path / "again"
    again.mkdir()
    assert StandIn(again, code, 0).train("--restarts", "3").returncode == code


def test_a_rank_that_raises_in_a_later_start_ends_the_loop(tmp_path: Path) -> None:
    """What a rank says itself is believed in every start."""
    raised = {
        "code": 1,
        "stderr": "distbp: rank 1 on host a: ValueError",
        "logs": {"1": "12:00:01 failed with 1: x\n"},
    }
    stand_in = StandIn(tmp_path, 69, raised, 0)
    assert stand_in.train("--restarts", "3").returncode == 1
    assert len(stand_in.calls()) == 2


def test_restarts_without_progress_are_counted(tmp_path: Path) -> None:
    """--restarts N means N starts more, and the last code is handed on."""
    stand_in = StandIn(tmp_path, 69)
    ended = stand_in.train("--restarts", "2")
    assert ended.returncode == 69
    assert len(stand_in.calls()) == 3
    assert "are used up" in ended.stderr


def test_a_new_checkpoint_resets_the_count(tmp_path: Path) -> None:
    """A start that leaves a new checkpoint has made progress; the count begins anew."""
    steps = [{"code": 69, "checkpoint": f"step-{step:08d}"} for step in (5, 10, 15)]
    stand_in = StandIn(tmp_path, *steps, 0)
    assert stand_in.train("--restarts", "1").returncode == 0
    assert len(stand_in.calls()) == 4


def test_an_unfinished_checkpoint_is_no_progress(tmp_path: Path) -> None:
    """What a killed save leaves behind does not reset the count."""
    part = {"code": 69, "checkpoint": "step-00000005.tmp-1"}
    stand_in = StandIn(tmp_path, part, 69, 0)
    assert stand_in.train("--restarts", "1").returncode == 69
    assert len(stand_in.calls()) == 2


@pytest.mark.parametrize(("options", "code", "starts"), [((), 75, 1), (("--requeue",), 0, 2)])
def test_a_requested_stop_is_repeated_only_when_asked(
    tmp_path: Path, options: tuple[str, ...], code: int, starts: int
) -> None:
    """75 ends the loop unless --requeue was given."""
    stand_in = StandIn(tmp_path, 75, 0)
    assert stand_in.train(*options).returncode == code
    assert len(stand_in.calls()) == starts


# ----- signals


@pytest.mark.parametrize("sent", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGINT"])
def test_every_signal_asks_the_ranks_to_save(tmp_path: Path, sent: str) -> None:
    """Whatever comes reaches the launcher as SIGUSR1, and nothing starts again; Ctrl-C is 130."""
    stand_in = StandIn(tmp_path, {"wait": 75}, 0)
    with stand_in.waiting("--requeue", *stand_in.words()) as script:
        script.send_signal(signal.Signals[sent])
        assert script.wait(60) == (130 if sent == "SIGINT" else 75)
    assert [call["signal"] for call in stand_in.calls()] == ["SIGUSR1"]


def test_a_second_signal_ends_the_job_at_once(tmp_path: Path) -> None:
    """The second signal reaches the launcher as SIGTERM; the code is 128 plus its number."""
    stand_in = StandIn(tmp_path, {"wait": 1, "stubborn": True})
    with stand_in.waiting(*stand_in.words()) as script:
        script.send_signal(signal.SIGUSR1)
        assert stand_in.meet() == "again"
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == 128 + signal.SIGTERM
    assert [call["signal"] for call in stand_in.calls()] == ["SIGUSR1", "SIGTERM"]


def test_a_stop_before_training_began_is_75(tmp_path: Path) -> None:
    """Ranks that SIGUSR1 kills before Python can answer it have not begun: run again."""
    stand_in = StandIn(tmp_path, {"wait": 138})
    with stand_in.waiting(*stand_in.words()) as script:
        script.send_signal(signal.SIGUSR1)
        assert script.wait(60) == 75


# ----- what is left behind


def test_processes_that_outlive_the_launcher_are_ended(tmp_path: Path) -> None:
    """A process of the job in a session of its own is gone afterwards; one of another job lives on."""
    stand_in = StandIn(tmp_path, {"code": 9, "leave": True})
    with subprocess.Popen(["sleep", "1000"]) as other:
        try:
            ended = stand_in.train("--restarts", "0")
            left = (tmp_path / "left").read_text()
            assert ended.returncode == 69
            assert f"processes {left}" in ended.stderr
            status = Path(f"/proc/{left}/stat")  # Gone, or a zombie that its new parent has yet to collect.
            assert not status.exists() or status.read_text().split()[2] == "Z"
            assert other.poll() is None
        finally:
            other.kill()


def test_a_launcher_that_ignores_last_words_is_ended(tmp_path: Path) -> None:
    """A launcher that lives on after a rank has said why it ends the job is ended, and the answer is 69."""
    ended = StandIn(tmp_path, {"stderr": KILLED, "linger": True}).train("--restarts", "0")
    assert ended.returncode == 69
    assert "ending it" in ended.stderr


def test_segments_of_the_job_are_removed(tmp_path: Path) -> None:
    """A segment that the job had mapped is removed; an equally named one that it never mapped stays."""
    ours = Path(f"/dev/shm/mpich_shm_{uuid.uuid4().hex}")
    theirs = Path(f"/dev/shm/mpich_shm_{uuid.uuid4().hex}")
    theirs.touch()
    try:
        ended = StandIn(tmp_path, {"code": 9, "segment": str(ours)}).train("--restarts", "0")
        assert f"removed {ours}" in ended.stderr
        assert not ours.exists()
        assert theirs.exists()
    finally:
        ours.unlink(missing_ok=True)
        theirs.unlink()


def test_other_files_in_shared_memory_stay(tmp_path: Path) -> None:
    """A file without the name of an MPI segment is the user's, even if a rank had it mapped."""
    data = Path(f"/dev/shm/data-{uuid.uuid4().hex}")
    segment = Path(f"/dev/shm/sm_segment.{uuid.uuid4().hex}")
    part = {"code": 9, "segment": str(segment), "data": str(data)}
    try:
        assert StandIn(tmp_path, part).train("--restarts", "0").returncode == 69
        assert data.exists()
        assert not segment.exists()
    finally:
        data.unlink(missing_ok=True)
        segment.unlink(missing_ok=True)


def test_the_session_directory_of_a_killed_launcher_is_removed(tmp_path: Path) -> None:
    """The directory that carries the launcher's process number goes; that of another process stays."""
    assert StandIn(tmp_path, {"code": "SIGKILL", "session": True}).train("--restarts", "0").returncode == 69
    assert len(list(tmp_path.glob("ompi.*"))) == 1


def test_nothing_of_its_own_is_left(tmp_path: Path) -> None:
    """The script's temporary directory is removed."""
    StandIn(tmp_path, 0).train()
    assert list(tmp_path.glob("tmp.*")) == []


# ----- the culprit

SAID_BY_MPICH = "=   PID 1001 RUNNING AT a\n=   EXIT CODE: 9\n"
SAID_BY_OPEN_MPI = "prterun noticed that process rank 0 with PID 77 on node a exited on\nsignal 9 (Killed)."
ABORTED = 'prterun has exited due to process rank 1 with PID 0 on node a calling\n"abort".'
KILLED = "mpirun.sh: rank 0, process 1001, host a: killed by signal 9\n"
LEFT = "mpirun.sh: rank 1, process 1000, host a: left with 14\n"
RAISED = "distbp: rank 1 on host a: Traceback (most recent call last):\n"
WAITED = "distbp: rank 0 on host a: waited 10 s for worker 1 of the same host, ...: resuming is safe"
OTHER_HOST = "distbp: rank 1 on host a: alltoall on host a: waited 10 s for host b; ...: resuming is safe\n"
SILENT = {"0": "", "1": ""}
LOST = "x failed with 69: waited 10 s for worker 1 of the same host; resuming is safe\n"
WORKER_1 = "culprit: worker 1 on host a (rank 0 of the launcher, process 1001)"
IN_VAIN = ", for which the others waited in vain"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"stderr": KILLED, "logs": SILENT}, f"{WORKER_1}, killed by signal 9\n"),
        ({"stderr": KILLED}, "culprit: rank 0 of the launcher, process 1001 on host a, killed by signal 9\n"),
        ({"stderr": "unfinished" + LEFT + KILLED, "logs": SILENT}, f"{WORKER_1}, killed by signal 9\n"),
        ({"stderr": LEFT + KILLED.replace("killed by signal 9", "left with 3") + ABORTED}, ", left with 3\n"),
        ({"stderr": KILLED + WAITED, "logs": SILENT}, f"{WORKER_1}, killed by signal 9\n"),
        ({"stderr": RAISED, "logs": SILENT}, f"{WORKER_1}\n"),
        ({"stderr": RAISED}, "culprit: worker 1 on host a\n"),
        ({"stderr": RAISED + LEFT, "logs": SILENT}, f"{WORKER_1}\n"),
        ({"stderr": WAITED, "logs": SILENT}, WORKER_1 + IN_VAIN),
        ({"stderr": WAITED + LEFT, "logs": SILENT}, WORKER_1 + IN_VAIN),
        ({"stderr": WAITED + OTHER_HOST, "logs": SILENT}, "culprit: host b or the link to it" + IN_VAIN),
        ({"logs": {"0": LOST, "1": "x failed with 1: Traceback\n"}}, f"{WORKER_1}\n"),
        ({"logs": {"0": LOST, "1": ""}}, WORKER_1 + IN_VAIN),
        ({"stderr": SAID_BY_OPEN_MPI, "logs": SILENT}, f"{WORKER_1}\n"),
        ({"stderr": SAID_BY_OPEN_MPI}, "culprit: rank 0 of the launcher, which names it"),
        (
            {"stderr": "   Process name: [prterun-vm-9@1,2]\n   Exit code:    77"},
            "culprit: rank 2 of the launcher",
        ),
        ({"stderr": "Abort(1) on node 1 (rank 1 in comm 0): application called"}, "culprit: rank 1 of the"),
        ({"stdout": SAID_BY_MPICH}, "culprit: unknown"),
        ({"logs": SILENT}, "culprit: perhaps worker"),
        ({}, "culprit: unknown"),
    ],
)
def test_the_culprit_is_named(tmp_path: Path, part: dict[str, object], message: str) -> None:
    """Who failed first is named from last words and from the workers' logs, best evidence first."""
    ended = StandIn(tmp_path, {"code": 77} | part).train()
    assert ended.returncode == 77
    assert message in ended.stderr


@pytest.mark.parametrize("code", [2, 65, 66, 73, 78])
def test_nobody_is_accused_of_what_all_ranks_say(tmp_path: Path, code: int) -> None:
    """When all ranks leave with an error of the request, who left first is no culprit."""
    part = {"code": code, "stderr": f"   Process name: [prterun-vm-9@1,1]\n   Exit code:    {code}"}
    ended = StandIn(tmp_path, part).train()
    assert ended.returncode == code
    assert "culprit" not in ended.stderr


def test_what_the_log_says_is_shown(tmp_path: Path) -> None:
    """The top and the end of the culprit's log of this start are shown, a long middle is not."""
    lines = "".join(f"line {number}\n" for number in range(40))
    ended = StandIn(tmp_path, {"code": 79, "logs": {"0": "x failed with 79: " + lines}}).train()
    said = [line.removeprefix("mpirun.sh:").strip() for line in ended.stderr.splitlines()]
    begin = said.index(f"{tmp_path}/run/logs/rank-00000.log says:")
    shown = ["x failed with 79: line 0", "line 1", "line 2", "line 3", "...", "line 36", "line 37", "line 38"]
    assert said[begin + 2 : begin + 11] == [*shown, "line 39"]


def test_logs_of_an_earlier_start_accuse_nobody(tmp_path: Path) -> None:
    """A failure of the start before is in the same log and does not count again."""
    first = {"code": 69, "logs": {"0": "", "1": "x failed with 69: lost\n"}}
    second = {"code": 77, "logs": {"0": "x failed with 77: key\n", "1": ""}}
    ended = StandIn(tmp_path, first, second).train()
    assert "culprit: worker 0 on" in ended.stderr
    assert "failed with 77: key" in ended.stderr


def test_a_recorded_loss_is_shown(tmp_path: Path) -> None:
    """What the job itself recorded about a loss is shown after the culprit."""
    part = {"code": 69, "logs": {"0": ""}, "lost": {"rank": 1, "host": "b"}}
    ended = StandIn(tmp_path, part).train("--restarts", "0")
    assert '"host": "b"' in ended.stderr


# ----- schedulers


@pytest.mark.parametrize("form", ["srun", "mpirun"])
def test_slurm_requeues_what_was_saved(tmp_path: Path, form: str) -> None:
    """Under srun and under mpirun.sh alike, 75 puts the job back into the queue and is handed on."""
    stand_in = StandIn(tmp_path, 75, srun=[75])
    environment = {"FORM": form, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(REPOSITORY)}
    ended = stand_in.run(*stand_in.words(), script=LAUNCH / "slurm.sbatch", **environment)
    assert ended.returncode == 75, ended.stderr
    assert [call["arguments"] for call in stand_in.calls("scontrol")] == [["requeue", "7"]]


@pytest.mark.parametrize("code", [0, 1, 69])
def test_slurm_requeues_nothing_else(tmp_path: Path, code: int) -> None:
    """Other codes are handed on and leave the queue alone."""
    stand_in = StandIn(tmp_path, srun=[code])
    ended = stand_in.run(*stand_in.words(), script=LAUNCH / "slurm.sbatch", SLURM_JOB_ID="7")
    assert ended.returncode == code
    assert stand_in.calls("scontrol") == []


@pytest.mark.parametrize(("sent", "requeued"), [("SIGUSR1", 1), ("SIGTERM", 0)])
def test_slurm_signals_reach_the_ranks(tmp_path: Path, sent: str, requeued: int) -> None:
    """SIGUSR1 and SIGTERM to the batch script become SIGUSR1; a cancelled job is not requeued."""
    stand_in = StandIn(tmp_path, srun=[{"wait": 75}])
    with stand_in.waiting(*stand_in.words(), script=LAUNCH / "slurm.sbatch", SLURM_JOB_ID="7") as script:
        script.send_signal(signal.Signals[sent])
        assert script.wait(60) == 75
    assert [call["signal"] for call in stand_in.calls("srun")] == ["SIGUSR1"]
    assert len(stand_in.calls("scontrol")) == requeued


def test_slurm_shows_its_command(tmp_path: Path) -> None:
    """--dry-run prints the srun line with the CPUs of a task, which srun would not inherit."""
    stand_in = StandIn(tmp_path)
    ended = stand_in.run(
        "--dry-run", *stand_in.words(), script=LAUNCH / "slurm.sbatch", SLURM_CPUS_PER_TASK="4", PMI="pmi2"
    )
    expected = ["env", "SRUN_CPUS_PER_TASK=4", "srun", "--mpi=pmi2", "--kill-on-bad-exit=1", "distbp"]
    assert shlex.split(ended.stdout) == [*expected, *stand_in.words()]
    assert stand_in.calls("srun") == []


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ((), {}, "expected a command"),
        (("train", "digits"), {}, "add --out DIR"),
        (("run", "train.py"), {"FORM": "prun"}, "got 'prun'"),
    ],
)
def test_slurm_refuses_what_cannot_be_meant(
    tmp_path: Path, words: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    """No command, no fixed directory, or an unknown form is 2 before srun is called."""
    stand_in = StandIn(tmp_path)
    ended = stand_in.run(*words, script=LAUNCH / "slurm.sbatch", **environment)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert stand_in.calls("srun") == []


@pytest.mark.parametrize(("sent", "submitted"), [("SIGUSR1", 1), ("SIGTERM", 0)])
def test_pbs_submits_again_only_when_the_time_is_up(tmp_path: Path, sent: str, submitted: int) -> None:
    """The timer's request ends in a save and a new job; a qdel ends in a save alone."""
    stand_in = StandIn(tmp_path, {"wait": 75})
    command = " ".join(stand_in.words())
    with stand_in.waiting(script=LAUNCH / "pbs.sh", COMMAND=command, PBS_O_WORKDIR=str(REPOSITORY)) as script:
        script.send_signal(signal.Signals[sent])
        assert script.wait(60) == 75
    assert [call["signal"] for call in stand_in.calls()] == ["SIGUSR1"]
    again = ["-v", f"COMMAND={command},STOP_AFTER_S=14100", "launch/pbs.sh"]
    assert [call["arguments"] for call in stand_in.calls("qsub")] == [again] * submitted


@pytest.mark.parametrize(
    ("script", "variable"), [("pbs.sh", "PBS_NODEFILE"), ("lsf.sh", "LSB_DJOB_HOSTFILE")]
)
def test_the_scheduler_says_where_ranks_run(tmp_path: Path, script: str, variable: str) -> None:
    """Ranks and hosts come from the scheduler's file, one line a rank; --dry-run shows it."""
    stand_in = StandIn(tmp_path)
    hosts = tmp_path / "hosts"
    hosts.write_text("a\na\nb\n")
    command = " ".join(stand_in.words())
    ended = stand_in.run("--dry-run", script=LAUNCH / script, COMMAND=command, **{variable: str(hosts)})
    expected = ["-n", "3", "-f", str(hosts), str(tmp_path / "distbp"), *stand_in.words()]
    assert shlex.split(ended.stdout)[1:] == expected, ended.stderr
    assert stand_in.calls() == []


def test_lsf_requeues_by_the_exit_code(tmp_path: Path) -> None:
    """The run limit's SIGUSR2 becomes a save and 75, the code that the script's own header requeues."""
    stand_in = StandIn(tmp_path, {"wait": 75})
    with stand_in.waiting(script=LAUNCH / "lsf.sh", COMMAND=" ".join(stand_in.words())) as script:
        script.send_signal(signal.SIGUSR2)
        assert script.wait(60) == 75
    assert '#BSUB -Q "75"' in (LAUNCH / "lsf.sh").read_text()


# ----- the scripts as text


def test_help_is_the_head_of_the_script(tmp_path: Path) -> None:
    """--help explains every option that mpirun.sh takes."""
    text = StandIn(tmp_path).run("--help").stdout
    for option in (
        "-n RANKS",
        "--hostfile F",
        "--restarts N",
        "--requeue",
        '--mpirun "OPTIONS"',
        "--dry-run",
    ):
        assert option in text


@pytest.mark.parametrize("name", ["mpirun.sh", "slurm.sbatch", "pbs.sh", "lsf.sh"])
def test_shellcheck_finds_nothing(name: str) -> None:
    """Every script is clean by shellcheck, and may be executed."""
    assert os.access(LAUNCH / name, os.X_OK)
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed: apt install shellcheck")
    found = subprocess.run([shellcheck, str(LAUNCH / name)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout
