"""What fits on which nodes: arithmetic, checked against plain counting, and the words of each refusal."""

import itertools
import random
import re
from collections.abc import Sequence

import pytest
import ray
from ray.util import placement_group_table, remove_placement_group

from actors.config.models import EngineConfig, EvaluateConfig
from actors.config.workers import WorkersConfig
from actors.placement import (
    Node,
    ResourceRequest,
    evaluator_need,
    read_cluster,
    read_nodes,
    replica_request,
    reserve,
    sampler_request,
    worker_request,
)
from actors.room import most_replicas, require_room, require_room_together, workers_beside


def node(name: str, gpus: float = 8, cpus: float = 8, role: str = "", **custom: float) -> Node:
    total = {"CPU": cpus, "memory": 1e9, "node:10.0.0.1": 1.0, **({"GPU": gpus} if gpus else {}), **custom}
    return Node(name, total, {"ray.io/node-id": name, **({"role": role} if role else {})})


def engine(tensor_parallel: int = 4, **settings: object) -> EngineConfig:
    return EngineConfig.model_validate({"gpu": True, "tensor_parallel": tensor_parallel, **settings})


def replica(tensor_parallel: int = 4, **settings: object) -> ResourceRequest:
    return replica_request(engine(tensor_parallel, **settings))


def worker(gpus: int = 1, **settings: object) -> ResourceRequest:
    return worker_request(WorkersConfig.model_validate({"gpus": gpus, **settings}))


def room_of(nodes: Sequence[Node], first: ResourceRequest, second: ResourceRequest | None, most: int = 99) -> list[int]:
    return workers_beside([(one, one.total) for one in nodes], first, second, most)


TWO_KINDS = [node("a", role="teacher", teacher_node=1), node("b", role="student"), node("head", gpus=0, cpus=2)]


# ---- how many fit


def test_a_replica_stands_in_one_node_however_many_gpus_there_are_in_all() -> None:
    four_times_three = [node(name, gpus=3) for name in "abcd"]
    assert room_of(four_times_three, replica(4), None) == [0]
    assert len(room_of(four_times_three, replica(3), None)) == 5
    assert len(room_of(four_times_three, replica(1), None)) == 13


def test_labels_and_custom_resources_keep_teachers_and_students_apart() -> None:
    assert room_of(TWO_KINDS, replica(labels={"role": "teacher"}), worker(labels={"role": "student"})) == [8, 8, 8]
    assert room_of(TWO_KINDS, replica(resources={"teacher_node": 1}), worker()) == [16, 12]
    assert room_of(TWO_KINDS, replica(), worker()) == [16, 12, 8, 4, 0]
    assert room_of(TWO_KINDS, replica(), worker(), most=2) == [16, 12, 8]


@pytest.mark.parametrize(
    ("selector", "names"),
    [("teacher", "a"), ("!teacher", "b head"), ("in(teacher, student)", "a b"), ("!in(teacher,student)", "head"), ("other", "")],
)
def test_selectors_mean_what_they_mean_to_ray(selector: str, names: str) -> None:
    need = worker(gpus=0, labels={"role": selector})
    assert [one.name for one in TWO_KINDS if need.may_stand_on(one)] == names.split()


def test_fractions_of_cpus_add_up() -> None:
    tenth = worker(gpus=0, cpus=0.1)
    assert tenth.times_on(node("a", cpus=0.3)) == 3
    assert tenth.times_on(node("a", cpus=0.29)) == 2


