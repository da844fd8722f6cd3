"""From rows to the token ids and loss masks that models see: split, tokenize, count, write. T tokens of a row.

``prepare_data`` leaves four files: ``train.arrow`` and ``heldout.arrow`` (see ``actors.examples``), ``heldout_texts.jsonl``
(row, task, prompt and response of the held-out rows, line by line those of ``heldout.arrow``) and, last, ``summary.json``
(counts and hashes): where it stands, the others are whole.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from actors.examples import ExampleFile, write_examples
from actors.files import write_atomically
from orchestrator.config.data import DataConfig
from orchestrator.data.counts import DataCounts, count_data
from orchestrator.data.mixture import read_splits
from orchestrator.data.shown_rows import rows_to_show
from orchestrator.data.templates import render_rows, texts_to_learn
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
    shown = rows_to_show(train_rows, train, tokenizer)
    counts = count_data(train, heldout, rendered, data, [*train_rows, *heldout_rows], shown)
    write_prepared(folder, train, heldout, counts, tokenizer_hash(tokenizer))
    return counts


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
        "train_hash": ExampleFile(folder / "train.arrow").hash,
        "heldout_hash": ExampleFile(folder / "heldout.arrow").hash,
        "tokenizer_hash": tokenizer,
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
