"""The nearest plan that fits: the fewest keys changed, first those that leave the student's loss as it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from actors.config.passes import pass_size
from actors.format import GIB
from orchestrator.config.load import ConfigError, apply_override, validate
from orchestrator.config.run import RunConfig
from orchestrator.planning.cluster_fit import (
    GPU_PROCESS_BYTES,
    TargetCluster,
    evaluator_problems,
    gpu_bytes_of,
    problems,
    room_beside,
    teacher_problems,
)
from orchestrator.planning.jobs import Estimator, Job, trainings

PARALLEL = (1, 2, 4, 8)
"""GPUs of a replica that are tried."""
SHARES = (0.8, 0.7, 0.6, 0.5, 0.4)
"""Values of ``gpu_memory_utilization`` that are tried, the default first."""


@dataclass(frozen=True, slots=True)
class Nearest:
    """A plan that fits, or why there is none."""

    overrides: tuple[str, ...]
    """What to add to the command line; empty where there is no such plan."""
    config: RunConfig | None
    """The configuration with them."""
    otherwise: str = ""
    """Where there is none: what the cluster would need."""


def nearest_plan(config: RunConfig, place: TargetCluster, estimator: Estimator) -> Nearest:
    """Search for a configuration that fits.

    Each part is changed as little as makes it fit, one after the other: how the teacher is served, how each training is cut,
    and then how many replicas and workers there are, and whether they run at one time.
    """
    changes: list[str] = []
    for part in (
        _teacher_changes(config, place, estimator.shapes["teacher"].heads),
        *(_training_changes(job) for job in trainings(config)),
        _Choice("evaluate", [[], ["evaluate.precision=bfloat16"], ["evaluate.teacher=scores"], [*EVALUATOR_AT_LEAST]]),
    ):
        fitting = next(
            (tried for tried in part.tried if not _fails(part.fits, config, [*changes, *tried], place, estimator)), None
        )
        if fitting is None:
            return Nearest((), None, _too_small(config, place, estimator))
        changes += fitting
    for counts in _count_changes(changed(config, changes), place):
        candidate = changed(config, [*changes, *counts])
        if not problems(candidate, place, estimator):
            return Nearest((*changes, *counts), candidate)
    return Nearest((), None, _too_small(config, place, estimator))


EVALUATOR_AT_LEAST = ("evaluate.precision=bfloat16", "evaluate.teacher=scores")


@dataclass(frozen=True, slots=True)
class _Choice:
    """Something that may have to change, alone."""

    fits: str
    """``teacher``, ``evaluate``, or the name of a training."""
    tried: Sequence[list[str]]
    """What to change, the least first."""


def changed(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Return a configuration with overrides, validated again."""
    tree = config.model_dump(mode="json")
    for override in overrides:
        apply_override(tree, override)
    return validate(tree)


def _accepted(config: RunConfig, overrides: Sequence[str]) -> RunConfig | None:
    """Return a configuration with overrides; None if it refuses them, as that of a small network does checkpointing."""
    try:
        return changed(config, overrides)
    except ConfigError:
        return None


def _fails(part: str, config: RunConfig, overrides: Sequence[str], place: TargetCluster, estimator: Estimator) -> bool:
    if (candidate := _accepted(config, overrides)) is None:
        return True
    if part == "teacher":
        stands = len(room_beside(candidate, place, most=1)) > 1
        return not stands or bool(teacher_problems(candidate, place, estimator))
    if part == "evaluate":
        return bool(evaluator_problems(candidate, place, estimator))
    job = next(job for job in trainings(candidate) if job.name == part)
    return bool(job.workers.gpus) and gpu_bytes_of(estimator.training(job)) > place.gpu_bytes


def _teacher_changes(config: RunConfig, place: TargetCluster, heads: int) -> _Choice:
    """More of each node's GPUs a replica, another share for vLLM, or both."""
    engine = config.teacher.engine
    per_node = max((int(node.total.get("GPU", 0)) for node in place.nodes), default=0)
    possible = [size for size in PARALLEL if size <= per_node and heads % size == 0]
    larger = [size for size in possible if size > engine.tensor_parallel]
    smaller = [size for size in reversed(possible) if size < engine.tensor_parallel]
    shares = [share for share in SHARES if share != engine.gpu_memory_utilization]
    parallel = [[f"teacher.engine.tensor_parallel={size}"] for size in (*larger, *smaller)] if engine.kind == "vllm" else []
    other = [[f"teacher.engine.gpu_memory_utilization={share}"] for share in shares] if engine.kind == "vllm" else []
    half = [["teacher.engine.dtype=bfloat16"]] if engine.dtype == "float32" else []
    return _Choice("teacher", [[], *other, *parallel, *half, *([*one, *two] for one in parallel for two in other)])


