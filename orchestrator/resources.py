"""Which Ray a run uses, and whether it has what the run needs."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from actors.config import EngineConfig, WorkersConfig
from orchestrator.config import RunConfig

STORE_BYTES = 256 << 20  # Ray's object store carries counts and configurations only

TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",  # a minute, Ray's own, is short where importing takes half of it
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also how soon the end of a training is noticed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # an actor less
}
"""Settings of Ray Train unless the caller's environment says otherwise."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What is held at one time."""

    cpus: float = 0.0
    gpus: int = 0

    def __add__(self, other: "Demand") -> "Demand":
        return Demand(self.cpus + other.cpus, self.gpus + other.gpus)


def demand(config: RunConfig) -> Demand:
    """Return the most that a run holds at one time, over all its stages."""
    scoring, training = _teachers(config.teacher.engine), _workers(config.workers)
    stages = [scoring + training] if config.scores.overlap else [scoring, training]
    stages += [_workers(side.fit.workers) for side in (config.teacher, config.student) if side.fit]
    stages.append(Demand(config.evaluate.cpus, config.evaluate.gpus))
    return Demand(max(stage.cpus for stage in stages), max(stage.gpus for stage in stages))


@contextmanager
def ray_for(config: RunConfig) -> Iterator[None]:
    """Use the cluster that ``RAY_ADDRESS`` names, the Ray this process is connected to, or a private local one.

    Raises:
        ValueError: naming what the run holds at one time and what there is, before anything is started on it.
    """
    needed = demand(config)
    begun_here = not ray.is_initialized()
    if begun_here:
        for name, value in TRAIN_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if os.environ.get("RAY_ADDRESS"):
            ray.init(log_to_driver=False, logging_level="WARNING")
        else:
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(needed.cpus)),
                include_dashboard=False,
                object_store_memory=STORE_BYTES,
                log_to_driver=False,
                logging_level="ERROR",
            )
    try:
        require_resources(needed)
        yield
    finally:
        if begun_here:
            ray.shutdown()


def require_resources(needed: Demand) -> None:
    """Raise a ValueError unless the cluster has, in all, what is needed at one time."""
    there = ray.cluster_resources()
    for kind, wanted, remedy in (
        ("GPU", needed.gpus, "teacher.engine.replicas, teacher.engine.tensor_parallel or workers.count"),
        ("CPU", needed.cpus, "teacher.engine.cpus or workers.cpus"),
    ):
        if wanted > there.get(kind, 0):
            raise ValueError(
                f"the run holds {wanted:g} {kind}s at one time, the cluster has {there.get(kind, 0):g}: lower {remedy}, "
                "or set scores.overlap to false, so that teacher and student take turns"
            )


def _teachers(engine: EngineConfig) -> Demand:
    return Demand(engine.replicas * engine.cpus, engine.replicas * engine.tensor_parallel * engine.gpu)


def _workers(workers: WorkersConfig) -> Demand:
    return Demand(workers.count * workers.cpus, workers.count * workers.gpus)
