"""Where the points of a search come from: a list made beforehand, or Optuna, which learns from the trials that are over."""

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from orchestrator.config.tune import Direction
from orchestrator.search.controller import Outcome
from tune_spaces.ranges import label_of
from tune_spaces.space import Point, Space

ASKS = 20
"""How often Optuna is asked for a point that was not tried before; a small space has many that were."""


class Sampler(Protocol):
    """Gives points, and hears what came of them."""

    def next(self) -> Point | None:
        """Return a point that was not tried before; None when there are no more."""
        ...

    def tell(self, point: Mapping[str, Any], outcome: Outcome) -> None:
        """Learn how a trial of this point ended."""
        ...


class ListSampler:
    """Points that were known from the beginning: a grid, or random draws."""

    def __init__(self, points: Iterable[Point], tried: Sequence[Mapping[str, Any]] = ()) -> None:
        self._points = [point for point in points if point not in tried]

    def next(self) -> Point | None:
        """Return the next of the list."""
        return self._points.pop(0) if self._points else None

    def tell(self, point: Mapping[str, Any], outcome: Outcome) -> None:
        """A list does not learn."""


class OptunaSampler:
    """Points by Optuna's tree-structured Parzen estimator (Bergstra et al., 2011).

    Args:
        space: what may be drawn.
        direction: whether the least or the largest value is the best.
        seed: draws the first points.
        count: how many points there are to be in all.
        tried: points of trials that are over or under way, with how they ended.

    Attributes:
        study: what Optuna knows.
    """

    def __init__(
        self, space: Space, direction: Direction, seed: int, count: int, tried: Sequence[tuple[Point, Outcome | None]] = ()
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # Resumed, a search must not draw the random points of its beginning a second time.
        sampler = optuna.samplers.TPESampler(seed=seed + len(tried))
        self.study = optuna.create_study(direction="minimize" if direction == "min" else "maximize", sampler=sampler)
        self._space, self._count = space, count
        self._generator = random.Random(seed + len(tried))
        self._given = [dict(point) for point, _ in tried]
        for point, outcome in tried:
            if outcome is not None:
                self.tell(point, outcome)

    def next(self) -> Point | None:
        """Return the point that Optuna expects most of, or a random one where it names only points that were tried."""
        if len(self._given) >= self._count:
            return None
        for _ in range(ASKS):
            point = self._space.suggest(self.study.ask())
            if point not in self._given:
                break
        else:
            every = self._space.sample(len(self._given) + 1, self._generator)  # one more than were given: one is new
            point = next(one for one in every if one not in self._given)
        self._given.append(point)
        return point

    def tell(self, point: Mapping[str, Any], outcome: Outcome) -> None:
        """Let Optuna learn from a trial; one that was stopped counts by the rung it came to, one that failed does not."""
        if outcome.value is None or not math.isfinite(outcome.value) or outcome.status == "failed":
            return
        known = _Known(self._space, point)
        self._space.suggest(known)
        completed = outcome.status == "completed"
        self.study.add_trial(
            create_trial(
                state=TrialState.COMPLETE if completed else TrialState.PRUNED,
                value=outcome.value,
                params=known.params,
                distributions=known.distributions,
                intermediate_values={} if completed else {outcome.rung: outcome.value},
            )
        )


class _Known:
    """A trial whose point is known: it answers with the point's values, and notes what Optuna must know of each."""

    def __init__(self, space: Space, point: Mapping[str, Any]) -> None:
        self._point, self._branch = point, space.branch_of(point)
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        """Return the point's number."""
        return self._note(name, FloatDistribution(low, high, log=log, step=step))

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Return the point's whole number."""
        return self._note(name, IntDistribution(low, high, log=log, step=step))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return the label of the point's value, or its branch."""
        return self._note(name, CategoricalDistribution(tuple(choices)))

    def _note(self, name: str, distribution: BaseDistribution) -> Any:
        path = name.removeprefix(f"{self._branch}: ")
        value = self._branch if name == "branch" else self._point[path]
        self.params[name] = label_of(value) if isinstance(distribution, CategoricalDistribution) else value
        self.distributions[name] = distribution
        return self.params[name]
