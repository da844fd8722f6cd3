"""What a configuration asks of devices: the memory of each of its jobs, from shapes alone. One is made for each plan."""

from dataclasses import dataclass
from typing import Literal

import torch

from actors.config.models import EngineConfig, LoraAdapter, TrainConfig
from actors.config.workers import WorkersConfig
from orchestrator.config.run import RunConfig
from orchestrator.models.models import ROLES, Role
from orchestrator.planning.memory import (
    Memory,
    chunk_bytes,
    evaluator_memory,
    replica_memory,
    sampler_memory,
    saved_bytes,
    store_bytes,
    training_memory,
)
from orchestrator.planning.meta_models import adapted, meta_model
from orchestrator.planning.shapes import ModelShape, Passes, Workload, passes_of, shape_of

Training = Literal["finetune_teacher", "finetune_student", "train"]


@dataclass(frozen=True, slots=True)
class Job:
    """One training of a run."""

    name: Training
    """Name of its stage."""
    role: Role
    """Whose weights learn."""
    train: TrainConfig
    """How much, how large."""
    workers: WorkersConfig
    """Who does it."""
    section: str
    """Where the configuration speaks of its training: ``train``, ``teacher.finetune.train``."""
    lora: LoraAdapter | None = None
    """Adapters, if only they learn."""


def trainings(config: RunConfig) -> list[Job]:
    """Return the trainings of a run, in their order."""
    jobs = []
    if config.teacher.finetune:
        jobs.append(
            Job(
                "finetune_teacher",
                "teacher",
                config.teacher.finetune.train,
                config.teacher.finetune.workers,
                "teacher.finetune.train",
            )
        )
    if config.student.finetune:
        jobs.append(
            Job(
                "finetune_student",
                "student",
                config.student.finetune.train,
                config.student.finetune.workers,
                "student.finetune.train",
            )
        )
    return [*jobs, Job("train", "student", config.train, config.workers, "train", config.student.lora)]


def samplers(config: RunConfig) -> dict[str, tuple[Role, EngineConfig]]:
    """Return whose samplers stand beside the training, by the names of their jobs, and how they are served."""
    found: dict[str, tuple[Role, EngineConfig]] = {}
    if config.rollouts is not None:
        found["sampling"] = ("student", config.sampler_engine)
    if config.teacher_sampler_engine is not None:
        found["sampling_teacher"] = ("teacher", config.teacher_sampler_engine)
    return found


class Estimator:
    """Memory of the jobs of one configuration and its variants, which share models and rows; what is traced is remembered.

    Args:
        config: names the models; variants differ in how they are trained and served.
        work: the rows.
        asked: the texts that the teacher reads to score them, where these are others.
        scored: the same, those of a row together.
    """

    def __init__(
        self, config: RunConfig, work: Workload, asked: Workload | None = None, scored: Workload | None = None
    ) -> None:
        self.work, self.asked, self.scored = work, asked or work, scored or work
        self._config = config
        self._saved: dict[tuple[object, ...], int] = {}
        self._passes: dict[tuple[TrainConfig, int, Training], Passes] = {}
        self.shapes: dict[Role, ModelShape] = {role: self._shape_of(role) for role in ROLES}

    def rows(self, job: Job) -> Workload:
        """Return the rows that a training learns from."""
        return self.work if job.name == "train" else self.work.own or self.work

    def passes(self, job: Job) -> Passes:
        """Return the forward passes of a training."""
        key = (job.train, job.workers.count, job.name)
        if key not in self._passes:
            self._passes[key] = passes_of(self.rows(job), job.train, job.workers.count, self._config.seed)
        return self._passes[key]

    def shape(self, job: Job) -> ModelShape:
        """Return the shape of what learns, adapters included."""
        if job.lora is None:
            return self.shapes[job.role]
        return shape_of(adapted(meta_model(self._config, job.role, self.work), job.lora))

    def training(self, job: Job) -> Memory:
        """Return what each worker of a training takes."""
        passes, train = self.passes(job), job.train
        kept = self._traced(job, passes, train.gradient_checkpointing)
        shape = self.shape(job)
        anew = self._traced(job, passes, checkpointing=False) // shape.layers if train.gradient_checkpointing else 0
        chunk = chunk_bytes(shape, passes.targets, train.precision, gpu=job.workers.gpus > 0)
        return training_memory(shape, passes, train, job.workers, kept, anew, chunk)

    def replica(self, config: RunConfig, device_bytes: float | None = None) -> Memory:
        """Return what a replica of the teacher takes on each of its devices."""
        work = self.asked
        most = int(work.targets.max()) * work.longest // int(work.lengths.max())
        return replica_memory(self.shapes["teacher"], config.teacher.engine, work.longest, most, device_bytes)

    def sampler(self, role: Role, engine: EngineConfig, device_bytes: float | None = None) -> Memory:
        """Return what a sampler of a role's model takes on each of its devices."""
        return sampler_memory(self.shapes[role], engine, self.work.longest, device_bytes)

    def evaluator(self, config: RunConfig, role: Role) -> Memory:
        """Return what the evaluator of a role's model takes."""
        return evaluator_memory(self.shapes[role], config.evaluate, self.work.longest)

    def store(self, config: RunConfig) -> dict[str, int]:
        """Return the bytes of the stores of training and held-out rows."""
        work, vocab_size = self.work, self.shapes["teacher"].vocab_size
        train = store_bytes(config.scores, vocab_size, work.rows, work.train_targets)
        heldout = store_bytes(config.scores, vocab_size, config.data.planned_heldout_rows, work.heldout_targets)
        return {"train": train, "heldout": heldout}

    def remarks(self) -> list[str]:
        """Return what could not be estimated, and what a number here does not say."""
        return []

    def _shape_of(self, role: Role) -> ModelShape:
        return shape_of(meta_model(self._config, role, self.work))

    def _traced(self, job: Job, passes: Passes, checkpointing: bool) -> int:
        key = (job.role, job.lora, passes.rows, passes.tokens, job.train.precision, job.train.sharding, checkpointing)
        if key not in self._saved:
            model = adapted(meta_model(self._config, job.role, self.work), job.lora)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                if job.lora is not None:
                    model.enable_input_require_grads()
            in_16_bits = job.train.precision == "bfloat16"
            if in_16_bits and job.train.sharding == "fsdp":  # gathered in 16 bits, and let go: no copy stays
                model, in_16_bits = model.to(torch.bfloat16), False
            self._saved[key] = saved_bytes(model, passes.rows, passes.tokens, in_16_bits)
        return self._saved[key]
