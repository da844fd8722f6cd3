"""The rules of early stopping: by hand, and against slow readings of them that sort where the rules count."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.search.pruning import FEWEST_FOR_MEDIAN, StoppingRule

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
