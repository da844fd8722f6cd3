"""What a training worker is told, and where it begins.

Ray Train's controller loads this module as the workers do, so it imports nothing heavy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from actors.config.models import EvaluateConfig, LoraAdapter, TrainConfig
from actors.config.tracking import TrackingConfig
from actors.config.workers import WorkersConfig
from actors.dataloader.row_sources import RowPolicy
from actors.handles import RemoteMethod
from actors.model_source import ModelSource
from actors.storage.mirror import Mirror
from losses.config import LossConfig


class ValidationController(Protocol):
    """Handle of the actor that hears what was measured."""

    @property
    def measured(self) -> RemoteMethod[[int, int, int, Mapping[str, float | None], float], bool]:
        """Take trial, rung, step, measures and seconds; return whether the trial continues."""
        ...


@dataclass(frozen=True, slots=True)
class AnswerSchedule:
    """What the student of a trial answers when it has learned."""

    texts: str
    """The held-out rows as text."""
    tokenizer: ModelSource
    """Where the tokenizer is loaded from."""
    evaluate: EvaluateConfig
    """How many of their prompts it answers, and how."""


@dataclass(frozen=True, slots=True)
class ValidationSchedule:
    """When the student of a trial is validated while it learns, on what, and who decides whether it continues."""

    trial: int
    """Number of the trial."""
    steps: tuple[int, ...]
    """Optimizer steps after which it is, ascending."""
    examples: str
    """The held-out rows as token ids."""
    store: str
    """The complete store of the teacher's scores of these rows."""
    top_k: int
    """How many of that store's K are used."""
    batch_rows: int
    """Rows of one forward pass."""
    controller: ValidationController
    """Decides."""
    ordered: bool = False
    """Whether the labels of a classifier are grades."""
    answers: AnswerSchedule | None = None
    """What the student answers after the last of the steps; None for nothing."""


@dataclass(frozen=True, slots=True)
class WorkerResult:
    """How the workers of a training left it."""

    error: str | None = None
    """Of a failure that trying again cannot mend."""
    resize_requested: bool = False
    """Whether they left at a checkpoint because there is room for more of them."""


@dataclass(frozen=True, slots=True)
class RolloutTask:
    """How the student's own text is a part of its training."""

    log: str
    """Path or address of the folder of the rows that it wrote, with the teacher's scores."""
    weights: str
    """Path or address of the folder in which its weights are left for those who sample."""
    policy: RowPolicy
    """Which rows it writes, and by which weights."""
    dtype: str
    """Type in which samplers compute."""
    heldout: str | None = None
    """The held-out rows as token ids, on which its loss is measured where its share adapts to it."""
    heldout_store: str | None = None
    """The complete store of the teacher's scores of these rows."""
    heldout_batch_rows: int = 1
    """Rows of one forward pass over them."""
    head_of: ModelSource | None = None
    """The teacher, where the log keeps its hidden states: its output head makes the logits of them. None where it keeps none."""
    head_dtype: str = "float32"
    """Type in which the teacher is served, and its head computes."""


@dataclass(frozen=True, slots=True)
class TrainingTask:
    """One model to train, with everything it needs. Paths are absolute, and of files that all workers see or have copies of."""

    name: str
    """Name of the task, also of its metrics file."""
    model: ModelSource
    """The model to begin with."""
    tokenizer: str
    """Folder of the tokenizer that is saved beside the finished model."""
    lora: LoraAdapter | None
    """Adapters, if only they are trained."""
    loss: LossConfig
    """What is minimised."""
    train: TrainConfig
    """How much, how large, how often."""
    examples: str
    """The example file."""
    store: str | None
    """The score store, where the loss needs a teacher."""
    top_k: int
    """How many of the store's K are used."""
    wait_seconds: float
    """How long to wait for a shard of the store."""
    seed: int
    """Draws the order of epochs, dropout and random splits."""
    threads: int
    """CPU threads of a worker."""
    gpu: bool
    """Whether each worker has a GPU."""
    metrics: str
    """Folder of metrics."""
    output: str | None
    """Folder in which the finished model is written; None to keep nothing but what was measured."""
    dtype: str = "float32"
    """Type of the weights of the finished model: float32, bfloat16 or float16."""
    validation: ValidationSchedule | None = None
    """Examinations on the way, for trials."""
    run: str = "unnamed"
    """Name of the run it belongs to, for those who watch."""
    tracking: TrackingConfig = TrackingConfig()
    """Where its steps are shown besides the run's own files."""
    elastic: WorkersConfig | None = None
    """The workers, where they are to make way once there is room for more of them."""
    rollouts: RolloutTask | None = None
    """Where the student writes rows of its own training."""
    teacher_done: str | None = None
    """File that stands once the teacher needs its room no more; None where no teacher is at work beside the training."""
    mirror: Mirror | None = None
    """How the nodes' copies of these files are kept alike; None where all nodes see the same."""

    @property
    def beside_teacher(self) -> bool:
        """Whether a teacher is at work now, whose room is not to be taken."""
        return self.teacher_done is not None and not Path(self.teacher_done).exists()


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no finite number."""
