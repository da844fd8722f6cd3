"""What a run of classification, and one of language models, may say: sections that go together. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from actors.config.model_kinds import CutModel, ScratchModel
from actors.config.models import EvaluateConfig, TrainConfig
from actors.config.networks import IMAGE_NETWORKS, TEXT_NETWORKS, SoftLabels
from orchestrator.config.data import DataConfig
from orchestrator.config.formats import OF_CLASSES, ImageFormat
from orchestrator.config.sides import LabelWords, StudentConfig, TeacherConfig, TokenizerConfig
from orchestrator.config.task import ClassificationTask, TaskConfig
from orchestrator.config.tune import OF_LABELS

NETWORKS = (*TEXT_NETWORKS, *IMAGE_NETWORKS)
WITHOUT_BLOCKS = ("text_mlp", "text_rnn")
DISTILLS = ("coupled", "decoupled", "target_only", "diversity_only", "atkd")


def with_class_defaults(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a run's settings with what follows from its labels, where nothing else is said: K, and the engine.

    Raises:
        ValueError: if they say another K.
    """
    task = values.get("task")
    labels = task.get("labels") if isinstance(task, Mapping) and task.get("kind") == "classification" else None
    if not isinstance(labels, list | tuple) or len(labels) < 2:
        return values
    scores, teacher = values.get("scores") or {}, values.get("teacher") or {}
    others = len(labels) - 1
    if isinstance(scores, Mapping):
        if scores.get("top_k", others) != others:
            raise ValueError(
                f"scores.top_k is {scores['top_k']}, but of {len(labels)} labels all {others} besides a row's own are kept; "
                f"scores.top_k={others} would do, or leaving it out"
            )
        values = {**values, "scores": {**scores, "top_k": others}}
    if isinstance(teacher, Mapping) and isinstance(engine := teacher.get("engine") or {}, Mapping):
        served = {"kind": "transformers", "dtype": "float32", **engine}
        values = {**values, "teacher": {**teacher, "engine": served}}
    loss = values.get("loss")
    if isinstance(loss, Mapping) and loss.get("kind") in DISTILLS:  # all labels are named: there is no tail
        values = {**values, "loss": {"tail": "renormalize", **loss}}
    evaluate = values.get("evaluate")
    if isinstance(evaluate, Mapping) and evaluate.get("generate_rows", 0) is None:  # none is answered, as without the key
        values = {**values, "evaluate": {key: value for key, value in evaluate.items() if key != "generate_rows"}}
    return values


def rows_said_to_answer(evaluate: EvaluateConfig) -> int:
    """Return how many rows a user wants to be answered; 0 where the number is a default.

    A section that names all of its keys was written by a run, defaults included, so that the default there is nobody's wish.
    """
    fields, said = type(evaluate).model_fields, evaluate.model_fields_set
    written = said >= set(fields) and evaluate.generate_rows == fields["generate_rows"].default
    return evaluate.generate_rows if "generate_rows" in said and not written else 0


def require_language_models(data: DataConfig, teacher: TeacherConfig, student: StudentConfig) -> None:
    """Raise if a run of language models has a model or a format that classifies."""
    for role, kind in (("teacher", teacher.model.kind), ("student", student.model.kind)):
        if kind in (*NETWORKS, "soft_labels"):
            raise ValueError(
                f"{role}.model.kind {kind} tells labels apart, and the task is language_model: task={{kind: classification, "
                "labels: [...]} would do, or a kind such as pretrained"
            )
    if teacher.label_words is not None:
        raise ValueError(
            "teacher.label_words says how a language model tells labels apart, and the task is language_model: "
            "teacher.label_words=null would do, or task={kind: classification, labels: [...]}"
        )
    if teacher.calibrate:
        raise ValueError("teacher.calibrate is for classifiers, and the task is language_model; teacher.calibrate=false would do")
    for key, format in data.formats.items():
        if isinstance(format, OF_CLASSES):
            raise ValueError(
                f"the format of {key} is {format.kind}, of rows that are classified, and the task is language_model: "
                "task={kind: classification, labels: [...]} would do, or a format such as instruction"
            )


