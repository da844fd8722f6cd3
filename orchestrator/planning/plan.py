"""A plan: what a run will take, before anything starts, and whether a cluster has it."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from actors.config.models import TrainConfig
from actors.format import plural
from orchestrator.cluster.ray_session import demand
from orchestrator.config.run import RunConfig
from orchestrator.planning.class_models import ClassEstimator
from orchestrator.planning.class_rows import read_class_rows, said_class_rows
from orchestrator.planning.cluster_fit import (
    TargetCluster,
    given_place,
    live_place,
    planned_config,
    problems,
    settled_replicas,
    with_steady_workers,
)
from orchestrator.planning.jobs import Estimator, samplers, trainings
from orchestrator.planning.memory import Memory
from orchestrator.planning.nearest import Nearest, nearest_plan
from orchestrator.planning.probe import probe
from orchestrator.planning.rollouts import rollout_pace
from orchestrator.planning.shapes import Workload, read_workload, workload_of
from orchestrator.planning.throughput import (
    REPLICAS,
    STUDENTS,
    Pace,
    Pipeline,
    Rates,
    assumptions,
    pace,
    pipeline_of,
    replicas_that_feed,
    scoring_rate,
    training_rate,
    workers_that_are_fed,
)

SHOWN_STUDENTS, SHOWN_REPLICAS = (1, 4, 16, 64, 256, 1024), (1, 4, 16, 64, 256)


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What the user says beside the configuration."""

    gpus: int | None = None
    """GPUs of a cluster given as numbers; None for the machines that are there."""
    gpu_memory: float | None = None
    """GiB of each."""
    gpus_per_node: int = 8
    """GPUs of each node."""
    gpu_tflops: float = 312.0
    """Operations a second of each in 16 bits, in 10^12."""
    rows: int | None = None
    """Training rows, where the data is not read."""
    row_tokens: float | None = None
    """Tokens of a row, on average."""
    row_targets: float | None = None
    """Targets of a row, on average."""
    probe: bool = False
    """Measure speeds instead of assuming them."""
    as_json: bool = False
    """Print one JSON object and nothing else."""


@dataclass(frozen=True, slots=True)
class Plan:
    """All that a plan says; bytes and seconds."""

    fits: bool
    """Whether the cluster holds the run."""
    problems: tuple[str, ...]
    """Why not."""
    nearest: Nearest | None
    """The nearest plan that fits, where this one does not."""
    place: TargetCluster
    """The cluster."""
    work: Workload
    """The rows."""
    estimator: Estimator
    """Shapes, and the memory of each job."""
    memory: dict[str, Memory]
    """For each job what one device or process of it takes."""
    store: dict[str, int]
    """Bytes of the stores."""
    rates: Rates
    """Of one replica and one worker."""
    finetune_seconds: dict[str, float]
    """Of fine-tuning teacher and student."""
    pipeline: Pipeline
    """Rows, shards and steps, for the sweep."""
    pace: Pace
    """Scoring and training."""
    nearest_pace: Pace | None
    """The same of the nearest plan."""
    feeding: int
    """Replicas with which the workers hardly wait."""
    trials: int
    """Trials of the search that the configuration has."""
    assumptions: tuple[str, ...]
    """What it rests on."""
    remarks: tuple[str, ...]
    """What the user may have meant otherwise."""

    @property
    def seconds(self) -> float:
        """Of the whole run, without starting processes and evaluating."""
        return sum(self.finetune_seconds.values()) + self.pace.seconds

    @property
    def search_seconds(self) -> float:
        """Of a search: fine-tuning and scoring once, and all trials to the end, one after the other."""
        training = self.pace.epoch_seconds * self.pipeline.epochs
        return sum(self.finetune_seconds.values()) + self.pace.scoring_seconds + self.trials * training


