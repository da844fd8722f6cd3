"""Where points come from: complete, never twice, and the same after the search was resumed."""

import json
import random
from typing import Any

import pytest
from optuna.trial import TrialState

from orchestrator.search.controller import Outcome
from orchestrator.search.samplers import ListSampler, OptunaSampler
from tune_spaces.registry import SPACES
from tune_spaces.space import Point, Space, read_space

STEPPED = read_space({"loss.easy_ratio": {"low": 0.1, "high": 0.9, "step": 0.1}, "b": {"low": 1, "high": 4, "integer": True}})
SECTIONS = read_space({"loss": [{"kind": "coupled"}, {"kind": "atkd", "divergence": {"kind": "reverse_kl"}}], "k": [1, None]})
BRANCHED = read_space(
    {
        "rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "branches": {"plain": {"loss.kind": ["a"]}, "split": {"loss.kind": ["b"], "loss.ratio": {"low": 0.0, "high": 1.0}}},
    }
)


def drawn(source: Any) -> list[Point]:
    """All that a source gives."""
    points = []
    while (point := source.next()) is not None:
        points.append(point)
    return points


def through_the_ledger(point: Point) -> Point:
    read: Point = json.loads(json.dumps(point))
    return read


def all_different(points: list[Point]) -> bool:
    return all(point not in points[:index] for index, point in enumerate(points))


def learned(space: Space, count: int, tried: Any = (), seed: int = 0) -> OptunaSampler:
    return OptunaSampler(space, "min", seed, count, tried)


@pytest.mark.parametrize("space", [STEPPED, SECTIONS, SPACES["losses"]], ids=["steps", "sections", "losses"])
def test_a_grid_is_complete_in_its_order_however_often_it_is_taken_up(space: Space) -> None:
    grid = list(space.grid())
    assert drawn(ListSampler(grid)) == grid and len(grid) == space.size()
    tried = [through_the_ledger(point) for point in grid[:3]]
    assert drawn(ListSampler(space.grid(), tried)) == grid[3:]
    assert drawn(ListSampler(grid, grid)) == []


def test_random_points_come_once_and_in_the_same_order_after_some_were_tried() -> None:
    draws = STEPPED.sample(20, random.Random(3))
    assert all_different(draws)
    tried = [through_the_ledger(draws[index]) for index in (0, 1, 4)]  # two trials at a time do not end in their order
    rest = drawn(ListSampler(STEPPED.sample(20, random.Random(3)), tried))
    assert rest == [point for index, point in enumerate(draws) if index not in (0, 1, 4)]
    assert drawn(ListSampler(STEPPED.sample(25, random.Random(3)), draws)) == STEPPED.sample(25, random.Random(3))[20:]


@pytest.mark.parametrize("space", [STEPPED, SECTIONS, BRANCHED, *SPACES.values()], ids=["steps", "sections", "branches", *SPACES])
def test_points_are_the_same_when_they_are_read_back_from_the_ledger(space: Space) -> None:
    listed = space.sample(min(30, space.size() or 30), random.Random(1))
    suggested = drawn(learned(space, min(12, space.size() or 12)))
    for point in [*listed, *suggested]:
        assert through_the_ledger(point) == point
        assert space.branch_of(through_the_ledger(point)) == space.branch_of(point)


@pytest.mark.parametrize("space", [STEPPED, SECTIONS], ids=["steps", "sections"])
def test_optuna_gives_every_point_of_a_small_space_once(space: Space) -> None:
    size = space.size()
    assert size is not None
    source, points = learned(space, size), []
    while (point := source.next()) is not None:
        source.tell(through_the_ledger(point), Outcome("completed", 2.0 + len(points) % 3, 2))
        points.append(point)
    assert len(points) == size and all_different(points)
    assert sorted(map(str, points)) == sorted(map(str, space.grid())), "the same numbers to the last bit"


LARGER = {name: space for name, space in SPACES.items() if space.size() is None or space.size() >= 4}  # type: ignore[operator]


@pytest.mark.parametrize("space", [STEPPED, BRANCHED, *LARGER.values()], ids=["steps", "branches", *LARGER])
def test_resumed_optuna_knows_what_came_of_the_trials(space: Space) -> None:
    points = space.sample(min(12, space.size() or 12), random.Random(2))
    outcomes: list[Outcome | None] = [Outcome("completed", 1.0 + index, 2) for index in range(len(points))]
    outcomes[1], outcomes[2], outcomes[3] = Outcome("stopped", 7.0, 1), Outcome("failed", 3.0, 0), None
    source = learned(space, len(points) + 4, list(zip(map(through_the_ledger, points), outcomes, strict=True)))
    states = [trial.state for trial in source.study.trials]
    assert states.count(TrialState.COMPLETE) == len(points) - 3 and states.count(TrialState.PRUNED) == 1
    pruned = next(trial for trial in source.study.trials if trial.state == TrialState.PRUNED)
    assert pruned.intermediate_values == {1: 7.0}
    assert source.study.best_trial.value == 1.0
    if space.size() is None or space.size() >= len(points) + 4:  # type: ignore[operator]
        new = drawn(source)
        assert len(new) == 4 and all_different([*points, *new])


def test_what_optuna_is_told_is_what_it_would_have_kept_itself() -> None:
    """A study that is told of a point holds the parameters of a study that drew it."""
    for space in (*SPACES.values(), BRANCHED, STEPPED):
        teller = learned(space, 3)
        for point in (teller.next(), teller.next()):
            assert point is not None
            teller.tell(point, Outcome("completed", 1.0, 0))
            asked = [trial for trial in teller.study.trials if trial.state == TrialState.RUNNING]
            told = teller.study.trials[-1]
            assert any(told.params == pytest.approx(trial.params) for trial in asked)  # ours count steps in decimals
            assert told.distributions in [trial.distributions for trial in asked]


def test_optuna_learns_which_way_is_better() -> None:
    line = read_space({"x": {"low": 0.0, "high": 1.0}})
    for direction, best in (("min", 0.0), ("max", 1.0)):
        source, last = OptunaSampler(line, direction, 0, 40), []  # type: ignore[arg-type]
        while (point := source.next()) is not None:
            source.tell(point, Outcome("completed", point["x"], 2))
            last.append(point["x"])
        assert abs(sum(last[20:]) / 20 - best) < 0.3


@pytest.mark.parametrize(
    "outcome", [Outcome("failed", 3.0, 0), Outcome("failed", None, -1), Outcome("completed", float("nan"), 2)]
)
def test_failures_teach_optuna_nothing_and_their_points_are_not_tried_again(outcome: Outcome) -> None:
    space = read_space({"x": [1, 2]})
    source = learned(space, 2)
    first = source.next()
    assert first is not None
    source.tell(first, outcome)
    assert source.next() not in (first, None)
    assert source.next() is None