def require_metrics_of_the_task(task: TaskConfig, metrics: Mapping[str, str]) -> None:
    """Raise if trials are to be compared by what they are not measured by. ``metrics``: by section."""
    ordered = isinstance(task, ClassificationTask) and task.ordered
    for section, metric in metrics.items():
        if metric in OF_LABELS and not isinstance(task, ClassificationTask):
            raise ValueError(
                f"{section}.metric {metric} is measured of classifiers, and the task is language_model; {section}.metric="
                "top1_agreement would do"
            )
        if metric == "weighted_kappa" and not ordered:
            raise ValueError(
                f"{section}.metric weighted_kappa is measured of grades, and task.ordered is false; {section}.metric=accuracy "
                "would do, or task.ordered=true"
            )


def require_classification(
    task: ClassificationTask, data: DataConfig, teacher: TeacherConfig, student: StudentConfig, tokenizer: TokenizerConfig | None,
    set_but_not_for_classifiers: Mapping[str, str],
) -> None:  # fmt: skip
    """Raise if the sections of a run of classification do not go together.

    Args:
        task: the labels.
        data: where rows come from, and how they are read.
        teacher: the large model.
        student: the small one.
        tokenizer: trained on the rows, or null.
        set_but_not_for_classifiers: keys of language models alone that say something, and what they are to say.

    Raises:
        ValueError: naming the key, the value and one that would do.
    """
    for key, neutral in set_but_not_for_classifiers.items():
        raise ValueError(f"{key} is for language models, and the task is classification; {key}={neutral} would do")
    if teacher.label_words is not None:
        _require_words(teacher, teacher.label_words, task)
    elif teacher.engine.kind != "transformers":
        raise ValueError(
            f"teacher.engine.kind {teacher.engine.kind} serves language models, and the teacher is a classifier; "
            "teacher.engine.kind=transformers would do, or teacher.label_words for a causal language model"
        )
    _require_one_kind_of_rows(data)
    _require_models(data, teacher, student)
    reads_text = not is_of_images(data)
    if reads_text and student.model.kind != "pretrained" and tokenizer is None:
        raise ValueError(
            f"student.model {student.model.kind} has no tokenizer of its own, and tokenizer is null: tokenizer={{vocab_size: "
            "1000} would do"
        )
    if tokenizer is not None and (not reads_text or student.model.kind == "pretrained"):
        raise ValueError(
            "tokenizer is trained for a student made from scratch that reads text, and this one "
            + ("brings its own" if reads_text else "sees images") + "; tokenizer=null would do"
        )  # fmt: skip


def require_networks_can_train(train: TrainConfig, teacher: TeacherConfig, student: StudentConfig) -> None:
    """Raise if a small network is to be trained in a way that it has no blocks for.

    Raises:
        ValueError: naming the key, the value and one that would do.
    """
    trained: list[tuple[str, TrainConfig, TeacherConfig | StudentConfig]] = [("train", train, student)]
    trained += [
        (f"{role}.finetune.train", side.finetune.train, side)
        for role, side in (("teacher", teacher), ("student", student)) if side.finetune is not None
    ]  # fmt: skip
    for section, settings, side in trained:
        kind = side.model.kind
        if kind in NETWORKS and settings.gradient_checkpointing:
            raise ValueError(
                f"{section}.gradient_checkpointing true computes blocks of a large model twice, and {kind} has none such; "
                f"{section}.gradient_checkpointing=false would do"
            )
        if kind in WITHOUT_BLOCKS and settings.sharding == "fsdp":
            raise ValueError(
                f"{section}.sharding fsdp shards a model block by block, and {kind} has no blocks; {section}.sharding=replicate "
                "would do"
            )
        if kind in WITHOUT_BLOCKS and settings.compile:
            raise ValueError(
                f"{section}.compile true compiles a model block by block, and {kind} has no blocks; {section}.compile=false "
                "would do"
            )


