"""Schedules: pure functions of the step with the promised ends."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbp.errors import ConfigError
from distbp.optim import OPTIMIZERS, SCHEDULES, Schedule, choose

TOTAL = 100


def rates(**options: object) -> list[float]:
    """Return the rates of steps 0 to TOTAL."""
    schedule = Schedule(**options)  # type: ignore[arg-type]
    return [schedule(step, TOTAL) for step in range(TOTAL + 1)]


@pytest.mark.parametrize("name", SCHEDULES)
@given(
    step=st.integers(0, 10**7),
    total=st.integers(0, 10**6),
    warmup=st.integers(0, 1000),
    share=st.floats(0, 1),
    rise=st.floats(0, 0.999),
    power=st.floats(0.1, 5),
)
def test_rates_are_between_zero_and_the_peak(name, step, total, warmup, share, rise, power) -> None:
    """Whatever the step and the length of the run, the rate is a number from 0 to lr; asking twice agrees."""
    schedule = Schedule(
        lr=0.5, name=name, warmup_steps=warmup, final_fraction=share, rise_fraction=rise, power=power
    )
    rate = schedule(step, total)
    assert isinstance(rate, float)
    assert 0.0 <= rate <= 0.5 * (1 + 1e-15)
    assert schedule(step, total) == rate


@pytest.mark.parametrize("name", SCHEDULES)
def test_warm_up_is_a_straight_line_to_the_peak(name) -> None:
    """Step s of a warm-up of n steps has lr * (s + 1) / n; the last one has lr."""
    assert rates(lr=0.5, name=name, warmup_steps=8)[:8] == [0.5 * (s + 1) / 8 for s in range(8)]


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_warm_up_the_shape_begins_at_once(name) -> None:
    """The first rate is lr, but for one_cycle, which begins at its own share of it."""
    expected = 0.5 * 0.25 if name == "one_cycle" else 0.5
    assert rates(lr=0.5, name=name, initial_fraction=0.25)[0] == expected


@pytest.mark.parametrize("name", ["cosine", "one_cycle", "polynomial"])
def test_the_end_is_the_final_fraction(name) -> None:
    """At the end of the run, and after it, the rate is lr * final_fraction."""
    schedule = Schedule(lr=0.5, name=name, final_fraction=0.125, warmup_steps=10)
    assert schedule(TOTAL, TOTAL) == 0.0625
    assert schedule(10 * TOTAL, TOTAL) == 0.0625


@pytest.mark.parametrize("name", ["constant", "cosine", "polynomial", "step"])
def test_rates_never_rise_after_the_warm_up(name) -> None:
    """All shapes but one_cycle only fall."""
    falling = rates(lr=0.5, name=name, warmup_steps=10, step_size=7)[9:]
    assert all(a >= b for a, b in itertools.pairwise(falling))


def test_one_cycle_rises_to_the_peak_and_falls() -> None:
    """one_cycle reaches lr after rise_fraction of the steps, rising before and falling after."""
    cycle = rates(lr=0.5, name="one_cycle", rise_fraction=0.3)
    assert max(cycle) == cycle[30] == 0.5
    assert all(a < b for a, b in itertools.pairwise(cycle[:31]))
    assert all(a > b for a, b in itertools.pairwise(cycle[30:]))


def test_known_values() -> None:
    """Half way, cosine and the straight line are at half; the step shape halves every ten steps."""
    assert rates(lr=1.0, name="cosine")[50] == pytest.approx(0.5, abs=1e-15)
    assert rates(lr=1.0, name="polynomial")[50] == 0.5
    assert rates(lr=1.0, name="polynomial", power=2.0)[50] == 0.25
    assert rates(lr=1.0, name="step", step_size=10, gamma=0.5)[29:31] == [0.25, 0.125]
    assert set(rates(lr=0.7, name="constant")) == {0.7}


def test_linear_scaling_and_its_warm_up() -> None:
    """k times the batch gets k times the rate; the warm-up rises evenly from the small batch's."""
    schedule = Schedule.scaled(lr=0.1, batch_size=512, scaling_batch=64, name="constant", warmup_steps=7)
    assert schedule.lr == 0.8
    first = [schedule(step, TOTAL) for step in range(8)]
    # From 0.1 to 0.8 in seven equal steps, the first of which is taken at once (Goyal et al. 2017, 2.2).
    assert first[:7] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], abs=1e-15)
    assert first[7] == 0.8


def test_a_smaller_batch_is_scaled_down_and_warms_up_level() -> None:
    """Half the batch gets half the rate, and a warm-up that has nothing to rise from stays there."""
    schedule = Schedule.scaled(lr=0.1, batch_size=32, scaling_batch=64, name="constant", warmup_steps=3)
    assert {schedule(step, TOTAL) for step in range(5)} == {0.05}


def test_a_schedule_cannot_change() -> None:
    """A schedule has no state to save: it is frozen."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Schedule(lr=0.1).lr = 0.2  # type: ignore[misc]


def test_unknown_names_are_answered_with_the_nearest() -> None:
    """A misspelt schedule or optimizer is a ConfigError that says what was meant."""
    with pytest.raises(ConfigError, match=r"schedule.name: expected one of .*'cosin'; did you mean 'cosine'"):
        Schedule(lr=0.1, name="cosin")
    with pytest.raises(
        ConfigError, match=r"optimizer.name: expected one of adagrad.*, got 'sdg'; did you mean 'sgd'"
    ):
        choose(OPTIMIZERS, "sdg", "optimizer.name")
    with pytest.raises(ConfigError, match=r"got 'warp'$"):
        choose(OPTIMIZERS, "warp", "optimizer.name")
