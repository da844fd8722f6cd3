"""Spaces: their points on a grid, at random and as a trial suggests them; branches; what is no space."""

import random
from typing import Any

import pytest

from tests.tune_spaces.test_ranges import PlanOptions
from tune_spaces.registry import SPACES, space_named
from tune_spaces.space import Space, read_space

TREE: dict[str, Any] = {
    "common": {"low": 0, "high": 1.5, "step": 0.5},
    "branches": {
        "plain": {"kind": ["plain"]},
        "knobbed": {"kind": ["knobbed"], "kind.knob": {"low": 1, "high": 3, "integer": True}},
    },
}


@pytest.fixture
def space() -> Space:
    return read_space(TREE)


def test_the_grid_goes_branch_by_branch(space: Space) -> None:
    points = list(space.grid())
    assert len(points) == space.size() == 4 + 4 * 3
    assert points[0] == {"common": 0.0, "kind": "plain"}
    assert points[4:6] == [{"common": 0.0, "kind": "knobbed", "kind.knob": 1}, {"common": 0.0, "kind": "knobbed", "kind.knob": 2}]


def test_a_knob_exists_only_in_its_branch(space: Space) -> None:
    generator = random.Random(0)
    draws = [space.draw(generator) for _ in range(100)]
    assert all(("kind.knob" in point) == (point["kind"] == "knobbed") for point in [*draws, *space.grid()])
    assert {point["kind"] for point in draws} == {"plain", "knobbed"}
    assert all(space.branch_of(point) == point["kind"] for point in draws)


def test_a_trial_is_asked_for_the_branch_and_its_own_knobs(space: Space) -> None:
    asked = PlanOptions()
    assert space.suggest(asked) == {"common": 1.5, "kind": "knobbed", "kind.knob": 3}
    assert asked.names == ["common", "branch", "knobbed: kind.knob"]


@pytest.mark.parametrize("name", SPACES)
def test_draws_follow_the_seed_and_stay_in_the_space(name: str) -> None:
    space = SPACES[name]
    first, second, other = ([space.draw(generator) for _ in range(50)] for generator in map(random.Random, (1, 1, 2)))
    assert first == second != other
    alternatives = space.alternatives()
    for point in first:
        own = alternatives[space.branch_of(point)]
        assert own.keys() == point.keys() and all(own[path].holds(value) for path, value in point.items())


def test_a_sample_names_no_point_twice(space: Space) -> None:
    points = space.sample(16, random.Random(0))
    assert all(point in points for point in space.grid())
    assert points == space.sample(16, random.Random(0)) != space.sample(16, random.Random(1))
    with pytest.raises(ValueError, match="the space has 16 points, not 17; a grid tries each of them once"):
        space.sample(17, random.Random(0))


def test_the_sizes_of_the_shipped_spaces() -> None:
    sizes = {name: space.size() for name, space in SPACES.items()}
    assert sizes == {"atkd": 25, "atkd_full": 660, "losses": 109, "optim": None, "smoke": 2}
    for name, size in sizes.items():
        assert size is None or len({str(point) for point in SPACES[name].grid()}) == size


def test_the_papers_defaults_are_a_point_of_its_plane() -> None:
    assert {"loss.easy_ratio": 0.5, "loss.easy_weight": 0.2} in list(SPACES["atkd"].grid())


def test_a_point_of_no_branch_is_in_none(space: Space) -> None:
    assert space.branch_of({"common": 0.0}) is None
    assert space.branch_of({"common": 7.0, "kind": "plain"}) is None
    assert SPACES["smoke"].branch_of({"loss.easy_ratio": 0.3}) is None


def test_a_grid_over_a_continuous_range_names_its_path() -> None:
    message = r"a grid needs points, and train\.optimizer\.learning_rate is a range without steps: .* such as \[1e-05, 0\.00031"
    with pytest.raises(ValueError, match=message):
        SPACES["optim"].grid()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, r"the space is empty; name a path and its values, such as loss\.easy_ratio: \[0\.3, 0\.5\]"),
        ({"a": []}, r"^a: the list is empty; name at least one value$"),
        ({"a": {"low": 2, "high": 1}}, r"^a: the range is empty: low 2 is not below high 1"),
        ({"a": {"low": 2}}, r"^a: high: Field required"),
        ({"a": {"low": 1, "high": 2, "steps": 1}}, r"^a: steps: Extra inputs are not permitted; got 1$"),
        ({"a": "x"}, r"a: give a list of values, or a range \{low: 0\.1, high: 0\.9\}; got 'x' \(\[x\] would fix the value\)"),
        ({"loss": {"easy_ratio": [0.3]}}, r"^loss: give a list .* got \{'easy_ratio': \[0\.3\]\} \(a path is one key, such as"),
        ({"a..b": [1]}, r"'a\.\.b' is no dotted path into the configuration; loss\.easy_ratio is one"),
        ({3: [1]}, r"^3 is no dotted path"),
        ({"branches": ["a"]}, r"branches holds sections by name, such as \{plain: .*got \['a'\]"),
        ({"branches": {"a": 3}}, r"branches holds sections by name"),
        ({"branches": {"a": {}}}, r"the space is empty"),
        ({"branches": {"b": {"a": [1]}, "c": {"a": {"low": 0, "high": 2}}}}, r"branches b and c have points in common; a path"),
        ({"branches": {"b": {"a": {"low": 0, "high": 2}}, "c": {"a": [2]}}}, r"branches b and c have points in common"),
        ({"branches": {"b": {"a": {"low": 0, "high": 2}}, "c": {"a": {"low": 2, "high": 3}}}}, r"branches b and c have points"),
        ({"a": [1], "branches": {"b": {"a": [2]}}}, r"a stands in branch b and outside the branches; once would do"),
    ],
)  # fmt: skip
def test_what_is_no_space_is_said(tree: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_space(tree)


def test_an_unknown_space_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(ValueError, match=r"no space is called 'atdk'; did you mean atkd\? There are atkd, atkd_full"):
        space_named("atdk")
    with pytest.raises(ValueError, match=r"no space is called 'zzz'; there are atkd, .* or write your own as a mapping"):
        space_named("zzz")
