"""From rows to the token ids and loss masks that models see: split, tokenize, count, write. T tokens of a row.

``prepare_data`` leaves four files: ``train.arrow`` and ``heldout.arrow`` (see ``actors.examples``), ``heldout_texts.jsonl``
(row, task, prompt and response of the held-out rows, line by line those of ``heldout.arrow``) and, last, ``summary.json``
(counts and hashes): where it stands, the others are whole. The training rows pass through some at a time, so that memory does not
grow with them; the held-out rows are held.
"""

import json
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from actors.examples import ExampleFile, record_batch, write_batches, write_examples
from actors.files import write_atomically
from orchestrator.cluster.processes import map_in_processes, map_on_cluster
from orchestrator.config.data import DataConfig
from orchestrator.data.counts import DataCounts, SplitTally, count_data
from orchestrator.data.mixture import NumberedRow, PackedRows, SpooledRows, read_splits
from orchestrator.data.shown_rows import RowsToShow
from orchestrator.data.templates import RenderedRows, render_rows, texts_to_learn
from orchestrator.data.tokenization import TokenizedRows, tokenize
from orchestrator.data.tokenizers import tokenizer_hash

CODE_OF_MODELS = "transformers_modules"
"""The package under which transformers imports code that came with a model."""
ROWS_AT_ONCE = 1024
"""Training rows that are text and tokens at one time."""

TokenizerFor = Callable[[Iterable[str]], PreTrainedTokenizerBase]
"""Returns the run's tokenizer, given the training texts in case it is to be trained on them."""


def prepare_data(data: DataConfig, tokenizer_for: TokenizerFor, folder: Path, on_cluster: bool = False) -> DataCounts:
    """Read, split, render, tokenize and write the data of a run into ``folder``.

    Args:
        data: which rows, and how they are read.
        tokenizer_for: see ``TokenizerFor``.
        folder: of the data, made if it is missing.
        on_cluster: whether ``data.cluster_tasks`` of the Ray that is connected render and tokenize the training rows, instead
            of ``data.processes`` of this machine.

    Raises:
        ValueError: naming the file, row or key, if the data or the configuration cannot serve.
    """
    train_rows, heldout_rows = read_splits(data)
    tokenizer = tokenizer_for(texts_to_learn(train_rows, data))
    rendered, heldout = _rendered_and_tokenized(list(heldout_rows), data, tokenizer)
    heldout_tally = SplitTally.of(rendered, heldout)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").unlink(missing_ok=True)
    heldout_keys = [bytes.fromhex(example.key) for example in heldout.examples]
    train = TrainingRows(train_rows, data, tokenizer, frozenset(heldout_keys))
    with closing(train.batches(on_cluster)) as batches:
        write_batches(folder / "train.arrow", batches)
    train.tally.require_rows("training", data)
    heldout_tally.require_rows("held-out", data)
    write_heldout(folder, heldout)
    repeated = sum(key in train.met for key in heldout_keys)
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
    heldout_keys: frozenset[bytes]
    """Keys of the held-out rows."""
    met: set[bytes] = field(default_factory=set)
    """Those of them that training rows have too."""
    tally: SplitTally = field(default_factory=SplitTally)
    """What became of the rows so far."""
    shown: RowsToShow = field(default_factory=RowsToShow)
    """Some of them, for the reader."""

    def batches(self, on_cluster: bool) -> Generator[pa.RecordBatch]:
        """Yield the rows that are used, tokenized.

        Raises:
            ValueError: if the tokenizer is of code that nodes of a cluster do not have.
        """
        with closing(self._prepared(on_cluster)) as all_prepared:
            for prepared in all_prepared:
                self.tally.add(prepared.tally)
                self.shown.add(prepared.shown)
                self.met |= self.heldout_keys.intersection(prepared.batch["key"].to_pylist())
                yield prepared.batch

    def _prepared(self, on_cluster: bool) -> "Generator[PreparedRows]":
        work, packed = partial(prepare_rows, data=self.data, tokenizer=self.tokenizer), self.rows.packed(ROWS_AT_ONCE)
        if on_cluster:
            assert self.data.cluster_tasks is not None, "so the caller asks for it"
            if type(self.tokenizer).__module__.startswith(CODE_OF_MODELS):
                raise ValueError(
                    f"data.cluster_tasks is {self.data.cluster_tasks}, but the tokenizer is of code that came with its model, "
                    "which other nodes do not have; data.cluster_tasks=null and data.processes=4 would do"
                )
            return map_on_cluster(work, packed, self.data.cluster_tasks, "data.cluster_tasks")
        return map_in_processes(work, packed, self.data.processes, "data.processes")


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """Some training rows as they are written, and what became of them."""

    batch: pa.RecordBatch
    """Those that are used."""
    tally: SplitTally
    """Of all of them."""
    shown: RowsToShow
    """Those that a reader might see."""


def prepare_rows(packed: PackedRows, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> PreparedRows:
    """Render and tokenize some training rows."""
    rows, shown = packed.unpacked(), RowsToShow()
    rendered, used = _rendered_and_tokenized(rows, data, tokenizer)
    shown.look(rows, used)
    return PreparedRows(record_batch(used.examples), SplitTally.of(rendered, used), shown)


def _rendered_and_tokenized(
    rows: Sequence[NumberedRow], data: DataConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[RenderedRows, TokenizedRows]:
    rendered = render_rows(rows, data, tokenizer)
    return rendered, tokenize(rendered.rows, tokenizer, data)


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
