"""From text to the token ids and loss masks that models see. T tokens of a row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from actors.records import Example, example_key
from orchestrator.config.data import DataConfig
from orchestrator.data.special_tokens import special_strings
from orchestrator.data.templates import RenderedRow

TEXTS_A_BATCH = 1000

Extent = tuple[int, int]
"""First character of a token, and the one behind its last."""


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
    """Tokens of the longest row that is used, as far as it is used; 0 if none is."""

    longest_read: int
    """Tokens of the longest row, before rows were dropped or cut."""

    largest_id: int
    """Largest token id of the rows that are used."""


def tokenize(rendered: Sequence[RenderedRow], tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> TokenizedRows:
    """Tokenize each row's whole text at once, as a model meets it, and mark the tokens that are targets.

    A token is a target if any of its characters is, except the first token: nothing predicts it. Instruction rows get the
    tokenizer's own special tokens and end with the end-of-sequence token, a target; the text of conversations holds all
    special tokens already.

    Raises:
        ValueError: if instruction rows are to end with a token the tokenizer does not have.
    """
    if tokenizer.eos_token_id is None and not all(row.is_conversation for row in rendered):
        raise ValueError("the tokenizer has no end-of-sequence token (eos_token); data.format.kind=chat would do without")
    examples, kept = [], []
    dropped_long = truncated = without_target = merged_at_border = longest = longest_read = largest_id = 0
    for row, (token_ids, extents) in zip(rendered, _encode(rendered, tokenizer), strict=True):
        loss_mask, straddles = mark_targets(extents, row.target_spans)
        if not row.is_conversation:
            token_ids, loss_mask = _end_sequence(token_ids, loss_mask, tokenizer.eos_token_id)
        loss_mask[:1] = False
        longest_read = max(longest_read, len(token_ids))
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
        longest, largest_id = max(longest, len(token_ids)), max(largest_id, int(token_ids.max()))
        examples.append(Example(token_ids, loss_mask, example_key(token_ids, loss_mask), row.row))
        kept.append(row)
    return TokenizedRows(
        examples, kept, dropped_long, truncated, without_target, merged_at_border, longest, longest_read, largest_id
    )


def tokenize_prompts(rendered: Sequence[RenderedRow], tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """Return the tokens of prompts, int32 [T] each, with which rows begin in training.

    What a tokenizer puts behind a text of its own accord is left out: the answer follows.
    """
    prompts = []
    for row, (token_ids, extents) in zip(rendered, _encode(rendered, tokenizer), strict=True):
        of_text = np.flatnonzero(extents[:, 0] < extents[:, 1])
        end = len(token_ids) if row.is_conversation else int(of_text[-1]) + 1 if len(of_text) else 0
        prompts.append(token_ids[:end])
    return prompts


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


def _encode(rendered: Sequence[RenderedRow], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield token ids, int32 [T], and extents, int64 [T, 2], of each row."""
    for start in range(0, len(rendered), TEXTS_A_BATCH):
        batch = rendered[start : start + TEXTS_A_BATCH]
        encoded: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for is_conversation in {row.is_conversation for row in batch}:
            alike = [index for index, row in enumerate(batch) if row.is_conversation == is_conversation]
            encoded |= zip(alike, _encode_alike([batch[index] for index in alike], tokenizer, not is_conversation), strict=True)
        yield from (encoded[index] for index in range(len(batch)))


def _encode_alike(
    batch: Sequence[RenderedRow], tokenizer: PreTrainedTokenizerBase, add_special_tokens: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    encoded = tokenizer(
        [row.text for row in batch],
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        verbose=False,
    )
    fields = (encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"])
    for row, token_ids, offsets, added in zip(batch, *fields, strict=True):
        if row.ordinary_spans:
            token_ids, offsets, added = _split_special(row, token_ids, offsets, added, tokenizer)
        yield np.array(token_ids, dtype=np.int32), token_extents(offsets, added)


def _split_special(
    row: RenderedRow, token_ids: Sequence[int], offsets: Sequence[Extent], added: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[list[int], list[Extent], list[int]]:  # fmt: skip
    """Return a row's tokens, those that are special tokens of people's text replaced by the tokens of their characters."""
    special = set(tokenizer.convert_tokens_to_ids(special_strings(tokenizer)))
    all_pieces: list[int] = []
    all_extents: list[Extent] = []
    all_added: list[int] = []
    for token, (start, end), extra in zip(token_ids, offsets, added, strict=True):
        inside = any(first < end and start < last for first, last in row.ordinary_spans)
        if extra or token not in special or not inside:
            pieces, extents = [token], [(start, end)]
        else:
            pieces, extents = _ordinary_tokens(row.text[start:end], start, tokenizer)
        all_pieces += pieces
        all_extents += extents
        all_added += [extra] * len(pieces)
    return all_pieces, all_extents, all_added


def _ordinary_tokens(text: str, start: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[Extent]]:
    """Return the tokens of a text without special tokens among them, and their characters, counted from ``start``.

    Raises:
        ValueError: if the tokenizer cannot write the text in ordinary tokens.
    """
    encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    tokenizer.backend_tokenizer.encode_special_tokens = tokenizer.split_special_tokens  # the call above leaves it switched
    if not set(encoded["input_ids"]).isdisjoint(tokenizer.convert_tokens_to_ids(special_strings(tokenizer))):
        raise ValueError(f"the tokenizer cannot read {text!r} as ordinary text; data.special_tokens=strip would do")
    return encoded["input_ids"], [(start + first, start + last) for first, last in encoded["offset_mapping"]]


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
