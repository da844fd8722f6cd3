"""Held-out texts, and how a generated answer compares with its reference: exact match and Rouge-L."""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rouge_score.rouge_scorer import RougeScorer

from actors.config.models import TaskMeasure


@dataclass(frozen=True, slots=True)
class HeldoutText:
    """One held-out row as text."""

    row: int
    """Index of the row in its dataset."""

    task: str | None
    """Kind of task, where the data says."""

    prompt: str
    """What the model is asked."""

    response: str
    """What it should answer."""


@dataclass(frozen=True, slots=True)
class GeneratedAnswer:
    """What a model answered to one held-out prompt."""

    row: int
    """Index of the row in its dataset."""

    task: str | None
    """Kind of task, where the data says."""

    prompt: str
    """What the model was asked."""

    reference: str
    """What it should have answered."""

    generated: str
    """What it did answer, without special tokens."""

    correct: bool
    """Whether the two give the same answer."""

    rouge_l: float | None
    """Rouge-L of generated against reference, 0 to 1; None where it is not defined."""


class AnswerComparison:
    """Tells whether generated texts give the answers of their references.

    With a pattern the answer is the first group of its last match; without one it is the whole text. White space around
    an answer does not count.
    """

    def __init__(self, pattern: str | None) -> None:
        self._pattern = None if pattern is None else re.compile(pattern)
        self._rouge = RougeScorer(["rougeL"], use_stemmer=True)

    def answer(self, text: str) -> str | None:
        """Return the answer that a text gives, or None if it gives none."""
        if self._pattern is None:
            return text.strip()
        matches = list(self._pattern.finditer(text.strip()))
        return None if not matches or matches[-1].group(1) is None else matches[-1].group(1).strip()

    def require_answers(self, texts: Sequence[HeldoutText]) -> None:
        """Raise if a reference has no answer that the pattern matches.

        Raises:
            ValueError: naming the first such row.
        """
        for text in texts:
            if self.answer(text.response) is None:
                assert self._pattern is not None, "the whole text always is an answer"
                raise ValueError(
                    f"row {text.row}: evaluate.answer_pattern {self._pattern.pattern!r} finds no answer in its response "
                    f"{shortened(text.response)!r}; a pattern that matches every response would do, or null for the whole text"
                )

    def compare(self, text: HeldoutText, generated: str) -> GeneratedAnswer:
        """Return the scored answer to one prompt."""
        return GeneratedAnswer(
            row=text.row,
            task=text.task,
            prompt=text.prompt,
            reference=text.response,
            generated=generated,
            correct=self.answer(generated) == self.answer(text.response),
            rouge_l=self._rouge_l(text.response, generated),
        )

    def _rouge_l(self, reference: str, generated: str) -> float | None:
        # The scorer's words are runs of a-z and 0-9: a reference in another script has none and would always score 0.
        if not re.search("[a-z0-9]", reference.lower()):
            return None
        return float(self._rouge.score(reference, generated)["rougeL"].fmeasure)


def means_by_task(answers: Iterable[GeneratedAnswer], measure: TaskMeasure) -> dict[str, float | None]:
    """Return exact match or mean Rouge-L of the answers to each kind of task, by its name.

    Answers of no named task are left out; None is the Rouge-L of a task of which no answer has one.
    """
    sums: dict[str, list[float]] = {}
    for answer in answers:
        if answer.task is not None:
            value = answer.rouge_l if measure == "rouge_l" else float(answer.correct)
            sums.setdefault(answer.task, []).extend([] if value is None else [value])
    return {task: fmean(values) if values else None for task, values in sums.items()}


def read_heldout_texts(path: Path, rows: Sequence[int]) -> list[HeldoutText]:
    """Return the texts of the held-out rows, a JSON object a line, in the order of ``rows``.

    Raises:
        ValueError: if the file's rows are not these.
    """
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    texts = [HeldoutText(line["row"], line.get("task"), line["prompt"], line["response"]) for line in lines]
    found = [text.row for text in texts]
    if found != list(rows):
        place = next((index for index, (ours, theirs) in enumerate(zip(rows, found, strict=False)) if ours != theirs), None)
        what = f"{len(found)} rows where there are {len(rows)} examples" if place is None else (
            f"row {found[place]} at line {place + 1}, the examples row {rows[place]}"
        )  # fmt: skip
        raise ValueError(f"{path} does not belong to its examples: it holds {what}; prepare the data again")
    return texts


def shortened(text: str, length: int = 80) -> str:
    """Return the end of a long text, where answers stand, after an ellipsis."""
    return text if len(text) <= length else "…" + text[-(length - 1) :]
