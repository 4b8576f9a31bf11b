"""One worker's step loop, the same on every backend.

One step, from `DESIGN`'s point of view and in this file's names:

    _compute        forward and backward over this worker's micro-batches -> its slot in the arena
    barrier
    _reduce         lane owners: tree over the slots, over the hosts; sums for norms and the verdict
    barrier         now everybody knows the sums; nobody has written yet
    _update         lane owners: write the NEXT generation of the lane (a skipped step: copy the current one),
                    and check what they read if this step is verified (`verify.py`);
                    an optimizer with sums of its own writes them first, and everybody meets once more
    barrier
    _commit         the host's first worker stores the committed-step word

and after a step at which something is due, what `after_step.py` does: evaluation, records, a save.

A worker takes its generation from its own step counter.  It reads the committed-step word only at the gate,
so a store by a writer that dies between the barrier and the store cannot mislead anyone.  A loss reaches the
loop as `Parked` out of any wait; `run` then goes back to the gate and begins where the words say.

What this file does not know: how workers are started, what a model is made of, how a checkpoint looks.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import state
from distbp.after_step import AfterStep
from distbp.arena import EMPTY, RELOAD, Parked
from distbp.backends.base import Seat, host_ranks
from distbp.closer_look import CloserLook
from distbp.data import ReadAhead
from distbp.divergence import diverged
from distbp.errors import TransportError
from distbp.evaluation import EVALUATION_BATCH
from distbp.exchange import BucketExchange, Piece, bucket_starts, cut_pieces, probe_bucket_bytes
from distbp.fault_points import FaultPoints
from distbp.job import (
    COMPUTE,
    CORRECT,
    EPOCH_SUMS,
    LOSS,
    MAX_SKIPPED_IN_ROW,
    REDUCE,
    SAMPLES,
    SAVE,
    SCALARS,
    SKIPPED,
    SKIPPED_IN_ROW,
    START,
    STOP,
    TAIL,
    UPDATE,
    WEIGHT,
    Job,
    epoch_ends_at,
)
from distbp.lane import Lane
from distbp.leaf import Leaf
from distbp.nn import Context, Parameter
from distbp.optim import norm
from distbp.partition import split_range
from distbp.reduce import LaneReduction, MicroBatchSum
from distbp.terminal import say
from distbp.transports.base import Transport, TransportAborted
from distbp.trial import compare_gradients
from distbp.verify import Corruption, StateCheck

__all__ = ["Worker"]

Array = NDArray[Any]

FLOAT_BYTES = 4

LAST_DEADLINE_S = 300.0
"""Seconds to wait for others when the last step is done: rank 0 takes hashes of the whole state."""


class Worker:
    """One worker in one call of `fit`; `run` returns whether the run was stopped before its last step."""

    def __init__(self, seat: Seat, job: Job) -> None:
        self.seat = seat
        self.job = job
        self.arena = seat.arena
        self.arena.barrier.first_rank = host_ranks(seat.host_sizes, seat.host).start
        self.first, self.last = split_range(job.micro_batches, seat.size, seat.rank)
        # Whoever has nothing left to evaluate waits for somebody's batch.
        least = job.micro_batches // seat.size * job.micro_batch
        self._steps_of_a_batch = max(1.0, EVALUATION_BATCH / least)
        self.durations: list[float] = []
        self.step = 0
        self._lost_at = 0
        self._result: dict[str, Any] = {}
        self._buckets_done = 0
        self._starts: list[int] = []
        self._exchange: BucketExchange | None = None
        self._faults = FaultPoints(seat.rank)
        self._look = CloserLook(self.arena, job, self.first, self.last)
        self._build_gradient_path()
        self._build_batches()
        self.check = StateCheck(seat, job.network.layout, job.verify_every)
        self.after = AfterStep(seat, job, self._views_of(job.optimizer.evaluated), self.check, self._faults)

    def run(self) -> bool:
        """Train to the last step or to a requested stop, through any number of losses."""
        while True:
            attempt, transport = self.seat.gate(), None
            try:
                transport = self.seat.connect(attempt)
                # The verdict on every step finds what is not finite; a warning would only repeat it.
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                    self._build_lane(transport)
                    self._open_lane(transport)
                    self._prepare()
                    stopped = self._train()
            except (Parked, TransportAborted):
                continue
            except Corruption as found:
                self._lost_at = self.step
                self.after.settle()
                self.seat.corrupted(attempt, found.finding)
                continue
            except TransportError:
                if not self.seat.replaces_lost:
                    if transport is not None:
                        transport.abort()  # Closing it in order would need the host that is out of reach.
                    raise
                # Somebody may be dead, and then the coordinator is about to say so; or a link broke.
                self.seat.broken(attempt)
                continue
            finally:
                if self._exchange is not None:
                    self._exchange.close()
                if transport is not None:
                    transport.close()
            return stopped

    # Building: everything that is allocated once.

    def _build_gradient_path(self) -> None:
        """Let backprop write into this worker's slot, through the tree over its micro-batches."""
        job, local = self.job, self.seat.local_rank
        self._gradient = MicroBatchSum(self.first, self.last, self.arena.slots[local])
        self._tail = MicroBatchSum(self.first, self.last, self.arena.tails[local])
        self._tail_rows = np.zeros((self.last - self.first, job.tail))
        self._views = self._views_of("parameters")
        job.network.send_gradients_to(self._collect)

    def _views_of(self, vector: str) -> list[list[Array]]:
        """Return the views of every tensor in a state vector, for both generations."""
        return [self.job.network.views(self.arena.vectors(step)[vector]) for step in (0, 1)]

    def _collect(self, parameter: Parameter, leaf: Leaf) -> None:
        """Add up one tensor; when it was the last one of a bucket, say so to the lane owners."""
        self.arena.count_unit()
        self._faults.reach(self.step, "backward")
        if self._look.on:
            leaf = self._look.measured(leaf)
        self._gradient.collect(parameter.offset, parameter.shape, leaf)
        if self._buckets_done < len(self._starts) and parameter.offset == self._starts[self._buckets_done]:
            self._buckets_done += 1
            self.arena.mark_ready(self.step, self._buckets_done)

    def _build_lane(self, transport: Transport | None) -> None:
        """Find this worker's lane: in every bucket a run of the fixed blocks over which norms are summed."""
        layout, seat, arena = self.job.network.layout, self.seat, self.arena
        borders = layout.borders()
        blocks = norm.blocks(borders)
        self._starts = [0]
        if len(seat.host_sizes) > 1:
            if transport is not None and seat.local_rank == 0:
                arena.bucket_bytes = self.job.bucket_bytes or probe_bucket_bytes(transport)
            arena.barrier.wait()
            self._starts = bucket_starts(borders, arena.bucket_bytes // FLOAT_BYTES)
        self._pieces: list[Piece] = []
        if seat.local_rank < seat.lanes:
            self._pieces = cut_pieces(blocks, layout.size, self._starts, seat.lanes, seat.local_rank)
        self._lane = Lane(arena, self.job, self._pieces, blocks)

    def _open_lane(self, transport: Transport | None) -> None:
        """Lay out the reduction of this worker's lane, and of the tail for the host's first worker."""
        seat, micro_batches = self.seat, self.job.micro_batches
        ranges = [
            [split_range(micro_batches, seat.size, rank) for rank in host_ranks(seat.host_sizes, host)]
            for host in range(len(seat.host_sizes))
        ]
        host_ranges = [(workers[0][0], workers[-1][1]) for workers in ranges]
        self._transport = transport
        reductions = [
            LaneReduction(
                [[vector[piece.low : piece.high] for vector in blocks] for blocks in self.arena.slots],
                ranges[seat.host],
                host_ranges,
                transport,
            )
            for piece in self._pieces
        ]
        self._exchange = BucketExchange(
            self.arena,
            reductions,
            transport,
            overlap=self.job.overlap,
            before=lambda: self._faults.reach(self.step, "exchange"),
        )
        if seat.local_rank == 0:
            self._tail_sum = LaneReduction(self.arena.tails, ranges[seat.host], host_ranges, transport)
        self.check.open(self._pieces, self._starts, transport)

    def _build_batches(self) -> None:
        """Allocate the arrays that batches are read into."""
        count = (self.last - self.first) * self.job.micro_batch
        x, y = self.job.train.batch(np.zeros(count, np.int64))
        self._x, self._y = np.empty_like(x), np.empty_like(y)
        self._ahead = ReadAhead(self.job.train, self.job.order, self.job.batch_size)

    # Beginning an attempt.

    def _prepare(self) -> None:
        """Bring every host to the same step, and make sure that all workers compute alike."""
        arena, job, admission = self.arena, self.job, self.seat.admission
        arena.progress(START)
        arena.forget_ready()
        if self._transport is not None and self.seat.local_rank == 0:
            state.share(arena, job, admission, self._transport)
        elif arena.committed == EMPTY and self.seat.rank == 0:
            state.begin(arena, job, admission)
        self.arena.barrier.wait()
        self.step = self.arena.committed
        self._faults.reach(self.step, "start")
        views = self._views[self.step & 1]
        compare_gradients(self.seat, job, self.step, views, self._transport, self.check)
        job.network.send_gradients_to(self._collect)
        if self.seat.rank == 0:
            if arena.source == RELOAD:
                self._report_reload()
            self.after.begin(self.step)

    def _report_reload(self) -> None:
        """Say from which step the run goes on after its state was given up."""
        redone = max(self._lost_at - self.step, 0)
        say(f"distbp: I_RESUMED step={self.step} steps_redone={redone}")
        self.seat.report({"kind": "restart", "step": self.step, "steps_redone": redone})

    # The loop.

    def _train(self) -> bool:
        """Make steps until the last one is done, or a stop was agreed on; return whether it was a stop."""
        job = self.job
        self._flags = np.zeros(2)
        while True:
            stop = bool(self._flags[0] > 0 and self.step < job.total_steps)
            due = self.after.is_due(self.step) or bool(self._flags.any())
            if due and self.arena.done < self.step:
                save = bool(self._flags[1])
                self._be_patient(self._steps_of_a_batch)
                self.after.finish(self.step, save=save, stop=stop, transport=self._transport)
                self._be_patient(1.0)
            if stop or self.step >= job.total_steps:
                self._set_deadlines(LAST_DEADLINE_S)
                if self.seat.local_rank == 0:
                    self.after.keep_ledger(self._transport)
                self._result = (
                    self.after.result(self.step, stop, self.durations) if self.seat.rank == 0 else {}
                )
                self._meet_everybody()
                return stop
            begun = time.perf_counter()
            self._make_step()
            self.durations.append(time.perf_counter() - begun)
            if len(self.durations) % 8 == 1:
                self._be_patient(1.0)

    def _be_patient(self, steps: float) -> None:
        """Wait from now on for others as long as five times so many of the slowest recent steps take."""
        if self.seat.patience_s is not None and self.durations:
            self._set_deadlines(max(self.seat.patience_s, 5 * steps * max(self.durations[-64:])))

    def _set_deadlines(self, seconds: float) -> None:
        """Say how long this worker waits for others before it takes them for lost."""
        self.arena.barrier.deadline_s = seconds
        if self._transport is not None:
            self._transport.deadline_s = seconds

    def _meet_everybody(self) -> None:
        """Wait for every worker of every host: nobody may leave while another could still need it."""
        self.check.meet(self.step)
        if self._transport is not None and self.seat.local_rank == 0:
            self._transport.barrier()
        self.arena.barrier.wait()

    def _make_step(self) -> None:
        """Make one step: the picture in the module docstring."""
        arena, barrier = self.arena, self.arena.barrier
        times = [time.perf_counter()]
        arena.progress(COMPUTE)
        self._compute()
        times.append(time.perf_counter())
        arena.note_compute(times[1] - times[0])
        barrier.wait()
        times.append(time.perf_counter())
        arena.progress(REDUCE)
        self._reduce()
        waiting_since = time.perf_counter()
        barrier.wait()
        times.append(time.perf_counter())
        waited = times[2] - times[1] + times[3] - waiting_since
        arena.progress(UPDATE)
        tail = arena.tails[0][0].copy()
        accepted = self._update(tail)
        waiting_since = time.perf_counter()
        barrier.wait()
        arena.note_wait(waited + time.perf_counter() - waiting_since)
        self.check.conclude()
        self._refuse_divergence(accepted)
        times.append(time.perf_counter())
        self._commit(tail, times, accepted=accepted)
        self._flags[:] = tail[STOP], tail[SAVE]
        self.step += 1

    def _compute(self) -> None:
        """Run this worker's micro-batches; gradients and sums end in its slot."""
        job, step, rows = self.job, self.step, self._tail_rows
        self._buckets_done = 0
        self._look.begin(step)
        if self._exchange is not None:
            self._exchange.begin(step)
        count = self.last - self.first
        position = step * job.batch_size + self.first * job.micro_batch
        indices = job.order.indices(position, count * job.micro_batch)
        if self.seat.local_rank == 0:
            self._ahead.reach(step * job.batch_size)
        self._faults.reach(step, "read")
        job.train.batch(indices, self._x, self._y)
        shape = (count, job.micro_batch)
        job.change(self._x.reshape(shape + self._x.shape[1:]), step, self.first)
        job.network.use(self._views[step & 1])
        self._faults.reach(step, "forward")
        sums = job.network.loss_and_gradient(
            self._x.reshape(shape + self._x.shape[1:]),
            self._y.reshape(shape + self._y.shape[1:]),
            Context(True, job.seed, step, self.first),
        )
        rows[:, LOSS], rows[:, WEIGHT], rows[:, CORRECT] = sums.loss, sums.weight, sums.correct
        self._look.write_tail(rows, sums)
        job.network.write_statistics(rows[:, TAIL:])
        rows[0, STOP] = self.arena.stop_requested
        if self.seat.rank == 0:
            rows[0, SAVE] = self.after.save_is_due()
        bad = np.flatnonzero(~np.isfinite(sums.loss))
        self.arena.mark_bad(self.first + int(bad[0]) if len(bad) else -1)
        self._faults.reach(step, "publish")
        self._tail.collect(0, (job.tail,), lambda low, high, out: np.copyto(out, rows[low:high]))

    def _reduce(self) -> None:
        """Add this worker's lane, then measure it while it is still in the cache."""
        self._faults.reach(self.step, "reduce")
        if self._pieces:
            assert self._exchange is not None, "the lane was opened"
            self._exchange.finish()
            self._faults.reach(self.step, "measure")
            self._lane.measure()
        if self.seat.local_rank == 0:
            self._tail_sum.run()
            self.after.watch_stragglers(self.step, self._transport)

    def _update(self, tail: NDArray[np.float64]) -> bool:
        """Write the next generation of the lane and, by the host's first worker, of the scalars.

        Returns the verdict on the step; a step that is not accepted copies the current generation.
        """
        job, step = self.job, self.step
        self._faults.reach(step, "apply")
        accepted = self._lane.is_finite() and bool(np.isfinite(tail).all()) and bool(tail[WEIGHT] > 0)
        if accepted and job.optimizer.num_sums:
            self._lane.prepare(step, tail)
            self.arena.barrier.wait()  # Now everybody knows these sums, too.
        saved = self.after.saves_at(step + 1, save=bool(tail[SAVE] > 0), stop=bool(tail[STOP] > 0))
        # Before a run is given up as diverged, hosts compare their states: one may be corrupted.
        for part in self.check.begin(step, covered=saved or self._diverges(accepted)):
            if accepted:
                self._lane.apply(part, step, tail)
            else:
                self._lane.copy(part, step)
            self.check.follow(part)
        if accepted and self._look.on:
            self._look.measure_change(step, self._pieces)
        if self.seat.local_rank == 0:
            self._update_scalars(tail, accepted)
            self.check.follow_scalars()
        self.check.agree()
        return accepted

    def _refuse_divergence(self, accepted: bool) -> None:
        """End the run when too many steps in a row were not finite."""
        if self._diverges(accepted):
            raise diverged(self.seat, self.job, self.step, self._transport)

    def _diverges(self, accepted: bool) -> bool:
        """Return whether this step is the last one that may be skipped in a row."""
        return not accepted and bool(self.arena.scalars(self.step)[SKIPPED_IN_ROW] + 1 >= MAX_SKIPPED_IN_ROW)

    def _update_scalars(self, tail: NDArray[np.float64], accepted: bool) -> None:
        """Write the next generation of the scalar state."""
        job, step = self.job, self.step
        current, following = self.arena.scalars(step), self.arena.scalars(step + 1)
        np.copyto(following, current)
        if epoch_ends_at(step, len(job.train), job.batch_size):
            for place in EPOCH_SUMS:
                following[place] = 0.0
        following[SAMPLES] = (step + 1) * job.batch_size
        if accepted:
            for place, column in EPOCH_SUMS.items():
                following[place] += tail[column]
            following[SKIPPED_IN_ROW] = 0
            job.network.move_statistics(following[SCALARS:], tail[TAIL:] / job.micro_batches)
        else:
            following[SKIPPED_IN_ROW] += 1
            following[SKIPPED] += 1
        self._look.follow(step, tail, self._lane.gradient_sums if accepted else ())

    def _commit(self, tail: NDArray[np.float64], times: list[float], *, accepted: bool) -> None:
        """Write the records of the step, then store the committed-step word, the last thing of all."""
        job, step = self.job, self.step
        self._faults.reach(step, "commit")
        if self.seat.rank == 0:
            if job.log_samples:
                indices = job.order.indices(step * job.batch_size, job.batch_size)
                self.after.records.samples(step, indices.tolist())
            self.after.progress.step(step + 1, tail, times, self.after.records)
            layers = self._look.layers(tail, accepted) if self._look.on else None
            self.after.observe(step + 1, tail, layers, accepted=accepted)
        if self.seat.local_rank == 0:
            self.check.commit()
            self.arena.committed = step + 1

    def result(self) -> dict[str, Any]:
        """Return what rank 0 reports about the run."""
        return self._result

    def close(self) -> None:
        """Finish what is in flight and give back the arena; idempotent."""
        self.after.close()
        self.arena.close()
