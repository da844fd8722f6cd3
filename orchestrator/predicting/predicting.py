"""The command predict: a finished run's student, or its teacher, answers the rows of a file, batch by batch, into another."""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from actors.config.networks import SoftLabels
from actors.format import duration, plural
from actors.rollouts.base import Sampling
from orchestrator.cluster.logs import ProgressSnapshot
from orchestrator.cluster.progress import logged_progress
from orchestrator.cluster.ray_session import ray_for
from orchestrator.config.load import load_config
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.data.mixture import NumberedRow, numbered
from orchestrator.data.sources import READERS, kind_of_file, rows_of_file
from orchestrator.models.classifiers import label_names
from orchestrator.models.models import Models, Role
from orchestrator.predicting.answer_file import AnswerFile
from orchestrator.predicting.answering import Answering, choose_engine, class_answers, devices_needed, text_answers
from orchestrator.predicting.options import PredictOptions
from orchestrator.predicting.questions import (
    Question,
    class_questions,
    format_of_rows,
    require_room_to_answer,
    source_of,
    text_questions,
)
from orchestrator.run.run_dir import other_configuration, result_path
from orchestrator.run.score_identity import model_identity
from orchestrator.run.scoring import temperature_of

logger = logging.getLogger("atkd")

PROGRESS_SECONDS = 5.0
SUFFIX = ".predicted.jsonl"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be done, once all that can be wrong with it was looked at."""

    questions: Sequence[Question]
    """One a row."""
    settings: Mapping[str, Any]
    """What the answers depend on besides model and questions, in plain fields."""
    batch_rows: int
    """Rows that are answered at one time."""
    answering: AbstractContextManager[Answering]
    """Starts the model where Ray is."""


def predict(config: RunConfig, folder: Path, options: PredictOptions) -> Path:
    """Have the rows of a file answered; return the file of the answers, a JSON line a row.

    Args:
        config: of the run.
        folder: of the run.
        options: which rows, by which model, how, and where to.

    Raises:
        ValueError: naming the option, the row or the key, before any device is taken.
        WritingFailed: if a language model failed; what was answered is kept, and the same command goes on.
    """
    options.require_sound()
    role, rows_path, target = options.model, Path(options.rows), target_of(options)
    require_answerer(config, folder, role)
    models, rows = Models(config, folder), read_new_rows(rows_path)
    if target.absolute() == rows_path.absolute():
        raise ValueError(f"--output {target} is the file of the rows itself; another file would do")
    asking = asked_of_classifier if config.classes else asked_of_language_model
    asked = asking(config, folder, models, rows, options)
    identity = {"model": model_identity(source_of(models, role)), "rows": hash_of(asked.questions), **asked.settings}
    with AnswerFile(target, identity, options.overwrite) as file:
        if file.lines:
            logger.info(f"predict: going on with {file.path}, which has {file.lines} of {plural(len(rows), 'row')}")
        if file.lines < len(rows):
            with ray_for(devices_needed(config, folder)), asked.answering as answer:
                answer_rows(asked, answer, file, role)
    return target


def answer_rows(asked: Asked, answer: Answering, file: AnswerFile, role: Role) -> None:
    """Write the answers that a file lacks."""
    found, total, started = file.lines, len(asked.questions), time.monotonic()

    def look() -> ProgressSnapshot | None:
        done = file.lines
        if done == found:
            return None
        pace = (done - found) / (time.monotonic() - started)
        return ProgressSnapshot(done, f"predict: {done:,} of {total:,} rows, {pace:,.1f} rows/s", done, total)

    with logged_progress("predict", look, PROGRESS_SECONDS):
        for first in range(found, total, asked.batch_rows):
            batch = asked.questions[first : first + asked.batch_rows]
            file.write([json.dumps(one, ensure_ascii=False) for one in answer(batch)])
    seconds = time.monotonic() - started
    new = total - found
    logger.info(f"predict: {plural(new, 'row')} answered by the {role} in {duration(seconds)}, {new / seconds:,.1f} rows/s")


def asked_of_classifier(
    config: RunConfig, folder: Path, models: Models, rows: Sequence[NumberedRow], options: PredictOptions
) -> Asked:
    """Return what a run's classifier is asked.

    Raises:
        ValueError: naming the option or the row.
    """
    assert isinstance(config.task, ClassificationTask)
    options.require_for_classes()
    role, format = options.model, format_of_rows(config.data, options.format_of)
    with naming(options.rows):
        questions = class_questions(rows, config, format, models, role, folder)
    labels, temperature = list(label_names(config.task).values()), temperature_of(config, folder) if role == "teacher" else 1.0
    settings = {"labels": labels, "dtype": config.evaluate.precision, "temperature": temperature}
    answering = class_answers(config, models, role, labels, temperature)
    return Asked(questions, settings, options.batch_rows or config.evaluate.batch_rows, answering)


def asked_of_language_model(
    config: RunConfig, folder: Path, models: Models, rows: Sequence[NumberedRow], options: PredictOptions
) -> Asked:
    """Return what a run's language model is asked.

    Raises:
        ValueError: naming the option or the row.
    """
    role, format = options.model, format_of_rows(config.data, options.format_of)
    engine = choose_engine(config, models, role, options)
    most = options.max_new_tokens or config.evaluate.max_new_tokens
    key = "evaluate.max_new_tokens" if options.max_new_tokens is None else "--max-new-tokens"
    sampling = Sampling(
        most, options.temperature or 0.0, 1.0 if options.top_p is None else options.top_p,
        config.seed if options.seed is None else options.seed,
    )  # fmt: skip
    with naming(options.rows):
        questions = text_questions(rows, config.data, format, models.tokenizer())
        require_room_to_answer(questions, source_of(models, role), role, most, key, engine.kind == "vllm")
    longest = max(len(question.token_ids) for question in questions)
    settings = {
        "engine": engine.kind, "dtype": engine.dtype, "max_new_tokens": most, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "seed": sampling.seed if sampling.temperature else None,
    }  # fmt: skip
    answering = text_answers(models, role, engine, sampling, longest, folder / "logs")
    return Asked(questions, settings, engine.rows_per_call, answering)


@contextmanager
def naming(rows: str) -> Iterator[None]:
    """Put the file of the rows before what the body raises of one of them."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{rows}: {error}") from error


