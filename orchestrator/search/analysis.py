"""What a search or a comparison shows, as numbers: values that may be compared, settings that vary, arms by seed."""

import math
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from orchestrator.search.ledger import Search, Trial
from orchestrator.search.results import axes_of
from orchestrator.search.statistics import FEWEST_FOR_CORRELATION, Values, rank_correlation

NEAR_THE_END = 0.02
"""Share of a range within which a value is at its end."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A numeric setting."""

    path: str
    """Dotted path in the configuration."""

    log: bool = False
    """Whether it was searched evenly in the logarithm."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Trials and their values after the same number of steps, which makes them comparable."""

    step: int
    """Optimizer steps."""

    values: Mapping[int, float]
    """Value by number of trial; completed and stopped ones that were measured then."""


@dataclass(frozen=True, slots=True)
class Importance:
    """How closely a setting and the metric go together."""

    path: str
    """Dotted path of the setting."""

    correlation: float
    """Spearman's rank correlation of setting and metric, −1 to 1."""

    trials: int
    """Over how many trials."""


@dataclass(frozen=True, slots=True)
class TaughtBy:
    """What came of a comparison under one teacher."""

    teacher: str
    """Its name in the section ``compare``."""

    weights: int
    """Weights of the teacher."""

    heldout_loss: float
    """The teacher's own loss on the held-out rows, nats per target."""

    search: Search
    """The ledger of the comparison."""


def at_the_end(search: Search) -> Snapshot:
    """Return completed trials with their values."""
    values = {trial.number: search.value(trial) for trial in search.with_status("completed")}
    return Snapshot(search.spec.total_steps, {number: value for number, value in values.items() if value is not None})


def where_all_were(search: Search) -> Snapshot | None:
    """Return the last step at which every completed or stopped trial was measured, with the values; None without such a step."""
    trials = search.with_status("completed", "stopped")
    measured = [dict(learning_curve(search, trial)) for trial in trials]
    common = set.intersection(*map(set, measured)) if measured else set()
    if not common:
        return None
    step = max(common)
    return Snapshot(step, {trial.number: curve[step] for trial, curve in zip(trials, measured, strict=True)})


def learning_curve(search: Search, trial: Trial) -> list[tuple[int, float]]:
    """Return steps and the finite values of the metric that were measured after them."""
    values = ((rung.step, rung.metrics.get(search.spec.metric)) for rung in trial.rungs)
    return [(step, value) for step, value in values if value is not None and math.isfinite(value)]


def varied(search: Search) -> list[str]:
    """Return the settings that differ between trials, in the order of the points."""
    return [path for path in axes_of(search) if len({repr(trial.begun.point.get(path)) for trial in search.trials}) > 1]


def numeric_axes(search: Search) -> list[Axis]:
    """Return the settings that vary between trials and are numbers in all that have them, in the order of the points."""
    axes = []
    for path in axes_of(search):
        values = [trial.begun.point[path] for trial in search.trials if path in trial.begun.point]
        if all(map(_is_number, values)) and len(set(values)) > 1:
            log = any(isinstance(said, Mapping) and said.get("log", False) for said in _ranges_of(search, path))
            axes.append(Axis(path, log))
    return axes


def plane(search: Search, snapshot: Snapshot, x: Axis, y: Axis) -> dict[tuple[float, float], float]:
    """Return the best value at each place of two settings, of the trials that have both."""
    better = min if search.spec.mode == "min" else max
    places: dict[tuple[float, float], float] = {}
    for trial in search.trials:
        point = trial.begun.point
        if trial.number in snapshot.values and x.path in point and y.path in point:
            place, value = (float(point[x.path]), float(point[y.path])), snapshot.values[trial.number]
            places[place] = better(value, places.get(place, value))
    return places


