"""Whether teachers, samplers and workers find room at one time: against trying all ways, and the words of each refusal."""

import collections
import itertools
import random
import re
from collections.abc import Sequence

import pytest

from actors.config.models import EngineConfig
from actors.placement import (
    Node,
    ResourceRequest,
    sampler_request,
)
from actors.room import fit_together, require_all_together
from tests.actors.test_placement import engine, node, replica, worker


def sampler(tensor_parallel: int = 1, **settings: object) -> ResourceRequest:
    return sampler_request(engine(tensor_parallel, **settings))


def ways_to_place(nodes: Sequence[Node], need: ResourceRequest, count: int) -> list[tuple[int, ...]]:
    """All ways to deal so many over the nodes, whether there is room or not."""
    return [
        dealt
        for dealt in itertools.product(range(count + 1), repeat=len(nodes))
        if sum(dealt) == count and all(need.may_stand_on(one) for one, here in zip(nodes, dealt, strict=True) if here)
    ]


def fit_somehow(nodes: Sequence[Node], needs: Sequence[tuple[ResourceRequest, int]]) -> bool:
    """Whether any way of dealing all of them over the nodes finds room."""
    for ways in itertools.product(*(ways_to_place(nodes, need, count) for need, count in needs)):
        wanted: list[dict[str, float]] = [{} for _ in nodes]
        for (need, _), way in zip(needs, ways, strict=True):
            for here, amounts in zip(way, wanted, strict=True):
                for resource, amount in need.amounts.items():
                    amounts[resource] = amounts.get(resource, 0) + here * amount
        if all(
            amount <= one.total.get(resource, 0) + 1e-9
            for one, amounts in zip(nodes, wanted, strict=True)
            for resource, amount in amounts.items()
        ):
            return True
    return False


def test_what_is_said_to_fit_together_does() -> None:
    chance, answers = random.Random(1), collections.Counter[tuple[bool, bool]]()
    for _ in range(300):
        nodes = [
            node(name, gpus=chance.randint(0, 4), cpus=chance.randint(1, 6), role=chance.choice(["teacher", "student", ""]))
            for name in "abc"[: chance.randint(1, 3)]
        ]
        labels = [chance.choice([{}, {"role": "!student"}]), chance.choice([{}, {"role": "student"}])]
        needs = [
            (replica(chance.randint(1, 2), cpus=chance.choice([1, 2.5]), labels=labels[0]), chance.randint(1, 2)),
            (sampler(chance.randint(1, 2), cpus=chance.choice([0.5, 2]), labels=labels[1]), chance.randint(1, 2)),
            (worker(chance.randint(0, 1), cpus=chance.choice([0.5, 1])), chance.randint(1, 3)),
        ]
        said, there_is = fit_together(nodes, needs), fit_somehow(nodes, needs)
        assert there_is or not said, "it may miss a way, but never makes one up"
        answers[said, there_is] += 1
    assert answers[True, True] > 30 and answers[False, False] > 30
    assert answers[False, True] < answers[True, True] / 10


def test_what_fits_together_by_hand() -> None:
    one, two = [node("a", gpus=4)], [node("a", gpus=4), node("b", gpus=4)]
    assert fit_together(one, [(replica(2), 1), (sampler(1), 1), (worker(), 1)])
    assert not fit_together(one, [(replica(2), 1), (sampler(1), 1), (worker(), 2)])
    assert fit_together(two, [(replica(4), 1), (sampler(1), 2), (worker(), 2)])
    assert not fit_together(two, [(replica(4), 2), (sampler(1), 1)])
    assert fit_together(two, [(replica(3), 2), (sampler(1), 2)])
    assert not fit_together(two, [(replica(3), 2), (sampler(2), 1)]), "one GPU is left on each of two nodes"
    assert fit_together(one, []) and fit_together([], [])
    assert not fit_together([], [(worker(gpus=0), 1)])


def test_whoever_is_bound_to_a_node_may_be_placed_before_the_others() -> None:
    nodes = [node("a", gpus=2, role="student"), node("b", gpus=2)]
    assert fit_together(nodes, [(replica(2), 1), (worker(labels={"role": "student"}), 2)])
    assert fit_together(nodes, [(sampler(1), 2), (worker(labels={"role": "student"}), 1), (replica(1), 1)])
    assert not fit_together(nodes, [(replica(2), 1), (worker(labels={"role": "student"}), 3)])


def test_three_kinds_that_do_not_fit_together_hear_what_would_do() -> None:
    two = [node("a"), node("b")]
    needs = [(replica(), 2), (sampler(), 4), (worker(), 4)]
    require_all_together(two, needs)
    many = [(replica(), 2), (sampler(), 5), (worker(), 4)]
    message = (
        "2 replicas of 4 GPUs and 1 CPU, 5 samplers of 1 GPU and 1 CPU, 4 workers of 1 GPU and 1 CPU do not fit at one time on 2 "
        "nodes; teacher.engine.replicas 1 or rollouts.engine.replicas 4 or workers.count 3 would do"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_all_together(two, many)
    for index, count in ((0, 1), (1, 4), (2, 3)):
        require_all_together(two, [(need, count if place == index else old) for place, (need, old) in enumerate(many)])


def test_only_numbers_that_would_do_are_named() -> None:
    with pytest.raises(ValueError, match=r" do not fit at one time on 1 node; workers\.count 2 would do$"):
        require_all_together([node("a")], [(replica(), 1), (sampler(2), 1), (worker(), 5)])
    message = (
        "1 replica of 4 GPUs and 1 CPU, 1 sampler of 4 GPUs and 1 CPU, 1 worker of 1 GPU and 1 CPU do not fit at one time on "
        "1 node; more nodes, or fewer of several kinds, would do"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_all_together([node("a")], [(replica(), 1), (sampler(4), 1), (worker(), 1)])


def test_a_sampler_stands_in_its_own_section() -> None:
    need = sampler(2, cpus=3, resources={"rack": 1}, labels={"role": "student"})
    assert (need.section, need.noun, need.count_key) == ("rollouts.engine", "sampler", "replicas")
    assert need.amounts == replica(2, cpus=3, resources={"rack": 1}).amounts == {"GPU": 2.0, "CPU": 3.0, "rack": 1.0}
    assert need.labels == {"role": "student"}
    assert need.many(2) == "2 samplers of 2 GPUs and 3 CPUs and 1 rack"
    assert "GPU" not in sampler_request(EngineConfig()).amounts
