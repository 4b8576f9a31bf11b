"""What belongs to a committed step: evaluation by all workers, records and a save by rank 0.

It happens after the commit and has a done-word of its own: a worker that is lost meanwhile makes everybody
come back here with the same state, and whatever was not said to be done is done again.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import checkpoint, state
from distbp.backends.base import Seat, host_ranks
from distbp.closer_look import watched_in_epoch, watched_noise_scale
from distbp.diagnostician import Diagnostician
from distbp.errors import DistbpError
from distbp.evaluation import COLUMNS, num_batches, summary, write_row
from distbp.fault_points import FaultPoints
from distbp.job import (
    EVALUATE,
    LOSS,
    SAMPLES,
    SAVING,
    SCALARS,
    SKIPPED,
    WEIGHT,
    Job,
    epoch_ends_at,
    epoch_of,
)
from distbp.metrics.diagnosis import Finding, batch_advice
from distbp.metrics.ledger import Ledger
from distbp.metrics.progress import Progress
from distbp.metrics.records import Records
from distbp.metrics.stragglers import WINDOW, Stragglers
from distbp.partition import split_range
from distbp.reduce import tree_total
from distbp.saver import Saver
from distbp.transports.base import Transport
from distbp.verify import StateCheck

__all__ = ["AfterStep"]

Array = NDArray[Any]

_HEAR_EVERY = 4
"""Batches of evaluation between two words of the hosts."""


class AfterStep:
    """One worker's part of what follows a step; `records`, `progress` and `saver` exist on rank 0 only.

    `views` are those of the parameters that are evaluated, for both generations.
    """

    def __init__(
        self, seat: Seat, job: Job, views: list[list[Array]], check: StateCheck, faults: FaultPoints
    ) -> None:
        self.seat = seat
        self.job = job
        self.arena = seat.arena
        self.views = views
        self.check = check
        self._faults = faults
        self._transport: Transport | None = None
        ranges = [split_range(job.micro_batches, seat.size, rank) for rank in range(seat.size)]
        self._stragglers = Stragglers([last - first for first, last in ranges])
        if seat.rank == 0:
            self.records = Records(seat.admission.out, job.records)
            self.progress = Progress(job, seat)
            hosts = range(len(seat.host_sizes))
            self._diagnostician = None if job.observer is not None else Diagnostician(job, seat.admission.out)
            self._ledger = Ledger([host for host in hosts for _ in host_ranks(seat.host_sizes, host)])
            self.saver = Saver(
                seat.admission.out / "checkpoints",
                keep=job.keep,
                start=seat.admission.start,
                every_seconds=job.checkpoint_every_seconds,
                report=seat.report,
            )

    def is_due(self, step: int) -> bool:
        """Return whether evaluation, an epoch's record or a save belongs to `step` by the plan alone."""
        return self._ends_epoch(step) or self._saves_at(step)

    def saves_at(self, step: int, *, save: bool, stop: bool) -> bool:
        """Return whether `finish` will save the state of `step`."""
        return save or stop or step >= self.job.total_steps or self._saves_at(step)

    def save_is_due(self) -> bool:
        """Return whether the time between two saves is over (rank 0); ends a run that cannot save."""
        self.arena.saved = self.saver.saved_step
        return self.saver.is_due()

    def watch_stragglers(self, step: int, transport: Transport | None) -> None:
        """Note how long workers computed in this step; called by the first worker of every host."""
        self._stragglers.add(self.arena.computed())
        if step % WINDOW != WINDOW - 1:
            return
        medians = self.keep_ledger(transport)
        if self.seat.rank == 0:
            record = self._ledger.record(time.monotonic())
            if record is not None:
                self.records.metric({"kind": "workers"} | self.progress.position(step + 1) | record)
            for found in self._stragglers.judge(medians):
                self.progress.say(
                    f"distbp: W_STRAGGLER rank={found.rank} compute_ms={found.seconds * 1e3:.1f} "
                    f"others_ms={found.others * 1e3:.1f} cost_s={found.cost:.1f}: the others wait for it in "
                    "every step; look at what else runs on its host, and at its processor limit"
                )
                self.seat.report({"kind": "straggler", "step": step + 1} | asdict(found))

    def keep_ledger(self, transport: Transport | None) -> NDArray[np.float64]:
        """Swap what workers spent since the last time; return everybody's medians, which rank 0 has noted."""
        steps = self._stragglers.steps
        spent_here = np.array(self.arena.spent())
        medians = self._stragglers.take_medians() if steps else np.zeros(len(spent_here))
        mine = np.column_stack([medians, spent_here])
        if transport is not None:
            everybody = [np.empty((size, 3)) for size in self.seat.host_sizes]
            transport.allgather(mine, everybody)
            mine = np.concatenate(everybody)
        medians, *spent = mine.T
        if self.seat.rank == 0:
            self._ledger.add(medians, np.array(spent), steps)
        everybodys: NDArray[np.float64] = medians
        return everybodys

    def begin(self, step: int) -> None:
        """Begin an attempt after `step` steps; records behind it will be made again (rank 0)."""
        self.records.cut(step, self.arena.done)
        self.progress.begin(step)
        if self._diagnostician is not None:
            self._diagnostician.begin(step)

    def observe(
        self, step: int, tail: NDArray[np.float64], layers: dict[str, Any] | None, *, accepted: bool
    ) -> None:
        """Note what was seen of a step, `layers` if it was looked at closely (rank 0)."""
        diagnostician, observer = self._diagnostician, self.job.observer
        if observer is not None:
            loss = float(tail[LOSS] / tail[WEIGHT]) if accepted else math.inf
            if observer(step, loss):
                self.arena.request_stop()
        findings = [] if diagnostician is None else diagnostician.step(step, tail, accepted=accepted)
        if layers is not None:
            record = {"kind": "layers"} | self.progress.position(step) | layers
            self.records.metric(record)
            if diagnostician is not None and accepted:
                diagnostician.history.read([record])
                findings += diagnostician.judge()
        self._say(findings)

    def _record_epoch(self, records: list[dict[str, Any]]) -> None:
        """Write the records of an epoch's end, and ask what they tell."""
        for record in records:
            self.records.metric(record)
        if self._diagnostician is not None:
            self._diagnostician.history.read(records)
            self._say(self._diagnostician.judge())

    def _say(self, findings: list[Finding]) -> None:
        """Print diagnoses, and report them to whoever keeps the job."""
        for found in findings:
            self.progress.say(
                f"distbp: W_DIAGNOSIS {found.name} step={found.step}: {found.message}. Cure: {found.remedy}"
            )
            self.seat.report({"kind": "diagnosis"} | asdict(found))

    def finish(self, step: int, *, save: bool, stop: bool, transport: Transport | None) -> None:
        """Evaluate, record and save what is due at `step`, or asked for; then say that it is done."""
        job, arena = self.job, self.arena
        ends_epoch = self._ends_epoch(step)
        validation = None
        if ends_epoch and job.validation is not None:
            validation = self._evaluate(step, transport)
            if self.saves_at(step, save=save, stop=stop):
                # A run that goes back to this checkpoint does not evaluate again.
                self.check.meet(step)
        self._transport = transport
        saves = self.saves_at(step, save=save, stop=stop)
        accepted = True
        if self.seat.rank == 0:
            if ends_epoch:
                watched = watched_in_epoch(arena.watched(step), job.network.loss.kind)
                self._record_epoch(self.progress.epoch(step, arena.scalars(step), watched, validation))
            if saves:
                accepted = self._save(step)
                if accepted and (stop or step >= job.total_steps):
                    self.saver.wait_durable(step, self._waiting)
                arena.saved = self.saver.saved_step
        if saves and transport is not None and self.seat.local_rank == 0:
            self._await_rank_0(transport)
        if self.seat.local_rank == 0 and accepted:  # Else everybody goes back, and will come here again.
            arena.done = step

    def _await_rank_0(self, transport: Transport) -> None:
        """Let the hosts wait for rank 0, which may have to wait for a disk; it speaks twice a second.

        So the deadline of the transport holds for the time between two words, and not for the disk.
        """
        while not self._hear(transport, ready=True):
            self.arena.progress(SAVING)

    def _hear(self, transport: Transport, *, ready: bool) -> bool:
        """Meet the first workers of all hosts; return whether all of them are ready."""
        words = [np.empty(1, np.float32) for _ in self.seat.host_sizes]
        transport.allgather(np.array([ready], np.float32), words)
        return all(word[0] for word in words)

    def result(self, step: int, stopped: bool, durations: list[float]) -> dict[str, Any]:
        """Return what rank 0 reports about the run; `durations` are the seconds of each step."""
        job, scalars = self.job, self.arena.scalars(step)
        history = self.records.history()
        validation = next((e for e in reversed(history) if e["kind"] == "validation"), None)
        median = statistics.median(durations) if durations else None
        rate = job.batch_size / median if median else None
        noise_scale = watched_noise_scale(self.arena.watched(step))
        flops = 6 * job.network.multiply_adds
        tensors = state.named_tensors(self.arena, job, step)
        model = [array for name, array in tensors.items() if name.startswith(("parameters/", "statistics/"))]
        return {
            "status": "stopped" if stopped else "done",
            "exit_code": 75 if stopped else 0,
            "steps": step,
            "epochs": epoch_of(step, len(job.train), job.batch_size),
            "samples": int(scalars[SAMPLES]),
            "seed": job.seed,
            "parameters_sha256": checkpoint.parameters_sha256(model),
            "state_sha256": checkpoint.state_sha256(tensors),
            "train_loss": next((e["loss"] for e in reversed(history) if e["kind"] == "train"), None),
            "validation": validation
            and {key: validation.get(key) for key in ("loss", "accuracy", "entropy")},
            "samples_per_second": rate,
            "step_ms_median": median * 1e3 if median else None,
            "step_ms_quartiles": _quartiles(durations),
            "flops_per_sample": flops,
            "gflops_per_second": rate * flops / 1e9 if rate else None,
            "noise_scale": noise_scale,
            "batch_advice": batch_advice(noise_scale, job.batch_size),
            "workers": self._ledger.accounts(),
            "skipped_steps": int(scalars[SKIPPED]),
            "world_size": self.seat.size,
            "hosts": len(self.seat.host_sizes),
            "micro_batch": job.micro_batch,
            "batch_size": job.batch_size,
            "num_parameters": job.network.num_parameters,
            "num_outputs": job.network.output_shape[-1],
            "out": str(self.seat.admission.out),
            "blas": job.metadata["environment"]["blas"],
        }

    def close(self) -> None:
        """Finish what is in flight; idempotent."""
        if self.seat.rank == 0:
            with contextlib.suppress(Exception):
                self.saver.wait()
            self.progress.close()
            self.records.close()

    def _ends_epoch(self, step: int) -> bool:
        """Return whether `step` completes an epoch, or the run."""
        job = self.job
        return step >= job.total_steps or epoch_ends_at(step, len(job.train), job.batch_size)

    def _saves_at(self, step: int) -> bool:
        """Return whether the plan has a checkpoint at `step`."""
        every = self.job.checkpoint_every_steps
        return bool(every and step and step % every == 0)

    def _evaluate(self, step: int, transport: Transport | None) -> dict[str, float | None]:
        """Evaluate this worker's share of the validation batches; every worker returns the total."""
        job, arena, seat = self.job, self.arena, self.seat
        assert job.validation is not None, "nothing to evaluate"
        arena.progress(EVALUATE)
        job.network.use(self.views[step & 1])
        job.network.use_statistics(arena.scalars(step)[SCALARS:])
        count = num_batches(job.validation)
        rows = arena.evaluation
        arena.barrier.wait()
        mine = range(*split_range(count, seat.size, seat.rank))
        for turn in range(-(-count // seat.size)):
            if turn < len(mine):
                write_row(job.network, job.validation, mine[turn], rows[mine[turn]])
                arena.progress(EVALUATE)
            if transport is not None and seat.local_rank == 0 and turn % _HEAR_EVERY == _HEAR_EVERY - 1:
                self._hear(transport, ready=True)  # However long it takes, nobody is silent.
        arena.barrier.wait()
        if transport is not None and seat.local_rank == 0:
            self._gather_rows(transport, count)
        arena.barrier.wait()
        loss = job.network.loss
        return summary(tree_total(rows[:count, :COLUMNS]), loss.answers * len(job.validation), loss.kind)

    def _gather_rows(self, transport: Transport, count: int) -> None:
        """Swap the rows of this host for those of the others."""
        size, rows = self.seat.size, self.arena.evaluation
        shares = []
        for host in range(len(self.seat.host_sizes)):
            ranks = host_ranks(self.seat.host_sizes, host)
            low, high = split_range(count, size, ranks[0])[0], split_range(count, size, ranks[-1])[1]
            shares.append(rows[low:high])
        transport.allgather(shares[self.seat.host].copy(), shares)

    def settle(self) -> None:
        """Let the save in flight come to its end: what it writes was right, and may be what we go back to."""
        if self.seat.rank == 0:
            with contextlib.suppress(DistbpError):
                self.saver.wait(lambda: self.arena.progress(SAVING))
                self.arena.saved = self.saver.saved_step

    def _save(self, step: int) -> bool:
        """Begin to write the state of this step; return False if the copy is not what was computed."""
        world = {"world_size": self.seat.size, "hosts": len(self.seat.host_sizes)}
        watched = self.arena.watched(step).tolist()
        tensors = state.named_tensors(self.arena, self.job, step)
        self._waiting()
        metadata = self.job.metadata | {"world": world, "watched": watched}
        saved = self.saver.save(
            step,
            tensors,
            metadata,
            self._waiting,
            lambda copies: self.check.accepts(step, copies),
            changes=step < self.job.total_steps,
        )
        self._faults.reach(step, "save")
        return saved

    def _waiting(self) -> None:
        """Say that this worker is not stuck: it waits for the disk."""
        self.arena.progress(SAVING)
        if self._transport is not None:
            self._hear(self._transport, ready=False)


def _quartiles(durations: list[float]) -> list[float] | None:
    """Return least, lower quartile, median and upper quartile in ms, without the first steps.

    Those touch memory for the first time: a quarter of the steps, but at most 20, do not count.
    """
    steady = durations[min(20, len(durations) // 4) :]
    if len(steady) < 2:
        return None
    return [round(1e3 * seconds, 4) for seconds in (min(steady), *statistics.quantiles(steady))]
