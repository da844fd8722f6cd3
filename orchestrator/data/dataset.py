"""From rows to the token ids and loss masks that models see: split, tokenize, count, write. T tokens of a row.

``prepare_data`` leaves four files: ``train.arrow`` and ``heldout.arrow`` (see ``actors.examples``), ``heldout_texts.jsonl``
(row, task, prompt and response of the held-out rows, line by line those of ``heldout.arrow``) and, last, ``summary.json``
(counts and hashes): where it stands, the others are whole.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from actors.examples import write_examples
from actors.files import write_atomically
from actors.records import examples_hash
from orchestrator.config.data import DataConfig
from orchestrator.data.counts import DataCounts, count_data
from orchestrator.data.sources import Row, read_rows
from orchestrator.data.templates import NumberedRow, render_rows, texts_to_learn
from orchestrator.data.tokenization import TokenizedRows, tokenize
from orchestrator.data.tokenizers import tokenizer_hash

TokenizerFor = Callable[[list[str]], PreTrainedTokenizerBase]
"""Returns the run's tokenizer, given the training texts in case it is to be trained on them."""


def prepare_data(data: DataConfig, tokenizer_for: TokenizerFor, folder: Path) -> DataCounts:
    """Read, split, render, tokenize and write the data of a run into ``folder``.

    Raises:
        ValueError: naming the file, row or key, if the data or the configuration cannot serve.
    """
    train_rows, heldout_rows = read_splits(data)
    tokenizer = tokenizer_for(texts_to_learn(train_rows, data))
    rendered = [render_rows(rows, data, tokenizer) for rows in (train_rows, heldout_rows)]
    train, heldout = (tokenize(split.rows, tokenizer, data) for split in rendered)
    for split, rows, texts in (("training", train, rendered[0]), ("held-out", heldout, rendered[1])):
        if not rows.examples:
            raise ValueError(
                f"no {split} row is left: {rows.dropped_long} exceed data.max_tokens {data.max_tokens}, {rows.without_target} "
                f"have no target within it, {texts.without_answer} have no answer"
                + (f"; data.max_tokens={rows.longest_read} would keep all that have one" if rows.longest_read else "")
            )
    counts = count_data(train, heldout, rendered, data)
    write_prepared(folder, train, heldout, counts, tokenizer_hash(tokenizer))
    return counts


def read_splits(data: DataConfig) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """Return the rows to train on and the held-out rows, which are drawn from the same source or have one of their own.

    Raises:
        ValueError: naming the file and the line, or the key, if there is nothing to read.
    """
    rows = read_rows(data.source, data.seed)
    if data.heldout is None:
        return choose_rows(rows, data)
    train = _shuffled(rows, f"{data.seed} split")[: data.max_rows]
    heldout = _shuffled(read_rows(data.heldout.source, data.seed), f"{data.seed} heldout")[: data.heldout.max_rows]
    return train, heldout


def _shuffled(rows: Sequence[Row], seed: str) -> list[NumberedRow]:
    numbered: list[NumberedRow] = list(enumerate(rows))
    random.Random(seed).shuffle(numbered)
    return numbered


def choose_rows(rows: Sequence[Row], data: DataConfig) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """Draw the rows to train on and those to hold out, each with its index in ``rows``; shuffle the former.

    One shuffle by ``data.seed`` decides all: held-out rows first, then training rows, up to ``max_rows``. So a smaller
    ``max_rows`` keeps the same held-out rows.

    Raises:
        ValueError: if holding out ``heldout_rows`` leaves nothing to train on.
    """
    assert data.heldout_rows is not None, "data.heldout names a source of its own"
    order = _shuffled(rows, f"{data.seed} split")[: data.max_rows]
    if data.heldout_rows >= len(order):
        raise ValueError(
            f"data.heldout_rows {data.heldout_rows} leaves none of {len(order)} rows to train on; "
            + (f"data.heldout_rows={max(1, len(order) // 10)} would do" if len(order) > 1 else "at least two rows are needed")
        )
    return order[data.heldout_rows :], order[: data.heldout_rows]


def write_prepared(folder: Path, train: TokenizedRows, heldout: TokenizedRows, counts: DataCounts, tokenizer: str) -> None:
    """Write both splits, the held-out texts and, last, the summary. ``tokenizer`` is the hash of the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    write_examples(folder / "train.arrow", train.examples)
    write_examples(folder / "heldout.arrow", heldout.examples)
    texts = [{"row": row.row, "task": row.task, "prompt": row.prompt, "response": row.response} for row in heldout.kept]
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    write_atomically(folder / "heldout_texts.jsonl", lines.encode())
    summary = {
        "counts": asdict(counts),
        "train_hash": examples_hash(example.key for example in train.examples),
        "heldout_hash": examples_hash(example.key for example in heldout.examples),
        "tokenizer_hash": tokenizer,
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
