"""From rows to what classifiers read: features and a label behind them.

``prepare_classes`` leaves ``train.arrow`` and ``heldout.arrow`` (see ``actors.examples``), ``teacher_train.arrow`` and
``teacher_heldout.arrow`` where the teacher reads other tokens than the student, ``heldout_rows.jsonl`` (row, label, group) and,
last, ``summary.json``. A row has the same key in all of them: that of its content.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.examples import ExampleFile, write_examples
from actors.files import write_atomically
from actors.records import Example
from orchestrator.classification.labelled_rows import LabelledRow, read_row, require_labels, require_one_shape, shown_row
from orchestrator.config.data import DataConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.data.mixture import read_splits
from orchestrator.data.tokenizers import tokenizer_hash

T = TypeVar("T")
SHOWN_ROWS = 3
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class ClassCounts:
    """What became of the rows."""

    train_rows: int
    """Rows to train on."""
    heldout_rows: int
    """Rows to measure."""
    heldout_rows_in_train: int
    """Held-out rows that the training rows hold too."""
    rows_too_long: int
    """Rows left out, or cut, since they exceed ``data.max_tokens``."""
    train_labels: dict[str, int]
    """Training rows of each label."""
    heldout_labels: dict[str, int]
    """Held-out rows of each label."""
    longest: int
    """Tokens of the longest row, its label included; of images, their numbers and the label."""
    teacher_longest: int
    """The same as the teacher reads them."""
    image_shape: tuple[int, ...]
    """Channels, height and width of images; empty for texts."""
    shown_rows: list[str]
    """Some training rows for the reader."""

    def lines(self, data: DataConfig) -> list[str]:
        """Return sentences for the terminal."""
        rows = f"{self.train_rows} rows to train on, {self.heldout_rows} held out"
        if self.image_shape:
            rows += f", images of {' x '.join(map(str, self.image_shape))}"
        else:
            rows += f", longest {self.longest - 1} tokens"
        if self.rows_too_long:
            rows += f"; {self.rows_too_long} {'cut' if data.too_long == 'truncate' else 'dropped'} as too long"
        if self.heldout_rows_in_train:
            rows += f"; {self.heldout_rows_in_train} held out but also among the training rows"
        labels = ", ".join(f"{label} {count}" for label, count in self.train_labels.items())
        return [rows, f"training rows by label: {labels}", *self.shown_rows]


def read_counts(folder: Path) -> ClassCounts:
    """Return the counts of the rows that were prepared in a folder."""
    content = json.loads((folder / "summary.json").read_text())["counts"]
    return ClassCounts(**{**content, "image_shape": tuple(content["image_shape"])})


Tokenizers = tuple[PreTrainedTokenizerBase | None, PreTrainedTokenizerBase | None]
"""The student's, and the teacher's where it is another; None for images and where there is no other."""


def prepare_classes(
    data: DataConfig, task: ClassificationTask, tokenizers_for: Callable[[list[str]], Tokenizers], folder: Path
) -> ClassCounts:
    """Read, check, tokenize and write the rows of a run of classification into ``folder``.

    Args:
        data: where rows come from, and how they are read.
        task: their labels.
        tokenizers_for: returns the tokenizers, given the training texts in case one is to be trained on them.
        folder: gets the files.

    Raises:
        ValueError: naming the row or the key, if a label is unknown or has no training row, texts are empty, or images are of
            several sizes or hold what is no finite number.
    """
    numbered = read_splits(data)
    splits = [[read_row(row, data, task) for row in rows] for rows in numbered]
    require_labels(splits[0], splits[1], task)
    shape = require_one_shape([row for split in splits for row in split])
    texts = [row.text for row in splits[0] if row.text is not None]
    student, teacher = tokenizers_for(texts) if texts else (None, None)
    longest = None if shape else data.max_tokens - 1
    shortened = longest if data.too_long == "truncate" else None
    keep_special = data.special_tokens == "keep"
    read = {
        prefix: [[features_of(row, tokenizer, keep_special) for row in split] for split in splits]
        for prefix, tokenizer in _readers(student, teacher).items()
    }
    fits = [_fitting([features[index] for features in read.values()], longest) for index in range(len(SPLITS))]
    kept = [split if shortened else _where(split, fit) for split, fit in zip(splits, fits, strict=True)]
    require_rows(kept, data)
    require_labels(kept[0], kept[1], task)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    lengths: dict[str, int] = {}
    for prefix, tokenizer in _readers(student, teacher).items():
        for name, split, features, fit in zip(SPLITS, kept, read[prefix], fits, strict=True):
            fitting = features if shortened else _where(features, fit)
            for place, ids in enumerate(fitting):
                if shortened and len(ids) > shortened:
                    fitting[place] = features_of(split[place], tokenizer, keep_special, shortened)
            write_examples(folder / f"{prefix}{name}.arrow", map(example_of, split, fitting))
            lengths[prefix] = max(lengths.get(prefix, 0), 1 + max(map(len, fitting)))
    lines = [{"row": row.number, "label": row.label, "group": row.group} for row in kept[1]]
    write_atomically(folder / "heldout_rows.jsonl", "".join(json.dumps(line) + "\n" for line in lines).encode())
    counts = counts_of(kept, task, sum(fit.count(False) for fit in fits), lengths, shape)
    summary = {
        "counts": asdict(counts),
        **{f"{name}_hash": ExampleFile(folder / f"{name}.arrow").hash for name in SPLITS},
        "tokenizer_hash": tokenizer_hash(student) if student is not None else None,
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
    return counts


def counts_of(
    kept: Sequence[Sequence[LabelledRow]], task: ClassificationTask, too_long: int, lengths: Mapping[str, int],
    shape: tuple[int, ...],
) -> ClassCounts:  # fmt: skip
    """Return what became of the rows.

    Args:
        kept: training rows, and held-out rows.
        task: with the labels.
        too_long: rows that are left out or cut.
        lengths: of the longest row, by who reads it.
        shape: of the images; empty for texts.
    """
    train, heldout = kept
    trained = {row.key for row in train}
    return ClassCounts(
        train_rows=len(train),
        heldout_rows=len(heldout),
        heldout_rows_in_train=sum(row.key in trained for row in heldout),
        rows_too_long=too_long,
        train_labels=count_labels(train, task),
        heldout_labels=count_labels(heldout, task),
        longest=lengths[""],
        teacher_longest=lengths.get("teacher_", lengths[""]),
        image_shape=shape,
        shown_rows=[shown_row(row, row.place, task) for row in train[:SHOWN_ROWS]],
    )


def require_rows(kept: Sequence[Sequence[LabelledRow]], data: DataConfig) -> None:
    """Raise if all rows of a split were dropped as too long."""
    for words, split in zip(("training", "held-out"), kept, strict=True):
        if not split:
            raise ValueError(
                f"no {words} row is left: all exceed data.max_tokens {data.max_tokens}; data.too_long=truncate would cut them"
            )


def features_of(
    row: LabelledRow, tokenizer: PreTrainedTokenizerBase | None, keep_special: bool = False, longest: int | None = None
) -> np.ndarray:
    """Return what a model reads, int32 [F]: token ids, or the bits of an image's values.

    Args:
        row: text or image.
        tokenizer: of texts.
        keep_special: whether a special token inside a text is one, rather than the ordinary characters that it is.
        longest: cut a text to so many tokens; those that the tokenizer puts around it stay around it.

    Raises:
        ValueError: if the tokenizer finds no token in a text.
    """
    if row.image is not None:
        return row.image.reshape(-1).view(np.int32)
    assert tokenizer is not None and row.text is not None, "texts have a tokenizer"
    read = tokenizer(
        row.text, split_special_tokens=not keep_special, truncation=longest is not None, max_length=longest, verbose=False
    )
    if not read["input_ids"]:
        raise ValueError(f"{row.place}: its text {row.text!r} has no token by the tokenizer: there is nothing to classify")
    return np.array(read["input_ids"], dtype=np.int32)


def example_of(row: LabelledRow, features: np.ndarray) -> Example:
    """Return a row as the models see it: its features, and behind them its label, the one target."""
    loss_mask = np.zeros(len(features) + 1, dtype=bool)
    loss_mask[-1] = True
    return Example(np.append(features, np.int32(row.label)), loss_mask, row.key, row.number)


def count_labels(rows: Sequence[LabelledRow], task: ClassificationTask) -> dict[str, int]:
    """Return how many rows each label has."""
    counts = Counter(row.label for row in rows)
    return {str(label): counts[index] for index, label in enumerate(task.labels)}


def _readers(
    student: PreTrainedTokenizerBase | None, teacher: PreTrainedTokenizerBase | None
) -> dict[str, PreTrainedTokenizerBase | None]:
    """Return who reads rows, by the prefix of the files: the student, and the teacher where it has tokens of its own."""
    return {"": student} if teacher is None else {"": student, "teacher_": teacher}


def _fitting(read: Sequence[Sequence[np.ndarray]], longest: int | None) -> list[bool]:
    """Return whether each row is as short as asked for all who read it."""
    return [longest is None or max(map(len, features)) <= longest for features in zip(*read, strict=True)]


def _where(items: Sequence[T], fits: Sequence[bool]) -> list[T]:
    return [item for item, fit in zip(items, fits, strict=True) if fit]
