"""The memory of the hosts of a Ray job, as the driver sees it: one keeper actor for each host.

The driver must not wait for a host that is gone.  So what is told to a keeper (`park`, `release`) is sent and
not waited for: Ray delivers the calls of one caller in order, also to an actor whose node has yet to be
found, and each of them may be made twice.  Only the words are waited for, when all workers are parked: then
every host has a node again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbp.arena import EMPTY
from distbp.backends.base import Plan, host_layout, host_ranks
from distbp.backends.hang_watch import Glance
from distbp.backends.ray_cluster import RayCluster
from distbp.backends.ray_worker import HostKeeper
from distbp.errors import WorkerLost

__all__ = ["Keepers", "RayMemory"]

_ANSWER_S = 30.0
"""Seconds for an answer that the job cannot go on without."""

_PING_S = 0.5
_GLANCE_S = 1.0
"""Seconds for an answer that is only good to have."""

Place = tuple[int, int]
"""Where workers of the same host open memory: process number, descriptor."""


Ended = Callable[[int, Any, BaseException | None], None]


class Keepers:
    """The keeper actors of all hosts and what they hold; `close` ends them, idempotent.

    `ended(host, actor, error)` is called, on another thread, when the keeper `actor` has died, and
    `replace_now` with the same arguments, on the caller's, when a call has found out.
    """

    def __init__(
        self,
        cluster: RayCluster,
        hosts: int,
        data: NDArray[np.uint8] | None,
        ended: Ended,
        replace_now: Ended,
    ) -> None:
        self._cluster = cluster
        self._hosts = hosts
        self._packed = data
        self._ended = ended
        self._replace_now = replace_now
        self._reference: Any = None
        self._actors: list[Any] = []
        self._data: list[Any] = []
        self._memory: RayMemory | None = None
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="distbp-keepers", daemon=True)

    def start(self) -> None:
        """Start one keeper for each host, and give it the data."""
        if self._packed is not None:
            self._reference, self._packed = self._cluster.ray.put(self._packed), None
        for host in range(self._hosts):
            self._actors.append(self._start(host))
            self._data.append(self._hold(host))
        self._watcher.start()

    def use(self, memory: RayMemory) -> None:
        """Serve the arenas of `memory` from now on."""
        self._memory = memory

    def tell(self, host: int, name: str, *arguments: Any) -> Any:
        """Call a method of a keeper without waiting; return the reference to its answer."""
        return getattr(self._actors[host], name).remote(*arguments)

    def ask(self, host: int, reference: Any, seconds: float = _ANSWER_S) -> Any:
        """Wait for an answer; `WorkerLost` if there is none."""
        from ray.exceptions import GetTimeoutError, RayActorError

        try:
            return self._cluster.ray.get(reference, timeout=seconds)
        except (GetTimeoutError, RayActorError) as error:
            raise WorkerLost(
                f"the keeper of host {host} gave no answer in {seconds:g} s ({type(error).__name__}); "
                "run again: resuming is safe"
            ) from error

    def has_answered(self, reference: Any) -> bool:
        """Return whether an answer, or the news that there will be none, has come."""
        return bool(self._cluster.ray.wait([reference], timeout=0)[0])

    def data(self, host: int) -> Place:
        """Return where workers of a host open the data."""
        place: Place = self._ask_again(host, lambda: self._data[host])
        return place

    def sees(self, host: int, path: str, content: bytes) -> bool:
        """Return whether a host sees the run directory."""
        return bool(self._ask_again(host, lambda: self.tell(host, "sees", path, content)))

    def is_current(self, host: int, actor: Any) -> bool:
        """Return whether `actor` is the keeper of a host, and not one that was replaced before."""
        return not self._closed.is_set() and self._actors[host] is actor

    def replace(self, host: int, pids: Sequence[int]) -> bool:
        """Start a new keeper; return whether it took the arena over from one of the workers `pids`."""
        self._actors[host] = self._start(host)
        self._data[host] = self._hold(host)
        return self._memory is not None and self._memory.restore(host, pids)

    def close(self) -> None:
        """End all keepers."""
        self._closed.set()
        if self._watcher.is_alive():
            self._watcher.join(2 * _PING_S)
        for actor in self._actors:
            with suppress(Exception):  # The cluster itself may be gone.
                self._cluster.ray.kill(actor, no_restart=True)
        self._actors = []

    def _start(self, host: int) -> Any:
        """Start the keeper of a host and watch it."""
        return self._cluster.start_actor(HostKeeper, host, 0)

    def _watch(self) -> None:
        """Ask every keeper now and then whether it lives, on a thread of its own, until they are closed.

        Ray tells the end of an actor to those who wait for an answer.  A call that never returns would need a
        keeper with two threads, and Ray does not keep the order of calls to such an actor.
        """
        from ray.exceptions import RayActorError

        asked: dict[int, tuple[Any, Any]] = {}
        while not self._closed.wait(_PING_S):
            for host, actor in enumerate(list(self._actors)):
                if asked.get(host, (None, None))[0] is not actor:
                    asked[host] = actor, actor.ping.remote()
                if not self._cluster.ray.wait([asked[host][1]], timeout=0)[0]:
                    continue
                try:
                    self._cluster.ray.get(asked[host][1])
                    del asked[host]
                except RayActorError as error:
                    self._ended(host, actor, error)

    def _hold(self, host: int) -> Any:
        """Give a keeper the data."""
        return None if self._reference is None else self.tell(host, "hold", self._reference)

    def _ask_again(self, host: int, call: Callable[[], Any]) -> Any:
        """Ask a keeper, and the one that has replaced it if it died meanwhile."""
        from ray.exceptions import RayActorError

        try:
            return self._cluster.ray.get(call(), timeout=_ANSWER_S)
        except RayActorError as error:
            self._replace_now(host, self._actors[host], error)
            return self.ask(host, call())


class RayMemory:
    """The arenas of one call; they have seen `attempt` announced and hold nothing."""

    def __init__(self, plan: Plan, host_sizes: tuple[int, ...], keepers: Keepers, attempt: int) -> None:
        self._layouts = [
            msgspec.to_builtins(host_layout(plan, host_sizes, host)) for host in range(len(host_sizes))
        ]
        self._host_sizes = host_sizes
        self._keepers = keepers
        self._attempt = attempt
        self._stop = False
        self._asked: dict[int, Any] = {}
        self._closed = False
        self._places = [self._open(host) for host in range(len(host_sizes))]
        keepers.use(self)

    def seat(self, rank: int) -> tuple[dict[str, Any], int | None]:
        """Return the layout, the worker's number on its host, and where it opens the arena."""
        host = next(h for h in range(len(self._layouts)) if rank in host_ranks(self._host_sizes, h))
        place: Place = self._keepers.ask(host, self._places[host])
        local_rank = rank - host_ranks(self._host_sizes, host).start
        return {"layout": self._layouts[host], "local_rank": local_rank, "memory": place}, None

    def park(self, attempt: int) -> None:
        """Announce `attempt` on every host."""
        self._attempt = attempt
        self._tell_all("park", attempt)

    def release(self, source: int) -> None:
        """Let the parked workers of every host begin."""
        self._tell_all("release", source)

    def words(self) -> tuple[int, ...]:
        """Return the committed-step word of every host."""
        references = [self._keepers.tell(host, "words") for host in range(len(self._layouts))]
        return tuple(int(self._keepers.ask(host, ref)[0]) for host, ref in enumerate(references))

    def progress(self) -> tuple[int, int]:
        """Return the highest committed step and the newest checkpoint of the hosts that answer at once."""
        references = [self._keepers.tell(host, "words") for host in range(len(self._layouts))]
        step, saved = EMPTY, EMPTY
        for host, reference in enumerate(references):
            with suppress(WorkerLost):
                held = self._keepers.ask(host, reference, _GLANCE_S)
                step, saved = max(step, held[0]), max(saved, held[1])
        return step, saved

    def glances(self) -> dict[int, Glance]:
        """Return what the hosts have answered to the question of the last call; never wait."""
        seen: dict[int, Glance] = {}
        for host in range(len(self._layouts)):
            asked = self._asked.pop(host, None)
            if asked is not None and not self._keepers.has_answered(asked):
                self._asked[host] = asked
                continue
            if asked is not None:
                first = host_ranks(self._host_sizes, host).start
                with suppress(WorkerLost):
                    answer = self._keepers.ask(host, asked, 0)
                    seen |= {first + worker: Glance(*glance) for worker, glance in answer.items()}
            self._asked[host] = self._keepers.tell(host, "glances")
        return seen

    def set_word(self, host: int, step: int) -> None:
        """Store the committed-step word of one host."""
        self._keepers.ask(host, self._keepers.tell(host, "set_word", step))

    def request_stop(self) -> None:
        """Ask the workers of every host to finish the step, save and end."""
        self._stop = True
        self._tell_all("request_stop")

    def restore(self, host: int, pids: Sequence[int]) -> bool:
        """Give a new keeper the arena of its host: a worker's if one has it, else an empty one."""
        if self._closed:
            return False
        if pids:
            reference = self._keepers.tell(host, "adopt", self._layouts[host], list(pids))
            with suppress(WorkerLost):
                if self._keepers.ask(host, reference) is not None:
                    self._places[host] = reference
                    self._keepers.tell(host, "park", self._attempt)
                    return True
        self._places[host] = self._open(host)
        return False

    def close(self) -> None:
        """Give back the memory; idempotent."""
        if not self._closed:
            self._closed = True
            self._tell_all("close")

    def _open(self, host: int) -> Any:
        """Let a keeper make an empty arena; return the reference to its place."""
        return self._keepers.tell(host, "open", self._layouts[host], self._attempt, self._stop)

    def _tell_all(self, name: str, *arguments: Any) -> None:
        """Call a method of every keeper without waiting."""
        for host in range(len(self._layouts)):
            self._keepers.tell(host, name, *arguments)