def _require_words(teacher: TeacherConfig, label_words: LabelWords, task: ClassificationTask) -> None:
    """Raise if a teacher cannot answer with label words, or if the words are not one a label."""
    if teacher.model.kind != "pretrained":
        raise ValueError(
            f"teacher.label_words are the answers of a causal language model, and teacher.model.kind is {teacher.model.kind}; "
            "teacher.label_words=null would do, or teacher.model.kind=pretrained"
        )
    if teacher.finetune is not None:
        raise ValueError(
            "teacher.finetune trains a classifier, and a teacher with teacher.label_words is taken as it is: "
            "teacher.finetune=null would do"
        )
    words = label_words.texts(task.labels)
    if len(words) != len(task.labels):
        raise ValueError(
            f"teacher.label_words.words has {len(words)}, and task.labels has {len(task.labels)} "
            f"({', '.join(map(str, task.labels))}); one word a label would do, such as {[f' {label}' for label in task.labels]}"
        )
    for label, word in zip(task.labels, words, strict=True):
        if not word:
            raise ValueError(f"teacher.label_words.words has an empty word for the label {label!r}; {f' {label}'!r} would do")


def is_of_images(data: DataConfig) -> bool:
    """Whether the rows of a run of classification are images rather than texts."""
    return any(isinstance(format, ImageFormat) for format in data.formats.values())


def _require_one_kind_of_rows(data: DataConfig) -> None:
    kinds = {format.kind for format in data.formats.values()}
    if not kinds <= {"text", "image"}:
        key, format = next((key, format) for key, format in data.formats.items() if format.kind not in ("text", "image"))
        raise ValueError(
            f"the format of {key} is {format.kind}, of language models, and the task is classification: data.format={{kind: "
            'text, text: "{{ text }}"} would do, or {kind: image}'
        )
    if len(kinds) > 1:
        raise ValueError("data has texts and images, and a classifier reads one of them; data.format.kind=text in all would do")


def _require_models(data: DataConfig, teacher: TeacherConfig, student: StudentConfig) -> None:
    wrong = TEXT_NETWORKS if is_of_images(data) else IMAGE_NETWORKS
    right = "image_cnn" if is_of_images(data) else "text_cnn"
    rows = "images" if is_of_images(data) else "texts"
    for role, side in (("teacher", teacher), ("student", student)):
        model = side.model
        if isinstance(model, ScratchModel | CutModel):
            raise ValueError(
                f"{role}.model.kind {model.kind} is a language model, and the task is classification; {right} would do, or "
                "pretrained"
            )
        if model.kind in wrong:
            raise ValueError(f"{role}.model.kind {model.kind} does not read {rows}; {role}.model.kind={right} would do")
        if model.kind == "pretrained" and is_of_images(data):
            raise ValueError(
                f"{role}.model.kind pretrained reads texts, and the rows are images; {role}.model.kind={right} would do"
            )
    if teacher.model.kind in NETWORKS and teacher.finetune is None:
        raise ValueError(
            f"teacher.model is {teacher.model.kind} with random weights, and teacher.finetune is null: it has nothing to teach; "
            "add teacher.finetune"
        )
    if isinstance(teacher.model, SoftLabels) and teacher.finetune is not None:
        raise ValueError("teacher.model soft_labels is a table, which is not fine-tuned; teacher.finetune=null would do")
    if teacher.similar_tokens is not None:
        raise ValueError(
            "teacher.similar_tokens is for language models, and the task is classification; teacher.similar_tokens=null would "
            "do, or teacher.model={kind: soft_labels, similarity: uniform}"
        )
    if isinstance(teacher.model, SoftLabels) and teacher.calibrate:
        raise ValueError(
            "teacher.model soft_labels is a table that knows each row's label, so that it is always right; "
            "teacher.calibrate=false would do"
        )
