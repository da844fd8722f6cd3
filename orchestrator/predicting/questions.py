"""From new rows to what a run's models read: as in training, but without label or answer. Each row is looked at before any
device is taken. T tokens of a row.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.model_source import ModelSource
from orchestrator.classification.labelled_rows import LabelledRow, content_of
from orchestrator.classification.rows import features_of
from orchestrator.config.data import DataConfig
from orchestrator.config.formats import FormatConfig
from orchestrator.config.run import RunConfig
from orchestrator.data.mixture import NumberedRow
from orchestrator.data.templates import render_prompts
from orchestrator.data.tokenization import tokenize_prompts
from orchestrator.models.classifiers import window_of_classifier
from orchestrator.models.model_checks import window_of
from orchestrator.models.models import Models, Role, config_of
from orchestrator.run.run_dir import result_path


@dataclass(frozen=True, slots=True)
class Question:
    """A row as a model reads it."""

    row: int
    """Its index in the file."""
    token_ids: np.ndarray
    """int32 [T], its tokens; of an image the bits of its values."""
    prompt: str = ""
    """What a language model is asked, as text."""


def format_of_rows(data: DataConfig, source: str | None) -> FormatConfig:
    """Return how new rows are read: by the one format that a run has, or by that of a source that is named.

    Raises:
        ValueError: if there are several, or the source is none of the run's.
    """
    formats = data.formats
    if source is not None:
        if source not in formats:
            raise ValueError(f"--format-of {source} is no source of the run; {', '.join(formats)} would do")
        return formats[source]
    first = next(iter(formats.values()))
    if any(format != first for format in formats.values()):
        kinds = ", ".join(f"{key} {format.kind}" for key, format in formats.items())
        raise ValueError(
            f"the run reads rows in several formats ({kinds}), and which of them these rows have is not known; "
            f"--format-of {next(iter(formats))} would do"
        )
    return first


def class_questions(
    rows: Sequence[NumberedRow], config: RunConfig, format: FormatConfig, models: Models, role: Role, folder: Path
) -> list[Question]:
    """Return rows as a run's classifier reads them.

    Args:
        rows: of the file; labels are not looked at.
        config: of the run.
        format: how a row is read.
        models: of the run.
        role: who reads them.
        folder: of the run.

    Raises:
        ValueError: naming the row, if it holds nothing to classify, or what the model cannot read.
    """
    shape = tuple(json.loads(result_path(folder, "prepare").read_text())["counts"]["image_shape"])
    tokenizer = None if shape else tokenizer_of(models, role)
    window = window_of_classifier(config_of(source_of(models, role)))
    shortened = config.data.max_tokens - 1 if config.data.too_long == "truncate" else None
    questions = []
    for row in rows:
        try:
            read = LabelledRow(row.number, *content_of(row.fields, format), label=0, group=None, place=row.place)
            if read.image is not None and read.image.shape != shape:
                raise ValueError(
                    f"its image has the shape {list(read.image.shape)}, and the model learned from those of "
                    f"{list(shape)}; an image of that size would do"
                )
        except ValueError as error:
            raise ValueError(f"{row.place}: {error}") from error
        ids = features_of(read, tokenizer, config.data.special_tokens == "keep")
        if shortened is not None and tokenizer is not None and len(ids) > shortened:
            ids = features_of(read, tokenizer, config.data.special_tokens == "keep", shortened)
        if window is not None and len(ids) > window:
            raise ValueError(
                f"{row.place}: its text has {len(ids)} tokens, and the {role} reads {window}; a text of {window} tokens would do"
            )
        questions.append(Question(row.number, ids))
    return questions


def text_questions(
    rows: Sequence[NumberedRow], data: DataConfig, format: FormatConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Question]:
    """Return rows as prompts of a language model.

    Raises:
        ValueError: naming the row, if it lacks what the prompt is made of, or nothing is asked.
    """
    rendered = render_prompts(rows, format, data, tokenizer)
    questions = []
    for row, asked, token_ids in zip(rows, rendered, tokenize_prompts(rendered, tokenizer), strict=True):
        if not len(token_ids):
            raise ValueError(
                f"{row.place}: its prompt {asked.prompt!r} has no token by the tokenizer: there is nothing to answer"
            )
        questions.append(Question(row.number, token_ids, asked.prompt))
    return questions


def require_room_to_answer(
    questions: Sequence[Question], source: ModelSource, role: Role, max_new_tokens: int, key: str, by_vllm: bool
) -> None:
    """Raise if a prompt with the longest answer does not fit a model's window; ``key`` says how long an answer may be.

    Raises:
        ValueError: naming the row, and what would do.
    """
    window = window_of(config_of(source), by_vllm)
    if window is None:
        return
    for question in questions:
        length = len(question.token_ids)
        if length >= window:
            raise ValueError(
                f"row {question.row}: its prompt has {length} tokens, and the {role} knows {window} positions, which leaves none "
                f"for an answer; a prompt of {max(1, window - max_new_tokens)} tokens would do"
            )
        if length + max_new_tokens > window:
            raise ValueError(
                f"row {question.row}: its prompt has {length} tokens, {key} is {max_new_tokens}, and the {role} knows {window} "
                f"positions; --max-new-tokens {window - length} would do"
            )


def source_of(models: Models, role: Role) -> ModelSource:
    """Return the model that answers: the exported student, or the teacher that taught it."""
    return models.distilled() if role == "student" else models.ready("teacher")


def tokenizer_of(models: Models, role: Role) -> PreTrainedTokenizerBase:
    """Return by which tokenizer a role's classifier reads texts; a pretrained teacher has its own."""
    if role == "teacher" and models.side("teacher").model.kind == "pretrained":
        return models.own_tokenizer("teacher")
    return models.tokenizer()
