"""A cluster of pretended nodes on which a training loses a node, and gets another.

``test_elastic`` runs this in a process of its own, since a process knows one Ray at a time. It leaves ``facts.json`` in the
folder that is named to it. Nodes are processes on this machine; Ray Train and the training are real.
"""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from actors.config.workers import WorkersConfig
from actors.monitors.metrics_log import read_metrics
from orchestrator.run.training import train_model
from tests.actors.fake_cluster_world import SMALL, SOON, until
from tests.logs import logged
from tests.orchestrator.training_world import TRAIN, task_in

LONG = TRAIN.model_copy(update={"epochs": 30, "checkpoint_every_steps": 2})
"""120 steps: time to lose a node and to get one."""
LOST_AFTER, COMES_AFTER = 6, 20
WORKERS: dict[str, dict[str, Any]] = {
    "elastic": {"min": 1, "max": 2, "grow_seconds": 0.0},
    "steady": {"count": 2},
}


def drill(cluster: Cluster, folder: Path, kind: str) -> dict[str, Any]:
    """Train, lose the second node on the way, get another later on.

    Returns:
        What was said, and the seconds from the loss, or of a steady number from the coming of the other node, to the next step.
    """
    second = add_student_node(cluster)
    workers = WorkersConfig(labels={"role": "student"}, **WORKERS[kind])
    task = task_in(folder / kind, folder / "world", train=LONG, name=kind)

    def steps() -> int:
        return max((int(line["step"]) for line in read_metrics(Path(task.metrics) / f"{kind}.jsonl")), default=0)

    with logged() as said, ThreadPoolExecutor(1) as other:  # nodes come and go from the main thread only
        training = other.submit(train_model, task, workers, folder / kind / "checkpoints")
        until(lambda: steps() >= LOST_AFTER or training.done(), 120)
        cluster.remove_node(second, allow_graceful=False)
        began, done = time.monotonic(), steps()
        if kind == "elastic":  # a steady number waits for the node
            until(lambda: steps() > done or training.done(), 240)
            recovery_seconds = time.monotonic() - began
            until(lambda: steps() >= COMES_AFTER or training.done(), 240)
        second = add_student_node(cluster)
        if kind == "steady":
            began = time.monotonic()
            until(lambda: steps() > done or training.done(), 240)
            recovery_seconds = time.monotonic() - began
        training.result()
    cluster.remove_node(second, allow_graceful=False)
    return {"said": said, "recovery_seconds": recovery_seconds}


def add_student_node(cluster: Cluster) -> Any:
    return cluster.add_node(wait=False, num_cpus=1, labels={"role": "student"}, **SMALL)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    fake = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "_system_config": SOON, **SMALL})
    try:
        add_student_node(fake)
        ray.init(fake.address, log_to_driver=False, logging_level="ERROR")
        fake.wait_for_nodes()
        facts = {kind: drill(fake, place, kind) for kind in WORKERS}
        (place / "facts.json").write_text(json.dumps(facts))
    finally:
        ray.shutdown()
        fake.shutdown()
