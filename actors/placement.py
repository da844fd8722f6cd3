"""Where replicas and workers may stand: what each needs of a node, what nodes have, and how many of each fit.

All is arithmetic on plain records; only functions that read, reserve or wait speak to Ray.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from actors.config.models import EngineConfig, EvaluateConfig
from actors.config.workers import WorkersConfig
from actors.format import plural

SMALLEST_AMOUNT = 1e-4
"""Ray counts resources in steps of this size."""
SETTLE_SECONDS = 5.0
NODES_NAMED = 6
"""Nodes that an error lists one by one."""
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
        return " and ".join(_amount(resource, amount) for resource, amount in self.amounts.items())

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


def replica_request(engine: EngineConfig) -> ResourceRequest:
    """Return what one replica of the teacher needs."""
    return _engine_request(engine, "teacher.engine", "replica")


def sampler_request(engine: EngineConfig) -> ResourceRequest:
    """Return what one engine that samples from the student needs."""
    return _engine_request(engine, "rollouts.engine", "sampler")


def _engine_request(engine: EngineConfig, section: str, noun: str) -> ResourceRequest:
    amounts = _amounts(engine.cpus, engine.tensor_parallel if engine.gpu else 0, engine.resources)
    return ResourceRequest(section, noun, "replicas", {"CPU": "cpus", "GPU": "tensor_parallel"}, amounts, engine.labels)


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


def require_room(nodes: Sequence[Node], need: ResourceRequest, count: int = 1) -> None:
    """Raise if the nodes cannot hold the request even when all of them are free.

    What is merely taken at the moment is not refused: it may be waited for.

    Raises:
        ValueError: naming the key, its value, what nodes have, and a value that would do.
    """
    suitable = [node for node in nodes if need.may_stand_on(node)]
    if not suitable:
        raise ValueError(
            f"{need.section}.labels {_listed(need.labels)}: no node has {'them all' if len(need.labels) > 1 else 'it'}; "
            f"{_labels_of(nodes)}"
        )
    for resource, amount in need.amounts.items():
        largest = max(node.total.get(resource, 0.0) for node in suitable)
        if amount > largest + SMALLEST_AMOUNT / 2:
            raise ValueError(_too_much(need, resource, largest, nodes))
    if not any(need.times_on(node) for node in suitable):
        shown = "; ".join(f"{node.name} has {_has(node, need)}" for node in suitable[:NODES_NAMED])
        raise ValueError(f"{need.section}: no node has {need} together ({shown}); lower one of them")
    fitting = sum(need.times_on(node) for node in suitable)
    if fitting < count:
        raise ValueError(
            f"{need.many(count)} do not fit: nodes hold {fitting} in all ({_tally(suitable, need)}); "
            f"{need.section}.{need.count_key} {fitting} would do"
        )


def require_room_together(
    nodes: Sequence[Node], replica: ResourceRequest, replicas: int, worker: ResourceRequest, workers: int
) -> None:
    """Raise if teacher and student, which each fit alone by ``require_room``, do not fit together.

    Raises:
        ValueError: naming numbers that would do.
    """
    beside = workers_beside([(node, node.total) for node in nodes], replica, worker, replicas)
    if beside[replicas] >= workers:
        return
    remedies = [f"{worker.section}.{worker.count_key} {beside[replicas]}"] if beside[replicas] else []
    if fewer := most_replicas(beside, workers):
        remedies.append(f"{replica.section}.{replica.count_key} {fewer}")
    remedies.append("scores.overlap false, with which teacher and student take turns,")
    raise ValueError(
        f"{replica.many(replicas)} and {worker.many(workers)} do not fit at one time: beside the "
        f"{plural(replicas, replica.noun)} there is room for {plural(beside[replicas], worker.noun)}; "
        f"{' or '.join(remedies)} would do"
    )


def fit_together(nodes: Sequence[Node], needs: Sequence[tuple[ResourceRequest, int]]) -> bool:
    """Return whether so many of each find room at one time on free nodes; each order of the requests is tried, node by node."""
    return any(_fit_in_order(nodes, order) for order in permutations(needs))


def _fit_in_order(nodes: Sequence[Node], needs: Sequence[tuple[ResourceRequest, int]]) -> bool:
    left = [dict(node.total) for node in nodes]
    for need, count in needs:
        for node, amounts in zip(nodes, left, strict=True):
            placed = min(count, need.times_in(amounts) if need.may_stand_on(node) else 0)
            count -= placed
            for resource, amount in need.amounts.items():
                amounts[resource] = amounts.get(resource, 0) - placed * amount
        if count:
            return False
    return True


def require_all_together(nodes: Sequence[Node], needs: Sequence[tuple[ResourceRequest, int]]) -> None:
    """Raise if several kinds of actors, which each fit alone by ``require_room``, do not fit together.

    Raises:
        ValueError: naming numbers that would do.
    """
    if fit_together(nodes, needs):
        return
    remedies = []
    for index, (need, count) in enumerate(needs):
        others = [*needs[:index], *needs[index + 1 :]]
        fewer = next((less for less in range(count - 1, 0, -1) if fit_together(nodes, [*others, (need, less)])), 0)
        if fewer:
            remedies.append(f"{need.section}.{need.count_key} {fewer}")
    listed = ", ".join(need.many(count) for need, count in needs)
    remedy = f"{' or '.join(remedies)} would do" if remedies else "more nodes, or fewer of several kinds, would do"
    raise ValueError(f"{listed} do not fit at one time on {plural(len(nodes), 'node')}; {remedy}")


def workers_beside(
    room: Sequence[tuple[Node, Mapping[str, float]]], replica: ResourceRequest, worker: ResourceRequest | None, most: int
) -> list[int]:
    """Return for each number of replicas, from none to ``most``, how many workers fit beside them at best.

    Args:
        room: nodes, and of what is there on each, what may be used.

    Returns:
        Entry n is the most workers beside n replicas; it ends at the most replicas that fit, or at ``most``.
    """
    so_far = [0]
    for node, amounts in room:
        holds = min(replica.times_in(amounts), most) if replica.may_stand_on(node) else 0
        here = []
        for count in range(holds + 1):
            left = {resource: amount - count * replica.amounts.get(resource, 0) for resource, amount in amounts.items()}
            here.append(worker.times_in(left) if worker and worker.may_stand_on(node) else 0)
        longer = [-1] * min(len(so_far) + holds, most + 1)
        for before, workers in enumerate(so_far):
            for count, more in enumerate(here[: len(longer) - before]):
                longer[before + count] = max(longer[before + count], workers + more)
        so_far = longer
    return so_far


def most_replicas(beside: Sequence[int], workers: int) -> int:
    """Return the most replicas beside which so many workers fit; ``beside`` is what ``workers_beside`` found."""
    return max((count for count, room in enumerate(beside) if room >= workers), default=0)


def _amounts(cpus: float, gpus: int, custom: Mapping[str, float]) -> dict[str, float]:
    return {**({"GPU": float(gpus)} if gpus else {}), "CPU": cpus, **custom}


def _selects(selector: str, label: str | None) -> bool:
    """Ray's selectors: ``a``, ``in(a, b)``, and either after ``!``, which a node without the label passes too."""
    wanted = selector.removeprefix("!")
    values = wanted.removeprefix("in(").removesuffix(")").split(",") if wanted.startswith("in(") else [wanted]
    return (label in [value.strip() for value in values]) != selector.startswith("!")