def test_the_most_workers_beside_replicas_is_what_trying_all_ways_finds() -> None:
    chance = random.Random(0)
    for _ in range(60):
        nodes = [
            node(name, gpus=chance.randint(0, 6), cpus=chance.randint(1, 9), role=chance.choice(["teacher", "student", ""]))
            for name in "abc"
        ]
        teacher = replica(chance.randint(1, 3), cpus=chance.choice([1, 2.5]), labels=chance.choice([{}, {"role": "!student"}]))
        student = worker(chance.randint(0, 1), cpus=chance.choice([0.5, 2]), labels=chance.choice([{}, {"role": "student"}]))
        best: dict[int, int] = {}
        for counts in itertools.product(range(7), repeat=3):
            left = [
                {key: value - count * teacher.amounts.get(key, 0) for key, value in one.total.items()}
                for one, count in zip(nodes, counts, strict=True)
            ]
            if any(min(rest.values()) < 0 for rest in left) or any(
                count and (not teacher.may_stand_on(one) or "GPU" not in one.total)
                for one, count in zip(nodes, counts, strict=True)
            ):
                continue
            workers = sum(
                max(n for n in range(40) if all(n * want <= rest.get(key, 0) for key, want in student.amounts.items()))
                for one, rest in zip(nodes, left, strict=True)
                if student.may_stand_on(one)
            )
            best[sum(counts)] = max(best.get(sum(counts), 0), workers)
        assert room_of(nodes, teacher, student) == [best[count] for count in range(len(best))]


def test_the_most_replicas_beside_so_many_workers() -> None:
    assert most_replicas([16, 12, 8, 4, 0], workers=5) == 2
    assert most_replicas([16, 12], workers=0) == 1
    assert most_replicas([3], workers=4) == 0


def test_what_groups_hold_is_not_free() -> None:
    assert Node("a", {"CPU": 8.0, "GPU": 8.0}, held={"GPU": 4.0}).free == {"CPU": 8.0, "GPU": 4.0}
    assert replica().times_in({"CPU": -3.0, "GPU": 8.0}) == 0


# ---- what is refused, and in which words


