"""Whether what a run needs finds room on nodes, alone and together, and in words what would do where it does not.

All is arithmetic on plain records.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations

from actors.format import plural
from actors.placement import OWN_PREFIXES, OWN_RESOURCES, SMALLEST_AMOUNT, Node, ResourceRequest, amount_of

NODES_NAMED = 6
"""Nodes that an error lists one by one."""


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


def _too_much(need: ResourceRequest, resource: str, largest: float, nodes: Sequence[Node]) -> str:
    amount = need.amounts[resource]
    with_labels = f" with {_listed(need.labels)}" if need.labels else ""
    if resource == "GPU" and not largest:
        without = "gpus 0" if need.keys["GPU"] == "gpus" else "gpu false"
        return (
            f"{need.section}: each {need.noun} wants {amount_of(resource, amount)}, and no node{with_labels} has a GPU; "
            f"{need.section}.{without} would do"
        )
    key = need.keys.get(resource, f"resources.{resource}")
    known = f"the largest node{with_labels} has {amount_of(resource, largest)}; {key} {largest:g} would do"
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
    return " and ".join(amount_of(resource, node.total.get(resource, 0.0)) for resource in need.amounts)


def _tally(nodes: Sequence[Node], need: ResourceRequest) -> str:
    named = [f"{node.name}: {need.times_on(node)}" for node in nodes[:NODES_NAMED]]
    return ", ".join(named + ([f"{len(nodes) - NODES_NAMED} more"] if len(nodes) > NODES_NAMED else []))
