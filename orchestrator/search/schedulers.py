"""Which trials are worth continuing: pure rules over what was measured at one rung, and the schedulers of Ray Tune.

Those of Ray Tune are asked outside Ray Tune's loop: they say whether a trial continues, and the trial ends by its own return.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, MedianStoppingRule, TrialScheduler

from orchestrator.config.schedulers import AsyncHyperBand, NativeScheduler, OwnScheduler
from orchestrator.config.tune import Direction, TuneConfig

FEWEST_FOR_MEDIAN = 3
"""Other trials at a rung below which their median says nothing."""

METRIC, TIME = "value", "rung"
"""What Ray Tune's schedulers read of a result; rungs are counted from 1 there."""


class Scheduler(Protocol):
    """Says which trials continue. Rungs are counted from 0."""

    def begin(self, trial: int) -> None:
        """A trial is about to start."""
        ...

    def goes_on(self, trial: int, rung: int, value: float) -> bool:
        """Take down what was measured of a trial at a rung; return whether it continues."""
        ...

    def take_down(self, trial: int, rung: int, value: float) -> None:
        """Take down what was measured where nothing is to decide: at the last rung, or by a controller before this one.

        The rungs of a trial are told in their order; that of trials does not matter.
        """
        ...


def scheduler_of(settings: TuneConfig) -> Scheduler:
    """Return the scheduler that the section ``tune`` asks for."""
    if isinstance(settings.scheduler, str):
        return RuleScheduler(StoppingRule(settings.scheduler, settings.direction, settings.reduction))
    return RayScheduler(settings.scheduler, settings.direction, settings.rungs)


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When a trial that was measured may continue."""

    scheduler: OwnScheduler
    """Successive halving without waiting for one another (ASHA, arXiv 1810.05934), the median of the others, or always."""
    mode: Direction
    """Whether less or more is better."""
    reduction: int = 3
    """ASHA lets the best of so many continue."""

    def goes_on(self, value: float, others: Sequence[float]) -> bool:
        """Return whether a trial continues from a rung.

        Args:
            value: what was measured of it there. What is no finite number is worse than any number, and does not continue.
            others: what was measured there of other trials so far.
        """
        if self.scheduler == "none":
            return True
        cost, costs = self._cost(value), [self._cost(other) for other in others]
        if cost == math.inf:
            return False
        better = sum(other < cost for other in costs)
        if self.scheduler == "asha":
            together = len(others) + 1
            # The first ones at a rung continue: with fewer than one in `reduction` nothing can be concluded.
            return together < self.reduction or better < math.floor(together / self.reduction)
        if len(others) < FEWEST_FOR_MEDIAN:
            return True
        return cost <= statistics.median(costs)

    def _cost(self, value: float) -> float:
        """Less is better."""
        if not math.isfinite(value):
            return math.inf
        return value if self.mode == "min" else -value


class RuleScheduler:
    """A stopping rule, with the memory of what was measured at each rung."""

    def __init__(self, rule: StoppingRule) -> None:
        self._rule = rule
        self._values: defaultdict[int, dict[int, float]] = defaultdict(dict)  # by rung and trial

    def begin(self, trial: int) -> None:
        """Rules look at what was measured alone."""

    def goes_on(self, trial: int, rung: int, value: float) -> bool:
        """Take down what was measured of a trial at a rung; return whether it continues."""
        others = [other for number, other in self._values[rung].items() if number != trial]
        self.take_down(trial, rung, value)
        return self._rule.goes_on(value, others)

    def take_down(self, trial: int, rung: int, value: float) -> None:
        """Take down what was measured where nothing is to decide."""
        self._values[rung][trial] = value


class RayScheduler:
    """A scheduler of Ray Tune, asked rung by rung.

    What is no finite number is not shown to it, and does not continue: Ray Tune's own let such a trial go on.

    Args:
        settings: which scheduler, and its arguments.
        mode: whether less or more is better.
        rungs: how often a trial is measured.
    """

    def __init__(self, settings: NativeScheduler, mode: Direction, rungs: int) -> None:
        self._scheduler = _ray_scheduler(settings, mode, rungs)
        self._trials: dict[int, Trial] = {}

    def begin(self, trial: int) -> None:
        """Make a trial known to the scheduler."""
        if trial not in self._trials:  # schedulers know a trial by identity
            self._trials[trial] = Trial("trial", trial_id=f"{trial:04d}", stub=True)
        with _numpy_seeded(trial):  # brackets are drawn from numpy's global generator; again the same for the same trial
            self._scheduler.on_trial_add(None, self._trials[trial])

    def goes_on(self, trial: int, rung: int, value: float) -> bool:
        """Take down what was measured of a trial at a rung; return whether it continues."""
        if not math.isfinite(value):
            return False
        decision = self._scheduler.on_trial_result(None, self._trials[trial], _result(rung, value))
        return bool(decision == TrialScheduler.CONTINUE)

    def take_down(self, trial: int, rung: int, value: float) -> None:
        """Take down what was measured where nothing is to decide.

        A completed trial's last result is what a scheduler keeps without deciding, so that is what it is told; the trial is made
        known before, since after it the scheduler forgets whose it was.
        """
        if math.isfinite(value):
            self.begin(trial)
            self._scheduler.on_trial_complete(None, self._trials[trial], _result(rung, value))


def _ray_scheduler(settings: NativeScheduler, mode: Direction, rungs: int) -> TrialScheduler:
    arguments: dict[str, Any] = {**settings.model_dump(exclude={"kind"}), "metric": METRIC, "mode": mode, "time_attr": TIME}
    if isinstance(settings, AsyncHyperBand):
        return AsyncHyperBandScheduler(max_t=rungs, **arguments)
    return MedianStoppingRule(min_time_slice=math.inf, **arguments)  # with less it pauses a trial of which it knows too little


def _result(rung: int, value: float) -> dict[str, float]:
    return {TIME: rung + 1, METRIC: value}


@contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
