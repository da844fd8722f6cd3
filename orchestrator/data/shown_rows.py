"""Rows as a reader of the log sees them: all that the models see, with the targets marked."""

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from actors.records import Example
from orchestrator.data.mixture import NumberedRow
from orchestrator.data.tokenization import TokenizedRows

ROWS_TO_SHOW = 3
OPEN, CLOSE = "⟦", "⟧"
LONGEST_STRETCH = 400
"""Characters of a stretch of prompt or targets that are shown."""


def rows_to_show(rows: list[NumberedRow], used: TokenizedRows, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the first row that is used of each source, and further ones up to three, as text with their targets marked.

    Args:
        rows: those of the split, numbered.
        used: what became of them.
        tokenizer: that cut them into tokens.
    """
    by_number = {row.number: row for row in rows}
    examples = [(by_number[example.row], example) for example in used.examples]
    first_of = {row.source: example.row for row, example in reversed(examples)}
    first = [(row, example) for row, example in examples if first_of[row.source] == row.number]
    others = [(row, example) for row, example in examples if first_of[row.source] != row.number]
    return [
        f"{row.place}, {len(example.token_ids)} tokens, {int(example.loss_mask.sum())} of them targets, in {OPEN} {CLOSE}:\n"
        + with_marked_targets(example, tokenizer)
        for row, example in first + others[: max(0, ROWS_TO_SHOW - len(first))]
    ]


def with_marked_targets(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a row's tokens as text, special tokens included; long stretches without their middle."""
    text, ids = "", example.token_ids.tolist()
    for is_target, stretch in groupby(range(len(ids)), key=lambda position: bool(example.loss_mask[position])):
        piece = _without_middle(tokenizer.decode([ids[position] for position in stretch], skip_special_tokens=False))
        text += f"{OPEN}{piece}{CLOSE}" if is_target else piece
    return text


def _without_middle(text: str) -> str:
    if len(text) <= LONGEST_STRETCH:
        return text
    head, tail = LONGEST_STRETCH * 3 // 4, LONGEST_STRETCH // 4
    return f"{text[:head]} [... {len(text) - head - tail} characters ...] {text[-tail:]}"
