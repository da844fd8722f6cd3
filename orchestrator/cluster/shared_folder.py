"""Whether every node of the cluster sees the folders through which a run's processes speak to each other."""

import uuid
from collections.abc import Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.config.places import in_object_storage
from actors.storage.folder import open_folder

ANSWER_SECONDS = 120.0


def require_shared(places: Sequence[str]) -> None:
    """Raise if a node of the cluster does not see the folders, by path or address; of paths, a single node sees all.

    Raises:
        ValueError: naming the folder, the nodes, and what would do.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    for place in places:
        if len(nodes) < 2 and not in_object_storage(place):
            continue
        folder = open_folder(place)
        folder.begin()
        # A name that nobody has asked for before: a network filesystem may remember for a while that a file was not there.
        token = f"seen-{uuid.uuid4().hex}.tmp"
        folder.write(token, token.encode())
        try:
            if blind := nodes_that_miss(place, token, nodes):
                raise ValueError(_unseen(place, blind, len(nodes)))
        finally:
            folder.remove(token)


def nodes_that_miss(place: str, token: str, nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Return the addresses of the nodes, as Ray lists them, on which a file of a folder does not hold its own name."""
    answers = [
        ray.remote(_trouble)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(place, token)
        for node in nodes
    ]
    troubles = ray.get(answers, timeout=ANSWER_SECONDS)
    return [node["NodeManagerAddress"] + trouble for node, trouble in zip(nodes, troubles, strict=True) if trouble is not None]


def _unseen(place: str, blind: Sequence[str], nodes: int) -> str:
    where = f"{place} is not seen by {len(blind)} of {nodes} nodes ({', '.join(blind)})"
    if in_object_storage(place):
        return f"{where}: what a node needs to read and write there must stand in its own environment, or be its machine's role"
    return f"{where}: output, scores.root and checkpoints must be on storage that all nodes share, at the same path"


def _trouble(place: str, token: str) -> str | None:
    """Return None if a file holds its own name, else what is wrong, after a colon where something said so."""
    try:
        return None if open_folder(place).read(token) == token.encode() else ""
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        return f": {error}"
