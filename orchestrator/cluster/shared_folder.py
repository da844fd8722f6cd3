"""Whether every node of the cluster sees the folders through which a run's processes speak to each other."""

import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ANSWER_SECONDS = 120.0


def require_shared(folders: Sequence[Path]) -> None:
    """Raise if a node of the cluster does not see the folders; a single node always does.

    Raises:
        ValueError: naming the folder, the nodes, and what would do.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        # A name that nobody has asked for before: a network filesystem may remember for a while that a file was not there.
        with tempfile.NamedTemporaryFile(mode="w", dir=folder, prefix=f"seen-{uuid.uuid4().hex}-", suffix=".tmp") as token:
            token.write(token.name)
            token.flush()
            if blind := nodes_that_miss(Path(token.name), nodes):
                raise ValueError(
                    f"{folder} is not seen by {len(blind)} of {len(nodes)} nodes ({', '.join(blind)}): output and scores.root "
                    "must be on storage that all nodes share, at the same path"
                )


def nodes_that_miss(token: Path, nodes: Sequence[dict[str, Any]]) -> list[str]:
    """Return the addresses of the nodes, as Ray lists them, on which a file does not hold its own name."""
    answers = [
        ray.remote(_sees)
        .options(num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
        .remote(str(token))
        for node in nodes
    ]
    seen = ray.get(answers, timeout=ANSWER_SECONDS)
    return [node["NodeManagerAddress"] for node, sees in zip(nodes, seen, strict=True) if not sees]


def _sees(token: str) -> bool:
    try:
        return Path(token).read_text() == token
    except OSError:
        return False
