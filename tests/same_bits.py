"""One hash for every way to run: `python tests/same_bits.py [--ways local mpich openmpi] [DATA ...]`.

For each data set, which is `digits` or a path: the serial run; the local backend with 1 to 5 workers; under
each MPI 1 to 6 ranks on one host, and 1+1, 2+2, 2+1, 1+1+1 and scattered ranks on emulated hosts; on Ray 1 to
4 workers on one node and 3 to 5 on two and three nodes, by a driver and by `ray job submit`; and runs that
are stopped by SIGUSR1 in one backend and resumed in another.  Prints one line a run, and ends with 1 if any
hash differs from the serial one.  It takes minutes; the suite runs a part of it.

Needs Linux; the emulated hosts need root.  Environments: `make mpi-environments ray-environment`, or
MPICH_PREFIX, OPENMPI_PREFIX and RAY_PREFIX.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from cluster.emulated import EmulatedCluster  # noqa: E402  The repository is not installed.
from cluster.ray import RayNodes  # noqa: E402

STEPS, LONG = 60, 3000
"""Steps of a run, and of one that is stopped on its way."""

STOP_AFTER = 200
OPTIONS = [
    "-o", "train.batch_size=96", "-o", "train.micro_batch=8", "-o", "train.epochs=1000",
    "-o", "optimizer.clip_norm=5", "-o", "optimizer.momentum=0.9", "-o", "model.hidden=[128, 64]",
]  # fmt: skip
PLACEMENTS = [
    {"host0": 1, "host1": 1},
    {"host0": 2, "host1": 2},
    {"host0": 2, "host1": 1},
    {"host0": 1, "host1": 1, "host2": 1},
]
LAUNCHERS = {
    "mpich": ["mpiexec"],
    "openmpi": ["mpirun", "--allow-run-as-root", "--bind-to", "none", "--map-by", ":OVERSUBSCRIBE"],
}
SCATTER = {"mpich": ["-ppn", "1"], "openmpi": ["--map-by", "node"]}


def main():
    """Run everything, print a line for each run, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", nargs="*", default=["digits"])
    parser.add_argument("--ways", nargs="+", default=["local", "mpich", "openmpi", "ray"])
    arguments = parser.parse_args()
    flavours = [way for way in arguments.ways if way in LAUNCHERS]
    odd = 0
    with tempfile.TemporaryDirectory(prefix="distbp-same-bits-") as folder:
        others = [way for way in arguments.ways if way != "local"]
        shared = [folder, REPOSITORY, *map(prefix_of, others)]
        shared += [Path(data).resolve() for data in arguments.data if data != "digits"]
        with EmulatedCluster(3, shared=shared) as hosts:
            for data in arguments.data:
                data = data if data == "digits" else str(Path(data).resolve())
                odd += check(Runner(hosts, data, Path(folder)), arguments.ways, flavours)
    print("every run gave the same bits" if not odd else f"{odd} runs gave OTHER BITS")
    return 1 if odd else 0


def check(runner, ways, flavours):
    """Run every way for one data set; return how many hashes differ from the serial run's."""
    wanted = runner.train("serial", ["--backend", "serial"])
    odd = 0
    for name, run in itertools.chain(one_host(runner, ways, flavours), many_hosts(runner, flavours)):
        odd += say(runner, name, run(), wanted)
    if "ray" in ways:
        for name, got in ray_runs(runner):
            odd += say(runner, name, got, wanted)
    wanted = runner.train("serial", ["--backend", "serial"], steps=LONG)
    for path in itertools.permutations(ways, 2):
        odd += say(runner, " -> ".join(path), runner.resume(path), wanted)
    return odd


def say(runner, name, got, wanted):
    """Print one line; return 1 if the hash is another one."""
    same = got == wanted
    print(f"{Path(runner.data).name:10} {name:24} {got[:16]} {'same' if same else 'OTHER BITS'}", flush=True)
    return 0 if same else 1


def one_host(runner, ways, flavours):
    """Yield name and function of every run on this machine itself."""
    if "local" in ways:
        for workers in range(1, 6):
            options = ["--backend", "local", "--nproc", str(workers)]
            yield f"local {workers}", lambda options=options: runner.train("local", options)
    for flavour in flavours:
        for ranks in range(1, 7):
            yield (
                f"{flavour} {ranks}",
                lambda flavour=flavour, ranks=ranks: runner.train(flavour, [], launch(flavour, ranks)),
            )


def many_hosts(runner, flavours):
    """Yield name and function of every run on emulated hosts."""
    for flavour in flavours:
        for slots in PLACEMENTS:
            placed = "+".join(map(str, slots.values()))
            yield (
                f"{flavour} {placed}",
                lambda flavour=flavour, slots=slots: runner.train_on_hosts(flavour, slots),
            )
        slots = {"host0": 2, "host1": 2}
        yield (
            f"{flavour} 2+2 scattered",
            lambda flavour=flavour, slots=slots: runner.train_on_hosts(flavour, slots, SCATTER[flavour]),
        )


