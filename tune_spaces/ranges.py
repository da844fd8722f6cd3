"""What one key of a configuration may be in a search: a list of values, or a range of numbers. Imports no torch, no Ray."""

import json
import math
import random
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Suggests(Protocol):
    """Who is asked for values: an Optuna trial, or anything that answers the same three questions."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        """Return a number between ``low`` and ``high``, both included."""

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Return a whole number between ``low`` and ``high``, both included."""

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of ``choices``, which are texts, numbers, booleans or None."""


class Dice:
    """A trial whose values are drawn independently, evenly or evenly in the logarithm."""

    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        """Return a number drawn between ``low`` and ``high``."""
        if step is not None:
            return low + step * self._generator.randrange(round((high - low) / step) + 1)
        if log:
            return min(max(math.exp(self._generator.uniform(math.log(low), math.log(high))), low), high)
        return self._generator.uniform(low, high)

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """Return a whole number drawn between ``low`` and ``high``."""
        if log:
            return min(max(int(math.exp(self._generator.uniform(math.log(low), math.log(high + 1)))), low), high)
        return self._generator.randrange(low, high + 1, step)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """Return one of ``choices``."""
        return self._generator.choice(choices)


class SpacePart(BaseModel):
    """A frozen part of a space: unknown keys are errors, numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Choice(SpacePart):
    """One of a list of values. A list of one fixes the value."""

    values: tuple[Any, ...]
    """Whatever the key may be: numbers, texts, null, or whole sections as mappings."""

    @model_validator(mode="after")
    def _values_differ(self) -> "Choice":
        if not self.values:
            raise ValueError("the list is empty; name at least one value")
        labels = [label_of(value) for value in self.values]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"the list names {label!r} twice; once would do")
        return self

    def as_written(self) -> list[Any]:
        """Return the choice as a user writes it."""
        return list(self.values)

    def count(self) -> int:
        """Return how many values there are."""
        return len(self.values)

    def points(self) -> tuple[Any, ...]:
        """Return the values."""
        return self.values

    def probes(self) -> tuple[Any, ...]:
        """Return the values that, if a configuration accepts them, show that it accepts all."""
        return self.values

    def holds(self, value: Any) -> bool:
        """Whether the value is one of these."""
        return value in self.values

    def suggest(self, trial: Suggests, name: str) -> Any:
        """Return the value that the trial picks; it is not asked where there is one alone."""
        if len(self.values) == 1:
            return self.values[0]
        labels = [label_of(value) for value in self.values]
        return self.values[labels.index(trial.suggest_categorical(name, labels))]


class Range(SpacePart):
    """Numbers between two ends, both included."""

    low: float
    """The lower end."""

    high: float
    """The upper end."""

    step: float | None = Field(default=None, gt=0)
    """Distance between neighbours; without it the range is continuous, and a grid cannot cover it."""

    log: bool = False
    """Draw evenly in the logarithm, as learning rates want it."""

    integer: bool = False
    """Whole numbers only, every one unless ``step`` says otherwise."""

    @model_validator(mode="after")
    def _not_empty(self) -> "Range":
        low, high = self.low, self.high
        if low >= high:
            raise ValueError(f"the range is empty: low {low:g} is not below high {high:g}; a list, [{low:g}], fixes the value")
        if self.log and low <= 0:
            end = f"low: {high / 1000:g} would do" if high > 0 else "leave log out"
            raise ValueError(f"log needs numbers above 0, and low is {low:g}; {end}")
        if self.log and self.step is not None:
            raise ValueError(f"log and step exclude each other; leave step {self.step:g} out, or list the values")
        return self

    @model_validator(mode="after")
    def _whole_numbers(self) -> "Range":
        for name, value in (("low", self.low), ("high", self.high), ("step", self.step)):
            if self.integer and value is not None and value != round(value):
                raise ValueError(f"integer needs a whole {name}, not {value:g}; {name}: {math.ceil(value)} would do")
        return self

    @model_validator(mode="after")
    def _step_divides(self) -> "Range":
        if self.step is not None:
            low, high, step = (Decimal(str(number)) for number in (self.low, self.high, self.step))
            if (high - low) % step:
                last = low + step * max(Decimal(1), (high - low) // step)
                raise ValueError(f"step {step} does not lead from low {low} to high {high}; high: {last} would do")
        return self

    def as_written(self) -> dict[str, Any]:
        """Return the range as a user writes it."""
        return self.model_dump(exclude_defaults=True)

    def count(self) -> int | None:
        """Return how many points there are; None for a continuous or logarithmic range."""
        step = self._distance()
        return None if step is None else round((self.high - self.low) / step) + 1

    def points(self) -> tuple[float, ...] | None:
        """Return every number of a range with steps, ascending; None for a continuous or logarithmic range."""
        count = self.count()
        return None if count is None else tuple(map(self._point, range(count)))

    def probes(self) -> tuple[float, ...]:
        """Return both ends, then a number between them that is no whole one unless all are."""
        count = self.count()
        if count is not None:
            return tuple(self._point(index) for index in dict.fromkeys((0, count - 1, 1)))
        between = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        if not self.integer and between == round(between):
            between += min(between - self.low, self.high - between, 1.0) / math.pi
        return tuple(self._number(number) for number in (self.low, self.high, between))

    def holds(self, value: Any) -> bool:
        """Whether the value lies between the ends."""
        return isinstance(value, int | float) and self.low <= value <= self.high

    def suggest(self, trial: Suggests, name: str) -> float:
        """Return the number that the trial picks."""
        if self.integer:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        picked = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        return picked if self.step is None else self._point(round((picked - self.low) / self.step))

    def _distance(self) -> float | None:
        return 1 if self.integer and not self.log and self.step is None else self.step

    def _point(self, index: int) -> float:
        """Count in decimals, in which 0.1 + 2 * 0.1 is 0.3: a draw and a grid give the same number to the last bit."""
        return self._number(Decimal(str(self.low)) + index * Decimal(str(self._distance())))

    def _number(self, number: Decimal | float) -> float:
        return int(number) if self.integer else float(number)


Dimension = Choice | Range


def share_values(one: Dimension, other: Dimension) -> bool:
    """Whether a value may lie in both; of two ranges, whether they overlap."""
    if isinstance(one, Choice):
        return any(other.holds(value) for value in one.values)
    if isinstance(other, Choice):
        return share_values(other, one)
    return max(one.low, other.low) <= min(one.high, other.high)


def label_of(value: Any) -> Any:
    """A section has its JSON as label: Optuna takes texts, numbers, booleans and None."""
    return value if value is None or isinstance(value, str | int | float) else json.dumps(value, default=list)
