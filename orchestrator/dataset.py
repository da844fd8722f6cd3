"""From rows to the token ids and loss masks that models see: split, tokenize, count, write. T tokens of a row.

``prepare_data`` leaves four files: ``train.arrow`` and ``heldout.arrow`` (see ``actors.examples``), ``heldout_texts.jsonl``
(row, task, prompt and response of the held-out rows, line by line those of ``heldout.arrow``) and, last, ``summary.json``
(counts and hashes): where it stands, the others are whole.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.examples import write_atomically, write_examples
from actors.records import Example, example_key, examples_hash
from orchestrator.config import DataConfig
from orchestrator.rows import Row, read_rows
from orchestrator.templates import NumberedRow, RenderedRow, render_rows, texts_to_learn
from orchestrator.tokenizers import tokenizer_hash

TEXTS_A_BATCH = 1000

TokenizerFor = Callable[[list[str]], PreTrainedTokenizerBase]
"""Returns the run's tokenizer, given the training texts in case it is to be trained on them."""


@dataclass(frozen=True)
class TokenizedRows:
    """The rows of one split that are used, and what became of the others."""

    examples: list[Example]
    """The rows that are used."""

    kept: list[RenderedRow]
    """The text of each of them."""

    dropped_long: int
    """Rows left out because they exceed ``max_tokens``."""

    truncated: int
    """Rows used that were cut at ``max_tokens``."""

    without_target: int
    """Rows left out because nothing in them is a target (any more)."""

    merged_at_border: int
    """Rows used in which a token holds characters of prompt and target alike; it counts as a target."""

    longest: int
    """Tokens of the longest row, before rows were dropped or cut."""


@dataclass(frozen=True)
class DataCounts:
    """What became of the rows, both splits together where no split is named."""

    rows_read: int
    """Rows chosen from the source (all, or ``max_rows``)."""

    rows_dropped_long: int
    """Rows left out because they exceed ``max_tokens``."""

    rows_truncated: int
    """Rows used that were cut at ``max_tokens``."""

    rows_without_target: int
    """Rows left out because nothing in them is a target (any more)."""

    rows_merged_at_border: int
    """Rows used in which a token holds characters of prompt and target alike; it counts as a target."""

    train_rows: int
    """Rows to train on."""

    heldout_rows: int
    """Rows to evaluate on."""

    heldout_rows_in_train: int
    """Held-out rows that the training rows hold too, token for token."""

    train_tokens: int
    """Tokens of the training rows, prompts included."""

    train_targets: int
    """Tokens of the training rows that are learned."""

    heldout_targets: int
    """Tokens of the held-out rows that are predicted."""

    longest: int
    """Tokens of the longest row, before rows were dropped or cut."""

    def line(self) -> str:
        """Return a sentence for the terminal; what is zero and would be bad news otherwise is left out."""
        remarks = {
            "dropped as too long": self.rows_dropped_long,
            "cut as too long": self.rows_truncated,
            "dropped without a target": self.rows_without_target,
            "with a token across the border of prompt and response": self.rows_merged_at_border,
            "held out but also among the training rows": self.heldout_rows_in_train,
        }
        return (
            f"{self.rows_read} rows read: {self.train_rows} to train on ({self.train_tokens} tokens, {self.train_targets} "
            f"targets), {self.heldout_rows} held out ({self.heldout_targets} targets), longest {self.longest} tokens"
            + "".join(f"; {count} {remark}" for remark, count in remarks.items() if count)
        )


def prepare_data(data: DataConfig, tokenizer_for: TokenizerFor, folder: Path) -> DataCounts:
    """Read, split, render, tokenize and write the data of a run into ``folder``.

    Raises:
        ValueError: naming the file, row or key, if the data or the configuration cannot serve.
    """
    train_rows, heldout_rows = choose_rows(read_rows(data.source, data.seed), data)
    tokenizer = tokenizer_for(texts_to_learn(train_rows, data.format))
    train = tokenize(render_rows(train_rows, data.format, tokenizer), tokenizer, data)
    heldout = tokenize(render_rows(heldout_rows, data.format, tokenizer), tokenizer, data)
    for split, rows in (("training", train), ("held-out", heldout)):
        if not rows.examples:
            raise ValueError(
                f"no {split} row is left: {rows.dropped_long} exceed data.max_tokens {data.max_tokens}, {rows.without_target} "
                f"have no target within it; data.max_tokens={rows.longest} would keep them all"
            )
    counts = count_data(train, heldout)
    write_prepared(folder, train, heldout, counts, tokenizer_hash(tokenizer))
    return counts


def choose_rows(rows: Sequence[Row], data: DataConfig) -> tuple[list[NumberedRow], list[NumberedRow]]:
    """Draw the rows to train on and those to hold out, each with its index in ``rows``; shuffle the former.

    One shuffle by ``data.seed`` decides all: held-out rows first, then training rows, up to ``max_rows``. So a smaller
    ``max_rows`` keeps the same held-out rows.

    Raises:
        ValueError: if holding out ``heldout_rows`` leaves nothing to train on.
    """
    order = list(range(len(rows)))
    random.Random(f"{data.seed} split").shuffle(order)
    order = order[: data.max_rows]
    if data.heldout_rows >= len(order):
        raise ValueError(
            f"data.heldout_rows {data.heldout_rows} leaves none of {len(order)} rows to train on; "
            + (f"data.heldout_rows={max(1, len(order) // 10)} would do" if len(order) > 1 else "at least two rows are needed")
        )
    heldout, train = order[: data.heldout_rows], order[data.heldout_rows :]
    return [(number, rows[number]) for number in train], [(number, rows[number]) for number in heldout]


