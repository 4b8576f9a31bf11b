"""`distbp/coordinator.py`, rule by rule; how the rules work together is `test_recovery_model.py`'s matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbp.arena import RELOAD
from distbp.coordinator import (
    EMPTY,
    GOOD_STEPS,
    Corrupted,
    End,
    Failed,
    Left,
    Lost,
    Park,
    Parked,
    ReadWords,
    Release,
    SetWord,
    Start,
    State,
    Words,
    decide,
)

ONE_HOST = State(hosts=(0, 0, 0))
TWO_HOSTS = State(hosts=(0, 0, 1, 1))


def run(state, *events):
    """Feed events in; return the last state and all actions in order."""
    done = []
    for event in events:
        state, actions = decide(state, event)
        done += actions
    return state, done


def park_all(state):
    """Return the events by which every worker says that it is parked in the attempt of `state`."""
    return [Parked(rank, state.attempt) for rank in range(len(state.hosts))]


def agree(held, state=TWO_HOSTS):
    """Return what is done when everybody is parked and the words are `held`."""
    state, _ = run(state, *park_all(state))
    return run(state, Words(state.attempt, held))[1]


# Rule 1: nobody decides alone.


def test_a_loss_announces_the_next_attempt_before_it_starts_a_replacement():
    """The replacement must find the new attempt announced, so `Park` comes before `Start`."""
    state, actions = run(ONE_HOST, Lost(1, "SIGKILL"))
    assert actions == [Park(2), Start(1)]
    assert state.attempt == 2


def test_every_loss_announces_an_attempt_of_its_own():
    """Two workers lost at once are two attempts, and only the second one can be released."""
    state, actions = run(ONE_HOST, Lost(1, "SIGKILL"), Lost(2, "SIGKILL"))
    assert actions == [Park(2), Start(1), Park(3), Start(2)]
    assert run(state, *(Parked(rank, 2) for rank in range(3)))[1] == []


# Rule 2: the words are read when everybody is parked in the same attempt.


@pytest.mark.parametrize("missing", range(3))
def test_the_words_are_read_only_when_everybody_is_parked(missing):
    """As long as one worker has not said that it is parked, nothing is read."""
    state, _ = run(ONE_HOST, Lost(0, "SIGKILL"))
    others = [event for event in park_all(state) if event.rank != missing]
    state, actions = run(state, *others)
    assert actions == []
    assert run(state, Parked(missing, state.attempt))[1] == [ReadWords(2)]


def test_a_worker_that_says_it_twice_counts_once():
    """Three messages of one worker are not three parked workers."""
    assert run(ONE_HOST, Parked(0, 1), Parked(0, 1), Parked(0, 1))[1] == []


def test_parked_in_an_older_attempt_does_not_count():
    """Who parked before the second loss has to say so again."""
    state, _ = run(ONE_HOST, Lost(0, "SIGKILL"), Parked(1, 2), Parked(2, 2), Lost(0, "SIGKILL"))
    state, actions = run(state, Parked(0, 3), Parked(1, 2), Parked(2, 2))
    assert actions == []
    assert state.parked == {0}


def test_words_of_an_older_attempt_are_ignored():
    """A loss while the words are on their way makes them worthless: somebody may be running again."""
    state, actions = run(TWO_HOSTS, *park_all(TWO_HOSTS))
    assert actions == [ReadWords(1)]
    state, _ = run(state, Lost(3, "SIGKILL"))
    assert decide(state, Words(1, (5, 4))) == (state, ())


def test_a_released_attempt_does_not_count_as_parked():
    """After a release everybody runs: one worker that comes to a gate again does not get the words read.

    Without this the second call of `fit` would be released while only one worker has come to it, and then
    again for every other one, which sets barriers to zero under those that already wait in them.
    """
    state, actions = run(ONE_HOST, *park_all(ONE_HOST), Words(1, (EMPTY,)))
    assert actions == [ReadWords(1), Release(1)]
    state, actions = run(state, Parked(0, 1))
    assert actions == []
    assert run(state, Parked(1, 1), Parked(2, 1))[1] == [ReadWords(1)]


# Rule 3: the least step that is held.


def test_hosts_in_the_same_step_are_released_as_they_are():
    """When all hold the same step there is nothing to lower and nothing to give."""
    assert agree((7, 7)) == [Release(1)]


@pytest.mark.parametrize(("held", "ahead"), [((8, 7), 0), ((7, 8), 1)])
def test_a_host_that_is_one_ahead_turns_back(held, ahead):
    """Its word is lowered before anybody is released."""
    assert agree(held) == [SetWord(ahead, 7), Release(1)]


def test_a_host_that_is_two_ahead_is_a_bug_of_ours():
    """The protocol makes it impossible, so it stops the job instead of restoring a torn state."""
    with pytest.raises(AssertionError, match="two steps ahead"):
        agree((9, 7))


def test_step_zero_is_a_step_that_is_held():
    """0 steps committed is a state; only `EMPTY` is none."""
    assert agree((0, 1)) == [SetWord(1, 0), Release(1)]


# Rule 4: who holds nothing gets the state, or everybody begins from the checkpoint.


@pytest.mark.parametrize(("held", "source"), [((7, EMPTY), 0), ((EMPTY, 7), 1)])
def test_a_host_without_a_state_gets_it_from_one_that_has_it(held, source):
    """An empty word does not count as the least one; it makes the other host the source."""
    assert agree(held) == [Release(1, source)]


def test_the_source_is_lowered_before_it_gives():
    """With three hosts the source may itself be one ahead of the least step."""
    state = State(hosts=(0, 1, 2))
    assert agree((8, EMPTY, 7), state) == [SetWord(0, 7), Release(1, 0)]


def test_nobody_holds_anything():
    """The very start, or all hosts lost: a release without a source means checkpoint or beginning."""
    assert agree((EMPTY, EMPTY)) == [Release(1, EMPTY)]


# Rule 5: any event may interrupt this.


@pytest.mark.parametrize("rank", range(4))
def test_a_loss_between_parking_and_release_begins_again(rank):
    """Whoever is lost while all are parked, the replacement too: the rule starts again and ends well."""
    state, _ = run(TWO_HOSTS, Lost(2, "SIGKILL"))
    state, _ = run(state, *park_all(state))
    state, actions = run(state, Lost(rank, "SIGKILL"), Words(2, (7, EMPTY)))
    assert actions == [Park(3), Start(rank, 0.1 if rank == 2 else 0.0)]
    state, actions = run(state, *park_all(state), Words(3, (7, EMPTY)))
    assert actions == [ReadWords(3), Release(3, 0)]


# The end.


def test_the_last_goodbye_ends_the_job_with_the_highest_code():
    """0 when all are done, 75 as soon as one of them was stopped on request."""
    state, actions = run(ONE_HOST, Left(0, 0), Left(1, 75))
    assert actions == []
    state, actions = run(state, Left(2, 0))
    assert actions == [End(75)]
    assert state.ended
    assert state.exit_code == 75


def test_an_error_that_would_come_again_ends_the_job_at_once():
    """A failure of the user's code is not retried; its code and message are passed on."""
    state, actions = run(ONE_HOST, Failed(1, 1, "ValueError: no"))
    assert actions == [End(1, "ValueError: no")]
    assert state.exit_code == 1


