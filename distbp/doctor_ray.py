"""`distbp doctor --backend ray`: what only a Ray cluster as a whole can show.

The driver asks, an actor on every node answers, and one report is shown.

    1  Ray is here, and new enough; somebody listens; our token is taken       before joining
    2  what each node has: processors, memory, software, Ray's store           `doctor_witness.py` there,
    3  the checks of one machine, on every node                                `doctor_ray_nodes.py` judges
    4  who can use the folder where runs would lie                             `doctor_folder.py`
    5  every node connects to the driver, and to every other one               `doctor_ray_links.py`
    6  how much a submitted job would send from here                           `doctor_upload.py`

It disturbs nobody: its actors take no processors, are tied to their nodes, and are ended before the report.
A node that is silent is named, and left out of what follows.  A wait inside Ray itself, as for joining, has
no deadline of Ray's; a timer beside it shows the report as far as it is, and ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from distbp.backends.ray_cluster import RayCluster
from distbp.backends.ray_doctor import Admittance, RayWitnesses, takes_connections
from distbp.config import Run
from distbp.doctor import Verdict, check_out, check_ray, examine, exit_code_of
from distbp.doctor_folder import posted
from distbp.doctor_ranks import join_verdicts, say_count
from distbp.doctor_ray_links import Deadlines, call_driver, judge_pairs, measure_pairs
from distbp.doctor_ray_nodes import (
    SHARE,
    Node,
    judge_answers,
    judge_calls,
    judge_processors,
    judge_shared,
    judge_software,
    judge_store,
    judge_token,
)
from distbp.doctor_upload import judge_upload
from distbp.doctor_witness import ELSEWHERE, NodeFacts, Witness, token_files_of_this_process
from distbp.environment import available_cores
from distbp.errors import AuthenticationError, DistbpError, EnvironmentMismatch

__all__ = ["RayReport", "examine_cluster"]

LAST_RESORT_S = 900.0
"""No examination takes as long; a process that still runs is ended, with the place where it hangs."""

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for a job that was submitted."""

ORDER = (
    "ray", "cluster", "token", "nodes", "software", "processors", "object store", "shared", "driver",
    "network", "upload",
)  # fmt: skip
"""The checks of the cluster in the order of the report, behind those of one machine."""

GIVE_TOKEN = (
    "RAY_AUTH_MODE=token, and in RAY_AUTH_TOKEN_PATH a file with the token of the cluster's head that nobody "
    "else may read"
)


@dataclass
class RayReport:
    """What is shown: verdicts by name, and the figures behind them."""

    found: dict[str, Verdict] = field(default_factory=dict)
    nodes: list[dict[str, Any]] = field(default_factory=list)
    links: list[dict[str, Any]] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """Return 0 if nothing failed, else 78."""
        return exit_code_of(self.found)


class _CutShort(Exception):
    """The report says why nothing more can be asked."""


def examine_cluster(
    out: Path,
    run: Run,
    show: Callable[[RayReport], None],
    deadlines: Deadlines | None = None,
) -> int:
    """Examine the cluster that RAY_ADDRESS names, or a Ray of our own; return the exit code.

    Runs would be written below `out`; `run` says how many threads a worker has and whether a cluster without
    tokens is trusted.  `show` is called once, with the report.
    """
    faulthandler.dump_traceback_later(LAST_RESORT_S, exit=True)
    try:
        examination = _Examination(out.absolute(), run, show, deadlines or Deadlines())
        try:
            examination.run_all()
        except _CutShort:
            pass
        except Exception as error:  # Ray has many errors; none of them shall cost what was found.
            traceback.print_exc()
            finding = f"the examination ended early with {type(error).__name__}"
            examination.report.found["cluster"] = Verdict("FAIL", finding, "ray status, and the lines above")
        return examination.finish()
    finally:
        faulthandler.cancel_dump_traceback_later()


