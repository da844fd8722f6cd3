"""Where replicas and workers may stand: what each needs of a node, what nodes have, and how many of each fit.

All is arithmetic on plain records; only functions that read, reserve or wait speak to Ray.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from actors.config.models import EngineConfig, EvaluateConfig
from actors.config.workers import WorkersConfig
from actors.format import plural

SMALLEST_AMOUNT = 1e-4
"""Ray counts resources in steps of this size."""
SETTLE_SECONDS = 5.0
OWN_RESOURCES = ("CPU", "GPU", "memory", "object_store_memory")
OWN_PREFIXES = ("node:", "ray.io/", "accelerator_type:")
"""What Ray itself gives nodes by way of resources and labels; no user asks for these."""


@dataclass(frozen=True, slots=True)
class Node:
    """One node that is alive."""

    name: str
    """Its address, or the name it was started with."""
    total: Mapping[str, float]
    """Amount of each resource, by Ray's name of it."""
    labels: Mapping[str, str] = field(default_factory=dict)
    held: Mapping[str, float] = field(default_factory=dict)
    """What placement groups hold of it, the teachers and students of other jobs that is."""
    id: str = ""
    """Ray's own name of it; empty where the node is only planned."""

    @property
    def free(self) -> dict[str, float]:
        """What no placement group holds."""
        return {resource: amount - self.held.get(resource, 0) for resource, amount in self.total.items()}


@dataclass(frozen=True, slots=True)
class Cluster:
    """All nodes at one time."""

    nodes: Sequence[Node]
    available: Mapping[str, float]
    """What Ray says is free in all; less than the nodes' sum where tasks and actors hold something outside of groups."""


@dataclass(frozen=True, slots=True)
class ResourceRequest:
    """What one replica, worker or evaluator needs. It stands in one node."""

    section: str
    """Where the configuration says it: ``teacher.engine``."""
    noun: str
    """``replica``, ``sampler``, ``worker`` or ``evaluator``."""
    count_key: str
    """Key of the section that says how many there are."""
    keys: Mapping[str, str]
    """For Ray's own resources, the key of the section that says how much of it."""
    amounts: Mapping[str, float]
    """Amount of each resource; none is 0."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Selector of the nodes that will do."""

    def __str__(self) -> str:
        return " and ".join(amount_of(resource, amount) for resource, amount in self.amounts.items())

    def many(self, count: int) -> str:
        """``3 replicas of 4 GPUs and 1 CPU``."""
        return f"{plural(count, self.noun)} of {self}"

    def may_stand_on(self, node: Node) -> bool:
        """Whether the node has the labels."""
        return all(_selects(selector, node.labels.get(name)) for name, selector in self.labels.items())

    def times_in(self, amounts: Mapping[str, float]) -> int:
        """How many find room in these amounts."""
        times = ((amounts.get(resource, 0) + SMALLEST_AMOUNT / 2) / amount for resource, amount in self.amounts.items())
        return max(0, int(min(times)))

    def times_on(self, node: Node) -> int:
        """How many the node holds if nothing else stands there."""
        return self.times_in(node.total) if self.may_stand_on(node) else 0


def replica_request(engine: EngineConfig, section: str = "teacher.engine", noun: str = "replica") -> ResourceRequest:
    """Return what one engine needs; ``section`` is where the configuration speaks of it, ``noun`` what it is called."""
    amounts = _amounts(engine.cpus, engine.tensor_parallel if engine.gpu else 0, engine.resources)
    keys = {"CPU": "cpus", "GPU": "tensor_parallel"}
    return ResourceRequest(section, noun, "replicas", keys, amounts, engine.labels)


def sampler_request(engine: EngineConfig) -> ResourceRequest:
    """Return what one engine that samples from the student needs."""
    return replica_request(engine, "rollouts.engine", "sampler")


def teacher_sampler_request(engine: EngineConfig) -> ResourceRequest:
    """Return what one engine that samples from the teacher needs."""
    return replica_request(engine, "rollouts.teacher_engine", "teacher sampler")


