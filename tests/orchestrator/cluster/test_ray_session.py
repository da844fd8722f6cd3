"""What a run holds at one time, and what it is told when that is not there."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
from ray.exceptions import AuthenticationError

from actors.config.workers import WorkersConfig
from actors.placement import Cluster, Node
from orchestrator.cluster.ray_session import (
    Demand,
    cluster_address,
    demand,
    ray_for,
    require_places,
    settle_replicas,
    why_ray_failed,
)
from orchestrator.run.training import scaling_of
from tests.orchestrator.config.test_run import changed


def test_teacher_and_student_are_held_together_only_if_they_overlap() -> None:
    overrides = ["teacher.engine.cpus=2", "teacher.engine.replicas=3", "workers={count: 4, cpus: 1.5}"]
    assert demand(changed(*overrides)) == Demand(cpus=12, gpus=0)
    assert demand(changed(*overrides, "scores.overlap=false")) == Demand(cpus=6, gpus=0)


def test_gpus_are_counted_with_tensor_parallel() -> None:
    overrides = ["teacher.engine={gpu: true, replicas: 2, tensor_parallel: 4}", "workers={count: 3, gpus: 1}"]
    assert demand(changed(*overrides)).gpus == 11


def test_fitting_and_evaluation_count_too() -> None:
    assert demand(changed("teacher.finetune.workers.cpus=7")).cpus == 7
    assert demand(changed("evaluate={cpus: 9, gpus: 1}")) == Demand(cpus=9, gpus=1)


def test_who_writes_responses_counts_too() -> None:
    assert demand(changed("responses={writer: teacher, engine: {replicas: 3, cpus: 4}}")) == Demand(cpus=12)
    assert demand(changed("responses={writer: teacher}", "teacher.engine.cpus=3", "scores.overlap=false")) == Demand(cpus=3)


def test_who_draws_tokens_beside_the_training_needs_room_of_its_own() -> None:
    engines = "rollouts={student_share: 1, teacher_share: 0.2, engine: {cpus: 2}, teacher_engine: {cpus: 3, replicas: 2}}"
    beside = [engines, "student.model.hidden_size=64", "teacher.engine.cpus=1", "workers={count: 2, cpus: 1}"]
    assert demand(changed(*beside)) == Demand(cpus=1 + 2 + 6 + 2)
    require_places(changed(*beside), [Node("one", {"CPU": 11.0})])
    with pytest.raises(ValueError, match=(
        "^1 replica of 1 CPU, 1 sampler of 2 CPUs, 2 teacher samplers of 3 CPUs, 2 workers of 1 CPU do not fit at one time on "
        r"1 node; rollouts\.teacher_engine\.replicas 1 or workers\.count 1 would do$"
    )):  # fmt: skip
        require_places(changed(*beside), [Node("one", {"CPU": 10.0})])
    with pytest.raises(ValueError, match=r"rollouts\.teacher_engine\.cpus 3: the largest node has 2 CPUs; cpus 2 would do"):
        require_places(changed(*beside), [Node("one", {"CPU": 2.0})])


def test_of_replicas_whose_number_is_open_one_is_counted() -> None:
    assert demand(changed("teacher.engine={replicas: auto, cpus: 3}", "workers.cpus=2")) == Demand(cpus=5)


def nodes(count: int, gpus: float = 8, **held: float) -> list[Node]:
    return [Node(f"n{number}", {"CPU": 16.0, "GPU": gpus}, {"role": "both"}, held) for number in range(count)]


def free(nodes: list[Node]) -> Cluster:
    return Cluster(nodes, {name: sum(node.free[name] for node in nodes) for name in ("CPU", "GPU")})


ON_GPUS = ("teacher.engine={gpu: true, replicas: 2, tensor_parallel: 4}", "workers={count: 8, gpus: 1}")


def test_each_stage_is_looked_at_before_anything_starts() -> None:
    require_places(changed(*ON_GPUS), nodes(2))
    require_places(changed(*ON_GPUS, "scores.overlap=false"), nodes(1))
    require_places(changed(*ON_GPUS, "teacher.engine.replicas=auto"), nodes(2))
    with pytest.raises(ValueError, match=r"do not fit at one time: .* teacher\.engine\.replicas 1 or scores\.overlap false"):
        require_places(changed(*ON_GPUS, "workers.count=12"), nodes(2))
    for change, message in (
        ("teacher.engine.replicas=5", r"^5 replicas of .* teacher\.engine\.replicas 4 would do"),
        (
            "responses={writer: student, engine: {gpu: true, tensor_parallel: 16}}",
            r"^responses\.engine\.tensor_parallel 16: the largest node has 8 GPUs; tensor_parallel 8 would do$",
        ),
        ("workers.count=17", r"^17 workers of .* workers\.count 16 would do"),
        ("workers={min: 17, max: 20, gpus: 1, cpus: 1}", r"^17 workers of .* workers\.min 16 would do"),
        ("teacher.finetune.workers.cpus=17", r"^teacher\.finetune\.workers\.cpus 17: the largest node has 16 CPUs"),
        (
            "student.finetune={train: {}, workers: {labels: {role: none}}}",
            r"^student\.finetune\.workers\.labels role=none: no node has it",
        ),
        ("evaluate.cpus=17", r"^evaluate\.cpus 17: the largest node has 16 CPUs; cpus 16 would do"),
    ):
        with pytest.raises(ValueError, match=message):
            require_places(changed(*ON_GPUS, "scores.overlap=false", change), nodes(2))


@pytest.mark.ray
def test_a_run_that_wants_gpus_where_there_are_none_hears_it_at_once(local_ray: None) -> None:
    with (
        pytest.raises(ValueError, match=r"each replica wants 4 GPUs, and no node has a GPU; teacher\.engine\.gpu false would do"),
        ray_for(changed(*ON_GPUS)),
    ):
        raise AssertionError("the run must not begin")


@pytest.mark.parametrize(
    ("students", "shards", "cluster", "count", "reason"),
    [
        (None, 99, free(nodes(3)), 6, "6 replicas of 4 GPUs and 1 CPU, as many as find room on 3 nodes"),
        (4, 99, free(nodes(3)), 5, "5 replicas of 4 GPUs and 1 CPU, as many as find room on 3 nodes beside 4 workers"),
        (None, 2, free(nodes(3)), 2, "2 replicas of 4 GPUs and 1 CPU, one for each shard to score"),
        (None, 99, free(nodes(3, GPU=5.0)), 1, "1 replica of 4 GPUs and 1 CPU, which waits for room"),
        (None, 99, free(nodes(3, GPU=4.0)), 3, "3 replicas of 4 GPUs and 1 CPU, as many as find room on 3 nodes"),
        (24, 99, free(nodes(3)), 1, "1 replica of 4 GPUs and 1 CPU, which waits for room"),
        (4, 99, Cluster(nodes(3), {"CPU": 48.0, "GPU": 15.0}), 2, "2 replicas .* as many as find room on 3 nodes beside .*"),
    ],
)
def test_as_many_replicas_as_find_room(students: int | None, shards: int, cluster: Cluster, count: int, reason: str) -> None:
    engine = changed("teacher.engine={gpu: true, replicas: auto, tensor_parallel: 4}").teacher.engine
    workers = WorkersConfig(count=students, gpus=1) if students else None
    settled = settle_replicas(engine, workers, shards, cluster)
    assert settled.count == count
    assert re.fullmatch(reason, settled.reason)


def test_ray_train_is_told_what_the_arithmetic_counted() -> None:
    workers = WorkersConfig(count=3, cpus=2, gpus=1, resources={"student_node": 1}, labels={"role": "student"})
    scaling = scaling_of(workers, workers.count)
    assert (scaling.num_workers, scaling.use_gpu, scaling.label_selector) == (3, True, {"role": "student"})
    assert scaling.resources_per_worker == {"CPU": 2, "GPU": 1, "student_node": 1}
    assert scaling_of(WorkersConfig(), 1).label_selector is None


@pytest.mark.parametrize(("said", "means"), [(None, None), ("", None), ("local", None), ("auto", "auto")])
def test_ray_address_names_a_cluster_or_none(monkeypatch: pytest.MonkeyPatch, said: str | None, means: str | None) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if said is not None:
        monkeypatch.setenv("RAY_ADDRESS", said)
    assert cluster_address() == means


def test_a_cluster_that_does_not_answer_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = "{}:{}".format(*server.getsockname())
        for address in (here, f"ray://{here}"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            assert cluster_address() == address
    for address, message in (
        (here, f"RAY_ADDRESS {here}: nothing answers there .*refused.*auto finds a Ray that runs on this machine"),
        ("10.0.0.1:99999", "RAY_ADDRESS 10.0.0.1:99999: nothing answers there"),
        ("http://127.0.0.1:8265", "is an address for jobs: RAY_API_SERVER_ADDRESS .* such as 10.0.0.1:6379, would do"),
    ):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(ValueError, match=message):
            cluster_address()


@pytest.mark.ray
def test_a_ray_that_runs_already_is_used_and_left_running(local_ray: None) -> None:
    with ray_for(changed()):
        pass
    assert ray.is_initialized()


def test_what_ray_says_comes_after_what_to_change() -> None:
    said = why_ray_failed("10.0.0.1:6379", ConnectionError("Failed to connect\n to it"))
    assert said.startswith(
        "the cluster at RAY_ADDRESS 10.0.0.1:6379 does not let this process in; if it asks for a token, RAY_AUTH_MODE"
    )
    assert said.endswith("Ray says: Failed to connect to it")
    assert why_ray_failed(None, AuthenticationError("no token")).startswith(
        "Ray cannot be started without a token; leave RAY_AUTH_"
    )
    assert why_ray_failed(None, RuntimeError("a node died")) == (
        "Ray cannot be started on this machine; its logs are below RAY_TMPDIR, TMPDIR or /tmp. Ray says: a node died"
    )


@pytest.mark.ray
def test_a_token_that_is_not_there_is_said_in_a_line(tmp_path: Path) -> None:
    code = (
        "from orchestrator.config.load import load_config\n"
        "from orchestrator.cluster.ray_session import RayFailed, ray_for\n"
        "try:\n"
        f"    with ray_for(load_config('configs/tiny_cpu.yaml', ['output={tmp_path}'])): pass\n"
        "except RayFailed as error: print(error)"
    )
    surroundings = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "gone")}
    done = subprocess.run([sys.executable, "-c", code], env=surroundings, capture_output=True, text=True, check=True, timeout=120)
    assert re.match(r"Ray cannot be started without a token; leave RAY_AUTH_TOKEN_PATH out, .* Ray says: .*/gone", done.stdout)