@pytest.mark.parametrize(
    ("nodes", "need", "count", "message"),
    [
        (TWO_KINDS, replica(16), 1, "teacher.engine.tensor_parallel 16: the largest node has 8 GPUs; tensor_parallel 8 would do"),
        (TWO_KINDS, replica(cpus=99), 1, "teacher.engine.cpus 99: the largest node has 8 CPUs; cpus 8 would do"),
        (
            [node("a", gpus=4, role="teacher"), node("b")], replica(8, labels={"role": "teacher"}), 1,
            "teacher.engine.tensor_parallel 8: the largest node with role=teacher has 4 GPUs; tensor_parallel 4 would do",
        ),
        (
            [node("a", gpus=0)], replica(), 1,
            "teacher.engine: each replica wants 4 GPUs, and no node has a GPU; teacher.engine.gpu false would do",
        ),
        (
            [node("a", gpus=0)], sampler_request(engine(2)), 1,
            "rollouts.engine: each sampler wants 2 GPUs, and no node has a GPU; rollouts.engine.gpu false would do",
        ),
        (
            TWO_KINDS, sampler_request(engine(16)), 1,
            "rollouts.engine.tensor_parallel 16: the largest node has 8 GPUs; tensor_parallel 8 would do",
        ),
        (
            TWO_KINDS, sampler_request(engine(4)), 5,
            "5 samplers of 4 GPUs and 1 CPU do not fit: nodes hold 4 in all (a: 2, b: 2, head: 0); rollouts.engine.replicas 4 "
            "would do",
        ),
        (
            [node("a", gpus=0)], worker(), 1, "workers: each worker wants 1 GPU, and no node has a GPU; workers.gpus 0 would do"
        ),
        (
            [node("a", gpus=0)], evaluator_need(EvaluateConfig(gpus=1)), 1,
            "evaluate: each evaluator wants 1 GPU, and no node has a GPU; evaluate.gpus 0 would do",
        ),
        (
            TWO_KINDS, replica(labels={"role": "teachr"}), 1,
            "teacher.engine.labels role=teachr: no node has it; nodes have role=student, role=teacher",
        ),
        (
            TWO_KINDS, worker(labels={"role": "student", "zone": "x"}), 1,
            "workers.labels role=student, zone=x: no node has them all; nodes have role=student, role=teacher",
        ),
        (
            [node("a")], worker(labels={"role": "x"}), 1,
            "workers.labels role=x: no node has it; nodes have no labels; leave it out",
        ),
        (
            TWO_KINDS, replica(resources={"teacher_nod": 1}), 1,
            "teacher.engine.resources.teacher_nod 1: no node has any; custom resources of nodes are teacher_node",
        ),
        (
            [node("a")], worker(resources={"x": 1}), 1,
            "workers.resources.x 1: no node has any; nodes have no custom resources; leave it out",
        ),
        (
            TWO_KINDS, replica(resources={"teacher_node": 2}), 1,
            "teacher.engine.resources.teacher_node 2: the largest node has 1 teacher_node; resources.teacher_node 1 would do",
        ),
        (
            [node("a", gpus=8, cpus=2), node("b", gpus=1, cpus=32)], replica(4, cpus=16), 1,
            "teacher.engine: no node has 4 GPUs and 16 CPUs together (a has 8 GPUs and 2 CPUs; b has 1 GPU and 32 CPUs); "
            "lower one of them",
        ),
        (
            [node("a", gpus=7), node("b", gpus=7)], replica(), 3,
            "3 replicas of 4 GPUs and 1 CPU do not fit: nodes hold 2 in all (a: 1, b: 1); teacher.engine.replicas 2 would do",
        ),
        (
            [node(str(number), gpus=1) for number in range(9)], worker(), 10,
            "10 workers of 1 GPU and 1 CPU do not fit: nodes hold 9 in all (0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 1, 3 more); "
            "workers.count 9 would do",
        ),
    ],
)  # fmt: skip
def test_what_never_fits_is_refused_with_what_would_do(
    nodes: list[Node], need: ResourceRequest, count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        require_room(nodes, need, count)


def test_what_is_only_taken_now_is_not_refused() -> None:
    taken = Node("a", {"CPU": 8.0, "GPU": 8.0}, held={"CPU": 8.0, "GPU": 8.0})
    require_room([taken], replica(), 2)


def test_teacher_and_student_that_fit_only_in_turn_hear_what_would_do() -> None:
    nodes = [node("a"), node("b")]
    require_room_together(nodes, replica(), 2, worker(), 8)
    with pytest.raises(
        ValueError,
        match=r"^3 replicas of 4 GPUs and 1 CPU and 8 workers of 1 GPU and 1 CPU do not fit at one time: beside the 3 replicas "
        r"there is room for 4 workers; workers.count 4 or teacher.engine.replicas 2 or scores.overlap false, with which teacher "
        r"and student take turns, would do$",
    ):
        require_room_together(nodes, replica(), 3, worker(), 8)
    with pytest.raises(ValueError, match=r"room for 0 workers; scores.overlap false, .* would do$"):
        require_room_together([node("a", gpus=4)], replica(), 1, worker(), 1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"replicas": 0}, "0 is no number of replicas; 1 or auto would do"),
        ({"replicas": "atuo"}, "'atuo' is no number of replicas; 1 or auto would do"),
        ({"resources": {"GPU": 1}}, "GPU is no custom resource; gpu or gpus, beside resources, is the key for it"),
        ({"resources": {"teacher_node": 0}}, "teacher_node 0 asks for nothing; teacher_node 1 would do"),
        ({"labels": {"role": "a b"}}, "role 'a b' selects no label; 'teacher', '!teacher' or 'in(teacher, both)' would do"),
        ({"labels": {"role": ""}}, "role '' selects no label"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_the_configuration(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        EngineConfig.model_validate(setting)


# ---- Ray


@pytest.mark.ray
def test_nodes_are_read_with_what_groups_hold(local_ray: None) -> None:
    (there,) = read_nodes()
    assert there.total["CPU"] == 4 and "GPU" not in there.total
    before = there.free["CPU"]
    need = worker_request(WorkersConfig(cpus=0.5, labels={"ray.io/node-id": there.labels["ray.io/node-id"]}))
    group = reserve(need)
    ray.get(group.ready(), timeout=30)
    assert placement_group_table(group)["strategy"] == "STRICT_PACK"
    assert read_nodes()[0].free["CPU"] == before - 0.5
    remove_placement_group(group)
    assert read_cluster().nodes[0].free["CPU"] == before
    elsewhere = reserve(worker_request(WorkersConfig(cpus=0.5, labels={"role": "teacher"})))
    assert not elsewhere.wait(0.5)
    remove_placement_group(elsewhere)