def test_nothing_happens_after_the_end():
    """Peers of a failed worker fail too, or are lost while they are stopped: the first failure stands."""
    state, _ = run(ONE_HOST, Failed(1, 2, "first"))
    late = [Failed(0, 1, "second"), Lost(2, "SIGKILL"), Left(0, 0), *park_all(state), Words(1, (3,))]
    assert run(state, *late) == (state, [])


def test_a_worker_that_left_and_is_started_again_has_to_leave_again():
    """A loss after the goodbye takes the goodbye back."""
    state, _ = run(ONE_HOST, Left(0, 0), Lost(0, "SIGKILL"), Left(1, 0))
    state, actions = run(state, Left(2, 0))
    assert actions == []
    assert run(state, Left(0, 0))[1] == [End(0)]


# The budget.


def recover(state, lost):
    """Lose a worker and bring everybody back; return the state and whether the job went on."""
    state, actions = run(state, lost)
    if state.ended:
        return state, actions
    state, _ = run(state, *park_all(state), Words(state.attempt, (max(lost.step, 0),)))
    return state, actions


def test_restarts_without_progress_are_used_up():
    """`max_restarts` losses are survived, one more ends the job with 70 and says why."""
    state = State(hosts=(0, 0, 0), max_restarts=4)
    for number in range(4):
        state, _ = recover(state, Lost(number % 3, "SIGKILL", step=number))
        assert not state.ended
    state, actions = recover(state, Lost(1, "SIGSEGV", step=4))
    assert state.exit_code == 70
    (end,) = actions
    assert end.exit_code == 70
    assert "worker 1" in end.message
    assert "SIGSEGV" in end.message


