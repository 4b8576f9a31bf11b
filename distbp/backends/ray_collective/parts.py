"""What a rank holds in a group: joining a group makes it, destroying the group gives it back."""

from __future__ import annotations

import os
import select
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from distbp.backends.ray_collective.board import RayBoard, own_address
from distbp.backends.ray_collective.circle import BARRIER, Circle, area_bytes
from distbp.backends.ray_collective.flow import Flow
from distbp.backends.ray_collective.meeting import Meeting, Plan
from distbp.backends.ray_collective.memory import NodeMemory, late, lost, memory_bytes, name_ranks
from distbp.backends.ray_collective.moves import Moves
from distbp.backends.ray_collective.pairs import Pairs
from distbp.backends.ray_collective.sums import Sums
from distbp.errors import DistbpError
from distbp.transports.base import Transport
from distbp.transports.tcp import open_lane

__all__ = ["Parts", "join_group"]

_GRACE_S = 5.0
"""Seconds that a rank waits for another of its node beyond the deadline, when there are more nodes: the other
may be waiting for one of them, and then it is that one which has to be named."""

_LOOK_S = 0.001


@dataclass
class Parts:
    """Everything that a rank holds in a group; `close` is idempotent."""

    circle: Circle
    memory: NodeMemory
    lane: Transport | None
    moves: Moves
    sums: Sums
    pairs: Pairs
    meeting: Meeting

    def fail(self, error: BaseException) -> None:
        """Tell this node why the group is broken, and close connections so that other nodes notice."""
        self.memory.fail(error)
        self._disconnect()

    def close(self) -> None:
        """Leave the group."""
        self._disconnect()
        self.sums.close()
        self.memory.close()
        self.meeting.close()

    def _disconnect(self) -> None:
        """Close all connections."""
        self.pairs.close()
        if self.lane is not None:
            with suppress(DistbpError):
                self.lane.close()


def join_group(world_size: int, rank: int, group_name: str, deadline_s: float, meeting_s: float) -> Parts:
    """Meet the other ranks, share memory with those of this node, and connect with other nodes.

    `meeting_s` bounds this, `deadline_s` the operations that follow.  Errors name the ranks that are missing.
    """
    until = time.monotonic() + meeting_s
    with ExitStack() as undo:
        meeting = Meeting(RayBoard(group_name), world_size, rank, own_address(), meeting_s)
        undo.callback(meeting.close)
        plan = meeting.attend()
        circle = Circle(rank, plan.nodes)
        memory = map_memory(meeting, circle, meeting_s)
        undo.callback(memory.close)
        try:
            lane = connect_lane(meeting, plan, circle, memory, until)
            if lane is not None:
                undo.callback(lane.close)
            pairs = Pairs(circle, memory, meeting.listener, plan.addresses, plan.key, deadline_s)
            flow = Flow(circle, memory, lane, area_bytes(plan.nodes))
            moves, sums = Moves(flow), Sums(flow)
            moves.barrier(BARRIER)
        except BaseException as error:
            memory.fail(error)
            raise
        meeting.finish()
        memory.deadline_s = deadline_s + (_GRACE_S if circle.lanes else 0.0)
        if lane is not None:
            lane.deadline_s = deadline_s
        undo.pop_all()
    return Parts(circle, memory, lane, moves, sums, pairs, meeting)


def map_memory(meeting: Meeting, circle: Circle, deadline_s: float) -> NodeMemory:
    """Return the memory that this node's ranks share; its lowest rank makes it as large as it has to be."""
    area, descriptor = area_bytes(circle.nodes), -1
    size = memory_bytes(len(circle.mine), area)
    if len(circle.mine) > 1 and circle.local == 0:
        descriptor = meeting.beacon.descriptor
        os.ftruncate(descriptor, size)
    elif len(circle.mine) > 1:
        descriptor = meeting.neighbours[circle.mine[0]].descriptor
        leader = circle.mine[0]
        await_size(descriptor, size, leader, meeting.neighbours[leader].process, deadline_s)
    memory = NodeMemory(
        descriptor,
        circle.mine,
        circle.rank,
        {rank: neighbour.process for rank, neighbour in meeting.neighbours.items()},
        area,
        deadline_s,
    )
    for neighbour in meeting.neighbours.values():
        neighbour.process = -1  # The memory's now.
    return memory


def await_size(descriptor: int, size: int, rank: int, process: int, deadline_s: float) -> None:
    """Wait until `rank`, whose pidfd is `process`, has given the node's memory its size."""
    until = time.monotonic() + deadline_s
    poll = select.poll()
    poll.register(process, select.POLLIN)
    while os.fstat(descriptor).st_size != size:
        if poll.poll(0):
            raise lost([rank])
        if time.monotonic() > until:
            raise late([rank], deadline_s)
        time.sleep(_LOOK_S)


def connect_lane(
    meeting: Meeting, plan: Plan, circle: Circle, memory: NodeMemory, until: float
) -> Transport | None:
    """Connect this rank with the ranks of other nodes that own the same lane; None if it owns no lane."""
    if circle.local >= circle.lanes:
        return None
    assert meeting.listener is not None, "a rank that cannot reach all others listens"
    transport: Transport = open_lane(
        meeting.listener,
        [plan.addresses[ranks[circle.local]] for ranks in plan.nodes],
        circle.node,
        plan.key,
        label={"group": plan.number, "lane": circle.local},
        names=[f"{plan.addresses[ranks[0]][0]} ({name_ranks(ranks)})" for ranks in plan.nodes],
        deadline_s=max(1.0, until - time.monotonic()),
        check=memory.check,
    )
    return transport