def _training_changes(job: Job) -> _Choice:
    """Smaller passes, then checkpointing, then sharding: none changes what is learned."""
    key, size = pass_size(job.train)
    cuts = [[f"{job.section}.{key}={size >> halvings}"] for halvings in range(1, size.bit_length())]
    again = [f"{job.section}.gradient_checkpointing=true"] if not job.train.gradient_checkpointing else []
    shard = [f"{job.section}.sharding=fsdp"] if job.train.sharding == "replicate" and job.workers.count > 1 else []
    plain = [[], *cuts]
    tried = [*plain, *([*again, *cut] for cut in plain)]
    return _Choice(job.name, [*tried, *([*shard, *cut] for cut in tried)])


def _count_changes(config: RunConfig, place: TargetCluster) -> Iterator[list[str]]:
    """Fewer replicas, fewer workers, taking turns; then fewer of both."""
    engine, workers = config.teacher.engine, config.workers.count
    replicas = 1 if engine.replicas == "auto" else engine.replicas
    beside = room_beside(config, place, replicas)
    most = len(beside) - 1
    alone = beside[0]
    yield []
    if fewer := max((count for count in range(1, most + 1) if beside[count] >= workers), default=0):
        yield [f"teacher.engine.replicas={fewer}"]
    if most >= replicas and beside[replicas]:
        yield [f"workers.count={min(workers, beside[replicas])}"]
    fits = _finetune_changes(config, place)
    yield fits
    yield [*fits, "scores.overlap=false"]
    halves = ([f"teacher.engine.replicas={min(most, replicas)}"] if most < replicas else []) + (
        [f"workers.count={alone}"] if alone < workers else []
    )
    if most and alone:
        yield [*fits, *halves, "scores.overlap=false"]
        both = min(range(1, most + 1), key=lambda count: abs(count * workers - beside[count] * replicas))
        yield [*fits, f"teacher.engine.replicas={both}", f"workers.count={max(1, beside[both])}"]


def _finetune_changes(config: RunConfig, place: TargetCluster) -> list[str]:
    """Fewer workers for the fine-tunings that stand before scoring, where there are more than devices."""
    room = place.gpus
    return [
        f"{role}.finetune.workers.count={room}"
        for role, side in (("teacher", config.teacher), ("student", config.student))
        if side.finetune and side.finetune.workers.gpus and side.finetune.workers.count > room > 0
    ]


def _too_small(config: RunConfig, place: TargetCluster, estimator: Estimator) -> str:
    """Return which devices would do once all that can be changed is changed."""
    engine = config.teacher.engine
    least: list[tuple[str, float]] = []
    if engine.gpu:
        per_node = max((int(node.total.get("GPU", 0)) for node in place.nodes), default=1)
        heads = estimator.shapes["teacher"].heads
        size = max((size for size in PARALLEL if size <= per_node and heads % size == 0), default=1)
        served = changed(config, [f"teacher.engine.tensor_parallel={size}"]) if engine.kind == "vllm" else config
        who = f"a replica over {size} GPUs" if size > 1 else "a replica"
        least.append((who, estimator.replica(served).total + GPU_PROCESS_BYTES))
    for job in trainings(config):
        if job.workers.gpus:
            tried = reversed(_training_changes(job).tried)
            last = next(found for overrides in tried if (found := _accepted(config, overrides)) is not None)
            smallest = next(one for one in trainings(last) if one.name == job.name)
            least.append((f"a worker of {job.name}", gpu_bytes_of(estimator.training(smallest))))
    who, wanted = max(least, key=lambda one: one[1], default=("", 0.0))
    if wanted > place.gpu_bytes:
        return (
            f"no plan for this pair fits GPUs of {place.gpu_bytes / GIB:g} GiB: {who} takes {wanted / GIB:.1f} GiB at the least"
        )
    return (
        f"no plan for this pair was found for {place}; more GPUs, or fewer of teacher.engine.replicas and workers.count, would do"
    )