def test_good_steps_begin_the_count_anew():
    """Losses that are `GOOD_STEPS` steps apart go on for ever."""
    state = State(hosts=(0, 0, 0), max_restarts=1)
    for number in range(50):
        state, _ = recover(state, Lost(number % 3, "SIGKILL", step=number * GOOD_STEPS))
        assert not state.ended, number


def test_one_step_too_few_is_no_progress():
    """Losses that are one step closer than that use the budget up."""
    state = State(hosts=(0, 0, 0), max_restarts=1)
    state, _ = recover(state, Lost(0, "SIGKILL", step=0))
    state, _ = recover(state, Lost(1, "SIGKILL", step=GOOD_STEPS - 1))
    assert state.exit_code == 70


def test_a_new_checkpoint_begins_the_count_anew():
    """What is on disk will not be lost, however few steps it took."""
    state = State(hosts=(0, 0, 0), max_restarts=1)
    for number in range(10):
        state, _ = recover(state, Lost(number % 3, "SIGKILL", step=number, saved=number))
        assert not state.ended, number


def test_restarts_are_counted_over_the_whole_job():
    """The number in result.json is not reset by progress."""
    state = ONE_HOST
    for number in range(5):
        state, _ = recover(state, Lost(number % 3, "SIGKILL", step=number * GOOD_STEPS))
    assert state.restarts == 5


def test_the_same_worker_three_times_in_the_same_step():
    """A step that kills its worker every time ends the job at the third time, budget or not."""
    state = State(hosts=(0, 0, 0), max_restarts=100)
    for _ in range(2):
        state, _ = recover(state, Lost(1, "SIGKILL", step=7))
        assert not state.ended
    state, actions = recover(state, Lost(1, "SIGKILL", step=7))
    assert state.exit_code == 70
    assert "3 times in step 7" in actions[-1].message


def test_different_workers_or_steps_are_not_the_same():
    """Three losses in one step of three workers, and of one worker in three steps, may be chance."""
    state = State(hosts=(0, 0, 0), max_restarts=100)
    for rank, step in [(0, 7), (1, 7), (2, 7), (0, 8), (0, 9)]:
        state, _ = recover(state, Lost(rank, "SIGKILL", step=step))
        assert not state.ended


def test_the_same_worker_three_times_in_the_same_step_among_other_losses():
    """The third time is noticed too when three other workers die in turn with it."""
    state = State(hosts=(0, 0, 0, 0), max_restarts=100)
    for number in range(12):
        state, _ = recover(state, Lost(number % 4, "SIGKILL", step=7))
    assert state.ended


def test_a_host_lost_at_once_is_one_restart():
    """Losing a host of sixteen workers is one event and does not use up a budget of ten."""
    state = State(hosts=(0,) * 16 + (1,) * 16)
    state, _ = run(state, *(Lost(rank, "SIGKILL", step=7) for rank in range(16, 32)))
    assert not state.ended


# Purity.

RANKS = st.integers(0, 3)
STEPS = st.integers(EMPTY, 3)
ATTEMPTS = st.integers(1, 4)
EVENTS = st.one_of(
    st.builds(Parked, RANKS, ATTEMPTS),
    st.builds(Lost, RANKS, st.just("SIGKILL"), STEPS, STEPS),
    st.builds(Words, ATTEMPTS, st.sampled_from([(1, 1), (1, 2), (EMPTY, 1), (EMPTY, EMPTY)])),
    st.builds(Left, RANKS, st.sampled_from([0, 75])),
    st.builds(Failed, RANKS, st.just(1), st.just("no")),
)


@given(st.lists(EVENTS, max_size=30))
def test_deciding_is_pure(events):
    """The same state and event give the same answer, and the state that was given is not changed."""
    state = TWO_HOSTS
    for event in events:
        before = replace(state)
        first, second = decide(state, event), decide(state, event)
        assert first == second
        assert state == before
        state = first[0]


