"""A search space: dotted paths into a configuration and what stands there in a trial. It knows nothing of what they mean."""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError, model_validator

from tune_spaces.ranges import Choice, Dice, Dimension, Range, SpacePart, Suggests, share_values

Point = dict[str, Any]
"""What one trial sets: a value for each dotted path, such as ``{"loss.easy_ratio": 0.3}``."""

BRANCHES = "branches"
DRAWS_A_POINT = 1000  # after so many draws without a new point, a space whose size is not known has no more


class Space(SpacePart):
    """Paths that every trial sets, and branches, of which each trial takes one with the paths that exist in it alone."""

    ranges: dict[str, Dimension]
    """What each path may be, in every trial."""

    branches: dict[str, dict[str, Dimension]] = {}
    """By name, what else is set in a trial that takes this branch."""

    @model_validator(mode="after")
    def _paths_stand_once(self) -> "Space":
        if not self.ranges and not any(self.branches.values()):
            raise ValueError("the space is empty; name a path and its values, such as loss.easy_ratio: [0.3, 0.5]")
        for branch, own in self.branches.items():
            for path in own:
                if path in self.ranges:
                    raise ValueError(f"{path} stands in branch {branch} and outside the branches; once would do")
        return self

    @model_validator(mode="after")
    def _branches_differ(self) -> "Space":
        for (one, ours), (other, theirs) in itertools.combinations(self.branches.items(), 2):
            if ours.keys() == theirs.keys() and all(share_values(ours[path], theirs[path]) for path in ours):
                raise ValueError(f"branches {one} and {other} have points in common; a path with other values would do")
        return self

    def alternatives(self) -> dict[str | None, dict[str, Dimension]]:
        """Return, for each branch, all that is set in it; under None where there are no branches."""
        if not self.branches:
            return {None: self.ranges}
        return {branch: {**self.ranges, **own} for branch, own in self.branches.items()}

    def suggest(self, trial: Suggests) -> Point:
        """Return the point that a trial picks.

        A path within a branch has the branch in its name: what is the same path in two branches may have two ranges.
        """
        point = {path: dimension.suggest(trial, path) for path, dimension in self.ranges.items()}
        if self.branches:
            branch = Choice(values=tuple(self.branches)).suggest(trial, "branch")
            own = self.branches[branch]
            point |= {path: dimension.suggest(trial, f"{branch}: {path}") for path, dimension in own.items()}
        return point

    def draw(self, generator: random.Random) -> Point:
        """Return a random point: branches and values are equally likely, each range as its scale says."""
        return self.suggest(Dice(generator))

    def sample(self, count: int, generator: random.Random) -> list[Point]:
        """Return ``count`` random points, none twice.

        Raises:
            ValueError: if the space has fewer.
        """
        size = self.size()
        if size is not None and count > size:
            raise ValueError(f"the space has {size} points, not {count}; a grid tries each of them once")
        points: list[Point] = []
        for _ in range(DRAWS_A_POINT * count):
            if len(points) == count:
                break
            point = self.draw(generator)
            if point not in points:
                points.append(point)
        if len(points) < count:
            raise ValueError(f"the space seems to have {len(points)} points, not {count}; so many would do")
        return points

    def grid(self) -> Iterator[Point]:
        """Return every point, branch by branch, the last path changing fastest.

        Raises:
            ValueError: naming a path whose range has no points.
        """
        grids = [
            {path: _points_of(path, dimension) for path, dimension in dimensions.items()}
            for dimensions in self.alternatives().values()
        ]
        return (dict(zip(axes, values, strict=True)) for axes in grids for values in itertools.product(*axes.values()))

    def size(self) -> int | None:
        """Return how many points there are; None if a range is continuous."""
        total = 0
        for dimensions in self.alternatives().values():
            counts = [dimension.count() for dimension in dimensions.values()]
            if None in counts:
                return None
            total += math.prod(count for count in counts if count is not None)
        return total

    def as_written(self) -> dict[str, Any]:
        """Return the space as a user writes it; ``read_space`` reads it back to the same."""
        written: dict[str, Any] = {path: dimension.as_written() for path, dimension in self.ranges.items()}
        if self.branches:
            written[BRANCHES] = {
                branch: {path: dimension.as_written() for path, dimension in own.items()} for branch, own in self.branches.items()
            }
        return written

    def branch_of(self, point: Mapping[str, Any]) -> str | None:
        """Return the branch that holds the point; None where there are no branches, or none does."""
        for branch, dimensions in self.alternatives().items():
            if dimensions.keys() == point.keys() and all(own.holds(point[path]) for path, own in dimensions.items()):
                return branch
        return None


def read_space(tree: Mapping[str, Any]) -> Space:
    """Return the space that a section of YAML describes.

    A list is a choice, ``{low, high}`` with ``step``, ``log`` or ``integer`` a range; ``branches`` holds further such sections by
    name.

    Raises:
        ValueError: naming the path, what stands there and what would do.
    """
    said = {path: dimension for path, dimension in tree.items() if path != BRANCHES}
    branches = tree.get(BRANCHES, {})
    if not isinstance(branches, Mapping) or not all(isinstance(own, Mapping) for own in branches.values()):
        raise ValueError(f"{BRANCHES} holds sections by name, such as {{plain: {{loss.easy_ratio: [0.5]}}}}; got {branches!r}")
    try:
        return Space(ranges=_read_dimensions(said), branches={str(name): _read_dimensions(own) for name, own in branches.items()})
    except ValidationError as error:
        raise ValueError(_plainly(error)) from None


def _read_dimensions(tree: Mapping[str, Any]) -> dict[str, Dimension]:
    return {path: _read_dimension(path, said) for path, said in tree.items()}


def _read_dimension(path: Any, said: Any) -> Dimension:
    if not isinstance(path, str) or "" in path.split("."):
        raise ValueError(f"{path!r} is no dotted path into the configuration; loss.easy_ratio is one")
    try:
        if isinstance(said, list | tuple):
            return Choice(values=tuple(said))
        if isinstance(said, Mapping) and said.keys() & {"low", "high"}:
            return Range.model_validate(said)
    except ValidationError as error:
        raise ValueError(f"{path}: {_plainly(error)}") from None
    would_do = "a path is one key, such as loss.easy_ratio" if isinstance(said, Mapping) else f"[{said}] would fix the value"
    raise ValueError(f"{path}: give a list of values, or a range {{low: 0.1, high: 0.9}}; got {said!r} ({would_do})")


def _plainly(error: ValidationError) -> str:
    """Return what pydantic found wrong with one part, without its headings."""
    faults = []
    for fault in error.errors():
        place = ".".join(str(step) for step in fault["loc"])
        message = fault["msg"].removeprefix("Value error, ")
        faults.append(f"{place}: {message}; got {fault['input']!r}" if place else message)
    return "; ".join(faults)


def _points_of(path: str, dimension: Dimension) -> tuple[Any, ...]:
    points = dimension.points()
    if points is None:
        some = ", ".join(f"{number:g}" for number in sorted(dimension.probes()))
        raise ValueError(
            f"a grid needs points, and {path} is a range without steps: give it a step or a list, such as [{some}], or search at "
            "random or with tpe"
        )
    return points