def require_answerer(config: RunConfig, folder: Path, role: Role) -> None:
    """Raise if a run has no model of this role that answers rows.

    Raises:
        ValueError: with the command that makes it, or with the keys in which the run was made otherwise.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"there is no run in {folder}; the command run makes it, and ends in a student that answers")
    made = load_config(folder / "config.yaml").model_dump(mode="json")
    if lines := other_configuration(config.model_dump(mode="json"), made):
        raise ValueError(
            f"{folder} was made by another configuration, and its models answer as they were taught; leave this out:\n  "
            + "\n  ".join(lines)
        )
    if role == "teacher" and config.teacher.label_words is not None:
        raise ValueError("the teacher answers with label words, of which predict knows nothing; --model student would do")
    if role == "teacher" and isinstance(config.teacher.model, SoftLabels):
        raise ValueError("the teacher is a table that knows labels and no rows (soft_labels); --model student would do")
    stage, made_by = "export", "no exported student yet; the command export makes it"
    if role == "teacher":
        tuned = config.teacher.finetune is not None
        stage = "finetune_teacher" if tuned else "prepare"
        made_by = f"no teacher yet that answers; the command {'finetune' if tuned else 'prepare'} makes it"
    student = Models(config, folder).student_folder
    if not result_path(folder, stage).exists() or (role == "student" and not student.is_dir()):
        raise ValueError(f"the run in {folder} has {made_by}")


def read_new_rows(path: Path) -> Sequence[NumberedRow]:
    """Return the rows of a file, in its order.

    Raises:
        ValueError: naming the file and the line, if it is not there, holds none or cannot be read.
    """
    if not path.is_file():
        raise ValueError(f"ROWS {path}: there is no file {path.absolute()}; one that ends in {', '.join(READERS)} would do")
    return numbered(rows_of_file(path))


def target_of(options: PredictOptions) -> Path:
    """Return the file of the answers: the one that is named, or ROWS with another suffix."""
    if options.output is not None:
        return Path(options.output)
    rows = Path(options.rows)
    return rows.with_name(rows.name.removesuffix(kind_of_file(rows)) + SUFFIX)


def hash_of(questions: Sequence[Question]) -> str:
    """Name rows by what a model reads of them, in their order: 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for question in questions:
        digest.update(np.int64(len(question.token_ids)).tobytes() + question.token_ids.astype("<i4").tobytes())
        digest.update(question.prompt.encode() + b"\0")
    return digest.hexdigest()
