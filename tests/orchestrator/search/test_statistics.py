"""Statistics against printed tables, an integral taken by small steps, and examples computed by hand."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.search.statistics import (
    Summary,
    compare_arms,
    confidence_interval,
    critical_t,
    holm,
    probability_within,
    rank_correlation,
    summary_of,
    two_sided_p,
)

TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 9: 2.262, 10: 2.228, 29: 2.045, 30: 2.042, 120: 1.980}
"""Two-sided 5 % points of Student's t by degrees of freedom, as printed in every table."""


def integrated_probability(t: float, freedom: int, steps: int = 20_000) -> float:
    """Simpson's rule over the density."""
    scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
    width = 2 * t / steps
    heights = [scale * (1 + (-t + i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(steps + 1)]
    return width / 3 * (heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]))


@pytest.mark.parametrize(("freedom", "printed"), TABLE.items())
def test_critical_values_are_those_of_the_tables(freedom: int, printed: float) -> None:
    assert round(critical_t(freedom), 3) == printed


def test_other_confidence_is_in_the_tables_too() -> None:
    assert [round(critical_t(freedom, 0.99), 3) for freedom in (1, 2, 5, 10)] == [63.657, 9.925, 4.032, 3.169]


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 12, 31])
@pytest.mark.parametrize("t", [0.1, 1.0, 2.5, 6.0])
def test_probabilities_are_the_integral_of_the_density(freedom: int, t: float) -> None:
    assert probability_within(t, freedom) == pytest.approx(integrated_probability(t, freedom), abs=1e-9)


def test_nothing_lies_within_zero() -> None:
    assert probability_within(0.0, 1) == probability_within(0.0, 2) == 0.0


def test_means_and_deviations_by_hand() -> None:
    assert summary_of([2.0, 4.0, 4.0, 6.0]) == Summary(4, 4.0, pytest.approx(math.sqrt(8 / 3)))
    assert summary_of([3.0]) == Summary(1, 3.0, None)
    assert summary_of([]) == Summary(0, None, None)


def test_an_interval_by_hand() -> None:
    # Mean 2, deviation 1, so 2 ± 4.303 / √3; t = 2 √3 on two degrees: p = 1 − t / √(t² + 2) = 1 − √(6 / 7).
    low, high = confidence_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == (pytest.approx(-0.4841, abs=1e-4), pytest.approx(4.4841, abs=1e-4))
    assert two_sided_p([1.0, 2.0, 3.0]) == pytest.approx(1 - math.sqrt(6 / 7))


def test_holm_by_hand() -> None:
    # Smallest first: 4 × 0.005, 3 × 0.01, 2 × 0.03, 1 × 0.04, never falling: the last is held up by the one before.
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == {"d": pytest.approx(0.02), "a": pytest.approx(0.03), "c": pytest.approx(0.06), "b": pytest.approx(0.06)}
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}
    assert holm({}) == {}


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_lies_between_no_correction_and_bonferroni(p_values: list[float]) -> None:
    corrected = holm({str(index): p for index, p in enumerate(p_values)})
    for index, p in enumerate(p_values):
        assert p <= corrected[str(index)] <= min(1.0, len(p_values) * p)


def test_an_arm_that_is_lower_with_every_seed_is_better_where_less_is_better() -> None:
    values = {"base": {0: 2.0, 1: 2.1, 2: 1.9}, "good": {0: 1.90, 1: 2.01, 2: 1.79}, "same": {0: 2.1, 1: 2.0, 2: 1.9}}
    good, same = compare_arms(values, "base", "min")
    assert (good.arm, good.seeds, good.verdict, good.notes) == ("good", (0, 1, 2), "better", ())
    assert good.mean == pytest.approx(-0.1)
    assert good.interval is not None and good.interval[1] < 0
    assert good.p is not None and good.p_holm == pytest.approx(2 * good.p)
    assert (same.verdict, same.p_holm) == ("not distinguishable", 1.0)
    assert compare_arms(values, "base", "max")[0].verdict == "worse"


def test_many_arms_make_one_hard_to_tell_apart() -> None:
    noise = random.Random(1)
    base = {seed: 2.0 for seed in range(3)}
    arms = {f"arm{index}": {seed: 2.0 + noise.gauss(0, 0.1) for seed in range(3)} for index in range(9)}
    near = {0: 1.90, 1: 1.92, 2: 1.86}
    assert compare_arms({"base": base, "near": near}, "base", "min")[0].verdict == "better"
    assert compare_arms({"base": base, "near": near, **arms}, "base", "min")[0].verdict == "not distinguishable"


def test_too_few_seeds_are_named() -> None:
    values = {"base": {0: 2.0, 1: 2.0}, "none": {}, "one": {1: 1.0}, "two": {0: 1.0, 1: 1.5}}
    none, one, two = compare_arms(values, "base", "min")
    assert (none.mean, none.interval, none.p, none.verdict) == (None, None, None, "not distinguishable")
    assert none.notes[0] == "no seed in common: too few to rely on; 3 or more would do"
    assert (one.mean, one.interval, one.verdict) == (-1.0, None, "not distinguishable")
    few = "only one seed in common: too few to rely on; 3 or more would do"
    assert one.notes == (few, "left out, not completed in both: seed 0")
    assert two.interval is not None and two.notes[0].startswith("only 2 seeds in common")


def test_differences_without_spread_say_nothing() -> None:
    values = {"base": {0: 2.0, 1: 3.0, 2: 4.0}, "shifted": {0: 2.1, 1: 3.1, 2: 4.1}, "equal": {0: 2.0, 1: 3.0, 2: 4.0}}
    for comparison in compare_arms(values, "base", "min"):
        assert (comparison.p, comparison.interval, comparison.verdict) == (None, None, "not distinguishable")
        assert comparison.notes == (
            "all seeds differ by the same: these were not independent trainings, so nothing can be inferred",
        )


def test_a_baseline_that_is_no_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="the baseline 'kl' is none of the arms; 'atkd', 'forward_kl'"):
        compare_arms({"atkd": {}, "forward_kl": {}}, "kl", "min")


LOSSES = st.floats(-1e3, 1e3).map(lambda loss: round(loss, 6))  # numbers that do not vanish when they are scaled


@given(st.lists(LOSSES, min_size=2, max_size=8), st.floats(0.1, 10))
def test_an_interval_scales_and_holds_its_mean(differences: list[float], scale: float) -> None:
    interval = confidence_interval(differences)
    if interval is not None:
        assert interval[0] <= math.fsum(differences) / len(differences) <= interval[1]
        scaled = confidence_interval([scale * value for value in differences])
        assert scaled == pytest.approx([scale * end for end in interval], rel=1e-6, abs=1e-6)


def test_rank_correlations_by_hand() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 25]) == pytest.approx(0.8)  # 1 − 6 (0 + 0 + 1 + 1) / (4 · 15)
    assert rank_correlation([1, 2, 3], [9, 4, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 2, 3], [1, 5, 5, 9]) == pytest.approx(1)  # ties share rank 2.5
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None
