"""Fetches from a hub in a process of its own, since huggingface_hub reads its address when it is imported.

``test_hub`` runs this. What it prints last is JSON.

    python -m tests.actors.model_cache.hub_world alone MODEL      without Ray: what one node's cache says before and after
    python -m tests.actors.model_cache.hub_world nodes MODEL A B  on three pretended nodes: two with the cache A, one with B
"""

import json
import os
import sys
from dataclasses import asdict
from typing import Any

import ray
from ray.cluster_utils import Cluster

from actors.model_cache.hub import HubFiles
from actors.model_cache.nodes import NodeDownloads
from actors.model_source import ModelSource
from actors.placement import read_nodes
from tests.actors.fake_cluster_world import SMALL
from tests.fake_hub import COMMIT


def alone(model: ModelSource) -> dict[str, Any]:
    files = HubFiles(model, COMMIT)
    before = files.are_here()
    fetched = files.fetch()
    other = HubFiles(model, "f" * 40)
    return {
        "before": before, "fetched": fetched if isinstance(fetched, str) else asdict(fetched), "after": files.are_here(),
        "progress": files.progress(), "of another commit": other.are_here(),
    }  # fmt: skip


def on_nodes(model: ModelSource, caches: list[str]) -> dict[str, Any]:
    variables = {name: os.environ[name] for name in ("HF_ENDPOINT", "HF_HUB_DISABLE_XET")}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, **SMALL})
    try:
        for cache in (caches[0], caches[0], caches[1]):
            surroundings = {**variables, "HF_HUB_CACHE": cache}
            cluster.add_node(wait=False, num_cpus=1, node_name=f"with {cache}", env_vars=surroundings, **SMALL)
        ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
        cluster.wait_for_nodes()
        nodes = [node for node in read_nodes() if node.name.startswith("with")]
        found = []
        for _ in range(2):
            with NodeDownloads(HubFiles, (model, COMMIT), nodes) as downloads:
                found.append({"fetching": len(downloads.fetching), "bytes": [one.bytes for one in downloads.fetch()]})
                found[-1]["progress"] = downloads.progress() if downloads.fetching else (0, 0)
        with NodeDownloads(HubFiles, (ModelSource("nobody/has-this"), COMMIT), nodes[:1]) as downloads:
            try:
                downloads.fetch()
            except RuntimeError as error:
                found.append(str(error))
        return {"nodes": len(nodes), "found": found}
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    kind, name, *rest = sys.argv[1:]
    print(json.dumps(alone(ModelSource(name)) if kind == "alone" else on_nodes(ModelSource(name), rest)))
