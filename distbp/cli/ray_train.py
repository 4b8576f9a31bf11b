"""`distbp train` and `distbp run` with `--backend ray`: the driver's part, from cluster to exit code."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from distbp.backends.ray import RayJob
from distbp.backends.ray_cluster import RayCluster, choose_hosts
from distbp.cli.job import build_trainer, completed, fit_options, load_data, pack_job, run_name
from distbp.cli.outcome import describe_plan, report
from distbp.cli.ray_worker import RayWorker
from distbp.config import Config
from distbp.partition import default_micro_batch
from distbp.run_directory import RunDirectory

__all__ = ["run_on_ray", "train_on_ray"]

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a job that was submitted."""


def train_on_ray(config: Config, *, dry_run: bool) -> int:
    """Check everything here, place the workers on the cluster, and say how it ended."""
    prepared = load_data(config)
    config = completed(config, prepared)
    trainer = build_trainer(config, prepared.preprocessing)
    options = fit_options(config, prepared.preprocessing, config.run.out)
    threads, insecure = config.run.threads, config.run.ray_insecure
    micro_batch = config.train.micro_batch or default_micro_batch(config.train.batch_size)
    most = config.train.batch_size // micro_batch
    trainer.plan(prepared.train, prepared.validation, workers=config.run.nproc or 1, **options)
    with joined_cluster((config.run.nproc or 1) * threads, insecure) as cluster:
        nproc = config.run.nproc or _as_many_as_fit(cluster, threads, most)
        hosts = choose_hosts(nproc, threads, cluster.nodes(), cluster.ip)
        plan = trainer.plan(prepared.train, prepared.validation, workers=nproc, **options)
        if dry_run:
            describe_plan(config, "ray", nproc, plan)
            return 0
        run = RunDirectory.open(plan.out, run_name(config))
        out = run.path
        try:
            admission = run.admit(plan)
            if admission.result is not None:
                print(f"the run in {out} is already finished", file=sys.stderr)
                return report(out)
            packed = pack_job(config, prepared, str(out))
            job = RayJob(
                cluster,
                hosts,
                RayWorker,
                [],
                threads=threads,
                max_restarts=config.run.max_restarts,
                join_timeout_s=config.run.join_timeout_s,
                job=packed.message,
                data=_content(packed.descriptor),
                admitted=(run, admission),
            )
            code = job.run()
        finally:
            run.close()
    return report(Path(out), prepared.validation) if code == 0 else code


def run_on_ray(
    arguments: Sequence[str], nproc: int | None, *, threads: int, max_restarts: int, insecure: bool
) -> int:
    """Run a script with its options on `nproc` actors."""
    script = Path(arguments[0])
    if (
        SUBMITTED not in os.environ
    ):  # A submitted job has its working directory in another place on each node.
        script = script.absolute()
    with joined_cluster((nproc or 1) * threads, insecure) as cluster:
        nproc = nproc or _as_many_as_fit(cluster, threads, sys.maxsize)
        hosts = choose_hosts(nproc, threads, cluster.nodes(), cluster.ip)
        words = [str(script), *arguments[1:]]
        job = RayJob(cluster, hosts, RayWorker, words, threads=threads, max_restarts=max_restarts)
        return job.run()


@contextmanager
def joined_cluster(cpus: int, insecure: bool) -> Iterator[RayCluster]:
    """Join a cluster, and leave it at the end."""
    cluster = RayCluster.connect(cpus, insecure=insecure)
    try:
        yield cluster
    finally:
        cluster.close()


def _as_many_as_fit(cluster: RayCluster, threads: int, most: int) -> int:
    """Return how many workers the cluster's processors are enough for, at most `most`."""
    return min(most, max(1, sum(node.cpus // threads for node in cluster.nodes())))


def _content(descriptor: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return the bytes of a memory file; takes over the descriptor."""
    size = os.fstat(descriptor).st_size
    mapped = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
    os.close(descriptor)
    return np.frombuffer(mapped, np.uint8)
