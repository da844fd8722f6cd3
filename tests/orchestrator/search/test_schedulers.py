"""What stops trials: rules by hand and against slow readings of them, and the schedulers of Ray Tune behind the same calls."""

import math
import random
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle

from orchestrator.config.schedulers import AsyncHyperBand, MedianStopping, NativeScheduler
from orchestrator.config.tune import TuneConfig
from orchestrator.search.schedulers import (
    FEWEST_FOR_MEDIAN,
    RayScheduler,
    RuleScheduler,
    Scheduler,
    StoppingRule,
    scheduler_of,
)

VALUES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=25)
MODES = st.sampled_from(["min", "max"])


@pytest.mark.parametrize(
    ("value", "others", "goes_on"),
    [
        (9.0, [], True),  # the first, and the second, go on whatever they are
        (9.0, [1.0], True),
        (2.0, [1.0, 3.0], False),  # one in three goes on
        (0.5, [1.0, 3.0], True),
        (1.0, [1.0, 3.0], True),  # a tie with the best is as good
        (2.0, [1.0, 3.0, 4.0, 5.0], False),  # of five, still one
        (2.0, [1.0, 3.0, 4.0, 5.0, 6.0], True),  # of six, two
        (3.5, [1.0, 3.0, 4.0, 5.0, 6.0], False),
    ],
)
def test_asha_lets_the_best_third_go_on(value: float, others: list[float], goes_on: bool) -> None:
    assert StoppingRule("asha", "min").goes_on(value, others) == goes_on
    assert StoppingRule("asha", "max").goes_on(-value, [-other for other in others]) == goes_on


@pytest.mark.parametrize(
    ("value", "others", "goes_on"),
    [
        (9.0, [1.0, 2.0], True),  # a median of two says nothing
        (2.0, [1.0, 2.0, 3.0], True),
        (2.1, [1.0, 2.0, 3.0], False),
        (2.5, [1.0, 2.0, 3.0, 4.0], True),
        (2.6, [1.0, 2.0, 3.0, 4.0], False),
    ],
)
def test_the_median_of_the_others_is_the_bar(value: float, others: list[float], goes_on: bool) -> None:
    assert StoppingRule("median", "min").goes_on(value, others) == goes_on
    assert StoppingRule("median", "max").goes_on(-value, [-other for other in others]) == goes_on


def asha_by_sorting(mode: str, reduction: int, value: float, others: list[float]) -> bool:
    """A trial goes on if it stands among the first n // reduction of all n, placed before those it ties with."""
    line = sorted([*others, value], reverse=mode == "max")
    return len(line) // reduction == 0 or line.index(value) in range(len(line) // reduction)