def _too_much(need: ResourceRequest, resource: str, largest: float, nodes: Sequence[Node]) -> str:
    amount = need.amounts[resource]
    with_labels = f" with {_listed(need.labels)}" if need.labels else ""
    if resource == "GPU" and not largest:
        without = "gpus 0" if need.keys["GPU"] == "gpus" else "gpu false"
        return (
            f"{need.section}: each {need.noun} wants {_amount(resource, amount)}, and no node{with_labels} has a GPU; "
            f"{need.section}.{without} would do"
        )
    key = need.keys.get(resource, f"resources.{resource}")
    known = f"the largest node{with_labels} has {_amount(resource, largest)}; {key} {largest:g} would do"
    unknown = f"no node{with_labels} has any; {_custom_resources_of(nodes)}"
    return f"{need.section}.{key} {amount:g}: {known if largest else unknown}"


def _custom_resources_of(nodes: Sequence[Node]) -> str:
    every = {name for node in nodes for name in node.total}
    names = sorted(name for name in every if name not in OWN_RESOURCES and not name.startswith(OWN_PREFIXES))
    return f"custom resources of nodes are {', '.join(names)}" if names else "nodes have no custom resources; leave it out"


def _labels_of(nodes: Sequence[Node]) -> str:
    every = {(name, label) for node in nodes for name, label in node.labels.items()}
    pairs = [f"{name}={label}" for name, label in sorted(every) if not name.startswith(OWN_PREFIXES)]
    return f"nodes have {', '.join(pairs)}" if pairs else "nodes have no labels; leave it out"


def _listed(labels: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={selector}" for name, selector in labels.items())


def _has(node: Node, need: ResourceRequest) -> str:
    return " and ".join(_amount(resource, node.total.get(resource, 0.0)) for resource in need.amounts)


def _tally(nodes: Sequence[Node], need: ResourceRequest) -> str:
    named = [f"{node.name}: {need.times_on(node)}" for node in nodes[:NODES_NAMED]]
    return ", ".join(named + ([f"{len(nodes) - NODES_NAMED} more"] if len(nodes) > NODES_NAMED else []))


def _amount(resource: str, amount: float) -> str:
    return f"{amount:g} {resource}{'s' if amount != 1 and resource in OWN_RESOURCES else ''}"
