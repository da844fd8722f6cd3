"""What the user may say about a run: the whole configuration, one section a class. Imports neither torch nor Ray."""

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from actors.config.models import (
    EngineConfig,
    EvaluateConfig,
    LoraAdapter,
    ModelConfig,
    ScoresConfig,
    TrainConfig,
    needs_complete_store,
)
from actors.config.tracking import TrackingConfig
from actors.config.workers import WorkersConfig
from losses.config import AtkdLoss, LossConfig
from losses.section import LARGEST_SEED, Section
from orchestrator.config.compare import CompareConfig
from orchestrator.config.data import DataConfig
from orchestrator.config.tune import TuneConfig

VLLM_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)


class TokenizerConfig(Section):
    """A byte-level BPE tokenizer trained on the run's own training text, for models made from scratch."""

    vocab_size: int = Field(default=2048, ge=300)
    """Tokens in its vocabulary, special ones included."""


class FinetuneConfig(Section):
    """Fine-tuning on the data with cross entropy, by the student's own loop."""

    train: TrainConfig
    """How much, how large, how often."""

    workers: WorkersConfig = WorkersConfig()
    """Who does it."""


class TeacherConfig(Section):
    """The large model."""

    model: ModelConfig
    """Which model, or what shape of one."""

    finetune: FinetuneConfig | None = None
    """Fine-tune it on the data first, as the paper's teachers are; null to take it as it is."""

    engine: EngineConfig = EngineConfig()
    """How it is served for scoring."""


class StudentConfig(Section):
    """The small model."""

    model: ModelConfig
    """Which model, or what shape of one."""

    finetune: FinetuneConfig | None = None
    """Train it on the data first; for students made from scratch, which otherwise know no language."""

    lora: LoraAdapter | None = None
    """Train adapters instead of all weights."""


class ExportConfig(Section):
    """The student's folder, as it is given to others."""

    dtype: Literal["as_loaded", "float32", "bfloat16", "float16"] = "as_loaded"
    """Type of the stored weights; ``as_loaded`` is that of the model the student began as. Evaluation loads what is stored."""


class RunConfig(Section):
    """Everything one run depends on."""

    name: str = Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""

    output: str = "runs"
    """Folder of runs; on a cluster, one that all nodes see."""

    seed: int = Field(default=0, ge=0, le=LARGEST_SEED)
    """Draws initial weights, dropout and the order of later epochs."""

    tokenizer: TokenizerConfig | None = None
    """Train a tokenizer; needed when, and only when, the teacher is made from scratch."""

    data: DataConfig = DataConfig()
    teacher: TeacherConfig
    scores: ScoresConfig = ScoresConfig()
    student: StudentConfig
    loss: LossConfig = AtkdLoss(kind="atkd")
    train: TrainConfig = TrainConfig()
    workers: WorkersConfig = WorkersConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    tracking: TrackingConfig = TrackingConfig()
    tune: TuneConfig = TuneConfig()
    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        kinds = (self.teacher.model.kind, self.student.model.kind)
        if self.teacher.model.kind == "scratch" and self.teacher.finetune is None:
            raise ValueError(
                "teacher.model is scratch but teacher.finetune is null: a teacher with random weights has nothing to teach; "
                "add teacher.finetune"
            )
        if kinds == ("scratch", "scratch") and self.tokenizer is None:
            raise ValueError("both models are scratch and tokenizer is null: add a tokenizer section, such as {vocab_size: 2048}")
        engine, shape = self.teacher.engine, self.teacher.model
        if shape.kind == "scratch" and engine.kind == "vllm" and not engine.gpu:
            head_size = shape.hidden_size // shape.heads
            if head_size not in VLLM_CPU_HEAD_SIZES:
                raise ValueError(
                    f"teacher.model has heads of size {head_size} (hidden_size / heads); vLLM on CPUs serves the sizes "
                    f"{', '.join(map(str, VLLM_CPU_HEAD_SIZES))}: hidden_size {32 * shape.heads} would do"
                )
        if "pretrained" in kinds and self.tokenizer is not None:
            raise ValueError(
                "tokenizer is trained only where both models are made from scratch; a pretrained model brings its own: "
                "set tokenizer to null"
            )
        if needs_complete_store(self.loss) and self.scores.overlap:
            raise ValueError(
                "loss.scope dataset ranks tokens over the complete store, so training cannot overlap with scoring: "
                "set scores.overlap to false"
            )
        if self.workers.elastic and isinstance(self.loss, AtkdLoss) and self.loss.scope == "microbatch":
            raise ValueError(
                "loss.scope microbatch ranks the tokens of each forward pass by themselves, so the loss would change with the "
                f"number of workers, which workers.max {self.workers.max} lets change; loss.scope batch would do"
            )
        return self

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run's folder."""
        return Path(self.output).expanduser().resolve() / self.name

    @property
    def score_root(self) -> Path:
        """Absolute path of the folder under which score stores are kept by their identity."""
        return Path(self.scores.root or Path(self.output) / "scores").expanduser().resolve()
