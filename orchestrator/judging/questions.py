"""What a judge is asked: each model's answer beside the reference, or answers of two models in both orders."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from actors.config.judge import JudgeConfig
from actors.evaluation.answers import GeneratedAnswer
from orchestrator.judging.prompts import QuestionTemplate

REFERENCE = "reference"
"""In the place of a model's name, the answer that the data has."""


@dataclass(frozen=True, slots=True)
class Question:
    """Two answers to one prompt, which the judge is to compare."""

    row: int
    """Index of the row in its dataset."""

    model: str
    """Whose answer is measured."""

    against: str
    """Whose answer stands beside it: another model's, or the reference."""

    model_first: bool
    """Whether the model's answer is A, and the other one B."""

    text: str
    """What the judge reads."""

    key: str
    """Hash of all that a verdict depends on; equal questions share a verdict."""


class QuestionMaker:
    """Makes the questions of one judge."""

    def __init__(self, settings: JudgeConfig, address: str, template: QuestionTemplate) -> None:
        self._settings = settings
        self._address = address
        self._template = template

    def ratings(self, answers: Mapping[str, Sequence[GeneratedAnswer]]) -> list[Question]:
        """Return one question an answer: it and its reference, to be rated together (arXiv 2402.11890, 2306.05685).

        Which of the two stands first is drawn once for each prompt, the same for all models.
        """
        return [
            self._question(answer, model, REFERENCE, answer.generated, answer.reference, _drawn(answer.prompt))
            for model, of_model in answers.items()
            for answer in of_model
        ]

    def pairs(
        self, answers: Mapping[str, Sequence[GeneratedAnswer]], model: str, opponents: Sequence[str]
    ) -> list[Question]:
        """Return two questions a row and opponent: the answers of both, in both orders; none where they are the same text."""
        questions = []
        for opponent in opponents:
            for ours, theirs in same_rows(answers[model], answers[opponent]):
                if ours.generated.strip() != theirs.generated.strip():
                    for model_first in (True, False):
                        questions.append(
                            self._question(ours, model, opponent, ours.generated, theirs.generated, model_first)
                        )
        return questions

    def _question(
        self, answer: GeneratedAnswer, model: str, against: str, ours: str, theirs: str, model_first: bool
    ) -> Question:
        first, second = (ours, theirs) if model_first else (theirs, ours)
        text = self._template.question(answer.prompt.strip(), answer.reference.strip(), first.strip(), second.strip())
        return Question(answer.row, model, against, model_first, text, self._key(text))

    def _key(self, text: str) -> str:
        settings = self._settings
        content = [settings.model, self._address, settings.protocol, settings.temperature, text]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def same_rows(
    ours: Sequence[GeneratedAnswer], theirs: Sequence[GeneratedAnswer]
) -> Iterator[tuple[GeneratedAnswer, GeneratedAnswer]]:
    """Yield the answers of two models to the same rows."""
    by_row = {answer.row: answer for answer in theirs}
    return ((answer, by_row[answer.row]) for answer in ours if answer.row in by_row)


def identity_of(questions: Sequence[Question]) -> str:
    """Return a hash of all questions of a judging: whoever has judged them has nothing new to ask."""
    return hashlib.sha256("".join(sorted(question.key for question in questions)).encode()).hexdigest()


def _drawn(text: str) -> bool:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[0] % 2 == 0
