"""A few held-out texts token by token, as a report shows them: what the teacher is unsure of, what a model makes of each target.

T tokens of a row, N targets of it, V vocabulary. Logarithms are natural.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from actors.dataloader.collator import MicroBatch
from actors.evaluation.answers import HeldoutText
from actors.evaluation.metrics import LOGPROBS_AT_ONCE, HeldoutRows, forward_kl_to_teacher
from actors.examples import ExampleFile
from actors.score_store.store import ScoreStore
from losses.topk_teacher import TopkTeacher

ROWS_VIEWED = 6

MOST_TOKENS = 400
"""Tokens of a row that are kept for the report; the models read the whole row."""

TOKENS_BEFORE = 80
"""Of a longer row, tokens that are kept before the first target."""

UNFINISHED = "\ufffd"
"""What tokenizers write for bytes that are no whole character."""


@dataclass(frozen=True, slots=True)
class TokenView:
    """One held-out row as text in pieces, and what one model says at each target that is shown."""

    row: int
    """Index of the row in its dataset."""

    task: str | None
    """Kind of task, where the data says."""

    pieces: tuple[str, ...]
    """The text that each token adds. Empty where a character is not whole yet: the token that completes it has it all."""

    before: int
    """Tokens of the row that are left out before the first piece."""

    after: int
    """Tokens of the row that are left out after the last piece."""

    targets: tuple[int, ...]
    """Places among the pieces of the targets; the fields below have a value for each."""

    uncertainty: tuple[float, ...]
    """UNC, the teacher's probability of anything but the target, from the store."""

    divergence: tuple[float, ...]
    """KL(teacher || model) in nats, over target, top-K and tail, as ``kl_to_teacher`` of the whole split."""

    probability: tuple[float, ...]
    """The model's probability of the target."""

    favourite: tuple[str, ...]
    """The token that the model finds most likely, as text."""

    favourite_probability: tuple[float, ...]
    """The model's probability of that token."""


def view_tokens(
    logits_of: Callable[[MicroBatch], Tensor], rows: HeldoutRows, tokenizer: PreTrainedTokenizerBase, examples: ExampleFile,
    store: ScoreStore, texts: Sequence[HeldoutText],
) -> tuple[TokenView, ...]:  # fmt: skip
    """Return a few of the rows as one model reads them; the rows are the same for every model.

    Args:
        logits_of: the model, from a batch of one row to the logits [N, V] at its targets, both on the CPU.
        rows: the held-out rows with the teacher's scores, laid out for the model.
        tokenizer: turns tokens into text.
        examples: the same rows as token ids.
        store: the teacher's scores of them.
        texts: the same rows as text, for their tasks.
    """
    chosen = spread_over_tasks_and_lengths([text.task for text in texts], examples.lengths, ROWS_VIEWED)
    return tuple(
        view_of(position, logits_of, rows.batch(np.array([position])), tokenizer, examples, store, texts[position].task)
        for position in chosen
    )


def view_of(
    position: int, logits_of: Callable[[MicroBatch], Tensor], batch: MicroBatch, tokenizer: PreTrainedTokenizerBase,
    examples: ExampleFile, store: ScoreStore, task: str | None,
) -> TokenView:  # fmt: skip
    """Return one row as a model reads it; ``batch`` holds this row alone."""
    example = examples[position]
    start, stop = window_of(len(example.token_ids), int(example.target_positions[0]))
    shown = (example.target_positions >= start) & (example.target_positions < stop)
    assert isinstance(batch.teacher, TopkTeacher), "the rows come with scores from a store"
    kept = torch.from_numpy(np.flatnonzero(shown))  # the longest rows have many times more targets than are shown
    divergence, probability, favourite, favourite_probability = readings(
        logits_of(batch)[kept], batch.targets[kept], batch.teacher.select(kept)
    )
    return TokenView(
        row=example.row,
        task=task,
        pieces=pieces_of(tokenizer, example.token_ids.tolist(), start, stop),
        before=start,
        after=len(example.token_ids) - stop,
        targets=tuple((example.target_positions[shown] - start).tolist()),
        uncertainty=_rounded(store.uncertainty_at(position)[shown]),
        divergence=_rounded(divergence),
        probability=_rounded(probability),
        favourite=tuple(tokenizer.decode([token], **AS_IT_IS) for token in favourite.tolist()),
        favourite_probability=_rounded(favourite_probability),
    )


def readings(logits: Tensor, targets: Tensor, teacher: TopkTeacher) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return of logits [N, V] at targets [N], each [N]: KL to the teacher, the target's probability, the best token and its."""
    at_once = max(1, LOGPROBS_AT_ONCE // logits.shape[1])
    parts = []
    for start in range(0, len(logits), at_once):
        some = slice(start, start + at_once)
        logprobs = logits[some].double().log_softmax(dim=1)
        highest, favourite = logprobs.max(dim=1)
        divergence = forward_kl_to_teacher(logprobs, targets[some], teacher.select(some))
        probability = logprobs.gather(1, targets[some, None]).squeeze(1).exp()
        parts.append((divergence, probability, favourite, highest.exp()))
    whole = [torch.cat(values).numpy() for values in zip(*parts, strict=True)]
    return whole[0], whole[1], whole[2], whole[3]


def spread_over_tasks_and_lengths(tasks: Sequence[str | None], lengths: np.ndarray, count: int) -> list[int]:
    """Return positions of ``count`` rows, or all where there are fewer: the tasks in turn, the short rows before the long."""
    by_task: dict[str | None, list[int]] = {}
    for position in np.argsort(lengths, kind="stable").tolist():
        by_task.setdefault(tasks[position], []).append(position)
    names, count = sorted(by_task, key=str), min(count, len(tasks))
    chosen: list[int] = []
    while len(chosen) < count:
        left = by_task[names[0]]
        share = len(chosen) / max(1, count - 1)
        chosen.append(left.pop(round(share * (len(left) - 1))))
        names = names[1:] + names[:1] if left else names[1:]
    return chosen


def window_of(length: int, first_target: int) -> tuple[int, int]:
    """Return which tokens of a row of ``length`` are kept, from and up to; all of them unless it is long."""
    if length <= MOST_TOKENS:
        return 0, length
    start = max(0, min(first_target - TOKENS_BEFORE, length - MOST_TOKENS))
    return start, start + MOST_TOKENS


AS_IT_IS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def pieces_of(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int], start: int, stop: int) -> tuple[str, ...]:
    """Return what each token from ``start`` up to ``stop`` adds to the decoded text.

    A token's text depends on those before it: some tokenizers drop a space at the beginning, and a character may be made of
    several tokens. So longer and longer texts are decoded, and a piece is what is new. Where a character is not whole yet its
    tokens are empty, and the one that completes it has it.
    """
    base = max(0, start - 1)
    known = tokenizer.decode(list(token_ids[base:start]), **AS_IT_IS) if start > base else ""
    pieces = []
    for end in range(start + 1, stop + 1):
        text = tokenizer.decode(list(token_ids[base:end]), **AS_IT_IS)
        if text.endswith(UNFINISHED) and end < stop:
            pieces.append("")
        else:
            pieces.append(text[_length_in_common(known, text) :])
            known = text
    return tuple(pieces)


def _length_in_common(one: str, other: str) -> int:
    pairs = zip(one, other, strict=False)
    return next((index for index, (mine, others) in enumerate(pairs) if mine != others), min(len(one), len(other)))


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values)
