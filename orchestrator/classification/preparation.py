"""The first stage of a run of classification: rows with labels, tokenizers, and the models that are made for them."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from actors.config.networks import SoftLabels
from actors.format import plural
from orchestrator.classification.label_file import read_label_table
from orchestrator.classification.label_words import AskedRows, write_prompts
from orchestrator.classification.rows import ClassCounts, Tokenizers, prepare_classes
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
    read = read_rows(config, folder, models)
    merged = models.merge_adapter("teacher") if config.teacher.label_words is not None else None
    remarks = [*read.remarks, *([merged] if merged else [])]
    remarks += make_classifiers(models, config.task, read.tokenizers.by_role, read.counts.image_shape)
    for line in "\n".join(remarks).splitlines():  # rows that are shown have several
        logger.info(f"prepare: {line}")
    return {"counts": asdict(read.counts), "source_sha256": source_hashes(config.data), "answer_ends": [], "remarks": remarks}


@dataclass(frozen=True, slots=True)
class ReadRows:
    """What was written of the rows of a run, before there are models."""

    counts: ClassCounts
    """What became of them."""
    tokenizers: "RunTokenizers"
    """Who reads texts."""
    remarks: list[str]
    """The same in words."""


def read_rows(config: RunConfig, folder: Path, models: Models) -> ReadRows:
    """Turn the rows of a run into features and labels, and into prompts where a language model answers them; make no models.

    Raises:
        ValueError: naming the row or the key, if rows, labels, words or the table are none, or a model does not take the rows.
    """
    assert isinstance(config.task, ClassificationTask)
    if isinstance(soft_labels := config.teacher.model, SoftLabels) and soft_labels.table is not None:
        read_label_table(Path(soft_labels.table).expanduser(), [str(label) for label in config.task.labels])  # or refused
    tokenizers = RunTokenizers(models)
    counts = prepare_classes(config.data, config.task, tokenizers.of_texts, folder / "data")
    remarks = counts.lines(config.data)
    if config.teacher.label_words is not None:
        tokenizer = tokenizers.by_role["teacher"]
        assert tokenizer is not None, "a language model has one"
        asked = write_prompts(config, models, tokenizer, folder / "data")
        counts = replace(counts, teacher_longest=asked.longest)
        answers = words_in_words(config.teacher.label_words.texts(config.task.labels), asked)
        remarks.append(f"the teacher answers prompts of up to {asked.longest - 1} tokens with {answers}")
    require_windows(models, {"student": counts.longest - 1, "teacher": counts.teacher_longest - 1})
    return ReadRows(counts, tokenizers, remarks)


def words_in_words(texts: Sequence[str], asked: AskedRows) -> str:
    """Return the words of labels, and how many tokens each has."""
    return ", ".join(f"{word!r} ({plural(len(ids), 'token')})" for word, ids in zip(texts, asked.token_ids, strict=True))


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
