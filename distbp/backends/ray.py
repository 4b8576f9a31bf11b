"""The driver's side of the Ray backend: places actors, and carries out what the coordinator decides.

The driver is the coordinator (`job_keeper.py`) and the only one that knows where things are; workers and
keepers (`ray_worker.py`) know only it.  A worker's end is seen twice: its connection breaks at once, and Ray
says, a little later, that the actor is dead.  Only the second counts, because a broken connection does not
prove that nobody writes any more; an actor that Ray still believes in some seconds later is killed.

Losing an actor costs one step: a new one attaches to the arena that its host's keeper holds.  Losing a keeper
costs nothing: a new one takes the arena over from a worker.  Losing a node costs its workers, its keeper and
its copy of the state; Ray finds a node for its bundle, and the state comes from another host or, if no host
holds it, from the newest checkpoint.
"""

from __future__ import annotations

import functools
import os
import queue
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbp import coordinator
from distbp.backends.base import Admission, Plan
from distbp.backends.job_keeper import JobKeeper
from distbp.backends.job_parts import Call, WorkerLink
from distbp.backends.ray_cluster import Host, RayCluster
from distbp.backends.ray_memory import Keepers, RayMemory
from distbp.errors import EnvironmentMismatch
from distbp.run_directory import RunDirectory
from distbp.terminal import say
from distbp.transports import wire

__all__ = ["RayJob"]

_VERDICT_S = 5.0
"""Seconds that Ray gets to notice the end of an actor whose connection broke."""

_LAST_WORDS_S = 1.0
_NODE_S = 600.0
NODE_LOST = "node lost"

_NEVER_RAN = "cancelled before it started running"
"""Ray's words about an actor whose process could not talk to the driver, or whose node has just died."""

_AGAIN_S = 0.5


