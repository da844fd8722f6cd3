"""What trials say about arms and axes: means, paired differences with their uncertainty, rank correlations. Pure arithmetic.

Arms are compared seed by seed, because trials of one seed share the order of their rows: the difference within a seed varies less
than the values do.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["better", "worse", "not distinguishable"]

CONFIDENCE = 0.95
FEWEST_SEEDS = 3
FEWEST_FOR_CORRELATION = 8

Values = Mapping[int, float]
"""The metric of an arm's completed trials, by seed."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Mean and spread of some values."""

    count: int
    """How many there are."""

    mean: float | None
    """Their mean; None of none."""

    deviation: float | None
    """Their standard deviation, dividing by count − 1; None of fewer than two."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """An arm against the baseline, over the seeds that both completed."""

    arm: str
    """The arm."""

    seeds: tuple[int, ...]
    """Seeds that both completed."""

    mean: float | None
    """Mean difference, arm − baseline; None without such seeds."""

    interval: tuple[float, float] | None
    """95 % confidence interval of the mean difference by Student's t, of this comparison alone; None where the differences have
    no spread to take it from."""

    p: float | None
    """Probability, were there no difference, of a mean difference at least this far from 0."""

    p_holm: float | None
    """``p`` after Holm's correction over all arms of the comparison."""

    verdict: Verdict
    """``better`` or ``worse`` if ``p_holm`` is below 0.05."""

    notes: tuple[str, ...]
    """What the reader must know beside it."""


def summary_of(values: Sequence[float]) -> Summary:
    """Return mean and standard deviation."""
    return Summary(
        len(values), statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None
    )


def compare_arms(values: Mapping[str, Values], baseline: str, mode: Literal["min", "max"]) -> tuple[PairedDifference, ...]:
    """Return each other arm against the baseline, in the order of ``values``.

    Args:
        values: of each arm by seed, completed trials only.
        baseline: one of the arms.
        mode: whether less or more is better.

    Raises:
        ValueError: if there is no such baseline.
    """
    if baseline not in values:
        raise ValueError(f"the baseline {baseline!r} is none of the arms; {', '.join(map(repr, values)) or 'there are none'}")
    differences = {
        arm: {seed: of_arm[seed] - values[baseline][seed] for seed in sorted(of_arm.keys() & values[baseline].keys())}
        for arm, of_arm in values.items()
        if arm != baseline
    }
    tests = {arm: two_sided_p(list(by_seed.values())) for arm, by_seed in differences.items()}
    corrected = holm({arm: p for arm, p in tests.items() if p is not None})
    return tuple(
        _comparison(arm, by_seed, tests[arm], corrected.get(arm), mode, sorted(values[arm].keys() ^ values[baseline].keys()))
        for arm, by_seed in differences.items()
    )


def confidence_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean by Student's t; None where there is no spread to take it from."""
    if not _vary(differences):
        return None
    mean = statistics.fmean(differences)
    reach = critical_t(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean - reach, mean + reach


def two_sided_p(differences: Sequence[float]) -> float | None:
    """Return the p-value of the paired t test against no difference; None where there is no spread to take it from."""
    if not _vary(differences):
        return None
    t = statistics.fmean(differences) / (statistics.stdev(differences) / math.sqrt(len(differences)))
    return max(0.0, 1.0 - probability_within(abs(t), len(differences) - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values corrected for their number by Holm's step-down: it bounds the chance of any false difference."""
    corrected, largest = {}, 0.0
    for index, (arm, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - index) * p))
        corrected[arm] = largest
    return corrected


def critical_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Return the t that a variable of Student's distribution stays within, either side, with probability ``confidence``."""
    low, high = 0.0, 1.0
    while probability_within(high, freedom) < confidence:
        high *= 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if probability_within(middle, freedom) < confidence else (low, middle)
    return high


def probability_within(t: float, freedom: int) -> float:
    """Return P(−t < T < t) of Student's distribution with ``freedom`` degrees of freedom, 1 or more.

    For whole degrees the integral is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    assert freedom >= 1 and t >= 0
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = total = math.cos(angle) if odd else 1.0
    for factor in range(2 if odd else 1, freedom - 2, 2):
        term *= factor / (factor + 1) * math.cos(angle) ** 2
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))


def rank_correlation(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, ties sharing their mean rank; None where either is constant."""
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    return statistics.correlation(_ranks(xs), _ranks(ys))


def _comparison(
    arm: str, by_seed: Values, p: float | None, p_holm: float | None, mode: Literal["min", "max"], left_out: Sequence[int]
) -> PairedDifference:
    differences = list(by_seed.values())
    mean = summary_of(differences).mean
    verdict: Verdict = "not distinguishable"
    if p_holm is not None and mean is not None and p_holm < 1 - CONFIDENCE:
        verdict = "better" if (mean < 0) == (mode == "min") else "worse"
    return PairedDifference(
        arm, tuple(by_seed), mean, confidence_interval(differences), p, p_holm, verdict, tuple(_notes(differences, left_out))
    )


def _notes(differences: Sequence[float], left_out: Sequence[int]) -> list[str]:
    count, notes = len(differences), []
    if count < FEWEST_SEEDS:
        seeds = {0: "no seed", 1: "only one seed"}.get(count, f"only {count} seeds")
        notes.append(f"{seeds} in common: too few to rely on; {FEWEST_SEEDS} or more would do")
    if count > 1 and not _vary(differences):
        notes.append("all seeds differ by the same: these were not independent trainings, so nothing can be inferred")
    if left_out:
        notes.append(f"left out, not completed in both: seed {', '.join(map(str, left_out))}")
    return notes


def _vary(differences: Sequence[float]) -> bool:
    """Whether there is a spread that is more than rounding."""
    return len(differences) > 1 and statistics.stdev(differences) > 1e-9 * max(map(abs, differences))


def _ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, counted from 1; equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]
