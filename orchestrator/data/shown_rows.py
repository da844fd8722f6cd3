"""Rows as a reader of the log sees them: all that the models see, with the targets marked."""

from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from actors.records import Example
from orchestrator.data.mixture import NumberedRow
from orchestrator.data.tokenization import TokenizedRows

ROWS_TO_SHOW = 3
OPEN, CLOSE = "⟦", "⟧"
LONGEST_STRETCH = 400
"""Characters of a stretch of prompt or targets that are shown."""


class RowsToShow:
    """The first row that is used of each source, and further ones up to three."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[NumberedRow, Example]] = {}
        self._others: list[tuple[NumberedRow, Example]] = []

    def look(self, rows: Sequence[NumberedRow], used: TokenizedRows) -> None:
        """Look at some rows, and what became of them."""
        by_number = {row.number: row for row in rows}
        for example in used.examples:
            row = by_number[example.row]
            if row.source not in self._first:
                self._first[row.source] = row, example
            elif len(self._others) < ROWS_TO_SHOW:
                self._others.append((row, example))

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return them as text with their targets marked."""
        first = list(self._first.values())
        return [
            f"{row.place}, {len(example.token_ids)} tokens, {int(example.loss_mask.sum())} of them targets, in {OPEN} {CLOSE}:\n"
            + with_marked_targets(example, tokenizer)
            for row, example in first + self._others[: max(0, ROWS_TO_SHOW - len(first))]
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
