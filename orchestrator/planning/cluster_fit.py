"""Whether a run fits a cluster, device by device and node by node; a cluster is given as numbers, or is the live one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import ray
import torch
from ray.exceptions import RayError

from actors.config.models import EngineConfig
from actors.config.rollouts import ResponsesConfig, RolloutsConfig
from actors.config.workers import WorkersConfig
from actors.format import GIB, plural
from actors.memory import total_memory
from actors.placement import Node, replica_request, worker_request
from actors.room import most_replicas, workers_beside
from orchestrator.cluster.ray_session import RayFailed, cluster_address, require_places, why_ray_failed
from orchestrator.config.run import RunConfig
from orchestrator.config.sides import FinetuneConfig
from orchestrator.models.models import ROLES
from orchestrator.planning.jobs import Estimator, samplers, trainings
from orchestrator.planning.memory import Memory, forward_bytes, scoring_bytes, weights_bytes

Placed = TypeVar("Placed", EngineConfig, WorkersConfig)
Written = TypeVar("Written", ResponsesConfig, RolloutsConfig)
GPU_PROCESS_BYTES = GIB
"""Assumed of each process on a GPU: the context, libraries' workspaces, communication."""
GPU_USABLE = 0.95
"""Assumed share of a GPU that an allocator can use before it is in pieces."""
CPU_USABLE = 0.75
"""Share of a worker's memory on a CPU that tensors fill; measured, 0.79 where forward passes are large."""
CPU_PROCESS_BYTES = 700 << 20
"""Of each process on a CPU: Python with torch, transformers and Ray, or vLLM."""
ENOUGH_CPUS = 1e6
"""CPUs of a node of a cluster that is given as numbers: they are not checked."""


@dataclass(frozen=True, slots=True)
class TargetCluster:
    """A cluster as far as a plan looks at it."""

    nodes: Sequence[Node]
    """Its nodes."""
    gpu_bytes: float
    """Memory of each GPU; 0 where there is none."""
    node_bytes: float
    """Memory of each node; infinite where it is not checked."""
    live: bool
    """Whether it is there, rather than given as numbers."""

    @property
    def gpus(self) -> int:
        """GPUs of all nodes."""
        return int(sum(node.total.get("GPU", 0) for node in self.nodes))

    def __str__(self) -> str:
        has = f"{plural(self.gpus, 'GPU')} of {self.gpu_bytes / GIB:g} GiB" if self.gpus else "no GPU"
        return f"{plural(len(self.nodes), 'node')} with {has}" if self.live else f"{has} on {plural(len(self.nodes), 'node')}"


def given_place(gpus: int, gpu_gib: float, gpus_per_node: int) -> TargetCluster:
    """Return a cluster of equal nodes with as many CPUs as anyone asks for; the last node may have fewer GPUs.

    Raises:
        ValueError: naming the number that cannot be.
    """
    if gpus < 1:
        raise ValueError(
            f"--gpus {gpus} is no cluster; 1 is the least, and without --gpus the plan is for the machines that are there"
        )
    if gpu_gib <= 0:
        raise ValueError(f"--gpu-memory {gpu_gib:g} GiB holds nothing; 80 would do for an A100 or H100")
    if gpus_per_node < 1:
        raise ValueError(f"--gpus-per-node {gpus_per_node} is no node; 8 would do")
    sizes = [min(gpus_per_node, gpus - first) for first in range(0, gpus, gpus_per_node)]
    nodes = [Node(f"node {number}", {"CPU": ENOUGH_CPUS, "GPU": size}) for number, size in enumerate(sizes)]
    return TargetCluster(nodes, gpu_gib * GIB, float("inf"), live=False)