def worker_request(workers: WorkersConfig, section: str = "workers") -> ResourceRequest:
    """Return what one training worker needs; ``section`` is where the configuration speaks of it."""
    amounts = _amounts(workers.cpus, workers.gpus, workers.resources)
    count_key = "min" if workers.elastic else "count"
    return ResourceRequest(section, "worker", count_key, {"CPU": "cpus", "GPU": "gpus"}, amounts, workers.labels)


def evaluator_need(evaluate: EvaluateConfig) -> ResourceRequest:
    """Return what the evaluator needs."""
    return ResourceRequest(
        "evaluate", "evaluator", "", {"CPU": "cpus", "GPU": "gpus"}, _amounts(evaluate.cpus, evaluate.gpus, {})
    )


def read_nodes() -> list[Node]:
    """Return the nodes of the connected cluster that are alive."""
    held: dict[str, Counter[str]] = defaultdict(Counter)
    for group in placement_group_table().values():
        if group["state"] != "REMOVED":
            for bundle, node in group["bundles_to_node_id"].items():
                held[node].update(group["bundles"][bundle])
    return [
        Node(node["NodeName"], node["Resources"], node["Labels"], dict(held[node["NodeID"]]), node["NodeID"])
        for node in ray.nodes()
        if node["Alive"]
    ]


def read_cluster() -> Cluster:
    """Return the connected cluster as it is now."""
    return Cluster(read_nodes(), ray.available_resources())


def free_places(need: ResourceRequest, cluster: Cluster) -> int:
    """How many find room in what is free now, node by node."""
    on_nodes = sum(need.times_in(node.free) for node in cluster.nodes if need.may_stand_on(node))
    return min(on_nodes, need.times_in(cluster.available))


def settled_places(need: ResourceRequest, enough: int) -> int:
    """Return how many find room once what earlier work held has been given back, which Ray does in its own time.

    Waits a few seconds, unless there is room for ``enough`` before.
    """
    until = time.monotonic() + SETTLE_SECONDS
    while True:
        free = free_places(need, read_cluster())
        if free >= enough or time.monotonic() > until:
            return free
        time.sleep(0.2)


def proven_places(need: ResourceRequest, most: int, seconds: float = SETTLE_SECONDS) -> int:
    """Return how many, up to ``most``, really find room within some seconds: it is taken for a moment, and given back.

    What is counted as free may not be: tasks and actors outside of groups are on no node's, and a node that was lost stays
    there for a while.
    """
    groups = [reserve(need) for _ in range(most)]
    try:
        until = time.monotonic() + seconds
        return sum(group.wait(max(0.1, until - time.monotonic())) for group in groups)
    finally:
        for group in groups:
            remove_placement_group(group)


def reserve(need: ResourceRequest) -> PlacementGroup:
    """Ask for room in one node, and return at once; the room is held, once there is any, until the group is removed.

    A group of its own shows other jobs on which node the room is taken, and tells waiting for room from loading a model.
    """
    return placement_group(
        [dict(need.amounts)], strategy="STRICT_PACK", bundle_label_selector=[dict(need.labels)] if need.labels else None
    )


def _amounts(cpus: float, gpus: int, custom: Mapping[str, float]) -> dict[str, float]:
    return {**({"GPU": float(gpus)} if gpus else {}), "CPU": cpus, **custom}


def _selects(selector: str, label: str | None) -> bool:
    """Ray's selectors: ``a``, ``in(a, b)``, and either after ``!``, which a node without the label passes too."""
    wanted = selector.removeprefix("!")
    values = wanted.removeprefix("in(").removesuffix(")").split(",") if wanted.startswith("in(") else [wanted]
    return (label in [value.strip() for value in values]) != selector.startswith("!")


def amount_of(resource: str, amount: float) -> str:
    """``4 GPUs``; custom resources keep their name."""
    return f"{amount:g} {resource}{'s' if amount != 1 and resource in OWN_RESOURCES else ''}"
