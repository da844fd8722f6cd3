"""The rows of a run of classification before it starts: as the student reads them, and as its teacher does.

C classes. A label counts as one token behind its row, as it stands in the files.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from actors.examples import ExampleFile
from orchestrator.classification.label_words import read_asked
from orchestrator.classification.preparation import read_rows
from orchestrator.classification.rows import SPLITS, read_counts
from orchestrator.config.classes import is_of_images
from orchestrator.config.run import RunConfig
from orchestrator.models.classifiers import require_windows
from orchestrator.models.models import ROLES, Models
from orchestrator.planning.shapes import (
    PREPARED,
    READ_NOW,
    SAID,
    Workload,
    prepared_settings,
    require_rows_here,
    require_said,
    spread_evenly,
)
from orchestrator.run.stages import rows_of

SAID_WORDS = "teacher.label_words: each prompt counts as long as you said of the rows, and each word as one token"


@dataclass(frozen=True, slots=True)
class ClassRows:
    """The rows of a run of classification."""

    student: Workload
    """As the student reads them."""
    teacher: Workload
    """As the teacher reads them; of one that answers with label words, its prompts."""
    words: tuple[int, ...] = ()
    """Tokens of each label's word; empty where there are none."""
    image_shape: tuple[int, ...] = ()
    """Channels, height and width of images; empty for texts."""
    remarks: tuple[str, ...] = ()
    """What was assumed of them."""

    @property
    def asked(self) -> Workload:
        """What the teacher reads to score the training rows, one text after the other: with label words C of each row."""
        if not self.words:
            return self.teacher
        lengths = [self.teacher.lengths - 1 + word for word in self.words]
        return replace(
            self.teacher, lengths=np.concatenate(lengths), targets=np.repeat(self.words, self.teacher.rows),
            longest=self.teacher.longest - 1 + max(self.words),
        )  # fmt: skip

    @property
    def scored(self) -> Workload:
        """The same, those of a row together."""
        if not self.words:
            return self.teacher
        rows, count, of_words = self.teacher, len(self.words), sum(self.words)
        prompts = rows.heldout_tokens - rows.heldout_targets
        return replace(
            rows, lengths=count * (rows.lengths - 1) + of_words, targets=np.full(rows.rows, of_words),
            heldout_tokens=count * prompts + of_words * rows.heldout_targets,
        )  # fmt: skip


def read_class_rows(config: RunConfig) -> ClassRows:
    """Return the rows of a run: those its folder holds, or else the data itself, read now.

    Raises:
        ValueError: if the data is on the hub and nothing is known of it yet, or as the stage ``prepare`` does.
    """
    if _was_prepared(config):
        return _counted(config, config.run_dir, PREPARED)
    by_numbers = "" if is_of_images(config.data) else "say --rows and --row-tokens, or "
    require_rows_here(config, f"{by_numbers}run the command prepare first")
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        read_rows(config, Path(folder), Models(config, Path(folder)))
        return _counted(config, Path(folder), READ_NOW)


def said_class_rows(config: RunConfig, rows: int, row_tokens: float) -> ClassRows:
    """Return rows of which the user says how many there are, and how long they are on average.

    Raises:
        ValueError: if they are images, there are none, or they are longer than ``data.max_tokens``.
    """
    if is_of_images(config.data):
        raise ValueError(
            "--rows and --row-tokens are for texts, and the rows are images, whose size is read from them; leave both out, or "
            "run the command prepare first"
        )
    require_said(config, rows, row_tokens)
    models, heldout = Models(config, config.run_dir), config.data.planned_heldout_rows
    require_windows(models, dict.fromkeys(ROLES, int(np.ceil(row_tokens)) - 1))
    work = Workload(
        lengths=spread_evenly(rows, row_tokens), targets=np.ones(rows, np.int64), heldout_tokens=round(heldout * row_tokens),
        heldout_targets=heldout, longest=config.data.max_tokens, source=SAID,
        vocab_size=config.tokenizer.vocab_size if config.tokenizer is not None else len(models.own_tokenizer("student")),
    )  # fmt: skip
    if config.teacher.label_words is None:
        return ClassRows(work, work)
    return ClassRows(work, work, (1,) * config.classes, remarks=(SAID_WORDS,))


def _was_prepared(config: RunConfig) -> bool:
    """Whether the run's folder holds the rows of this very data, as these models read them."""
    settings, now = prepared_settings(config), config.model_dump(mode="json")
    return bool(settings) and (
        all(settings.get(section) == now[section] for section in ("task", "data", "tokenizer"))
        and all(settings[role]["model"] == now[role]["model"] for role in ROLES)
        and settings["teacher"]["label_words"] == now["teacher"]["label_words"]
    )


def _counted(config: RunConfig, folder: Path, source: str) -> ClassRows:
    image_shape = read_counts(folder / "data").image_shape
    vocab_size = None if image_shape else len(Models(config, folder).tokenizer())
    read = {role: [ExampleFile(rows_of(role, split, folder)) for split in SPLITS] for role in ROLES}
    student, teacher = (_workload(read[role], vocab_size, bool(image_shape), source) for role in ("student", "teacher"))
    words = read_asked(folder / "data").token_ids if config.teacher.label_words is not None else ()
    return ClassRows(student, teacher, tuple(map(len, words)), image_shape)


def _workload(splits: list[ExampleFile], vocab_size: int | None, of_images: bool, source: str) -> Workload:
    train, heldout = splits
    return Workload(
        lengths=train.lengths, targets=train.target_counts, heldout_tokens=heldout.tokens, heldout_targets=len(heldout),
        longest=max(int(split.lengths.max()) for split in splits), vocab_size=vocab_size, source=source,
        unit="numbers" if of_images else "tokens",
    )  # fmt: skip
