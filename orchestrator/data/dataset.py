"""From rows to the token ids and loss masks that models see: split, tokenize, count, write. T tokens of a row.

``prepare_data`` leaves four files: ``train.arrow`` and ``heldout.arrow`` (see ``actors.examples``), ``heldout_texts.jsonl``
(row, task, prompt and response of the held-out rows, line by line those of ``heldout.arrow``) and, last, ``summary.json``
(counts and hashes): where it stands, the others are whole. The training rows pass through some at a time, so that memory does not
grow with them; the held-out rows are held.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from actors.examples import ExampleFile, write_examples
from actors.files import write_atomically
from actors.records import Example
from orchestrator.cluster.processes import map_in_order
from orchestrator.config.data import DataConfig
from orchestrator.data.counts import DataCounts, SplitTally, count_data
from orchestrator.data.mixture import NumberedRow, SpooledRows, read_splits
from orchestrator.data.shown_rows import RowsToShow
from orchestrator.data.templates import RenderedRows, render_rows, texts_to_learn
from orchestrator.data.tokenization import TokenizedRows, tokenize
from orchestrator.data.tokenizers import tokenizer_hash

ROWS_AT_ONCE = 4096
"""Training rows that are text and tokens at one time."""

TokenizerFor = Callable[[Iterable[str]], PreTrainedTokenizerBase]
"""Returns the run's tokenizer, given the training texts in case it is to be trained on them."""


def prepare_data(data: DataConfig, tokenizer_for: TokenizerFor, folder: Path) -> DataCounts:
    """Read, split, render, tokenize and write the data of a run into ``folder``.

    Raises:
        ValueError: naming the file, row or key, if the data or the configuration cannot serve.
    """
    train_rows, heldout_rows = read_splits(data)
    tokenizer = tokenizer_for(texts_to_learn(train_rows, data))
    heldout, heldout_tally = _all_at_once(heldout_rows, data, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    train = TrainingRows(train_rows, data, tokenizer, frozenset(example.key for example in heldout.examples))
    write_examples(folder / "train.arrow", train.examples())
    train.tally.require_rows("training", data)
    heldout_tally.require_rows("held-out", data)
    write_heldout(folder, heldout)
    repeated = sum(example.key in train.met for example in heldout.examples)
    by_source = train_rows.by_source() + heldout_rows.by_source()
    counts = count_data(train.tally, heldout_tally, repeated, data, by_source, train.shown.texts(tokenizer))
    write_summary(folder, counts, tokenizer_hash(tokenizer))
    return counts


@dataclass
class TrainingRows:
    """The training rows on their way into their file."""

    rows: SpooledRows
    """As they were drawn."""
    data: DataConfig
    """How they are read."""
    tokenizer: PreTrainedTokenizerBase
    """Of the run."""
    heldout_keys: frozenset[str]
    """Keys of the held-out rows."""
    met: set[str] = field(default_factory=set)
    """Those of them that training rows have too."""
    tally: SplitTally = field(default_factory=SplitTally)
    """What became of the rows so far."""
    shown: RowsToShow = field(default_factory=RowsToShow)
    """Some of them, for the reader."""

    def examples(self) -> Iterator[Example]:
        """Yield the rows that are used, tokenized."""
        blocks = (list(self.rows[start : start + ROWS_AT_ONCE]) for start in range(0, len(self.rows), ROWS_AT_ONCE))
        work = partial(_rendered_and_tokenized, data=self.data, tokenizer=self.tokenizer)
        for some, (rendered, used) in map_in_order(work, blocks, self.data.processes, "data.processes"):
            self.tally.add(rendered, used)
            self.shown.look(some, used)
            self.met |= self.heldout_keys & {example.key for example in used.examples}
            yield from used.examples


def _rendered_and_tokenized(
    rows: Sequence[NumberedRow], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[RenderedRows, TokenizedRows]:
    rendered = render_rows(rows, data, tokenizer)
    return rendered, tokenize(rendered.rows, tokenizer, data)


def _all_at_once(rows: SpooledRows, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[TokenizedRows, SplitTally]:
    (rendered, used), tally = _rendered_and_tokenized(list(rows), data, tokenizer), SplitTally()
    tally.add(rendered, used)
    return used, tally


def write_heldout(folder: Path, heldout: TokenizedRows) -> None:
    """Write the held-out rows and their texts."""
    write_examples(folder / "heldout.arrow", heldout.examples)
    texts = [{"row": row.row, "task": row.task, "prompt": row.prompt, "response": row.response} for row in heldout.kept]
    lines = "".join(json.dumps(text, ensure_ascii=False) + "\n" for text in texts)
    write_atomically(folder / "heldout_texts.jsonl", lines.encode())


def write_summary(folder: Path, counts: DataCounts, tokenizer: str) -> None:
    """Write, last, what became of the rows, and what names both splits. ``tokenizer`` is the hash of the tokenizer."""
    summary = {
        "counts": asdict(counts),
        "train_hash": ExampleFile(folder / "train.arrow").hash,
        "heldout_hash": ExampleFile(folder / "heldout.arrow").hash,
        "tokenizer_hash": tokenizer,
    }
    write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode())