def median_by_sorting(mode: str, value: float, others: list[float]) -> bool:
    """A trial goes on if twice its value does not lie beyond the sum of the two in the middle."""
    if len(others) < FEWEST_FOR_MEDIAN:
        return True
    line, count = sorted(others), len(others)
    middle = line[(count - 1) // 2] + line[count // 2]
    return 2 * value <= middle if mode == "min" else 2 * value >= middle


@given(VALUES, MODES, st.integers(2, 5))
def test_rules_agree_with_slow_readings(values: list[float], mode: str, reduction: int) -> None:
    for count, value in enumerate(values):  # as they come in
        others = values[:count]
        assert StoppingRule("asha", mode, reduction).goes_on(value, others) == asha_by_sorting(mode, reduction, value, others)
        assert StoppingRule("median", mode).goes_on(value, others) == median_by_sorting(mode, value, others)
        assert StoppingRule("none", mode).goes_on(value, others)


@given(VALUES, MODES, st.sampled_from(["asha", "median"]), st.randoms())
def test_the_order_of_the_others_does_not_matter(values: list[float], mode: str, scheduler: str, dice: object) -> None:
    value, *others = values
    mixed = sorted(others, key=lambda _: dice.random())  # type: ignore[attr-defined]
    rule = StoppingRule(scheduler, mode)  # type: ignore[arg-type]
    assert rule.goes_on(value, others) == rule.goes_on(value, mixed)


@given(VALUES, MODES, st.integers(2, 4))
def test_the_best_so_far_always_goes_on(values: list[float], mode: str, reduction: int) -> None:
    best = min(values) if mode == "min" else max(values)
    assert StoppingRule("asha", mode, reduction).goes_on(best, values)  # type: ignore[arg-type]
    assert StoppingRule("median", mode).goes_on(best, values)  # type: ignore[arg-type]


@pytest.mark.parametrize("scheduler", ["asha", "median"])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_what_is_no_finite_number_is_worse_than_any(scheduler: str, mode: str, spoiled: float) -> None:
    rule = StoppingRule(scheduler, mode)  # type: ignore[arg-type]
    assert not rule.goes_on(spoiled, [])
    assert rule.goes_on(1.0, [spoiled, spoiled, spoiled])
    assert StoppingRule("none", mode).goes_on(spoiled, [1.0])  # type: ignore[arg-type]


RUNGS = 6
HALVING = AsyncHyperBand(kind="async_hyperband", reduction_factor=2)
NATIVE: dict[str, NativeScheduler] = {
    "halving": HALVING,
    "late": AsyncHyperBand(kind="async_hyperband", reduction_factor=3, grace_period=2),
    "brackets": AsyncHyperBand(kind="async_hyperband", reduction_factor=2, brackets=3),
    "median": MedianStopping(kind="median_stopping_rule"),
    "early median": MedianStopping(kind="median_stopping_rule", min_samples_required=1),
}
Decisions = dict[tuple[int, int], bool]


def value_of(trial: int, rung: int, seed: int) -> float:
    draw = random.Random(f"{trial} {rung} {seed}").random()
    return math.nan if draw < 0.05 else random.Random(f"{trial} {seed}").random() + draw / 4


def live(scheduler: Scheduler, trial: int, seed: int) -> Decisions:
    """A trial from its beginning to its end, as the controller asks."""
    scheduler.begin(trial)
    decided: Decisions = {}
    for rung in range(RUNGS - 1):
        decided[trial, rung] = scheduler.goes_on(trial, rung, value_of(trial, rung, seed))
        if not decided[trial, rung]:
            return decided
    scheduler.take_down(trial, RUNGS - 1, value_of(trial, RUNGS - 1, seed))
    decided[trial, RUNGS - 1] = True
    return decided


def told_again(scheduler: Scheduler, decided: Mapping[tuple[int, int], bool], seed: int) -> None:
    for trial, rung in sorted(decided, key=lambda place: (-place[0], place[1])):  # trials in whatever order
        scheduler.take_down(trial, rung, value_of(trial, rung, seed))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_scheduler_that_is_told_again_decides_as_one_that_was_never_interrupted(name: str, mode: str) -> None:
    stopped = 0
    for seed in range(12):
        whole: Decisions = {}
        first = RayScheduler(NATIVE[name], mode, RUNGS)  # type: ignore[arg-type]
        for trial in range(14):
            whole |= live(first, trial, seed)
        cut = 2 + seed % 10
        over = {place: goes_on for place, goes_on in whole.items() if place[0] < cut}
        second = RayScheduler(NATIVE[name], mode, RUNGS)  # type: ignore[arg-type]
        told_again(second, over, seed)
        for trial in range(cut, 14):
            over |= live(second, trial, seed)
        assert over == whole
        stopped += sum(not goes_on for (trial, rung), goes_on in whole.items() if math.isfinite(value_of(trial, rung, seed)))
    assert stopped > 20, "there is something that could differ"


def test_async_hyperband_stops_what_ray_tune_stops() -> None:
    """Below the median of those before at rungs 1, 2 and 4; at rung 3 nothing is asked."""
    scheduler = RayScheduler(HALVING, "min", RUNGS)
    for trial in range(4):
        scheduler.begin(trial)
    assert [scheduler.goes_on(trial, 0, value) for trial, value in enumerate([2.0, 1.0, 3.0, 1.2])] == [True, True, False, True]
    assert scheduler.goes_on(0, 1, 1.0) and not scheduler.goes_on(1, 1, 1.1)
    assert scheduler.goes_on(0, 2, 99.0) and scheduler.goes_on(0, 3, 99.0)


def test_the_native_median_stops_what_is_worse_than_three_others_and_never_pauses() -> None:
    scheduler = RayScheduler(NATIVE["median"], "max", RUNGS)
    for trial in range(6):
        scheduler.begin(trial)
    values = [3.0, 1.0, 2.0, 1.9, 2.5, 2.0]
    assert [scheduler.goes_on(trial, 0, value) for trial, value in enumerate(values)] == [True, True, True, False, True, True]


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("spoiled", [math.nan, math.inf, -math.inf])
def test_a_native_scheduler_is_not_shown_what_is_no_finite_number(name: str, spoiled: float) -> None:
    spoilt, clean = (RayScheduler(NATIVE[name], "min", RUNGS) for _ in range(2))
    for trial in range(20, 24):
        spoilt.begin(trial)
        assert not spoilt.goes_on(trial, 0, spoiled), "the first of all does not continue either"
        spoilt.take_down(trial, RUNGS - 1, spoiled)
    for trial in range(12):
        assert live(spoilt, trial, seed=1) == live(clean, trial, seed=1)


def test_brackets_are_dealt_by_the_trial_and_leave_the_global_generator_alone() -> None:
    np.random.seed(3)
    expected = np.random.random(2)
    np.random.seed(3)
    scheduler = RayScheduler(NATIVE["brackets"], "min", RUNGS)
    for trial in range(10):
        scheduler.begin(trial)
    assert list(np.random.random(2)) == list(expected)
    best = [scheduler.goes_on(trial, 0, float(trial)) for trial in range(10)]
    assert not all(best) and sum(best) > 1, "some brackets do not stop at the first rung"


@pytest.mark.parametrize("name", NATIVE)
def test_native_schedulers_travel_to_the_controller(name: str) -> None:
    there = cloudpickle.loads(cloudpickle.dumps(RayScheduler(NATIVE[name], "min", RUNGS)))
    here = RayScheduler(NATIVE[name], "min", RUNGS)
    for trial in range(12):
        assert live(there, trial, seed=2) == live(here, trial, seed=2)


def test_the_section_says_which_scheduler_it_is() -> None:
    assert isinstance(scheduler_of(TuneConfig(scheduler="median")), RuleScheduler)
    native = scheduler_of(TuneConfig(scheduler=HALVING, metric="top1_agreement", rungs=RUNGS))
    assert isinstance(native, RayScheduler)
    for trial in range(2):
        native.begin(trial)
    assert native.goes_on(0, 0, 0.5) and not native.goes_on(1, 0, 0.4), "of this metric more is better"


def test_a_rule_compares_with_the_other_trials_at_the_rung() -> None:
    scheduler = RuleScheduler(StoppingRule("asha", "min", 2))
    scheduler.take_down(7, 0, 1.0)  # told of before
    scheduler.take_down(7, 1, 0.0)
    assert not scheduler.goes_on(8, 0, 2.0) and scheduler.goes_on(9, 0, 0.5)