def make_plan(config: RunConfig, asked: PlanOptions) -> Plan:
    """Return the plan of a run.

    Raises:
        ValueError: naming what is missing or cannot be.
    """
    place = _place(asked, config)
    asked_config, config = config, planned_config(with_steady_workers(config), place)
    estimator = _estimator(config, asked)
    work = estimator.work
    gpu_flops = asked.gpu_tflops * 1e12
    assumed = assumed_rates(config, estimator, gpu_flops)
    rates = probe(config, estimator, assumed) if asked.probe else assumed
    found = problems(config, place, estimator)
    nearest = nearest_plan(config, place, estimator) if found else None
    pipe = pipeline_of(work, config.scores, visited(config), config.loss, rates, estimator.scored)
    shards = max(1, len(pipe.shard_tokens))
    memory = {"scoring": estimator.replica(config, place.gpu_bytes or None)}
    for name, (role, engine) in samplers(config).items():
        memory[name] = estimator.sampler(role, engine, place.gpu_bytes or None)
    memory |= {job.name: estimator.training(job) for job in trainings(config)}
    replicas = settled_replicas(config, place, shards)
    remarks = (*_remarks(asked_config, place, work), *estimator.remarks())
    if config.rollouts is not None:
        row_tokens = work.train_tokens / work.rows
        remarks += rollout_pace(config, estimator.shapes, row_tokens, rates, replicas, gpu_flops).lines()
    return Plan(
        fits=not found,
        problems=tuple(found),
        nearest=nearest,
        place=place,
        work=work,
        estimator=estimator,
        memory=memory,
        store=estimator.store(config),
        rates=rates,
        finetune_seconds=_finetune_seconds(config, estimator, gpu_flops, rates.training / assumed.training),
        pipeline=pipe,
        pace=pace(pipe, replicas, config.workers.count),
        nearest_pace=_nearest_pace(nearest, place, estimator, rates, assumed, gpu_flops),
        feeding=replicas_that_feed(pipe, config.workers.count),
        trials=config.tune.draws,
        assumptions=() if asked.probe else assumptions(gpu_flops),
        remarks=remarks,
    )


def _remarks(config: RunConfig, place: TargetCluster, work: Workload) -> tuple[str, ...]:
    """Return lines about what is not counted, workers whose number may change and about GPUs that stay idle."""
    lines = [
        f"{job.name}: planned with {plural(job.workers.count, 'worker')}, its min; up to {job.workers.most} train where there is "
        "room. What is said of count holds for min"
        for job in trainings(config)
        if job.workers.elastic
    ]
    if (measured := config.evaluate.benchmarks) is not None:
        lines.append(
            f"evaluate.benchmarks: {plural(len(measured.tasks), 'task')}, {plural(len(measured.models), 'model')}; how long that "
            "takes is in none of the hours"
        )
    if (judge := config.evaluate.judge) is not None:
        lines.append(
            f"evaluate.judge: {judge.model} is asked about the models' answers; how long that takes, and what it costs, is in "
            "none of the hours"
        )
    if config.responses is not None:
        lines.append(
            f"respond: the {config.responses.writer} writes {work.rows:,} responses of at most {config.responses.max_new_tokens} "
            "tokens before anything is scored; how long that takes is in none of the hours"
        )
    if not place.gpus:
        return tuple(lines)
    computes = config.teacher.model.kind != "soft_labels"
    sides = (
        ("the teacher", config.teacher.engine.gpu or not computes, "teacher.engine.gpu=true"),
        ("the student", config.workers.gpus > 0, "workers.gpus=1"),
    )
    none = [f"{side} takes no GPU in this configuration; {key} would give it one" for side, takes, key in sides if not takes]
    return tuple(lines + none)


def assumed_rates(config: RunConfig, estimator: Estimator, gpu_flops: float) -> Rates:
    """Return the rates of one replica and one worker by arithmetic."""
    job, measurable = trainings(config)[-1], "" if config.classes else "; --probe measures"
    return Rates(
        scoring_rate(estimator.shapes["teacher"], estimator.asked, config.teacher.engine, gpu_flops),
        training_rate(estimator.shape(job), estimator.work, job.train, job.workers, estimator.passes(job), gpu_flops),
        f"assumed: operations over an assumed share of the devices' speed{measurable}",
    )  # fmt: skip


