"""The first stage of a run of classification: rows with labels, tokenizers, and the models that are made for them."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.config.networks import SoftLabels
from actors.format import plural
from orchestrator.classification.label_file import read_label_table
from orchestrator.classification.label_words import AskedRows, write_prompts
from orchestrator.classification.rows import Tokenizers, prepare_classes
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.data.mixture import source_hashes
from orchestrator.data.tokenizers import train_tokenizer
from orchestrator.models.classifiers import make_classifiers, require_windows
from orchestrator.models.models import ROLES, Models, Role

logger = logging.getLogger("atkd")


def prepare_run(config: RunConfig, folder: Path, models: Models) -> dict[str, Any]:
    """Turn rows into features and labels, and make the models that are made for them; return what is known of them.

    Args:
        config: of the run.
        folder: of the run.
        models: of the run.
    """
    assert isinstance(config.task, ClassificationTask)
    for role in ROLES:
        models.named(role).require_safetensors()
    if isinstance(soft_labels := config.teacher.model, SoftLabels) and soft_labels.table is not None:
        read_label_table(Path(soft_labels.table).expanduser(), [str(label) for label in config.task.labels])  # or refused
    tokenizers = RunTokenizers(models)
    counts = prepare_classes(config.data, config.task, tokenizers.of_texts, folder / "data")
    remarks = counts.lines(config.data)
    if config.teacher.label_words is not None:
        asked, said = _ask(config, folder, models, tokenizers)
        counts, remarks = replace(counts, teacher_longest=asked.longest), remarks + said
    remarks += make_classifiers(models, config.task, tokenizers.by_role, counts.image_shape)
    require_windows(models, {"student": counts.longest - 1, "teacher": counts.teacher_longest - 1})
    for line in "\n".join(remarks).splitlines():  # rows that are shown have several
        logger.info(f"prepare: {line}")
    return {"counts": asdict(counts), "source_sha256": source_hashes(config.data), "answer_ends": [], "remarks": remarks}


def _ask(config: RunConfig, folder: Path, models: Models, tokenizers: "RunTokenizers") -> tuple[AskedRows, list[str]]:
    """Write the rows as a language model is asked for their labels; return what was written, and remarks."""
    settings, tokenizer = config.teacher.label_words, tokenizers.by_role["teacher"]
    assert settings is not None and isinstance(config.task, ClassificationTask) and tokenizer is not None
    merged = models.merge_adapter("teacher")
    asked = write_prompts(config, models, tokenizer, folder / "data")
    words = zip(settings.texts(config.task.labels), asked.token_ids, strict=True)
    answers = ", ".join(f"{word!r} ({plural(len(ids), 'token')})" for word, ids in words)
    remark = f"the teacher answers prompts of up to {asked.longest - 1} tokens with {answers}"
    return asked, [merged, remark] if merged else [remark]


class RunTokenizers:
    """The tokenizers of a run of classification: the student's, kept with it, and the teacher's own where it has one."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.by_role: dict[Role, PreTrainedTokenizerBase | None] = {"student": None, "teacher": None}

    def of_texts(self, texts: list[str]) -> Tokenizers:
        """Return the student's, and the teacher's where it is another; the student's may be trained on the texts."""
        models, settings = self._models, self._models.config.tokenizer
        student = train_tokenizer(texts, settings.vocab_size) if settings is not None else _own(models, "student")
        student.save_pretrained(models.tokenizer_folder)
        teacher = _own(models, "teacher") if models.config.teacher.model.kind == "pretrained" else None
        if teacher is not None:
            teacher.save_pretrained(models.tokenizer_folder.with_name("teacher_tokenizer"))
        self.by_role = {"student": student, "teacher": teacher or student}
        return student, teacher if models.classes_of("teacher") else None  # prompts are written apart


def _own(models: Models, role: Role) -> PreTrainedTokenizerBase:
    tokenizer = models.own_tokenizer(role)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
