"""Configuration schema of a run: the whole configuration, one section a class. Imports neither torch nor Ray."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from actors.config.model_kinds import CutModel, PretrainedModel, ScratchModel
from actors.config.models import (
    EngineConfig,
    EvaluateConfig,
    ScoresConfig,
    TrainConfig,
    needs_complete_store,
    needs_teacher,
)
from actors.config.places import in_object_storage, resolved, within
from actors.config.rollouts import ResponsesConfig, RolloutsConfig
from actors.config.tracking import TrackingConfig
from actors.config.workers import WorkersConfig
from actors.engines.vllm_limits import require_cpu_head_size
from actors.storage.mirror import Mirror, folder_on_nodes
from losses.config import AtkdLoss, LossConfig
from losses.section import LARGEST_SEED, MayChange, NotSearchable, Searchable, Section
from orchestrator.config.classes import (
    require_classification,
    require_language_models,
    require_metrics_of_the_task,
    require_networks_can_train,
    rows_said_to_answer,
    with_class_defaults,
)
from orchestrator.config.compare import CompareConfig
from orchestrator.config.data import DataConfig
from orchestrator.config.export import ExportConfig
from orchestrator.config.neighbours import require_neighbours_teach
from orchestrator.config.own_text import require_own_text
from orchestrator.config.sides import StudentConfig, TeacherConfig, TokenizerConfig
from orchestrator.config.task import ClassificationTask, LanguageModelTask, TaskConfig
from orchestrator.config.tune import TuneConfig, require_answered


class RunConfig(Section):
    """Everything one run depends on."""

    name: Annotated[
        str, NotSearchable("it names the search itself")
    ] = Field(min_length=1, max_length=80, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""

    output: Annotated[str, NotSearchable("it says where the search is kept")] = "runs"
    """Folder of runs: a path, on a cluster one that all nodes see; or an address in object storage (``s3://bucket/folder``, ``gs://``,
    ``abfs://``), of which each node keeps a copy."""

    seed: Annotated[
        int, Searchable("where both models are pretrained and none is fine-tuned or writes responses; elsewhere it makes others")
    ] = Field(default=0, ge=0, le=LARGEST_SEED)
    """Draws initial weights, dropout, the order of later epochs, and responses that a model writes."""

    task: Annotated[TaskConfig, NotSearchable("it says what is learned")] = LanguageModelTask(kind="language_model")
    """What is learned: the next tokens of a text, or the label of a row."""

    tokenizer: Annotated[
        TokenizerConfig | None, NotSearchable("it changes the tokens, and a search shares one score store")
    ] = None
    """Train a tokenizer; needed when, and only when, the teacher is made from scratch."""

    data: Annotated[
        DataConfig, NotSearchable("it changes the rows, and a search shares one score store")
    ] = DataConfig()
    teacher: Annotated[TeacherConfig, NotSearchable("it changes the scores, and a search shares one score store")]
    responses: Annotated[
        ResponsesConfig | None, NotSearchable("it changes the rows, and a search shares one score store")
    ] = None
    """Have the responses to the data's prompts written by a model; null for the data's own."""
    rollouts: RolloutsConfig | None = None
    """Have the student write responses while it learns; null for none."""
    scores: Annotated[
        ScoresConfig, NotSearchable("it says how the scores are kept, and a search shares one store; scores.top_k alone can vary")
    ] = ScoresConfig()
    student: Annotated[
        StudentConfig, NotSearchable("it is fine-tuned once for all trials; student.lora can vary, and of some student.model")
    ]
    loss: Annotated[LossConfig, Searchable()] = AtkdLoss(kind="atkd")
    train: Annotated[TrainConfig, Searchable()] = TrainConfig()
    checkpoints: Annotated[str | None, NotSearchable("trials keep none")] = None
    """Folder below which trainings keep their checkpoints: a path, or an address in object storage (``s3://bucket/folder``, ``gs://``,
    ``abfs://``); null for the run's own folder."""

    workers: Annotated[WorkersConfig, MayChange(), NotSearchable("it says where a student learns, not what")] = WorkersConfig()
    evaluate: Annotated[EvaluateConfig, NotSearchable("trials are compared by what it measures")] = EvaluateConfig()
    export: Annotated[ExportConfig, NotSearchable("trials export nothing")] = ExportConfig()
    tracking: Annotated[
        TrackingConfig, MayChange(), NotSearchable("it says where steps are shown, not what is learnt")
    ] = TrackingConfig()
    tune: Annotated[TuneConfig, MayChange(), NotSearchable("it is the search itself")] = TuneConfig()
    compare: Annotated[CompareConfig, MayChange(), NotSearchable("it says what is compared")] = CompareConfig()

    @field_validator("output")
    @classmethod
    def _path_or_address(cls, output: str) -> str:
        return resolved(output) if in_object_storage(output) else output

    @field_validator("checkpoints")
    @classmethod
    def _a_place(cls, checkpoints: str | None) -> str | None:
        return None if checkpoints is None else resolved(checkpoints)

    @model_validator(mode="before")
    @classmethod
    def _what_follows_from_labels(cls, values: Any) -> Any:
        return with_class_defaults(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _task_and_sections_agree(self) -> "RunConfig":
        if isinstance(self.task, ClassificationTask):
            unfit = self._set_for_language_models()
            require_classification(self.task, self.data, self.teacher, self.student, self.tokenizer, unfit)
            require_networks_can_train(self.train, self.teacher, self.student)
        else:
            require_language_models(self.data, self.teacher, self.student)
            self._language_models_agree()
            if self.export.onnx:
                raise ValueError(
                    "export.onnx writes classifiers as ONNX, and the task is language_model, whose folder vLLM and transformers "
                    "serve; export.onnx=false would do"
                )
        require_metrics_of_the_task(self.task, {"tune": self.tune.metric, "compare": self.compare.metric})
        require_answered("tune", self.tune.metric, self.tune.answers, self.evaluate, self.train)
        require_answered("compare", self.compare.metric, self.compare.answers, self.evaluate, self.train)
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

    def _set_for_language_models(self) -> dict[str, str]:
        """Return the keys of language models alone that say something, and what they are to say of classifiers."""
        said: dict[str, tuple[Any, Any]] = {
            "responses": (self.responses, None), "rollouts": (self.rollouts, None), "student.lora": (self.student.lora, None),
            "evaluate.judge": (self.evaluate.judge, None), "evaluate.benchmarks": (self.evaluate.benchmarks, None),
            "evaluate.teacher": (self.evaluate.teacher, "model"), "evaluate.answer_pattern": (self.evaluate.answer_pattern, None),
            "evaluate.max_new_tokens": (self.evaluate.max_new_tokens, EvaluateConfig().max_new_tokens),
            "evaluate.generate_rows": (rows_said_to_answer(self.evaluate), 0),
            "scores.top_mass": (self.scores.top_mass, None),
            "data.without_answer": (self.data.without_answer, "refuse"), "data.processes": (self.data.processes, 1),
            "data.cluster_tasks": (self.data.cluster_tasks, None), "train.packing": (self.train.packing, False),
            "tune.answers": (self.tune.answers, False), "compare.answers": (self.compare.answers, False),
        }  # fmt: skip
        for role, side in (("teacher", self.teacher), ("student", self.student)):
            if side.finetune is not None:
                said[f"{role}.finetune.train.packing"] = (side.finetune.train.packing, False)
        if self.data.special_tokens in ("strip", "refuse"):
            said["data.special_tokens"] = (self.data.special_tokens, "split")
        words = {"None": "null", "False": "false"}
        return {key: words.get(str(neutral), neutral) for key, (value, neutral) in said.items() if value != neutral}

    def _language_models_agree(self) -> None:
        kinds = (self.teacher.model.kind, self.student.model.kind)
        if self.teacher.model.kind == "scratch" and self.teacher.finetune is None:
            raise ValueError(
                "teacher.model is scratch but teacher.finetune is null: a teacher with random weights has nothing to teach; "
                "add teacher.finetune"
            )
        if self.responses is not None and self.compare.teachers:
            raise ValueError(
                "compare.teachers compares teachers on the same rows, but responses has them written: responses=null would do"
            )
        if "pretrained" not in kinds and self.tokenizer is None:
            made = "both models are scratch" if kinds[1] == "scratch" else "the teacher is scratch, the student cut from it,"
            raise ValueError(f"{made} and tokenizer is null: add a tokenizer section, such as {{vocab_size: 2048}}")
        self._can_be_cut()
        if self.teacher.similar_tokens is not None:
            similar, engine = self.teacher.similar_tokens, self.teacher.engine
            require_neighbours_teach(similar, engine, self.loss, self.rollouts, self.evaluate)
        served = [(self.teacher.engine, *self._shaped_by("teacher"))]
        if self.responses is not None and self.writer_engine is not None:
            served.append((self.writer_engine, *self._shaped_by(self.responses.writer)))
        if self.rollouts is not None:
            self._rollouts_agree(self.rollouts)
            served.append((self.sampler_engine, *self._shaped_by("student")))
        if self.teacher_sampler_engine is not None:
            served.append((self.teacher_sampler_engine, *self._shaped_by("teacher")))
        if self.evaluate.benchmark_engine is not None:
            served += [(self.evaluate.benchmark_engine, *self._shaped_by(role)) for role in ("teacher", "student")]
        for engine, section, shape in served:
            if shape.kind == "scratch" and engine.kind == "vllm" and not engine.gpu:
                require_cpu_head_size(shape.hidden_size, shape.heads, section)
        require_own_text(self.loss, self.rollouts)
        if "pretrained" in kinds and self.tokenizer is not None:
            raise ValueError(
                "tokenizer is trained only where both models are made from scratch; a pretrained model brings its own: "
                "set tokenizer to null"
            )

    def _can_be_cut(self) -> None:
        """Raise if the student cannot be cut from the teacher, as far as that is known without the teacher's files."""
        student, teacher = self.student.model, self.teacher.model
        if not isinstance(student, CutModel):
            return
        if isinstance(teacher, ScratchModel):
            student.require_fewer_than(teacher.layers)
        if self.compare.teachers:
            raise ValueError(
                "compare.teachers teaches one student by several teachers, and student.model.kind is cut: each would teach "
                "another student; student.model.kind=pretrained or scratch would do"
            )

    def _shaped_by(self, role: Literal["teacher", "student"]) -> tuple[str, PretrainedModel | ScratchModel]:
        """Return the model that gives a role's model its width and heads, after the section that speaks of it."""
        student, teacher = self.student.model, self.teacher.model
        if role == "student" and isinstance(student, PretrainedModel | ScratchModel):
            return "student.model", student
        assert isinstance(teacher, PretrainedModel | ScratchModel), "language models"
        return "teacher.model", teacher

    def _rollouts_agree(self, rollouts: RolloutsConfig) -> None:
        if not needs_teacher(self.loss):
            raise ValueError(
                f"loss.kind {self.loss.kind} learns from the rows as they are, and with rollouts the student would learn its own "
                "tokens; loss.kind=atkd would do, or rollouts=null"
            )
        if needs_complete_store(self.loss):
            raise ValueError(
                "loss.scope dataset ranks tokens over all rows before the training, but with rollouts rows are written on the "
                "way; loss.scope=batch would do"
            )
        if rollouts.keep_steps is not None:
            repeated = self.train.keep_checkpoints * self.train.checkpoint_every_steps
            if rollouts.inner_epochs > 1:  # the rows of whole windows are read again
                repeated = math.ceil(repeated / (rollouts.refresh_steps * rollouts.inner_epochs)) * rollouts.refresh_steps
            least = repeated + (rollouts.lag + 1) * rollouts.refresh_steps
            if rollouts.keep_steps < least:
                raise ValueError(
                    f"rollouts.keep_steps is {rollouts.keep_steps}, but a training that resumes from the oldest of "
                    f"train.keep_checkpoints {self.train.keep_checkpoints} checkpoints reads up to {least} steps again; "
                    f"rollouts.keep_steps={least} would do"
                )

    @property
    def classes(self) -> int:
        """How many labels there are; 0 for language models."""
        return len(self.task.labels) if isinstance(self.task, ClassificationTask) else 0

    @property
    def ordered(self) -> bool:
        """Whether there are labels, and they are grades."""
        return isinstance(self.task, ClassificationTask) and self.task.ordered

    @property
    def loads_teacher_to_measure(self) -> bool:
        """Whether the evaluation loads the teacher; otherwise it is measured by its scores."""
        if self.classes:
            return self.teacher.label_words is None
        return self.evaluate.teacher == "model"

    @property
    def sampler_engine(self) -> EngineConfig:
        """How the student is served where it writes rows of its own training."""
        assert self.rollouts is not None
        return self.rollouts.engine or self.teacher.engine.model_copy(update={"replicas": 1})

    @property
    def teacher_sampler_engine(self) -> EngineConfig | None:
        """How the teacher is served where it draws tokens of what the student writes; None where it draws none."""
        if self.rollouts is None or self.rollouts.teacher_share == 0:
            return None
        return self.rollouts.teacher_engine or self.teacher.engine.model_copy(update={"replicas": 1})

    @property
    def learns_from_data(self) -> bool:
        """Whether rows are learned from as the data has them, or the student answers all prompts."""
        return self.rollouts is None or self.rollouts.learns_from_data

    @property
    def writer_engine(self) -> EngineConfig | None:
        """How the writer of the responses is served; None where the data's own are learned from."""
        return (self.responses.engine or self.teacher.engine) if self.responses is not None else None

    @property
    def engines(self) -> dict[str, EngineConfig]:
        """All engines of a run, by the sections that speak of them."""
        writers = {"responses.engine": self.responses, "rollouts.engine": self.rollouts}
        own = {name: part.engine for name, part in writers.items() if part is not None and part.engine is not None}
        if self.rollouts is not None and self.rollouts.teacher_engine is not None:
            own["rollouts.teacher_engine"] = self.rollouts.teacher_engine
        return {"teacher.engine": self.teacher.engine, **own}

    @property
    def longest_text(self) -> int:
        """Most tokens that a model may meet in one text, prompt and answer together; one is left for what vLLM generates."""
        written = [part.max_new_tokens + 1 for part in (self.responses, self.rollouts) if part is not None]
        return self.data.max_tokens + max(self.evaluate.max_new_tokens, *written, 0)

    @property
    def place(self) -> str:
        """Absolute path of the run's folder, or its address."""
        return within(resolved(self.output), self.name)

    @property
    def run_dir(self) -> Path:
        """Absolute path of the run's folder, or of this node's copy of it."""
        return folder_on_nodes(self.place) if in_object_storage(self.output) else Path(self.place)

    @property
    def mirror(self) -> Mirror | None:
        """How the nodes' copies of the run's folder are kept alike; None where they all see the one."""
        return Mirror(str(self.run_dir), self.place) if in_object_storage(self.output) else None

    @property
    def score_root(self) -> str:
        """Absolute path, or address, of the folder under which score stores are kept by their identity."""
        return resolved(self.scores.root or within(self.output, "scores"))