class RayJob(JobKeeper):
    """A job of actors on `cluster`, `hosts[h].workers` of them on host h; `run` returns the exit code.

    Each is a `program`, whose method `work` is called once, with `arguments` among others.
    `job` is sent to every worker together with `data`, the packed data as bytes; the other options are those
    of `JobKeeper`.  The cluster stays the caller's.
    """

    backend = "ray"

    def __init__(
        self,
        cluster: RayCluster,
        hosts: Sequence[Host],
        program: type,
        arguments: Sequence[str],
        *,
        threads: int = 1,
        max_restarts: int = 10,
        join_timeout_s: float = 30.0,
        job: dict[str, Any] | None = None,
        data: NDArray[np.uint8] | None = None,
        admitted: tuple[RunDirectory, Admission] | None = None,
    ) -> None:
        sizes = tuple(host.workers for host in hosts)
        super().__init__(
            sizes, max_restarts=max_restarts, join_timeout_s=join_timeout_s, job=job, admitted=admitted
        )
        self._cluster = cluster
        self._hosts = list(hosts)
        self._program = program
        self._arguments = list(arguments)
        self._threads = threads
        self._key = secrets.token_bytes(32)
        self._starts = 0
        self._posts = Posts()
        self._listener = wire.Listener(cluster.ip, self._key)
        self._links: dict[int, RayLink] = {}
        self._keepers = Keepers(cluster, len(hosts), data, self._note_keeper_end, self._replace_keeper)
        self._unshared: set[int] = set()

    def run(self) -> int:
        """Place the job on the cluster and run it to its end."""
        closing = threading.Event()
        doorman = threading.Thread(target=self._let_in, args=(closing,), name="distbp-doorman", daemon=True)
        try:
            self._cluster.place(self._hosts, self._threads)
            self._keepers.start()
            self.selector.register(self._posts, selectors.EVENT_READ, self._posts.run)
            doorman.start()
            return super().run()
        finally:
            closing.set()
            if doorman.is_alive():
                doorman.join(2.0)
            self._listener.close()
            self._keepers.close()
            self._posts.close()

    def start_worker(self, rank: int) -> WorkerLink:
        """Start the actor of worker `rank`; Ray keeps it waiting while its host has no node."""
        self._starts += 1
        host = self.state.hosts[rank]
        actor = self._cluster.start_actor(self._program, host, self._threads)
        link = RayLink(rank, self._starts, host, actor, self._cluster, self.unwatch, self._keepers)
        self._links[link.start] = link
        reference = actor.work.remote(
            self._listener.address,
            self._key,
            rank,
            len(self.state.hosts),
            link.start,
            self._arguments,
            os.getcwd(),
            self.faults_for(rank),
        )
        self._cluster.when_done(reference, lambda error: self._posts.put(lambda: self._note_end(link, error)))
        return link

    def open_memory(self, plan: Plan) -> RayMemory:
        """Make the arenas of a new call, one on each host."""
        return RayMemory(plan, self.host_sizes, self._keepers, self.state.attempt)

    def give_up_s(self, join_timeout_s: float) -> float:
        """Return 10 minutes or more: a node that was lost may take that long to be there again."""
        return max(super().give_up_s(join_timeout_s), _NODE_S)

    def check_run_directory(self, call: Call, rank: int) -> None:
        """Refuse a run directory that rank 0, or any worker of a script, cannot see."""
        host = self.state.hosts[rank]
        out = call.admission.out
        if host in self._unshared or self._keepers.sees(host, str(out), (out / "lock").read_bytes()):
            return
        name = self._links_of(host)[0].host
        if rank == 0 or self._arguments:
            raise EnvironmentMismatch(
                f"worker {rank} on host {name} cannot see the run directory {out} of the driver on host "
                f"{socket.gethostname()}, so its checkpoints would be lost; name a folder that all nodes "
                "share with --out"
            )
        self._unshared.add(host)
        say(
            f"distbp: W_NOT_SHARED host {name} does not see {out}: its workers keep no log",
        )

    # What happens outside of the loop is put into it.

    def _let_in(self, closing: threading.Event) -> None:
        """Accept the connections of workers, on a thread of its own, until the job ends."""
        while not closing.is_set():
            connection = self._listener.accept(0.5)
            if connection is not None:
                self._posts.put(functools.partial(self._meet, connection))

    def _meet(self, connection: wire.Connection) -> None:
        """Match a connection with the actor that was started; one of an older start is turned away."""
        link = self._links.get(connection.hello.get("start", -1))
        if link is None or link.connection is not None or link.ended:
            connection.close()
            return
        link.meet(connection)
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._read_messages(link))
        if self.first_message is not None:
            place = self._keepers.data(link.host_index)
            self.tell(link, dict(self.first_message) | {"memory": place})
        self._read_messages(link)  # What came with the last packet of the handshake.

    def _read_messages(self, link: RayLink, wait_s: float = 0.0) -> None:
        """Handle what a worker has sent; a broken connection gives Ray some seconds for its verdict."""
        connection = link.connection
        if connection is None:
            return  # It was closed a moment ago, by what the loop did before this.
        try:
            while link.connection is connection and (message := connection.receive(wait_s)) is not None:
                if message["kind"] == "said":
                    stream = sys.stdout if message["stream"] == "stdout" else sys.stderr
                    with suppress(OSError):  # Whoever reads is gone: not the workers' failure.
                        print(message["text"], end="", file=stream, flush=True)
                else:
                    self.note_message(link.rank, link, message)
        except (EOFError, OSError):
            link.disconnect()
            timer = threading.Timer(_VERDICT_S, lambda: self._posts.put(lambda: self._force(link)))
            timer.daemon = True
            timer.start()

    def _force(self, link: RayLink) -> None:
        """End an actor that cannot be reached any more; Ray's answer then counts as any other."""
        if not link.ended:
            link.kill_actor()

    def _note_end(self, link: RayLink, error: BaseException | None) -> None:
        """Note that an actor has ended, as Ray says."""
        self._read_messages(link, _LAST_WORDS_S)
        link.ended = True
        link.disconnect()
        self._links.pop(link.start, None)
        if error is not None and not link.said_goodbye and not _is_death(error):
            # The program reports its own errors; this one is of starting an actor: a version, an import.
            text = f"worker {link.rank} could not run on host {link.host}: {_shorten(error)}"
            self.handle(coordinator.Failed(link.rank, 78, text))
            return
        if _NEVER_RAN in str(error) and not link.said_goodbye:
            if link.start > len(self.state.hosts):
                self._start_once_more(link)
                return
            text = (
                f"Ray gave up worker {link.rank} before it ran, as it does when nodes and driver disagree "
                "about tokens; start both with the same RAY_AUTH_MODE (distbp doctor --backend ray)"
            )
            self.handle(coordinator.Failed(link.rank, 78, text))
            return
        self.note_end(link.rank, link, "lost" if error is None else _cause(error))

    def _start_once_more(self, link: RayLink) -> None:
        """Start a replacement again whose node died before it ran: that is no loss of its own."""

        def start() -> None:
            if not self.state.ended and self._workers.get(link.rank) is link:
                self._workers[link.rank] = self.start_worker(link.rank)

        timer = threading.Timer(_AGAIN_S, lambda: self._posts.put(start))
        timer.daemon = True
        timer.start()

    def _note_keeper_end(self, host: int, actor: Any, error: BaseException | None) -> None:
        """Have a keeper replaced that has died; called on one of Ray's threads."""
        self._posts.put(lambda: self._replace_keeper(host, actor, error))

    def _replace_keeper(self, host: int, actor: Any, error: BaseException | None) -> None:
        """Let a new keeper take the arena over from a worker of its host, if one is left."""
        if self.state.ended or not self._keepers.is_current(host, actor):
            return
        cause = "lost" if error is None else _cause(error)
        links = [] if cause == NODE_LOST else self._links_of(host)
        adopted = self._keepers.replace(host, [link.pid for link in links if link.connection is not None])
        self.event("E_LOST_KEEPER", host=host, cause=cause, action="adopt" if adopted else "begin empty")

    def _links_of(self, host: int) -> list[RayLink]:
        """Return the links of a host's workers."""
        return [link for link in self._links.values() if link.host_index == host]