def tokenize(rendered: Sequence[RenderedRow], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> TokenizedRows:
    """Tokenize each row's whole text at once, as a model meets it, and mark the tokens that are targets.

    A token is a target if any of its characters is, except the first token: nothing predicts it. Instruction rows get the
    tokenizer's own special tokens and end with the end-of-sequence token, a target; the text of conversations holds all
    special tokens already.

    Raises:
        ValueError: if instruction rows are to end with a token the tokenizer does not have.
    """
    instruction = data.format.kind == "instruction"
    if instruction and tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token (eos_token); data.format.kind=chat would do without")
    examples, kept = [], []
    dropped_long = truncated = without_target = merged_at_border = longest = 0
    for row, (token_ids, extents) in zip(rendered, _encode(rendered, tokenizer, add_special_tokens=instruction), strict=True):
        loss_mask, straddles = mark_targets(extents, row.target_spans)
        if instruction:
            token_ids, loss_mask = _end_sequence(token_ids, loss_mask, tokenizer.eos_token_id)
        loss_mask[:1] = False
        longest = max(longest, len(token_ids))
        too_long = len(token_ids) > data.max_tokens
        if too_long and data.too_long == "drop":
            dropped_long += 1
            continue
        token_ids, loss_mask = token_ids[: data.max_tokens], loss_mask[: data.max_tokens]
        if not loss_mask.any():
            without_target += 1
            continue
        truncated += too_long
        merged_at_border += bool(straddles[: data.max_tokens].any())
        examples.append(Example(token_ids, loss_mask, example_key(token_ids, loss_mask), row.row))
        kept.append(row)
    return TokenizedRows(examples, kept, dropped_long, truncated, without_target, merged_at_border, longest)


def mark_targets(extents: np.ndarray, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """Return which tokens are targets, bool [T], and which of these reach beyond their span, bool [T].

    Args:
        extents: int [T, 2], first character of each token and the one behind its last; equal for tokens without text.
        spans: the stretches of the text that are targets.
    """
    starts, ends = extents[:, 0], extents[:, 1]
    loss_mask, straddles = np.zeros(len(extents), dtype=bool), np.zeros(len(extents), dtype=bool)
    for span_start, span_end in spans:
        inside = (starts < ends) & (starts < span_end) & (ends > span_start)
        loss_mask |= inside
        straddles |= inside & ((starts < span_start) | (ends > span_end))
    return loss_mask, straddles


def count_data(train: TokenizedRows, heldout: TokenizedRows) -> DataCounts:
    """Return the counts of both splits."""
    trained = {example.key for example in train.examples}
    splits = (train, heldout)
    return DataCounts(
        rows_read=sum(len(rows.examples) + rows.dropped_long + rows.without_target for rows in splits),
        rows_dropped_long=sum(rows.dropped_long for rows in splits),
        rows_truncated=sum(rows.truncated for rows in splits),
        rows_without_target=sum(rows.without_target for rows in splits),
        rows_merged_at_border=sum(rows.merged_at_border for rows in splits),
        train_rows=len(train.examples),
        heldout_rows=len(heldout.examples),
        heldout_rows_in_train=sum(example.key in trained for example in heldout.examples),
        train_tokens=sum(len(example.token_ids) for example in train.examples),
        train_targets=sum(int(example.loss_mask.sum()) for example in train.examples),
        heldout_targets=sum(int(example.loss_mask.sum()) for example in heldout.examples),
        longest=max(rows.longest for rows in splits),
    )


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


def _encode(
    rendered: Sequence[RenderedRow], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield token ids, int32 [T], and extents, int64 [T, 2], of each row."""
    for start in range(0, len(rendered), TEXTS_A_BATCH):
        encoded = tokenizer(
            [row.text for row in rendered[start : start + TEXTS_A_BATCH]],
            add_special_tokens=add_special_tokens,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            verbose=False,
        )
        fields = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
        for token_ids, offsets, added in zip(*fields, strict=True):
            yield np.array(token_ids, dtype=np.int32), token_extents(offsets, added)


def token_extents(offsets: Sequence[tuple[int, int]], added: Sequence[int]) -> np.ndarray:
    """Return which characters each token stands for, int64 [T, 2]; tokens the tokenizer added of itself get none.

    Many tokenizers leave leading spaces out of the offsets they report, so that a token of spaces alone seems empty. Here
    each token begins where the one before it ended.
    """
    extents = np.array(offsets, dtype=np.int64).reshape(-1, 2)
    extents[np.asarray(added, dtype=bool)] = 0
    ends = np.maximum.accumulate(extents[:, 1])
    extents[1:, 0] = np.minimum(extents[1:, 0], ends[:-1])
    extents[:1, 0] = 0
    extents[np.asarray(added, dtype=bool)] = 0
    return extents


def _end_sequence(token_ids: np.ndarray, loss_mask: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask of a row whose last token is the end of the sequence, a target; added unless it is there."""
    if len(token_ids) and token_ids[-1] == end:
        return token_ids, np.append(loss_mask[:-1], True)
    return np.append(token_ids, np.int32(end)), np.append(loss_mask, True)
