"""What became of the rows of a run, in numbers and in sentences for the terminal."""

from collections import Counter
from dataclasses import dataclass, field, fields

from orchestrator.config.data import DataConfig
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


@dataclass
class SplitTally:
    """What became of the rows of a split so far; ``DataCounts`` says what each field counts, of both splits together."""

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    dropped_long: int = 0
    truncated: int = 0
    without_target: int = 0
    without_answer: int = 0
    merged_at_border: int = 0
    respaced: int = 0
    longest: int = 0
    longest_read: int = 0
    largest_id: int = 0
    rows_with_special_tokens: int = 0
    special_tokens: Counter[str] = field(default_factory=Counter)
    turn_ends: Counter[str] = field(default_factory=Counter)
    asked_for_date: bool = False

    @staticmethod
    def of(rendered: RenderedRows, used: TokenizedRows) -> "SplitTally":
        """Count some rows: as text, and what became of them."""
        special_tokens = Counter[str]()
        for row in rendered.rows:
            special_tokens.update(dict(row.special_tokens))
        return SplitTally(
            rows=len(used.examples),
            tokens=sum(len(example.token_ids) for example in used.examples),
            targets=sum(int(example.loss_mask.sum()) for example in used.examples),
            dropped_long=used.dropped_long,
            truncated=used.truncated,
            without_target=used.without_target,
            without_answer=rendered.without_answer,
            merged_at_border=used.merged_at_border,
            respaced=sum(row.respaced_turns > 0 for row in used.kept),
            longest=used.longest,
            longest_read=used.longest_read,
            largest_id=used.largest_id,
            rows_with_special_tokens=sum(bool(row.special_tokens) for row in rendered.rows),
            special_tokens=special_tokens,
            turn_ends=Counter(end for row in used.kept for end in row.turn_ends),
            asked_for_date=rendered.template_asked_for_date,
        )

    def add(self, other: "SplitTally") -> None:
        """Count further rows of the split."""
        for one in fields(self):
            mine, others = getattr(self, one.name), getattr(other, one.name)
            together = max(mine, others) if one.name in ("longest", "longest_read", "largest_id") else mine + others
            setattr(self, one.name, bool(together) if one.name == "asked_for_date" else together)

    @property
    def read(self) -> int:
        """Rows that were looked at."""
        return self.rows + self.dropped_long + self.without_target + self.without_answer

    def require_rows(self, split: str, data: DataConfig) -> None:
        """Raise a ``ValueError`` if no row of the split is used."""
        if not self.rows:
            raise ValueError(
                f"no {split} row is left: {self.dropped_long} exceed data.max_tokens {data.max_tokens}, {self.without_target} "
                f"have no target within it, {self.without_answer} have no answer"
                + (f"; data.max_tokens={self.longest_read} would keep all that have one" if self.longest_read else "")
            )


def count_data(
    train: SplitTally, heldout: SplitTally, heldout_rows_in_train: int, data: DataConfig, by_source: Counter[str],
    shown_rows: list[str],
) -> DataCounts:  # fmt: skip
    """Return the counts of both splits.

    Args:
        train: what became of the training rows.
        heldout: what became of the held-out rows.
        heldout_rows_in_train: how many of these the training rows hold too.
        data: how they were read.
        by_source: rows chosen from each source, before any are held out.
        shown_rows: some of the training rows, for the reader.
    """
    splits = (train, heldout)
    return DataCounts(
        rows_read=sum(split.read for split in splits),
        rows_dropped_long=sum(split.dropped_long for split in splits),
        rows_truncated=sum(split.truncated for split in splits),
        rows_without_target=sum(split.without_target for split in splits),
        rows_merged_at_border=sum(split.merged_at_border for split in splits),
        train_rows=train.rows,
        heldout_rows=heldout.rows,
        heldout_rows_in_train=heldout_rows_in_train,
        train_tokens=train.tokens,
        train_targets=train.targets,
        heldout_targets=heldout.targets,
        longest=max(split.longest for split in splits),
        longest_read=max(split.longest_read for split in splits),
        largest_id=max(split.largest_id for split in splits),
        rows_without_answer=sum(split.without_answer for split in splits),
        rows_respaced=sum(split.respaced for split in splits),
        special_tokens=dict(train.special_tokens + heldout.special_tokens),
        rows_with_special_tokens=sum(split.rows_with_special_tokens for split in splits),
        turn_ends=dict(train.turn_ends + heldout.turn_ends),
        template_date=str(data.chat.date) if data.chat is not None and any(split.asked_for_date for split in splits) else None,
        rows_of_sources={key: by_source[key] for key in data.training_sources},
        shown_rows=shown_rows,
    )