@dataclass
class _Examination:
    """Everything that is asked; `report` fills."""

    out: Path
    run: Run
    show: Callable[[RayReport], None]
    deadlines: Deadlines
    report: RayReport = field(default_factory=RayReport)
    nodes: list[Node] = field(default_factory=list)
    address: str = field(default_factory=lambda: os.environ.get("RAY_ADDRESS", ""))

    @property
    def whom(self) -> str:
        """What is waited for."""
        return f"the Ray cluster at {self.address}" if self.address else "a Ray of our own"

    def finish(self) -> int:
        """Show the report and return the exit code."""
        found = self.report.found
        order = [*(name for name in found if name not in ORDER), *(name for name in ORDER if name in found)]
        self.report.found = {name: found[name] for name in order}
        self.show(self.report)
        sys.stdout.flush()
        return self.report.exit_code

    def run_all(self) -> None:
        """Make all checks, one after the other; `_CutShort` when there is nobody to ask."""
        self._check_before_joining()
        with self._joined() as cluster, contextlib.closing(self._try_without_token(cluster)) as trial:
            with self._waiting(self.deadlines.answer_s, f"the nodes of {self.whom}"):
                witnesses = RayWitnesses(cluster, Witness)
            self.report.found["cluster"] = self._judge_cluster(cluster, witnesses)
            with witnesses:
                self._describe(witnesses)
                self._examine_nodes(witnesses)
                self._check_shared(witnesses)
                self._check_network(witnesses, cluster.ip)
            silent = {witnesses.nodes[index].name: why for index, why in witnesses.silent.items()}
            self.report.found |= {
                "nodes": judge_answers(self.nodes, silent),
                "token": self._judge_token(trial),
                "upload": self._judge_upload(cluster),
            }

    # ----- joining

    def _check_before_joining(self) -> None:
        """Check Ray's version and, of a cluster with a plain address, whether it takes our token."""
        if importlib.util.find_spec("ray") is None:
            self._give_up("ray", Verdict("FAIL", "ray is not installed", "pip install 'ray[default]>=2.54'"))
        ray = check_ray()
        if ray.status != "ok":
            self._give_up("ray", Verdict("FAIL", ray.finding, ray.cure))
        self.report.found["ray"] = ray
        if self.address.startswith("http"):
            finding = f"RAY_ADDRESS {self.address} is a dashboard, which only takes jobs"
            cure = "ray job submit -- distbp doctor --backend ray, or RAY_ADDRESS=HOST:6379 of the head"
            self._give_up("cluster", Verdict("FAIL", finding, cure))
        if not takes_connections(self.address, self.deadlines.connect_s):
            return  # Joining says what is wrong, and knows the other forms of an address.
        with contextlib.closing(Admittance(self.address, with_token=True)) as trial:
            outcome = trial.outcome(self.deadlines.trial_s)
        if outcome == "refused":
            mode = os.environ.get("RAY_AUTH_MODE", "")
            finding = f"{self.whom} did not take our token; here RAY_AUTH_MODE is {mode!r}"
            self._give_up("token", Verdict("FAIL", finding, GIVE_TOKEN))
        if outcome == "silent":
            waited = f"{self.deadlines.trial_s:g} s"
            finding = f"{self.whom} takes connections, but gave no answer within {waited}"
            self._give_up("cluster", Verdict("FAIL", finding, "is it a Ray head? ray status tells"))

    @contextlib.contextmanager
    def _joined(self) -> Iterator[RayCluster]:
        """Join the cluster, or start a Ray of our own; leave it at the end."""
        try:
            with self._waiting(self.deadlines.join_s, self.whom):
                cluster = RayCluster.connect(available_cores(), insecure=self.run.ray_insecure)
        except AuthenticationError as error:
            self._give_up("token", _refusal(error))
        except EnvironmentMismatch as error:
            self._give_up("cluster", _refusal(error))
        try:
            yield cluster
        finally:
            with self._waiting(self.deadlines.answer_s, f"{self.whom} to end the session"):
                cluster.close()

    def _give_up(self, name: str, verdict: Verdict) -> NoReturn:
        """Add the checks of this machine alone to what failed, and end the examination."""
        found = examine(self.out, without=("ray", "mpi"))
        self.report.found = found | self.report.found | {name: verdict}
        raise _CutShort

    @contextlib.contextmanager
    def _waiting(self, seconds: float, whom: str) -> Iterator[None]:
        """End the process with the report as far as it is when what follows takes longer than `seconds`."""

        left = threading.Lock()

        def end() -> None:
            if not left.acquire(blocking=False):
                return
            verdict = Verdict("FAIL", f"waited {seconds:g} s for {whom}", "ray status tells whether it runs")
            self.report.found["cluster"] = verdict
            os._exit(self.finish())

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            left.acquire()  # A timer that has fired in this instant goes on to its end.
            timer.cancel()

    def _try_without_token(self, cluster: RayCluster) -> Admittance:
        """Start to try whether the cluster lets in somebody who has no token."""
        return Admittance(cluster.ray.get_runtime_context().gcs_address, with_token=False)

    def _judge_cluster(self, cluster: RayCluster, witnesses: RayWitnesses) -> Verdict:
        """Say where the cluster is and what it gives out."""
        with self._waiting(self.deadlines.answer_s, f"the processors of {self.whom}"):
            free = cluster.ray.available_resources().get("CPU", 0)
        total = sum(node.cpus for node in witnesses.nodes)
        at = cluster.ray.get_runtime_context().gcs_address
        where = f"one of our own at {at}, since RAY_ADDRESS is not set" if cluster.own else f"at {at}"
        driver = next((node.name for node in witnesses.nodes if node.drivers), "none of its nodes")
        return Verdict(
            "ok",
            f"{where}: {say_count(len(witnesses.nodes), 'node')}, the driver on {driver}; {total:g} "
            f"processors, {free:g} of them free",
        )

    # ----- what nodes are

    def _describe(self, witnesses: RayWitnesses) -> None:
        """Ask every node what it has, and judge that."""
        told = witnesses.ask_all("describe", self.run.threads, timeout_s=self.deadlines.start_s)
        facts = {index: msgspec.convert(one, NodeFacts) for index, one in told.items()}
        self.nodes = [Node(ray, facts.get(index)) for index, ray in enumerate(witnesses.nodes)]
        self.report.nodes = [node.described() for node in self.nodes]
        self.report.found |= {
            "software": judge_software(self.nodes),
            "processors": judge_processors(self.nodes),
            "object store": judge_store(self.nodes),
        }

    def _examine_nodes(self, witnesses: RayWitnesses) -> None:
        """Make the checks of one machine on every node, and join what they find."""
        told = witnesses.ask_all("examine", str(self.out), timeout_s=self.deadlines.answer_s)
        by_node = {
            self.nodes[index].name: {name: Verdict(**verdict) for name, verdict in verdicts.items()}
            for index, verdicts in told.items()
        }
        found = join_verdicts(by_node) if by_node else examine(self.out, without=ELSEWHERE)
        self.report.found = found | {"out": check_out(self.out)} | self.report.found

    def _check_shared(self, witnesses: RayWitnesses) -> None:
        """Write a file where runs would lie, and let every node read it."""
        with posted(self.out) as token:
            if token is None:
                self.report.found["shared"] = Verdict(
                    "FAIL", "not tried: the driver cannot write there", SHARE
                )
                return
            told = witnesses.ask_all("look_for", *token, timeout_s=self.deadlines.answer_s)
        blind = {self.nodes[index].name: trouble for index, trouble in told.items() if trouble}
        where = str(Path(token[0]).parent)
        asked = [self.nodes[index] for index in told]
        verdict = judge_shared(asked, blind, where, self.run.threads)
        if SUBMITTED in os.environ and self.out.is_relative_to(Path.cwd()):
            removed = "the folder is this job's own, and Ray removes it when the job ends"
            verdict = Verdict(
                "FAIL" if verdict.status == "FAIL" else "warn", f"{verdict.finding}; {removed}", SHARE
            )
        self.report.found["shared"] = verdict

    def _check_network(self, witnesses: RayWitnesses, ip: str) -> None:
        """Let every node connect to the driver, and nodes to each other, two by two."""
        try:
            calls = call_driver(witnesses, ip, self.deadlines)
        except EnvironmentMismatch as error:
            self.report.found["driver"] = _refusal(error)
            return
        self.report.found["driver"] = judge_calls(calls.unreached, calls.answered, calls.driver)
        # Only nodes with workers exchange gradients; the head of many clusters gives out no processors.
        members = {index: at for index, at in calls.addresses.items() if self.nodes[index].ray.cpus > 0}
        links, untried = measure_pairs(witnesses, members, self.deadlines)
        self.report.links = [msgspec.to_builtins(link) for link in links]
        verdict = judge_pairs(links, untried, len(members), self.deadlines.pairs_s)
        self.report.found["network"] = verdict

    # ----- what is left

    def _judge_token(self, trial: Admittance) -> Verdict:
        """Say who may use the cluster, and who may read its token."""
        readable = {node.name: node.facts.token_files for node in self.nodes if node.facts is not None}
        driver = next((node.name for node in self.nodes if node.ray.drivers), "the driver's host")
        readable[driver] = tuple({*readable.get(driver, ()), *token_files_of_this_process()})
        mode = os.environ.get("RAY_AUTH_MODE", "").lower()
        outcome = trial.outcome(self.deadlines.trial_s)
        readable = {name: paths for name, paths in readable.items() if paths}
        return judge_token(mode, outcome, readable, self.run.ray_insecure)

    def _judge_upload(self, cluster: RayCluster) -> Verdict:
        """Say how much would be sent if a job were submitted from here."""
        if cluster.own:
            return Verdict("ok", "one machine: nothing is sent")
        if SUBMITTED in os.environ:
            return Verdict("ok", "this is a submitted job: it was sent already")
        try:
            return judge_upload(Path.cwd())
        except (OSError, subprocess.SubprocessError) as error:
            return Verdict("warn", f"not counted: {error}", "submit jobs from a directory of their own")


def _refusal(error: DistbpError) -> Verdict:
    """Return an error that ends with what to do as a verdict."""
    finding, _, cure = str(error).rpartition("; ")
    return Verdict("FAIL", finding or cure, cure if finding else "")