def live_place(gpu_gib: float | None, cpus: float = 0.0) -> TargetCluster:
    """Return the cluster that ``RAY_ADDRESS`` names, or this machine.

    This machine has at least ``cpus``: there a run begins a Ray of its own, with as many as it holds at one time.

    Raises:
        RayFailed: if the cluster does not let this process in.
        ValueError: if its GPUs are on other machines and nobody said how large they are.
    """
    if address := cluster_address():
        begun_here = not ray.is_initialized()
        if begun_here:
            try:
                ray.init(log_to_driver=False, logging_level="WARNING")
            except (OSError, RuntimeError, ValueError, RayError) as error:
                raise RayFailed(why_ray_failed(address, error)) from error
        nodes = [Node(node["NodeName"], node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]
        if begun_here:
            ray.shutdown()
        node_bytes = min(node.total.get("memory", float("inf")) for node in nodes)
    else:
        here = {"CPU": max(float(os.cpu_count() or 1), cpus), "GPU": float(torch.cuda.device_count())}
        nodes, node_bytes = [Node("this machine", here)], float(total_memory())
    gpu_bytes = 0.0
    if any(node.total.get("GPU", 0) for node in nodes):
        if gpu_gib is None and not torch.cuda.is_available():
            raise ValueError("the cluster has GPUs, and this machine cannot see how large they are; --gpu-memory 80 would say it")
        gpu_bytes = gpu_gib * GIB if gpu_gib else float(torch.cuda.get_device_properties(0).total_memory)
    return TargetCluster(nodes, gpu_bytes, node_bytes, live=True)


def with_steady_workers(config: RunConfig) -> RunConfig:
    """Return the configuration with as many workers as are sure, where their number may change."""
    return config.model_copy(
        update={
            "teacher": config.teacher.model_copy(update={"finetune": _steady_finetune(config.teacher.finetune)}),
            "student": config.student.model_copy(update={"finetune": _steady_finetune(config.student.finetune)}),
            "workers": _steady(config.workers),
        }
    )


def _steady(workers: WorkersConfig) -> WorkersConfig:
    return workers.model_copy(update={"min": None, "max": None})


def _steady_finetune(fit: FinetuneConfig | None) -> FinetuneConfig | None:
    return fit and fit.model_copy(update={"workers": _steady(fit.workers)})


def planned_config(config: RunConfig, place: TargetCluster) -> RunConfig:
    """Return the configuration as far as the cluster can be asked about it: numbers know no labels or custom resources."""
    if place.live:
        return config
    return config.model_copy(
        update={
            "teacher": config.teacher.model_copy(
                update={"engine": _anywhere(config.teacher.engine), "finetune": _finetune_anywhere(config.teacher.finetune)}
            ),
            "student": config.student.model_copy(update={"finetune": _finetune_anywhere(config.student.finetune)}),
            "responses": _written_anywhere(config.responses),
            "rollouts": _written_anywhere(config.rollouts),
            "workers": _anywhere(config.workers),
        }
    )


def _anywhere(section: Placed) -> Placed:
    return section.model_copy(update={"labels": {}, "resources": {}})


def _finetune_anywhere(fit: FinetuneConfig | None) -> FinetuneConfig | None:
    return fit and fit.model_copy(update={"workers": _anywhere(fit.workers)})


def _written_anywhere(section: Written | None) -> Written | None:
    if section is None:
        return None
    engines = {key: getattr(section, key) for key in ("engine", "teacher_engine") if hasattr(section, key)}
    return section.model_copy(update={key: engine and _anywhere(engine) for key, engine in engines.items()})


def settled_replicas(config: RunConfig, place: TargetCluster, shards: int) -> int:
    """Return the number of replicas, of ``auto`` as many as find room beside the workers and have a shard to score."""
    engine = config.teacher.engine
    if engine.replicas != "auto":
        return engine.replicas
    workers = config.workers.count if config.scores.overlap else 0
    most = most_replicas(room_beside(config, place, shards), workers)
    return max(1, min(most, shards))


def room_beside(config: RunConfig, place: TargetCluster, most: int) -> list[int]:
    """Return for each number of replicas up to ``most`` how many workers fit beside them if all nodes are free."""
    room = [(node, node.total) for node in place.nodes]
    return workers_beside(room, replica_request(config.teacher.engine), worker_request(config.workers), most)


def problems(config: RunConfig, place: TargetCluster, estimator: Estimator) -> list[str]:
    """Return, a line each, why a run does not fit; nothing if it does."""
    found = []
    try:
        require_places(config, place.nodes)
    except ValueError as error:
        found.append(str(error))
    found += teacher_problems(config, place, estimator)
    found += sampler_problems(config, place, estimator)
    for job in trainings(config):
        memory = estimator.training(job)
        if job.workers.gpus and place.gpus and gpu_bytes_of(memory) > place.gpu_bytes:
            found.append(f"{job.section}: {_too_large('each worker', gpu_bytes_of(memory), place)}, at {memory.moment}")
    found += evaluator_problems(config, place, estimator)
    return found + node_problems(config, place, estimator)


def evaluator_problems(config: RunConfig, place: TargetCluster, estimator: Estimator) -> list[str]:
    """Return which models one GPU does not hold to evaluate them."""
    if not config.evaluate.gpus or not place.gpus:
        return []
    found = []
    for role in ROLES:
        wanted = gpu_bytes_of(estimator.evaluator(config, role))
        if wanted > place.gpu_bytes and not (role == "teacher" and not config.loads_teacher_to_measure):
            from_store = role == "teacher" and not config.classes
            remedy = "; evaluate.teacher=scores takes its measures from the store" if from_store else ""
            found.append(f"evaluate: {_too_large(f'the evaluator with the {role}', wanted, place)}{remedy}")
    return found


def teacher_problems(config: RunConfig, place: TargetCluster, estimator: Estimator) -> list[str]:
    """Return why a replica does not fit its GPUs: vLLM's share must hold what it knows of, the rest what it does not."""
    engine, shape, longest = config.teacher.engine, estimator.shapes["teacher"], estimator.asked.longest
    if not engine.gpu or not place.gpus:
        return []
    memory = estimator.replica(config)
    if engine.kind == "transformers":
        wanted = gpu_bytes_of(memory)
        return [f"teacher.engine: {_too_large('a replica', wanted, place)}"] if wanted > place.gpu_bytes else []
    share = engine.gpu_memory_utilization
    inside = weights_bytes(shape, engine) + forward_bytes(shape, engine, longest) + memory.parts["key-value cache"]
    outside = scoring_bytes(shape, engine, longest, targets_of_longest=0) + GPU_PROCESS_BYTES
    found = []
    if inside > share * place.gpu_bytes:
        found.append(
            f"teacher.engine: weights, activations and the cache of one row take {inside / GIB:.1f} GiB of each GPU, and "
            f"gpu_memory_utilization {share:g} of {place.gpu_bytes / GIB:g} GiB gives them {share * place.gpu_bytes / GIB:.1f}"
        )
    if outside > (1 - share) * place.gpu_bytes:
        found.append(
            f"teacher.engine: scoring takes {outside / GIB:.1f} GiB of each GPU beside vLLM's share, and gpu_memory_utilization "
            f"{share:g} leaves it {(1 - share) * place.gpu_bytes / GIB:.1f}"
        )
    return found


def sampler_problems(config: RunConfig, place: TargetCluster, estimator: Estimator) -> list[str]:
    """Return why a sampler does not fit its GPUs."""
    found = []
    for name, (role, engine) in samplers(config).items():
        section = "rollouts.engine" if name == "sampling" else "rollouts.teacher_engine"
        memory = estimator.sampler(role, engine)
        share = engine.gpu_memory_utilization * place.gpu_bytes
        if not engine.gpu or not place.gpus:
            continue
        if engine.kind == "transformers" and (wanted := gpu_bytes_of(memory)) > place.gpu_bytes:
            found.append(f"{section}: {_too_large('a sampler', wanted, place)}")
        if engine.kind == "vllm" and memory.total > share:
            found.append(
                f"{section}: weights, activations, logits and the cache of one text take {memory.total / GIB:.1f} GiB of each "
                f"GPU, and gpu_memory_utilization {engine.gpu_memory_utilization:g} of {place.gpu_bytes / GIB:g} GiB gives them "
                f"{share / GIB:.1f}"
            )
    return found


def node_problems(config: RunConfig, place: TargetCluster, estimator: Estimator) -> list[str]:
    """Return what exceeds a node's memory among the jobs that run on CPUs; on one node those of one time count together."""
    taken: dict[str, float] = {}
    together = len(place.nodes) == 1
    if not config.teacher.engine.gpu:
        count = (1 if config.teacher.engine.replicas == "auto" else config.teacher.engine.replicas) if together else 1
        taken["scoring"] = count * (estimator.replica(config).total + CPU_PROCESS_BYTES)
    for job in trainings(config):
        if not job.workers.gpus:
            a_worker = estimator.training(job).total / CPU_USABLE + CPU_PROCESS_BYTES
            taken[job.name] = (job.workers.count if together else 1) * a_worker
    for name, (role, engine) in samplers(config).items():
        if not engine.gpu:
            taken[name] = (int(engine.replicas) if together else 1) * (estimator.sampler(role, engine).total + CPU_PROCESS_BYTES)
    beside = [name for name in ("scoring", "sampling", "sampling_teacher", "train") if name in taken]
    if together and (config.scores.overlap or config.rollouts is not None) and len(beside) > 1:
        taken[f"{' and '.join(beside)}, at one time,"] = sum(taken[name] for name in beside)
    return [
        f"{name} takes {count / GIB:.1f} GiB of a node's memory, and there are {place.node_bytes / GIB:.1f} GiB"
        for name, count in taken.items()
        if count > place.node_bytes
    ]


def gpu_bytes_of(memory: Memory) -> float:
    """Return how large a GPU must be for this."""
    return memory.total / GPU_USABLE + GPU_PROCESS_BYTES


def _too_large(who: str, wanted: float, place: TargetCluster) -> str:
    return f"{who} takes {wanted / GIB:.1f} GiB of a GPU, and each has {place.gpu_bytes / GIB:g}"