def ray_runs(runner):
    """Yield name and hash of every run on Ray clusters of one, two and three nodes."""
    for cpus in ([4], [2, 1], [2, 2], [1, 1, 1], [2, 2, 1]):
        nodes = {f"host{index}": count for index, count in enumerate(cpus)}
        with RayNodes(runner.hosts, prefix_of("ray"), nodes, dashboard=True) as cluster:
            placed = "+".join(map(str, cpus))
            for workers in range(1, 5) if len(cpus) == 1 else (sum(cpus),):
                yield f"ray {workers} on {placed}", runner.train_on_nodes(cluster, workers)
            yield f"ray job submit on {placed}", runner.train_on_nodes(cluster, sum(cpus), submit=True)


def prefix_of(name):
    """The environment of a launcher."""
    return Path(os.environ.get(f"{name.upper()}_PREFIX", REPOSITORY / f".venv-{name}"))


def launch(flavour, ranks):
    """The launcher's part of a command."""
    launcher, *options = LAUNCHERS[flavour]
    return [str(prefix_of(flavour) / "bin" / launcher), *options, "-n", str(ranks)]


class Runner:
    """Runs distbp on one data set and returns hashes."""

    def __init__(self, hosts, data, folder):
        self.hosts = hosts
        self.data = data
        self.folder = Path(tempfile.mkdtemp(dir=folder))
        self.count = itertools.count()

    def command(self, name, options, out):
        """The command of one run."""
        own = name in LAUNCHERS or name == "ray"
        python = prefix_of(name) / "bin" / "python" if own else sys.executable
        program = [str(python), "-m", "distbp.cli.main", "train", self.data, *OPTIONS]
        return [*program, "--out", str(out), *options]

    def train(self, name, options, launcher=(), steps=STEPS):
        """Train to the last step on this machine; return the parameters' hash."""
        out = self.folder / str(next(self.count))
        return hash_of(self.finish(self.start(name, options, launcher, steps, out)), out)

    def start(self, name, options, launcher, steps, out):
        """Start a run on this machine."""
        options = [*options, "-o", f"train.max_steps={steps}", "-o", "run.log_samples=true"]
        return subprocess.Popen(
            [*launcher, *self.command(name, options, out)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process):
        """Wait for a run; return what came back."""
        stdout, stderr = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def train_on_hosts(self, flavour, slots, options=()):
        """Train on emulated hosts; return the parameters' hash."""
        out = self.folder / str(next(self.count))
        command = self.command(flavour, ["-o", f"train.max_steps={STEPS}"], out)
        line = self.hosts.mpirun(
            command,
            sum(slots.values()),
            flavour,
            slots=slots,
            prefix=prefix_of(flavour),
            environment={"PYTHONPATH": str(REPOSITORY)},
            options=options,
        )
        return hash_of(self.hosts.run(self.hosts.hosts[0], line, timeout=300, cwd=self.folder), out)

    def train_on_nodes(self, cluster, workers, submit=False):
        """Train on a Ray cluster; return the parameters' hash."""
        out = self.folder / str(next(self.count))
        options = ["-o", f"train.max_steps={STEPS}", "--backend", "ray", "--nproc", str(workers)]
        command = self.command("ray", options, out)
        if submit:
            work = self.folder / "work"
            work.mkdir(exist_ok=True)
            address = cluster.dashboard_address
            job = [prefix_of("ray") / "bin" / "ray", "job", "submit", "--address", address]
            command = [*job, "--working-dir", work, "--", *command]
        return hash_of(cluster.run_driver(command, timeout=300, cwd=self.folder), out)

    def resume(self, ways):
        """Train in the first way, stop on the way, and end in the second one; return the parameters' hash."""
        out = self.folder / str(next(self.count))
        first, second = (
            (way, [], launch(way, 3)) if way in LAUNCHERS else (way, ["--backend", way, "--nproc", "2"], ())
            for way in ways
        )
        process, log = self.start(*first, LONG, out), out / "samples.log"
        while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > STOP_AFTER):
            time.sleep(0.01)
        process.send_signal(signal.SIGUSR1)
        done = self.finish(process)
        if done.returncode != 75:
            return f"code {done.returncode} instead of 75: {done.stderr.strip()[-300:]}"
        return hash_of(self.finish(self.start(*second, LONG, out)), out)


def hash_of(done, out):
    """The parameters' hash of a run that ended well."""
    if done.returncode != 0:
        return f"code {done.returncode}: {done.stderr.strip()[-300:]}"
    return json.loads((out / "result.json").read_text())["parameters_sha256"]


if __name__ == "__main__":
    sys.exit(main())