@given(st.lists(EVENTS, max_size=30))
def test_whatever_comes_only_the_newest_attempt_counts(events):
    """Words are asked for only when everybody parked since the last release, for the newest attempt."""
    state, parked = TWO_HOSTS, set()
    for event in events:
        if isinstance(event, Parked) and event.attempt == state.attempt:
            parked.add(event.rank)
        after, actions = decide(state, event)
        assert after.attempt >= state.attempt
        if after.attempt > state.attempt:
            parked.clear()
        for action in actions:
            if isinstance(action, ReadWords):
                assert (action.attempt, parked) == (after.attempt, {0, 1, 2, 3})
            if isinstance(action, Release):
                assert action.attempt == after.attempt
        if any(isinstance(action, Release) for action in actions):
            parked.clear()
        state = after


# Rule 5: a corrupted state is held by nobody.


def test_a_corrupted_state_is_wiped_everywhere_and_only_when_all_are_parked():
    """First everybody parks, then every word that names a step is set to nothing held, then all reload."""
    state, actions = run(TWO_HOSTS, Corrupted(2, 1, "lane 0", 57, 50), Corrupted(0, 1, "lane 0", 57, 50))
    assert actions == [Park(2)], "every worker says so, and it counts once"
    state, actions = run(state, *park_all(state))
    assert actions == [ReadWords(2)]
    state, actions = run(state, Words(2, (57, 58)))
    assert actions == [SetWord(0, EMPTY), SetWord(1, EMPTY), Release(2, RELOAD)]
    assert state.restarts == 1


def test_a_loss_while_a_corrupted_state_is_given_up_changes_nothing():
    """The words do not count after a loss either; and while nobody holds a state, it is loaded again."""
    state, _ = run(TWO_HOSTS, Corrupted(2, 1, "lane 0", 57, 50), Lost(3, "SIGKILL", 57, 50))
    assert agree((57, 57), state)[-1] == Release(3, RELOAD)
    state, _ = run(state, *park_all(state), Words(3, (57, EMPTY)))
    state, _ = run(state, Lost(0, "SIGKILL", EMPTY, 50))
    assert agree((EMPTY, EMPTY), state) == [Release(4, RELOAD)]
    assert agree((50, 50), state) == [Release(4)]


def test_a_loaded_state_counts_again():
    """What was loaded after a corruption is held like any other state."""
    state, _ = run(ONE_HOST, Corrupted(0, 1, "lane 0", 57, 50))
    state, _ = run(state, *park_all(state), Words(2, (57,)), Lost(1, "SIGKILL", 50, 50))
    assert agree((50,), state) == [Release(3)]
    state, _ = run(state, *park_all(state), Words(3, (50,)), Lost(1, "SIGKILL", 51, 50))
    assert agree((EMPTY,), state) == [Release(4)], "an arena that was lost later is no corruption"


def test_corruptions_without_progress_end_the_job():
    """Memory that goes bad again and again uses up the restarts; the message names the place."""
    state = replace(ONE_HOST, max_restarts=2)
    for _ in range(2):
        state, actions = run(state, Corrupted(0, state.attempt, "lane 0 of host a", 57, 50))
        assert isinstance(actions[0], Park)
        state, _ = run(state, *park_all(state), Words(state.attempt, (57,)))
    state, (end,) = run(state, Corrupted(0, state.attempt, "lane 0 of host a", 57, 50))
    assert end.exit_code == 70
    assert end.message.startswith("lane 0 of host a; 3 restarts brought no progress")
    assert "memory" in end.message


def test_an_old_finding_is_ignored():
    """A finding of an attempt that is over changes nothing: whoever finds it again says so again."""
    state, _ = run(ONE_HOST, Lost(1, "SIGKILL"))
    assert run(state, Corrupted(0, 1, "lane 0")) == (state, [])


def test_restarts_without_progress_wait_ever_longer():
    """The first replacement comes at once, the next ones after a pause that doubles up to ten seconds."""
    state, waits = State((0, 0), max_restarts=12), []
    for _ in range(6):
        for rank in (0, 1):
            state, actions = run(state, Lost(rank, "SIGKILL", step=EMPTY + rank + len(waits)))
            waits += [action.after_s for action in actions if isinstance(action, Start)]
            state, _ = run(state, *park_all(state))
            state, _ = run(state, Words(state.attempt, (5,)))
    assert waits[:5] == [0.0, 0.1, 0.2, 0.4, 0.8]
    assert waits == sorted(waits)
    assert max(waits) <= 10.0
