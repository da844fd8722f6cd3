"""Which Ray a run uses, and whether it has what the run needs."""

import logging
import math
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import ray
from ray.exceptions import AuthenticationError, RayError

from actors.config.models import EngineConfig
from actors.config.workers import WorkersConfig
from actors.format import plural
from actors.placement import (
    Cluster,
    Node,
    evaluator_need,
    read_nodes,
    replica_request,
    sampler_request,
    teacher_sampler_request,
    worker_request,
)
from actors.room import most_replicas, require_all_together, require_room, require_room_together, workers_beside
from orchestrator.cluster import signals as sigterm
from orchestrator.cluster.node_checks import require_gpu_nodes, require_node
from orchestrator.cluster.node_facts import NodeFacts, read_node_facts
from orchestrator.cluster.places import ray_folder
from orchestrator.cluster.run_copies import nodes_kept_alike
from orchestrator.cluster.shared_folder import require_shared
from orchestrator.config.run import RunConfig

STORE_BYTES = 256 << 20  # Ray's object store carries counts and configurations, and rows of data.cluster_tasks on their way

CONNECT_SECONDS = 10.0

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
    """Return the most that a run holds at one time, over all its stages; of replicas whose number is ``auto``, one."""
    scoring, training = _teachers(config.teacher.engine), _workers(config.workers)
    stages = [scoring + training] if config.scores.overlap else [scoring, training]
    if config.rollouts is not None:
        samplers = [engine for engine in (config.sampler_engine, config.teacher_sampler_engine) if engine is not None]
        stages.append(sum(map(_teachers, samplers), scoring + training))
    stages += [_workers(side.finetune.workers) for side in (config.teacher, config.student) if side.finetune]
    stages += [_teachers(engine) for engine in config.engines.values()]
    stages.append(Demand(config.evaluate.cpus, config.evaluate.gpus))
    return Demand(max(stage.cpus for stage in stages), max(stage.gpus for stage in stages))


class RayFailed(RuntimeError):
    """Ray can be neither started nor reached; the message says which variable would help."""


@contextmanager
def ray_for(config: RunConfig) -> Iterator[None]:
    """Use the Ray this process is connected to, the cluster that ``RAY_ADDRESS`` names, or, where it names none, a private one.

    A private Ray is made for this process and ends with it; another that runs on the machine is left alone.

    Raises:
        RayFailed: if Ray can be neither started nor reached.
        ValueError: naming what the run wants, what there is and what would do, before anything is started on it; or a
            folder of the run that not all nodes see.
    """
    begun_here = not ray.is_initialized()
    if begun_here:
        require_machine(config)
    with _ray_of_this_process(demand(config)) if begun_here else nullcontext():
        require_places(config, read_nodes())
        if begun_here and cluster_address():
            require_gpu_nodes(config)
        require_shared([config.place, config.score_root, *([config.checkpoints] if config.checkpoints else [])])
        with nodes_kept_alike(config.mirror):
            yield


def ray_for_tasks() -> AbstractContextManager[None]:
    """Use a Ray as ``ray_for`` does, for tasks that want CPUs alone; whether a run would find room is not asked.

    Raises:
        RayFailed: if Ray can be neither started nor reached.
        ValueError: if nothing answers where ``RAY_ADDRESS`` says that a cluster is.
    """
    return nullcontext() if ray.is_initialized() else _ray_of_this_process(Demand(cpus=1.0))


@contextmanager
def _ray_of_this_process(needed: Demand) -> Iterator[None]:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start a private Ray; let it go at the end."""
    for name, value in TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = cluster_address()
    with nullcontext() if address else ray_folder() as folder:
        try:
            with sigterm.listening_on():
                if address:
                    ray.init(log_to_driver=_verbose(), logging_level="WARNING")
                else:
                    ray.init(
                        address="local",
                        num_cpus=max(os.cpu_count() or 1, math.ceil(needed.cpus)),
                        include_dashboard=False,
                        object_store_memory=STORE_BYTES,
                        log_to_driver=_verbose(),
                        logging_level="ERROR",
                        _temp_dir=folder,
                    )
        except (OSError, RuntimeError, ValueError, RayError) as error:
            raise RayFailed(why_ray_failed(address, error)) from error
        try:
            yield
        finally:
            ray.shutdown()


def _verbose() -> bool:
    """Return whether the user wants to see what workers print."""
    return logging.getLogger("atkd").isEnabledFor(logging.DEBUG)


def why_ray_failed(address: str | None, error: Exception) -> str:
    """Return a line of ours, which names the variable to change, and Ray's words after it; no address means a private Ray."""
    reason = " ".join(str(error).split())
    if address:
        return (
            f"the cluster at RAY_ADDRESS {address} does not let this process in; if it asks for a token, RAY_AUTH_MODE=token and "
            f"RAY_AUTH_TOKEN_PATH=/a/file, or RAY_AUTH_TOKEN, give it. Ray says: {reason}"
        )
    if isinstance(error, AuthenticationError):
        return (
            f"Ray cannot be started without a token; leave RAY_AUTH_TOKEN_PATH out, or name a file with one. Ray says: {reason}"
        )
    return f"Ray cannot be started on this machine; its logs are below RAY_TMPDIR, TMPDIR or /tmp. Ray says: {reason}"


