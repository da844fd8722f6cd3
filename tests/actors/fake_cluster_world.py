"""A cluster of pretended nodes in which two replicas score and four students stand, until a replica's node is lost.

``test_fake_cluster`` runs this in a process of its own, since a process knows one Ray at a time. It leaves ``facts.json`` in
the folder that is named to it, beside the store. Nodes are processes on this machine, and their GPUs are numbers.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.util import placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.config.workers import WorkersConfig
from actors.engines.base import TeacherEngine, TeacherSpec
from actors.placement import read_cluster, reserve, worker_request
from actors.teacher.pool import TeacherPool
from orchestrator.cluster.ray_session import settle_replicas
from tests.fakes import FakeTeacher, fake_examples, fake_spec, fake_store

ROWS, ROWS_PER_SHARD, TOP_K = 48, 4, 5
ROLES = {"a": "teacher", "b": "teacher", "c": "student"}
SMALL: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 80 << 20}
SOON = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_timeout_ms": 500}
STUDENTS = WorkersConfig(count=4, gpus=1, labels={"role": "student"})
SPEC = fake_spec(TOP_K, kind="vllm", gpu=True, tensor_parallel=4, replicas=2, cpus=1, labels={"role": "teacher"})


@dataclass(frozen=True)
class NotedTeacher:
    """A slow fake teacher that notes on which node it stands, and with which GPUs."""

    folder: Path

    def __call__(self, spec: TeacherSpec) -> TeacherEngine:
        with open(self.folder / "engines", "a") as file:
            file.write(json.dumps([here(), ray.get_gpu_ids(), time.time()]) + "\n")
        return FakeTeacher(seconds_per_call=0.3, log=self.folder / "scored")(spec)


def built_engines(folder: Path) -> list[tuple[str, list[int], float]]:
    """The node, the GPUs and the time of each engine that was built."""
    return [tuple(json.loads(line)) for line in (folder / "engines").read_text().splitlines()]


def here() -> str:
    return ray.get_runtime_context().get_node_id()


@ray.remote(num_cpus=1, num_gpus=1)
class Student:
    """Stands where a training worker would: Ray Train asks for the same room, but takes long to start on few cores."""

    def where(self) -> str:
        return here()


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


@contextmanager
def fake_cluster() -> Iterator[Cluster]:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "_system_config": SOON, **SMALL})
    try:
        for name, role in ROLES.items():
            cluster.add_node(wait=False, num_cpus=8, num_gpus=8, node_name=name, labels={"role": role}, **SMALL)
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()


@contextmanager
def standing_students() -> Iterator[list[str]]:
    """Place the students and give the names of their nodes."""
    groups = [reserve(worker_request(STUDENTS)) for _ in range(STUDENTS.count)]
    students = [Student.options(scheduling_strategy=PlacementGroupSchedulingStrategy(group)).remote() for group in groups]
    nodes = ray.get([student.where.remote() for student in students], timeout=60)
    names = names_of_nodes()
    yield [names[node] for node in nodes]
    for student, group in zip(students, groups, strict=True):
        ray.kill(student)
        remove_placement_group(group)


def names_of_nodes() -> dict[str, str]:
    return {node["NodeID"]: node["NodeName"] for node in ray.nodes()}


def rooms(gpus: int = SPEC.engine.tensor_parallel) -> list[str]:
    """The name of the node of each room of so many GPUs that is held now; of one that waits, nothing."""
    names = names_of_nodes()
    held = [group for group in placement_group_table().values() if group["state"] != "REMOVED"]
    return [names.get(group["bundles_to_node_id"][0], "") for group in held if group["bundles"][0]["GPU"] == gpus]


def drill(cluster: Cluster, folder: Path) -> dict[str, Any]:
    """Score with both beside each other, lose a node of the teacher's on the way, and go on."""
    facts: dict[str, Any] = {}
    examples = fake_examples(ROWS)
    path, store = fake_store(folder, examples, ROWS_PER_SHARD, TOP_K)
    auto = SPEC.engine.model_copy(update={"replicas": "auto"})
    facts["auto"] = settle_replicas(auto, STUDENTS, 99, read_cluster()).reason
    with standing_students() as students, TeacherPool(SPEC, engine_factory=NotedTeacher(folder)) as pool:
        names = names_of_nodes()
        facts |= {"students": students, "replicas": rooms()}
        until(lambda: ray.available_resources()["GPU"] == 3 * 8 - 2 * 4 - 4)
        facts["auto_beside"] = settle_replicas(auto, None, 99, read_cluster()).reason
        lost = facts["replicas"][0]
        for scored, _ in enumerate(pool.score_missing(path, store), start=1):
            if scored == 3:
                facts["missing_when_lost"] = len(store.missing_shards())
                node = next(node for node in cluster.worker_nodes if names[node.node_id] == lost)
                removed = time.time()
                cluster.remove_node(node, allow_graceful=False)
        until(lambda: sorted(rooms()) == [name for name in "ab" if name != lost] * 2)
        until(lambda: any(built > removed for _, _, built in built_engines(folder)))
        facts["replicas_after_loss"] = rooms()
    facts["rooms_left"] = len(rooms()) + len(rooms(gpus=1))
    engines = built_engines(folder)
    facts["engines"] = [(names[node], len(gpus)) for node, gpus, _ in engines]
    facts["recovery_seconds"] = min(built for _, _, built in engines if built > removed) - removed
    twice = [key for key, times in Counter((folder / "scored").read_text().split()).items() if times > 1]
    facts["shards_redone"] = len({example.row // ROWS_PER_SHARD for example in examples if example.key in twice})
    return facts


if __name__ == "__main__":
    place = Path(sys.argv[1])
    with fake_cluster() as fake:
        (place / "facts.json").write_text(json.dumps(drill(fake, place)))
