"""Real worker processes on one machine: the same bits, losses, stops, and what the terminal says."""

from __future__ import annotations

import json
import os
import random
import signal
import textwrap
import time

import psutil
import pytest

from tests.conftest import Job, result_of, wait_until

STEPS = 600
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", f"train.max_steps={STEPS}",
    "-o", "train.epochs=1000", "-o", "optimizer.clip_norm=2.0", "-o", "model.hidden=[64]",
    "-o", "run.log_samples=true",
]  # fmt: skip
SHORT = [*OPTIONS, "-o", "train.max_steps=200"]
SAMPLES = 1617


def step_of(out):
    """The last step that a run has recorded, 0 if there is none."""
    path = out / "samples.log"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def check_samples(out, steps=STEPS):
    """Every step is there once, in order, and every sample once in each epoch."""
    lines = (out / "samples.log").read_text().splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == list(range(steps))
    stream = [int(number) for line in lines for number in line.split("\t")[1].split()]
    for epoch in range(len(stream) // SAMPLES):
        assert sorted(stream[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The result of the run that nothing happens to, on one worker in one process."""
    out = tmp_path_factory.mktemp("undisturbed")
    run_alone(OPTIONS, out)
    check_samples(out)
    return result_of(out)


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """The result of a shorter run, on one worker in one process."""
    return run_alone(SHORT, tmp_path_factory.mktemp("short"))


def run_alone(options, out):
    """Train on one worker in one process; return the result."""
    done = Job(["train", "digits", *options, "--backend", "serial", "--out", out], out, None).wait()
    assert done.returncode == 0, done.stderr
    return result_of(out)


def same_bits(out, undisturbed):
    """The run in `out` ended in the state of the undisturbed one."""
    result = result_of(out)
    assert result["status"] == "done"
    assert result["parameters_sha256"] == undisturbed["parameters_sha256"]
    assert result["state_sha256"] == undisturbed["state_sha256"]
    assert result["validation"] == undisturbed["validation"]
    return result


# Two and four are in between: two workers end other runs of this file in the same bits.
@pytest.mark.parametrize(
    "nproc",
    [1, pytest.param(2, marks=pytest.mark.slow), 3, pytest.param(4, marks=pytest.mark.slow), 5, 12],
)
def test_any_number_of_workers_gives_the_same_bits(nproc, short, distbp, tmp_path):
    """Worker processes, as many as there are micro-batches or fewer, end in the bits of one."""
    out = tmp_path / "run"
    done = distbp("train", "digits", *SHORT, "--nproc", nproc, "--out", out)
    assert done.returncode == 0, done.stderr
    assert same_bits(out, short)["world_size"] == nproc
    check_samples(out, 200)


@pytest.mark.parametrize("nproc", [1, 2, 3])
def test_a_killed_worker_costs_one_step(nproc, undisturbed, start, tmp_path):
    """Kill -9 of a random worker at a random moment: replaced, same bits, one restart, named on stderr."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    out = tmp_path / "run"
    job = start("train", "digits", *OPTIONS, "--nproc", nproc, "--out", out)
    target = rng.randrange(1, STEPS // 2)
    wait_until(lambda: step_of(out) >= target)
    rank, worker = rng.choice(sorted(job.workers().items()))
    worker.kill()
    done = job.wait()
    assert done.returncode == 0, done.stderr
    result = same_bits(out, undisturbed)
    assert result["restarts"] == 1
    assert f"E_LOST_WORKER rank={rank}" in done.stderr
    assert "cause=SIGKILL" in done.stderr
    check_samples(out)
    lost = [e for e in events(out) if e["kind"] == "lost"]
    assert [(e["rank"], e["pid"]) for e in lost] == [(rank, worker.pid)]


def events(out):
    """The events of a run."""
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def test_two_workers_killed_together(undisturbed, start, tmp_path):
    """Losing two of three workers at once is survived as well."""
    out = tmp_path / "run"
    job = start("train", "digits", *OPTIONS, "--nproc", 3, "--out", out)
    wait_until(lambda: step_of(out) >= 50)
    workers = job.workers()
    for rank in (0, 2):
        workers[rank].kill()
    done = job.wait()
    assert done.returncode == 0, done.stderr
    assert same_bits(out, undisturbed)["restarts"] in (1, 2)


# SIGTERM is what the group gets below.
@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_a_stopped_run_goes_on_with_another_worker_count(number, undisturbed, start, distbp, tmp_path):
    """A signal ends the run with 75 (Ctrl-C: 130) and a durable checkpoint; more workers finish it."""
    out = tmp_path / "run"
    job = start("train", "digits", *OPTIONS, "--nproc", 2, "--out", out)
    wait_until(lambda: step_of(out) >= 20)
    os.kill(job.pid, number)
    stopped = job.wait()
    assert stopped.returncode == (130 if number == signal.SIGINT else 75), stopped.stderr
    result = result_of(out)
    assert result["status"] == "stopped"
    assert (out / "checkpoints" / f"step-{result['steps']:08d}").is_dir()
    done = distbp("train", "digits", *OPTIONS, "--nproc", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    same_bits(out, undisturbed)
    check_samples(out)


@pytest.mark.parametrize("phase", ["start", "training", "save"])
def test_a_job_killed_as_a_whole_goes_on(phase, undisturbed, start, distbp, tmp_path):
    """Kill -9 of every process, while starting, training or saving: the next start ends in the same bits."""
    out = tmp_path / "run"
    often = [*OPTIONS, "-o", "checkpoint.every_steps=" + ("1" if phase == "save" else "25")]
    job = start("train", "digits", *often, "--nproc", 2, "--out", out)
    if phase == "start":
        time.sleep(random.uniform(0.05, 0.6))
    else:
        wait_until(lambda: step_of(out) >= random.randrange(30, 60))
    workers = list(job.workers().values())
    job.kill()
    psutil.wait_procs(workers, timeout=5)
    assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers)
    # How often it saves has no part in the bits; it would take long to save after each of 500 steps.
    done = distbp("train", "digits", *OPTIONS, "--nproc", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    same_bits(out, undisturbed)
    check_samples(out)
    assert not list((out / "checkpoints").glob("*.tmp-*"))


def test_workers_leave_with_a_killed_launcher(start, tmp_path):
    """Kill -9 of the launching process alone takes its workers along within a second."""
    out = tmp_path / "run"
    job = start("train", "digits", *OPTIONS, "--nproc", 2, "--out", out)
    wait_until(lambda: step_of(out) >= 5)
    workers = list(job.workers().values())
    os.kill(job.pid, signal.SIGKILL)
    gone, alive = psutil.wait_procs(workers, timeout=10)
    assert len(gone) == 2
    assert not alive


def test_a_second_signal_ends_at_once(start, tmp_path):
    """Whoever asks twice does not wait for the step."""
    out = tmp_path / "run"
    script = tmp_path / "sleepy.py"
    script.write_text("import time\ntime.sleep(100)\n")
    job = start("run", "--nproc", 2, script, cwd=tmp_path)
    wait_until(lambda: len(job.workers()) == 2)
    time.sleep(0.5)
    os.kill(job.pid, signal.SIGINT)
    time.sleep(0.6)  # Within 0.3 s it would count as the same signal.
    os.kill(job.pid, signal.SIGINT)
    assert job.wait(10).returncode == 130
    assert not out.exists()


SCRIPT = """
import sys
import distbp
from distbp import nn

train, val = distbp.load_data("digits")
model = nn.Sequential(nn.Flatten(), nn.Linear(32), nn.ReLU(), nn.Linear(10))
trainer = distbp.Trainer(model, batch_size=96, micro_batch=8)
{before}
history = trainer.fit(train, val=val, epochs=3, out=sys.argv[1])
{between}
second = trainer.fit(train, val=val, epochs=1, out=sys.argv[1] + "-second")
distbp.print(history.result["state_sha256"], second.result["state_sha256"], trainer.evaluate(val)["accuracy"])
"""


def write_script(path, before="", between=""):
    """A user's script, with something of the user's own in it."""
    path.write_text(SCRIPT.format(before=textwrap.dedent(before), between=textwrap.dedent(between)))
    return path


def test_a_script_runs_alike_alone_and_on_workers(distbp, tmp_path):
    """The same script with two calls of fit prints the same hashes on one, two and three workers."""
    script = write_script(tmp_path / "train.py")
    lines = set()
    for index, options in enumerate([("--backend", "serial"), ("--nproc", 2), ("--nproc", 3)]):
        done = distbp("run", *options, script, tmp_path / f"run{index}")
        assert done.returncode == 0, done.stderr
        assert len(done.stdout.splitlines()) == 1
        lines.add(done.stdout)
    assert len(lines) == 1


def test_a_replaced_worker_skips_finished_calls(distbp, tmp_path):
    """A worker lost between two calls of fit runs the script again and gets the first result at once."""
    script = write_script(
        tmp_path / "train.py",
        between="""
        import os, pathlib, signal
        marker = pathlib.Path(sys.argv[1] + "-died")
        if distbp.rank() == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        """,
    )
    plain = write_script(tmp_path / "plain.py")
    expected = distbp("run", "--nproc", 2, plain, tmp_path / "plain").stdout
    done = distbp("run", "--nproc", 2, script, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected
    assert "E_LOST_WORKER rank=1" in done.stderr


@pytest.mark.parametrize(
    ("trouble", "code", "message"),
    [
        ("raise RuntimeError('broken here')", 1, "RuntimeError: broken here"),
        ("sys.exit(3)", 1, "called sys.exit(3)"),
        pytest.param("1 / 0", 1, "ZeroDivisionError", marks=pytest.mark.slow),
    ],
)
def test_an_error_in_one_worker_ends_the_job(trouble, code, message, distbp, tmp_path):
    """User code that raises on one worker ends all with 1; its traceback is the last thing printed."""
    script = write_script(tmp_path / "train.py", before=f"if distbp.rank() == 1: {trouble}")
    done = distbp("run", "--nproc", 3, script, tmp_path / "run")
    assert done.returncode == code
    assert "worker 1" in done.stderr
    assert message in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "way",
    [
        "os._exit(0)",
        pytest.param("os._exit(7)", marks=pytest.mark.slow),
        "os.kill(os.getpid(), signal.SIGSEGV)",
    ],
)
def test_a_worker_that_always_dies_uses_up_its_restarts(way, distbp, tmp_path):
    """Dying three times in the same step ends the job with 70 and names worker and cause."""
    script = write_script(tmp_path / "train.py", before=f"import os, signal\nif distbp.rank() == 1: {way}")
    done = distbp("run", "--nproc", 2, script, tmp_path / "run")
    assert done.returncode == 70
    assert "worker 1 was lost again" in done.stderr.strip().splitlines()[-1]


def test_workers_that_differ_are_refused(distbp, tmp_path):
    """Another batch size on one worker is found before step 1, and named."""
    script = write_script(
        tmp_path / "train.py",
        before="if distbp.rank() == 1: trainer = distbp.Trainer(model, batch_size=96, micro_batch=8, seed=5)",
    )
    done = distbp("run", "--nproc", 2, script, tmp_path / "run")
    assert done.returncode == 78
    assert "identity.seed" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "named"),
    [
        ("OPENBLAS_CORETYPE", "Nehalem", "environment.blas"),
        ("NPY_DISABLE_CPU_FEATURES", "X86_V3 AVX2", "cpu_features"),
    ],
)
def test_a_worker_with_another_kernel_is_refused(variable, value, named, distbp, tmp_path):
    """Workers whose BLAS kernel or NumPy loops differ are found before step 1, with the cure."""
    early = f"import os\nif os.environ.get('DISTBP_RANK') == '1': os.environ['{variable}'] = '{value}'\n"
    (tmp_path / "sitecustomize.py").write_text(early)  # Python runs it before it imports anything else.
    environment = {"PYTHONPATH": str(tmp_path), "OPENBLAS_CORETYPE": "Haswell"}
    script = write_script(tmp_path / "train.py")
    done = distbp("run", "--nproc", 2, script, tmp_path / "run", env=environment)
    assert done.returncode == 78, done.stderr
    assert named in done.stderr
    assert "OPENBLAS_CORETYPE" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_signal_to_the_group_saves_and_stops(number, undisturbed, start, distbp, tmp_path):
    """Schedulers signal every process of a job: that is one request, with a checkpoint and 75."""
    out = tmp_path / "run"
    job = start("train", "digits", *OPTIONS, "--nproc", 2, "--out", out)
    wait_until(lambda: step_of(out) >= 20)
    os.killpg(job.pid, number)
    stopped = job.wait()
    assert stopped.returncode == 75, stopped.stderr
    assert "the checkpoint is safe" in stopped.stderr
    assert distbp("train", "digits", *OPTIONS, "--out", out).returncode == 0
    same_bits(out, undisturbed)


def test_ctrl_c_of_a_serial_run(undisturbed, start, distbp, tmp_path):
    """One process answers Ctrl-C with 130 and a checkpoint, like several."""
    out = tmp_path / "run"
    job = start("train", "digits", *OPTIONS, "--backend", "serial", "--out", out)
    wait_until(lambda: step_of(out) >= 20)
    os.kill(job.pid, signal.SIGINT)
    stopped = job.wait()
    assert stopped.returncode == 130
    assert "stopped on request after step" in stopped.stderr
    assert distbp("train", "digits", *OPTIONS, "--out", out).returncode == 0
    same_bits(out, undisturbed)


@pytest.mark.parametrize("who", ["distbp.rank() == 1", "distbp.rank() == 0"])
def test_a_worker_that_skips_fit_is_named(who, distbp, tmp_path):
    """A worker that ends while the others wait in fit ends the job at once."""
    script = write_script(tmp_path / "train.py", before=f"if {who}: sys.exit(0)")
    done = distbp("run", "--nproc", 2, script, tmp_path / "run", timeout=30)
    assert done.returncode == 1
    assert "ended without the call of fit" in done.stderr


@pytest.mark.parametrize("options", [("--backend", "serial"), ("--nproc", 2)])
def test_calls_without_a_directory_do_not_share_one(options, distbp, tmp_path):
    """Two calls of fit in the same second get directories, and results, of their own."""
    script = tmp_path / "train.py"
    script.write_text(
        SCRIPT.split("history")[0].format(before="")
        + "for epochs in (1, 2):\n"
        + "    result = trainer.fit(train, val=val, epochs=epochs).result\n"
        + "    distbp.print(result['steps'], result['out'])\n"
    )
    done = distbp("run", *options, script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (one, first), (two, second) = (line.split(maxsplit=1) for line in done.stdout.splitlines())
    assert (int(one), int(two)) == (17, 34)
    assert first != second


def test_a_second_call_may_go_on_in_the_same_directory(distbp, tmp_path):
    """The lock and the memory of a finished call are given back before the next one."""
    script = tmp_path / "train.py"
    script.write_text(
        SCRIPT.split("history")[0].format(before="")
        + "for epochs in (1, 2, 3):\n"
        + "    result = trainer.fit(train, val=val, epochs=epochs, out='run').result\n"
        + "    distbp.print(result['steps'])\n"
    )
    done = distbp("run", "--nproc", 2, script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["17", "34", "51"]


def test_a_very_long_error_arrives(distbp, tmp_path):
    """A message too long for a packet is shortened; its end, which says most, is printed."""
    script = write_script(
        tmp_path / "train.py",
        before="if distbp.rank() == 1: raise RuntimeError(chr(0x1F600) * 90000 + 'the end')",
    )
    done = distbp("run", "--nproc", 2, script, tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr.strip().endswith("the end")


def test_work_at_exit_is_done(distbp, tmp_path):
    """What a script registered for its exit happens on every worker."""
    script = write_script(
        tmp_path / "train.py",
        before="import atexit, pathlib; atexit.register(pathlib.Path(f'bye-{distbp.rank()}').touch)",
    )
    assert distbp("run", "--nproc", 2, script, tmp_path / "run", cwd=tmp_path).returncode == 0
    assert sorted(path.name for path in tmp_path.glob("bye-*")) == ["bye-0", "bye-1"]
