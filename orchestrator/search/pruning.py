"""Which trials are worth continuing. Pure rules over what was measured at one rung; nothing here knows of Ray."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

FEWEST_FOR_MEDIAN = 3
"""Other trials at a rung below which their median says nothing."""


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """When a trial that was measured may continue."""

    scheduler: Literal["asha", "median", "none"]
    """Successive halving without waiting for one another (ASHA, arXiv 1810.05934), the median of the others, or always."""
    mode: Literal["min", "max"]
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