def _place(asked: PlanOptions, config: RunConfig) -> TargetCluster:
    if asked.gpu_tflops <= 0:
        raise ValueError(f"--gpu-tflops {asked.gpu_tflops:g} computes nothing; 312 is an A100's in 16 bits")
    if asked.gpus is None:
        return live_place(asked.gpu_memory, demand(config).cpus)
    if asked.probe:
        raise ValueError("--probe measures the machines that are there, and --gpus speaks of others; leave one out")
    if asked.gpu_memory is None:
        raise ValueError(f"--gpus {asked.gpus} needs --gpu-memory, the GiB of each; 80 for an A100 or H100")
    return given_place(asked.gpus, asked.gpu_memory, asked.gpus_per_node)


def _estimator(config: RunConfig, asked: PlanOptions) -> Estimator:
    if not config.classes:
        return Estimator(config, _work(config, asked))
    if asked.probe:
        raise ValueError(
            "--probe measures language models, and task.kind is classification; without it the speeds are assumed, and the plan "
            "says of what"
        )
    if asked.row_targets not in (None, 1):
        raise ValueError(f"--row-targets {asked.row_targets:g}: a row of classification has one, its label; leave it out")
    if asked.rows is None and asked.row_tokens is None:
        return ClassEstimator(config, read_class_rows(config))
    if asked.rows is None or asked.row_tokens is None:
        raise ValueError("--rows and --row-tokens go together; say both, or none to have the data read")
    return ClassEstimator(config, said_class_rows(config, asked.rows, asked.row_tokens))


def _work(config: RunConfig, asked: PlanOptions) -> Workload:
    if asked.rows is None and asked.row_tokens is None and asked.row_targets is None:
        return read_workload(config)
    if asked.rows is None or asked.row_tokens is None or asked.row_targets is None:
        raise ValueError("--rows, --row-tokens and --row-targets go together; say all three, or none to have the data read")
    return workload_of(config, asked.rows, asked.row_tokens, asked.row_targets)


def _finetune_seconds(
    config: RunConfig, estimator: Estimator, gpu_flops: float, measured_over_assumed: float
) -> dict[str, float]:
    """Return the seconds of each fine-tuning; where the student was measured, faster or slower by as much as it was."""
    seconds: dict[str, float] = {}
    for job in trainings(config)[:-1]:
        work = estimator.rows(job)
        rate = training_rate(estimator.shape(job), work, job.train, job.workers, estimator.passes(job), gpu_flops)
        seconds[job.name] = work.train_tokens * job.train.epochs / (rate * job.workers.count * measured_over_assumed)
    return seconds


def visited(config: RunConfig) -> TrainConfig:
    """Return the student's training with as many epochs as there are visits of a row."""
    times = config.rollouts.inner_epochs if config.rollouts is not None else 1
    return config.train.model_copy(update={"epochs": config.train.epochs * times})


def _nearest_pace(
    nearest: Nearest | None, place: TargetCluster, estimator: Estimator, rates: Rates, assumed: Rates, gpu_flops: float
) -> Pace | None:
    """Return the pace of the nearest plan, at rates that follow the measured ones as the assumed ones do."""
    if nearest is None or nearest.config is None:
        return None
    config = nearest.config
    other = assumed_rates(config, estimator, gpu_flops)
    scaled = other if rates is assumed else replace(
        rates,
        scoring=rates.scoring * other.scoring / assumed.scoring,
        training=rates.training * other.training / assumed.training,
    )
    pipe = pipeline_of(estimator.work, config.scores, visited(config), config.loss, scaled, estimator.scored)
    return pace(pipe, settled_replicas(config, place, max(1, len(pipe.shard_tokens))), config.workers.count)


def sweep(made: Plan) -> list[dict[str, Any]]:
    """Return the simulated sweep: for each number of workers and replicas the seconds, and who is waited for."""
    return [asdict(one) | {"bottleneck": one.bottleneck} for one in (
        pace(made.pipeline, replicas, workers) for workers in STUDENTS for replicas in REPLICAS
    )]  # fmt: skip


def saturation(made: Plan) -> dict[str, dict[int, int]]:
    """Return where each side saturates: replicas that feed so many workers, and workers that so many replicas feed."""
    return {
        "replicas_for_workers": {workers: replicas_that_feed(made.pipeline, workers) for workers in STUDENTS},
        "workers_for_replicas": {replicas: workers_that_are_fed(made.pipeline, replicas) for replicas in REPLICAS},
    }