@dataclass
class RayLink:
    """One start of a worker: its actor, and its connection once it has called."""

    rank: int
    start: int
    host_index: int
    actor: Any
    cluster: RayCluster
    unwatch: Callable[..., None]
    keepers: Keepers
    connection: wire.Connection | None = None
    said_goodbye: bool = False
    verdict: str | None = None
    ended: bool = False
    host: str = "?"
    pid: int = -1

    def meet(self, connection: wire.Connection) -> None:
        """Take the connection of the actor."""
        self.connection = connection
        self.host, self.pid = str(connection.hello["host"]), int(connection.hello["pid"])

    def tell(self, message: Mapping[str, Any], descriptor: int | None = None) -> None:
        """Send a message; memory is named in it, descriptors do not travel between hosts."""
        assert descriptor is None, "a descriptor does not travel to an actor"
        if self.connection is None:
            raise OSError("the actor is not connected")
        self.connection.send(message)

    def disconnect(self) -> None:
        """Close the connection; idempotent."""
        if self.connection is not None:
            self.unwatch(self.connection)
            self.connection.close()
            self.connection = None

    def signal(self, number: int) -> None:
        """Send a signal to the worker's process, through the keeper of its host."""
        if self.pid > 0:
            self.keepers.tell(self.host_index, "signal", self.pid, number)

    def wait(self, seconds: float) -> None:
        """Return when the worker has closed its connection, or after `seconds`."""
        until = time.monotonic() + seconds
        with suppress(EOFError, OSError):
            while self.connection is not None and (left := until - time.monotonic()) > 0:
                self.connection.receive(left)

    def dump_stacks(self) -> None:
        """Let the worker write its stacks: its host's keeper sends the signal."""
        self.signal(signal.SIGUSR2)

    def end(self) -> None:
        """Kill the worker's process: Ray's own way would wait for a process that is stopped."""
        self.signal(signal.SIGKILL)
        self.kill_actor()

    def kill_actor(self) -> None:
        """Let Ray end the actor's process."""
        self.cluster.ray.kill(self.actor, no_restart=True)

    def kill(self) -> None:
        """End the actor if it still runs; idempotent."""
        self.disconnect()
        if not self.ended:
            self.ended = True
            with suppress(Exception):  # The cluster itself may be gone.
                self.kill_actor()


class Posts:
    """Calls that other threads leave for the loop, which sees `fileno` become readable."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor to poll."""
        return self._reader.fileno()

    def put(self, call: Callable[[], None]) -> None:
        """Leave a call; callable from any thread, without effect when the loop is gone."""
        self._calls.put(call)
        with suppress(OSError):
            self._writer.send(b"x")

    def run(self) -> None:
        """Make the calls that were left."""
        with suppress(BlockingIOError):
            self._reader.recv(4096)
        with suppress(queue.Empty):
            while True:
                self._calls.get_nowait()()

    def close(self) -> None:
        """Give back the sockets; idempotent."""
        self._reader.close()
        self._writer.close()


def _is_death(error: BaseException) -> bool:
    """Return whether Ray says that the process died, in contrast to a call that raised."""
    from ray.exceptions import RayActorError

    return isinstance(error, RayActorError) and not error.actor_init_failed


def _cause(error: BaseException) -> str:
    """Return in a word why an actor died."""
    return NODE_LOST if "node has died" in str(error) else "actor died"


def _shorten(error: BaseException) -> str:
    """Return the last lines of an error of Ray's, which say most."""
    return "\n".join(str(error).strip().splitlines()[-3:])
