"""What became of the rows of a run, in numbers and in sentences for the terminal."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.config.data import DataConfig
from orchestrator.data.mixture import NumberedRow
from orchestrator.data.templates import RenderedRows
from orchestrator.data.tokenization import TokenizedRows

TREATMENTS = {
    "split": "they are read as ordinary text",
    "strip": "they are removed",
    "keep": "they stay special tokens, and may end turns or begin others",
}


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
    """Tokens of the longest row that is used, as far as it is used."""

    longest_read: int
    """Tokens of the longest row, before rows were dropped or cut."""

    largest_id: int
    """Largest token id of the rows that are used."""

    rows_without_answer: int
    """Rows left out because there is no answer in them."""

    rows_respaced: int
    """Rows used in which the chat template writes an answer with other white space than the row."""

    special_tokens: dict[str, int]
    """Special tokens inside people's text, and how often they stood there."""

    rows_with_special_tokens: int
    """Rows that hold them."""

    turn_ends: dict[str, int]
    """Special tokens with which learned turns end, and how many; empty text for those that none ends."""

    template_date: str | None
    """The day that the chat template was told it is; None if it has not asked."""

    rows_of_sources: dict[str, int]
    """Rows chosen from each source of training rows, before any are held out, by the source's key."""

    shown_rows: list[str]
    """Some training rows as text with their targets marked, the first of each source among them."""

    def lines(self, data: DataConfig) -> list[str]:
        """Return sentences for the terminal; what is zero and would be bad news otherwise is left out."""
        remarks = {
            f"dropped as too long (the longest has {self.longest_read} tokens, data.max_tokens is {data.max_tokens})":
                self.rows_dropped_long,
            f"cut as too long (the longest has {self.longest_read} tokens)": self.rows_truncated,
            "dropped without a target": self.rows_without_target,
            "dropped without an answer": self.rows_without_answer,
            "with a token across the border of prompt and response": self.rows_merged_at_border,
            "whose answer the chat template writes with other white space": self.rows_respaced,
            "held out but also among the training rows": self.heldout_rows_in_train,
        }  # fmt: skip
        lines = [
            f"{self.rows_read} rows read: {self.train_rows} to train on ({self.train_tokens} tokens, {self.train_targets} "
            f"targets), {self.heldout_rows} held out ({self.heldout_targets} targets), longest {self.longest} tokens"
            + "".join(f"; {count} {remark}" for remark, count in remarks.items() if count)
        ]
        if len(self.rows_of_sources) > 1:
            lines.append("rows of " + ", ".join(f"{key}: {rows}" for key, rows in self.rows_of_sources.items()))
        if self.special_tokens:
            names = ", ".join(f"{token} {count}" for token, count in sorted(self.special_tokens.items()))
            lines.append(
                f"{self.rows_with_special_tokens} rows hold special tokens in people's text ({names}): "
                f"{TREATMENTS[data.special_tokens]} (data.special_tokens={data.special_tokens})"
            )
        if self.template_date is not None:
            lines.append(f"the chat template writes today's date, which is {self.template_date} in this run (data.format.date)")
        if unended := self.turn_ends.get("", 0):
            lines.append(
                f"{unended} answers end in no special token, so a model does not learn from them where to stop; a template that "
                "ends each turn with one would do (data.format.template)"
            )
        return [*lines, *self.shown_rows]


def count_data(
    train: TokenizedRows, heldout: TokenizedRows, rendered: Sequence[RenderedRows], data: DataConfig,
    rows: Sequence[NumberedRow], shown_rows: list[str],
) -> DataCounts:  # fmt: skip
    """Return the counts of both splits.

    Args:
        train: what became of the training rows.
        heldout: what became of the held-out rows.
        rendered: the rows of both as text.
        data: how they were read.
        rows: those of both, before they were rendered.
        shown_rows: some of the training rows, for the reader.
    """
    sources = Counter(row.source for row in rows)
    trained = {example.key for example in train.examples}
    splits = (train, heldout)
    texts = [row for split in rendered for row in split.rows]
    without_answer = sum(split.without_answer for split in rendered)
    special: Counter[str] = Counter()
    for row in texts:
        special.update(dict(row.special_tokens))
    asked_for_date = any(split.template_asked_for_date for split in rendered)
    return DataCounts(
        rows_read=sum(len(rows.examples) + rows.dropped_long + rows.without_target for rows in splits) + without_answer,
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
        longest_read=max(rows.longest_read for rows in splits),
        largest_id=max(rows.largest_id for rows in splits),
        rows_without_answer=without_answer,
        rows_respaced=sum(row.respaced_turns > 0 for rows in splits for row in rows.kept),
        special_tokens=dict(special),
        rows_with_special_tokens=sum(bool(row.special_tokens) for row in texts),
        turn_ends=dict(Counter(end for rows in splits for row in rows.kept for end in row.turn_ends)),
        template_date=str(data.chat.date) if data.chat is not None and asked_for_date else None,
        rows_of_sources={key: sources[key] for key in data.training_sources},
        shown_rows=shown_rows,
    )