def importances(search: Search, snapshot: Snapshot) -> list[Importance]:
    """Return the settings by the size of their rank correlation with the metric, largest first.

    Left out are settings of fewer than 8 of the snapshot's trials, and those that do not vary among them.
    """
    found = []
    for axis in numeric_axes(search):
        pairs = [
            (float(trial.begun.point[axis.path]), snapshot.values[trial.number])
            for trial in search.trials
            if trial.number in snapshot.values and axis.path in trial.begun.point
        ]
        if len(pairs) >= FEWEST_FOR_CORRELATION:
            correlation = rank_correlation([setting for setting, _ in pairs], [value for _, value in pairs])
            if correlation is not None:
                found.append(Importance(axis.path, correlation, len(pairs)))
    return sorted(found, key=lambda importance: -abs(importance.correlation))


def settings_at_an_end(search: Search, trial: Trial) -> list[str]:
    """Return the paths of a trial's settings that lie at an end of what was searched, beyond which there may be better ones."""
    return [
        path
        for path, value in trial.begun.point.items()
        if _is_number(value) and any(_at_an_end(value, said) for said in _ranges_of(search, path))
    ]


def values_of_arms(search: Search, metric: str) -> dict[str, Values]:
    """Return a metric of the completed trials by arm and seed, arms in the order in which they began.

    Raises:
        ValueError: if two completed trials are of one arm and seed.
    """
    values: dict[str, dict[int, float]] = {arm: {} for arm in dict.fromkeys(arm_of(trial) for trial in search.trials)}
    for trial in search.with_status("completed"):
        arm, seed, value = arm_of(trial), trial.begun.seed, trial.metrics.get(metric)
        if seed in values[arm]:
            raise ValueError(f"trial {trial.number} is the second of arm {arm!r} with seed {seed}; a comparison has one of each")
        if value is not None:
            values[arm][seed] = value
    return dict(values)


def mean_curves(search: Search) -> dict[str, list[tuple[int, float]]]:
    """Return for each arm the mean of its completed trials, at the steps at which all of them were measured."""
    curves: dict[str, list[dict[int, float]]] = {}
    for trial in search.with_status("completed"):
        curves.setdefault(arm_of(trial), []).append(dict(learning_curve(search, trial)))
    return {
        arm: [(step, statistics.fmean(curve[step] for curve in of_arm)) for step in _common(of_arm)]
        for arm, of_arm in curves.items()
    }


def difference_curves(search: Search, baseline: str) -> dict[str, list[tuple[int, float]]]:
    """Return for each other arm its mean difference to the baseline, over the seeds that both completed, step by step."""
    curves: dict[str, dict[int, dict[int, float]]] = {}
    for trial in search.with_status("completed"):
        curves.setdefault(arm_of(trial), {})[trial.begun.seed] = dict(learning_curve(search, trial))
    found = {}
    for arm, by_seed in curves.items():
        pairs = [(by_seed[seed], curves[baseline][seed]) for seed in by_seed if seed in curves.get(baseline, {})]
        if arm != baseline and pairs:
            steps = _common([curve for pair in pairs for curve in pair])
            found[arm] = [(step, statistics.fmean(ours[step] - theirs[step] for ours, theirs in pairs)) for step in steps]
    return found


def arm_of(trial: Trial) -> str:
    """Return the arm of a trial of a comparison."""
    return trial.begun.arm or "(no arm)"


def _common(curves: list[dict[int, float]]) -> list[int]:
    return sorted(set.intersection(*map(set, curves)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _ranges_of(search: Search, path: str) -> Iterator[Any]:
    """Yield what the space says of a path, once for each branch that has it."""
    space = search.spec.space
    branches = space.get("branches")
    for part in (space, *(branches.values() if isinstance(branches, Mapping) else ())):
        if isinstance(part, Mapping) and path in part:
            yield part[path]


def _at_an_end(value: float, said: Any) -> bool:
    if isinstance(said, Mapping) and _is_number(said.get("low")) and _is_number(said.get("high")):
        low, high = said["low"], said["high"]
        if said.get("log") and min(low, value) > 0:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return not low + NEAR_THE_END * (high - low) < value < high - NEAR_THE_END * (high - low)
    # Of two values, each is at an end.
    return isinstance(said, list) and len(said) > 2 and all(map(_is_number, said)) and value in (min(said), max(said))