def cluster_address() -> str | None:
    """Return where ``RAY_ADDRESS`` says that a cluster is; None for a private Ray.

    Raises:
        ValueError: if it is an address of another kind, or nothing answers there; Ray itself would try for two minutes.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    if address in ("", "local"):
        return None
    if address.startswith(("http://", "https://")):
        raise ValueError(
            f"RAY_ADDRESS {address} is an address for jobs: RAY_API_SERVER_ADDRESS tells it to ray job submit; here the "
            "address of the head node, such as 10.0.0.1:6379, would do"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():  # else it is a word of Ray's, such as auto
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"RAY_ADDRESS {address}: nothing answers there ({error}); auto finds a Ray that runs on this machine, and "
                "without RAY_ADDRESS the command starts one of its own"
            ) from error
    return address


def require_machine(config: RunConfig, facts: NodeFacts | None = None) -> None:
    """Raise if the run would stand on this machine alone, and the machine is not as it needs it; a cluster is not looked at.

    Nothing is started and nothing loaded for it. ``facts`` are those of this machine, if they are known already.

    Raises:
        ValueError: naming the key, what was found and what would do.
    """
    if cluster_address():
        return
    facts = facts or read_node_facts()
    cpus = max(float(os.cpu_count() or 1), demand(config).cpus)  # as many as a private Ray is told
    machine = [Node(facts.node, {"CPU": cpus, "GPU": float(facts.usable_gpus)})]
    if not facts.gpus:
        require_places(config, machine)  # that there is no GPU is the first thing to say
    require_node(config, facts)
    require_places(config, machine)


def require_places(config: RunConfig, nodes: Sequence[Node]) -> None:
    """Raise a ValueError unless the nodes, were all of them free, could hold each stage of the run."""
    replica, replicas = replica_request(config.teacher.engine), _replicas(config.teacher.engine)
    worker, workers = worker_request(config.workers), config.workers.count
    for section, engine in config.engines.items():
        require_room(nodes, replica_request(engine, section), _replicas(engine))
    require_room(nodes, worker, workers)
    if config.rollouts is not None:
        samplers = [(sampler_request(config.sampler_engine), _replicas(config.sampler_engine))]
        if (drawing := config.teacher_sampler_engine) is not None:
            samplers.append((teacher_sampler_request(drawing), _replicas(drawing)))
        for need, count in samplers:
            require_room(nodes, need, count)
        require_all_together(nodes, [(replica, replicas), *samplers, (worker, workers)])
    elif config.scores.overlap:
        require_room_together(nodes, replica, replicas, worker, workers)
    for role, side in (("teacher", config.teacher), ("student", config.student)):
        if side.finetune:
            require_room(nodes, worker_request(side.finetune.workers, f"{role}.finetune.workers"), side.finetune.workers.count)
    require_room(nodes, evaluator_need(config.evaluate))


@dataclass(frozen=True, slots=True)
class SettledReplicas:
    """How many replicas ``auto`` comes to on this cluster at this time, and why."""

    count: int
    """At least 1; if there is room for none, it is waited for."""
    reason: str
    """A line for the user."""


def settle_replicas(engine: EngineConfig, students: WorkersConfig | None, shards: int, cluster: Cluster) -> SettledReplicas:
    """Choose as many replicas as find room beside the students' workers and what other jobs hold, one a shard at most.

    Args:
        engine: what each replica wants.
        students: workers that hold their room at the same time but do not stand yet; None if they come later.
        shards: shards of the largest store that lack scores.
        cluster: what there is, and what other jobs hold of it.
    """
    replica, workers = replica_request(engine), students.count if students else 0
    worker = worker_request(students) if students else None
    beside = workers_beside([(node, node.free) for node in cluster.nodes], replica, worker, shards)
    promised = {resource: workers * amount for resource, amount in worker.amounts.items()} if worker else {}
    left = {resource: amount - promised.get(resource, 0) for resource, amount in cluster.available.items()}
    fitting = min(most_replicas(beside, workers), replica.times_in(left))
    count = max(1, min(fitting, shards))
    if fitting == 0:
        why = "which waits for room"
    elif count == shards:
        why = "one for each shard to score"
    else:
        places = sum(1 for node in cluster.nodes if replica.may_stand_on(node) and replica.times_in(node.free))
        why = f"as many as find room on {plural(places, 'node')}" + (f" beside {plural(workers, 'worker')}" if workers else "")
    return SettledReplicas(count, f"{replica.many(count)}, {why}")


def _replicas(engine: EngineConfig) -> int:
    return 1 if engine.replicas == "auto" else engine.replicas


def _teachers(engine: EngineConfig) -> Demand:
    replicas = _replicas(engine)
    return Demand(replicas * engine.cpus, replicas * engine.tensor_parallel * engine.gpu)


def _workers(workers: WorkersConfig) -> Demand:
    return Demand(workers.count * workers.cpus, workers.count * workers.gpus)
