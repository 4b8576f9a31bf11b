"""The coordinator: decides who is in, which step comes next, and what to do about a loss.  Pure: no I/O.

`decide(state, event)` returns the next state and the actions to carry out, in order.  A backend turns what
it sees into events and carries the actions out; the same function serves every backend, and the tests drive
it through every interleaving of small jobs (`tests/test_recovery_model.py`).

The one rule of recovery
------------------------
1. Nobody decides alone.  On a loss the coordinator announces a new *attempt* (`Park`); whoever waits, in the
   barrier or in a transport, leaves only into the parked state and says so (`Parked`).
2. When every worker is parked in the same attempt, the replacements of the lost ones included, nobody is
   running and nobody lost can still write: a backend reports `Lost` only for a process that is known to be
   dead.  Only then are the committed-step words read (`ReadWords`, answered by `Words`).
3. Everyone goes to the LEAST committed step of the hosts that hold one.  A host that is one ahead lowers its
   word and turns back to its other generation, which is still whole: it is not written before an exchange
   that needs every host.  No host can be two ahead.
4. A host that holds nothing gets the state from one that does (`Release.source`) and stores its word last.
   If nobody holds anything, the workers load the newest verified checkpoint, or begin.
5. A state that was found to be corrupted (`Corrupted`) counts on no host, because wrong gradients may have
   reached them all: when everybody is parked every word is set to "nothing held", and only then are the
   workers told to load the newest verified checkpoint (`RELOAD`).  Nothing is repaired in place.
6. Any event may interrupt this: a second loss announces the next attempt and the rule starts again.

Why not let each worker look at the committed-step word by itself: the writer may die between the barrier and
the store, and then one survivor reads "committed" before another worker's replacement reads "not committed".

Restarts are counted by progress: `max_restarts` losses, broken connections or corruptions without
`GOOD_STEPS` steps or a new checkpoint in between, or the same worker dying three times in the same step, end
the job with 70.  The second one without progress waits 0.1 s before it begins, each further one twice as
long.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from distbp.arena import EMPTY, RELOAD

__all__ = [
    "GOOD_STEPS",
    "OUT_OF_MEMORY",
    "Action",
    "Broken",
    "Corrupted",
    "End",
    "Event",
    "Failed",
    "Left",
    "Lost",
    "Park",
    "Parked",
    "ReadWords",
    "Release",
    "SetWord",
    "Start",
    "State",
    "Words",
    "decide",
]

GOOD_STEPS = 20
"""So many steps after a restart show that the cause is gone, and its count begins anew."""

_SAME_STEP_LIMIT = 3
_FIRST_BACK_OFF_S, _MOST_BACK_OFF_S = 0.1, 10.0

OUT_OF_MEMORY = "out of memory"
"""The cause of a loss when the kernel killed a worker to get memory."""

_CURE = "look for the cause in RUN/logs before running again"
_CURES = {
    "SIGKILL": "look for the cause in RUN/logs, and for an out-of-memory kill in the kernel's log",
    OUT_OF_MEMORY: "take fewer workers, a smaller micro_batch or model, or a machine with more memory",
}

_NOBODY = -1
"""Stands for a rank where only a connection was lost."""


@dataclass(frozen=True)
class Parked:
    """Event: worker `rank` waits in the parked state of `attempt`."""

    rank: int
    attempt: int


@dataclass(frozen=True)
class Lost:
    """Event: the process of `rank` is dead and did not say goodbye.

    `step` is the highest committed step seen and `saved` the newest durable checkpoint, for the budget only.
    """

    rank: int
    cause: str
    step: int = EMPTY
    saved: int = EMPTY


@dataclass(frozen=True)
class Broken:
    """Event: worker `rank` lost a connection to another host in `attempt`; nobody is known to be dead.

    `step` and `saved` are those of `Lost`.
    """

    rank: int
    attempt: int
    step: int = EMPTY
    saved: int = EMPTY


@dataclass(frozen=True)
class Corrupted:
    """Event: all workers found in `attempt` that the state in memory is not what was written; `rank` says so.

    `message` says where; `step` and `saved` are those of `Lost`.
    """

    rank: int
    attempt: int
    message: str
    step: int = EMPTY
    saved: int = EMPTY


@dataclass(frozen=True)
class Words:
    """Event: the committed-step word of every host, read while everybody was parked in `attempt`."""

    attempt: int
    held: tuple[int, ...]


@dataclass(frozen=True)
class Failed:
    """Event: worker `rank` reports an error that running again would meet again."""

    rank: int
    exit_code: int
    message: str


@dataclass(frozen=True)
class Left:
    """Event: worker `rank` said goodbye with `exit_code` (0, or 75 after a requested stop)."""

    rank: int
    exit_code: int


@dataclass(frozen=True)
class Park:
    """Action: announce `attempt` on every host and end every wait in a transport."""

    attempt: int


@dataclass(frozen=True)
class Start:
    """Action: start a replacement for `rank`, `after_s` seconds from now."""

    rank: int
    after_s: float = 0.0


@dataclass(frozen=True)
class ReadWords:
    """Action: read the committed-step word of every host and answer with `Words(attempt, ...)`."""

    attempt: int


@dataclass(frozen=True)
class SetWord:
    """Action: store `step` in the committed-step word of `host`."""

    host: int
    step: int


@dataclass(frozen=True)
class Release:
    """Action: set the barriers to zero and let everybody begin `attempt`.

    `source` is the host that gives its state to those that hold none; `EMPTY` when all hold it, or none;
    `RELOAD` when what they held was corrupted.
    """

    attempt: int
    source: int = EMPTY


@dataclass(frozen=True)
class End:
    """Action: end the job with `exit_code`; stop whoever still runs."""

    exit_code: int
    message: str = ""


Event = Parked | Lost | Broken | Corrupted | Words | Failed | Left
Action = Park | Start | ReadWords | SetWord | Release | End


@dataclass(frozen=True)
class State:
    """What the coordinator knows.  `hosts[rank]` is the host of each worker; worker count never changes.

    `deaths` holds `(rank, step, times)`: how often a worker died in the step in which it died last.  `asked`
    says that the words are being read, `corrupted` that they do not count, and `reload` that nobody has held
    a state since.
    """

    hosts: tuple[int, ...]
    max_restarts: int = 10
    attempt: int = 1
    parked: frozenset[int] = frozenset()
    left: frozenset[int] = frozenset()
    restarts: int = 0
    restarts_without_progress: int = 0
    progress_mark: tuple[int, int] = (EMPTY, EMPTY)
    deaths: tuple[tuple[int, int, int], ...] = ()
    lost_since_release: frozenset[int] = frozenset()
    asked: bool = False
    corrupted: bool = False
    reload: bool = False
    exit_code: int = 0
    ended: bool = False


def decide(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """Return the state after `event` and what has to be done, in this order."""
    if state.ended:
        return state, ()
    if isinstance(event, Lost):
        return _replace_lost(state, event)
    if isinstance(event, Parked):
        return _note_parked(state, event)
    if isinstance(event, Broken):
        return _part(state, event)
    if isinstance(event, Corrupted):
        return _give_up_state(state, event)
    if isinstance(event, Words):
        return _agree(state, event)
    if isinstance(event, Failed):
        return replace(state, ended=True, exit_code=event.exit_code), (End(event.exit_code, event.message),)
    return _note_left(state, event)


def _replace_lost(state: State, event: Lost) -> tuple[State, tuple[Action, ...]]:
    """Announce the next attempt and start a replacement, or give up."""
    state = _count_restart(_count_death(state, event), event.step, event.saved, event.rank)
    same_step = next(times for rank, _, times in state.deaths if rank == event.rank)
    if same_step >= _SAME_STEP_LIMIT or state.restarts_without_progress > state.max_restarts:
        when = "before the first step" if event.step == EMPTY else f"in step {event.step}"
        times = (
            f"{same_step} times {when}"
            if same_step >= _SAME_STEP_LIMIT
            else f"{state.restarts_without_progress} restarts brought no progress"
        )
        message = (
            f"worker {event.rank} was lost again ({event.cause}): {times}; {_CURES.get(event.cause, _CURE)}"
        )
        return replace(state, ended=True, exit_code=70), (End(70, message),)
    state = _announce(replace(state, left=state.left - {event.rank}))
    return state, (Park(state.attempt), Start(event.rank, _back_off_s(state.restarts_without_progress)))


def _back_off_s(restarts: int) -> float:
    """Return how long the restart of this number without progress waits: not at all, then ever longer."""
    return 0.0 if restarts <= 1 else float(min(_FIRST_BACK_OFF_S * 2.0 ** (restarts - 2), _MOST_BACK_OFF_S))


def _announce(state: State) -> State:
    """Begin the next attempt: nobody is parked in it yet."""
    return replace(state, attempt=state.attempt + 1, parked=frozenset(), asked=False)


def _part(state: State, event: Broken) -> tuple[State, tuple[Action, ...]]:
    """Let everybody park and open new connections; one announcement is enough for all who report it.

    It counts as a restart, so that a link that never works ends the job; a loss that comes to light
    afterwards is the same restart.
    """
    return _begin_anew(state, event, "hosts lost their connections again", "the network between them")


def _give_up_state(state: State, event: Corrupted) -> tuple[State, tuple[Action, ...]]:
    """Let everybody park and go back to the newest checkpoint; all report it, the first one counts."""
    before = state.attempt
    state, actions = _begin_anew(state, event, event.message, "the memory of that host")
    return (replace(state, corrupted=True) if state.attempt != before else state), actions


def _begin_anew(
    state: State, event: Broken | Corrupted, what: str, look_at: str
) -> tuple[State, tuple[Action, ...]]:
    """Announce the next attempt to all, of whom nobody was lost; or give up when that was done too often."""
    if event.attempt != state.attempt:
        return state, ()
    state = _count_restart(state, event.step, event.saved, _NOBODY)
    if state.restarts_without_progress > state.max_restarts:
        message = (
            f"{what}; {state.restarts_without_progress} restarts brought no progress; look at {look_at} "
            "before running again"
        )
        return replace(state, ended=True, exit_code=70), (End(70, message),)
    state = _announce(state)
    return state, (Park(state.attempt),)


def _count_death(state: State, event: Lost) -> State:
    """Count how often this worker died in the step in which it died last."""
    died_in = {rank: (step, times) for rank, step, times in state.deaths}
    last_step, times = died_in.get(event.rank, (event.step, 0))
    died_in[event.rank] = (event.step, times + 1 if last_step == event.step else 1)
    return replace(state, deaths=tuple((rank, *death) for rank, death in sorted(died_in.items())))


def _count_restart(state: State, at_step: int, saved_step: int, rank: int) -> State:
    """Count a restart; enough steps or a new checkpoint since the last one begin the count anew.

    Several workers lost before anybody was released again, a whole host say, are one restart; a worker lost
    twice meanwhile is two.
    """
    lost = state.lost_since_release
    if lost and rank not in lost:
        return replace(state, lost_since_release=lost | {rank})
    step, saved = state.progress_mark
    progressed = at_step >= step + GOOD_STEPS or saved_step > saved
    count = 1 if progressed and state.restarts else state.restarts_without_progress + 1
    return replace(
        state,
        restarts=state.restarts + 1,
        restarts_without_progress=count,
        progress_mark=(at_step, saved_step) if progressed or not state.restarts else state.progress_mark,
        lost_since_release=lost | {rank},
    )


def _note_parked(state: State, event: Parked) -> tuple[State, tuple[Action, ...]]:
    """Note a parked worker; when it was the last one, ask for the words."""
    if event.attempt != state.attempt:
        return state, ()
    parked = state.parked | {event.rank}
    everybody = len(parked) == len(state.hosts)
    state = replace(state, parked=parked, asked=everybody)
    return state, (ReadWords(state.attempt),) if everybody else ()


def _agree(state: State, event: Words) -> tuple[State, tuple[Action, ...]]:
    """Apply rules 3 to 5: the least step that is held, given to whoever holds none."""
    if event.attempt != state.attempt or not state.asked:
        return state, ()
    state = replace(state, parked=frozenset(), asked=False, lost_since_release=frozenset())
    holding = [host for host, step in enumerate(event.held) if step != EMPTY]
    if state.corrupted:
        state = replace(state, corrupted=False, reload=True)
        return state, (*(SetWord(host, EMPTY) for host in holding), Release(state.attempt, RELOAD))
    if not holding:
        return state, (Release(state.attempt, RELOAD if state.reload else EMPTY),)
    state = replace(state, reload=False)
    target = min(event.held[host] for host in holding)
    ahead = [host for host in holding if event.held[host] > target]
    assert all(event.held[host] == target + 1 for host in ahead), f"a host is two steps ahead: {event.held}"
    source = next(host for host in holding)
    needed = len(holding) < len(event.held)
    return state, (
        *(SetWord(host, target) for host in ahead),
        Release(state.attempt, source if needed else EMPTY),
    )


def _note_left(state: State, event: Left) -> tuple[State, tuple[Action, ...]]:
    """Note a goodbye; the last one ends the job with the highest code that was given.

    A backend lets nobody leave before the result of the call is recorded: a worker that is gone cannot park.
    """
    state = replace(state, left=state.left | {event.rank}, exit_code=max(state.exit_code, event.exit_code))
    if len(state.left) < len(state.hosts):
        return state, ()
    return replace(state, ended=True), (End(state.exit_code),)
