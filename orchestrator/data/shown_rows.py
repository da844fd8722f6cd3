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
        self._kept: list[tuple[NumberedRow, Example]] = []
        self._sources: set[str] = set()

    def look(self, rows: Sequence[NumberedRow], used: TokenizedRows) -> None:
        """Look at some rows, and what became of them."""
        by_number = {row.number: row for row in rows}
        for example in used.examples:
            self._look_at(by_number[example.row], example)

    def add(self, following: "RowsToShow") -> None:
        """Look at the rows that others kept of the rows that follow; what is kept is as if all had been looked at here."""
        for row, example in following._kept:
            self._look_at(row, example)

    def _look_at(self, row: NumberedRow, example: Example) -> None:
        if row.source not in self._sources or len(self._kept) < len(self._sources) + ROWS_TO_SHOW:
            self._sources.add(row.source)
            self._kept.append((row, example))

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Return them as text with their targets marked."""
        first_of = {row.source: row.number for row, _ in reversed(self._kept)}
        first = [(row, example) for row, example in self._kept if row.number == first_of[row.source]]
        others = [(row, example) for row, example in self._kept if row.number != first_of[row.source]]
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
