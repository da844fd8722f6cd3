"""What a key may be: lists and ranges, their points, and what is no range."""

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tune_spaces.ranges import Choice, Dice, Range


def test_steps_are_counted_in_decimals() -> None:
    assert Range(low=0.1, high=0.7, step=0.2).points() == (0.1, 0.3, 0.5, 0.7)
    assert Range(low=0, high=0.3, step=0.1).points() == (0.0, 0.1, 0.2, 0.3)  # 3 * 0.1 is another number in floats


def test_whole_numbers_are_integers() -> None:
    points = Range(low=1, high=9, step=4, integer=True).points()
    assert points == (1, 5, 9) and all(isinstance(point, int) for point in points)
    assert Range(low=2, high=5, integer=True).points() == (2, 3, 4, 5)


def test_a_continuous_or_logarithmic_range_has_no_points() -> None:
    assert Range(low=0, high=1).points() is None
    assert Range(low=1, high=8, log=True, integer=True).points() is None


def test_a_range_too_long_to_write_out_is_counted_and_drawn() -> None:
    long = Range(low=0, high=10**12, integer=True)
    assert long.count() == 10**12 + 1 and long.probes() == (0, 10**12, 1)
    assert long.holds(long.suggest(Dice(random.Random(0)), "x"))


def test_the_middle_of_a_continuous_range_is_no_whole_number() -> None:
    """Else a range over a key of whole numbers would be accepted, and refused in the middle of a search."""
    low, high, middle = Range(low=8, high=64).probes()
    assert (low, high) == (8, 64) and low < middle < high and middle != round(middle)
    assert Range(low=8, high=64, step=0.5).probes() == (8.0, 64.0, 8.5)
    assert Range(low=1, high=100, log=True, integer=True).probes() == (1, 100, 10)


RANGES = st.builds(
    lambda low, steps, step, log, integer: Range(
        low=low, high=low + steps * step, step=None if log else step, log=log, integer=integer
    ),
    st.integers(1, 50), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.booleans(),
)  # fmt: skip


@given(RANGES, st.integers(0, 1000))
def test_draws_lie_in_the_range_and_on_its_points(one: Range, seed: int) -> None:
    value = one.suggest(Dice(random.Random(seed)), "x")
    assert one.holds(value) and isinstance(value, int if one.integer else float)
    points = one.points()
    assert points is None or (value in points and len(points) == one.count())


def test_a_logarithmic_range_is_drawn_evenly_in_the_logarithm() -> None:
    dice = Dice(random.Random(0))
    small = sum(Range(low=1e-5, high=1e-1, log=True).suggest(dice, "x") < 1e-3 for _ in range(1000))
    assert 440 < small < 560
    ones = sum(Range(low=1, high=127, log=True, integer=True).suggest(dice, "x") < 11 for _ in range(1000))
    assert 400 < ones < 600


class PlanOptions:
    """Picks the last choice and the upper end, and keeps what it was asked."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        self.names.append(name)
        return low + 3 * step if step else high

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        self.names.append(name)
        return high

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        self.names.append(name)
        assert all(choice is None or isinstance(choice, str | int | float) for choice in choices)
        return choices[-1]


def test_a_stepped_draw_is_the_grids_own_number() -> None:
    assert 0.1 + 3 * 0.2 != 0.7 == Range(low=0.1, high=0.9, step=0.2).suggest(PlanOptions(), "x")


def test_a_choice_gives_back_whole_sections_and_is_not_asked_about_one_value() -> None:
    asked = PlanOptions()
    assert Choice(values=(None, {"rank": 4})).suggest(asked, "lora") == {"rank": 4}
    assert Choice(values=("batch",)).suggest(asked, "scope") == "batch"
    assert asked.names == ["lora"]


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"low": 0.5, "high": 0.5}, r"the range is empty: low 0\.5 is not below high 0\.5; a list, \[0\.5\], fixes the value"),
        ({"low": 0, "high": 1, "log": True}, r"log needs numbers above 0, and low is 0; low: 0\.001 would do"),
        ({"low": -2, "high": -1, "log": True}, r"log needs numbers above 0, and low is -2; leave log out"),
        ({"low": 1, "high": 2, "log": True, "step": 1}, r"log and step exclude each other; leave step 1 out, or list the values"),
        ({"low": 0.5, "high": 2, "integer": True}, r"integer needs a whole low, not 0\.5; low: 1 would do"),
        ({"low": 0.1, "high": 1, "step": 0.4}, r"step 0\.4 does not lead from low 0\.1 to high 1\.0; high: 0\.9 would do"),
        ({"low": 0.1, "high": 0.2, "step": 0.4}, r"high: 0\.5 would do"),
        ({"low": 0, "high": 1, "step": 0}, r"step\s+Input should be greater than 0"),
        ({"low": 0, "high": float("inf")}, r"high\s+Input should be a finite number"),
    ],
)
def test_what_is_no_range_is_said(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Range.model_validate(said)


def test_a_list_names_each_value_once() -> None:
    with pytest.raises(ValidationError, match="the list is empty; name at least one value"):
        Choice(values=())
    with pytest.raises(ValidationError, match="the list names 'a' twice; once would do"):
        Choice(values=("a", "b", "a"))
