"""From verdicts to figures: a model's ratings over those of the references, and wins, ties and losses of a pair of models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.evaluation.answers import GeneratedAnswer
from orchestrator.judging.questions import Question, same_rows
from orchestrator.judging.verdicts import VerdictBook

DRAWS = 2000
"""Samples of the bootstrap."""

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class RatingFigure:
    """How a model's answers are rated beside the references."""

    model: str
    rows: int
    """Rows that were judged."""
    ratio: float | None
    """Sum of the model's ratings over the sum of the references' (arXiv 2402.11890); None without rows, as all that follow."""
    low: float | None
    """Lower end of the 95 % bootstrap interval of the ratio, over rows."""
    high: float | None
    """Upper end."""
    mean: float | None
    """Mean rating of the model, 1 to 10."""
    reference_mean: float | None
    """Mean rating of the references beside it."""


@dataclass(frozen=True, slots=True)
class PairFigure:
    """How a model's answers compare with another's, each pair asked about in both orders."""

    model: str
    against: str
    rows: int
    """Rows with verdicts in both orders, and those on which both models say the same."""
    same_text: int
    """Rows of these on which both say the same: ties that nobody was asked about."""
    win: float | None
    """Share of rows on which both orders find the model's answer better; None without rows, as all that follow."""
    tie: float | None
    """Share of rows that are neither won nor lost."""
    loss: float | None
    """Share of rows on which both orders find the other answer better."""
    disagree: float | None
    """Share of the rows asked about on which the two orders do not say the same; None if none was."""


def rating_figure(model: str, questions: Sequence[Question], book: VerdictBook, seed: int) -> RatingFigure:
    """Return the ratio of sums over a model's rows that have a verdict, with a bootstrap interval drawn by ``seed``."""
    ratings = []
    for question in questions:
        if question.model == model and (found := book.get(question)) is not None:
            a, b = found.verdict.a, found.verdict.b
            ratings.append((a, b) if question.model_first else (b, a))
    if not ratings:
        return RatingFigure(model, 0, None, None, None, None, None)
    pairs = np.array(ratings)  # [rows, 2]: the model's, the reference's
    low, high = ratio_interval(pairs, seed)
    ours, references = pairs.sum(axis=0)
    return RatingFigure(
        model, len(pairs), float(ours / references), low, high, float(pairs[:, 0].mean()), float(pairs[:, 1].mean())
    )


def ratio_interval(pairs: np.ndarray, seed: int) -> tuple[float, float]:
    """Return the 95 % percentile interval of the ratio of sums, rows drawn anew with replacement.

    Args:
        pairs: float [rows, 2], numerators and denominators.
        seed: of the draws.
    """
    generator = np.random.default_rng(seed)
    ratios = np.empty(DRAWS)
    for draw in range(DRAWS):  # one at a time: all at once would take rows × draws numbers
        ours, references = pairs[generator.integers(0, len(pairs), len(pairs))].sum(axis=0)
        ratios[draw] = ours / references
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def pair_figure(
    answers: Mapping[str, Sequence[GeneratedAnswer]], model: str, against: str, questions: Sequence[Question], book: VerdictBook
) -> PairFigure:
    """Return how often a model wins, ties and loses: a win or a loss counts where both orders agree on it, the rest are ties."""
    orders: dict[int, list[float]] = {}
    for question in questions:
        if (question.model, question.against) == (model, against) and (found := book.get(question)) is not None:
            lead = found.verdict.a - found.verdict.b
            orders.setdefault(question.row, []).append(lead if question.model_first else -lead)
    both = [leads for leads in orders.values() if len(leads) == 2]
    asked = {question.row for question in questions if (question.model, question.against) == (model, against)}
    same_text = sum(ours.row not in asked for ours, _ in same_rows(answers[model], answers[against]))
    rows = len(both) + same_text
    if not rows:
        return PairFigure(model, against, 0, 0, None, None, None, None)
    wins = sum(first > 0 and second > 0 for first, second in both)
    losses = sum(first < 0 and second < 0 for first, second in both)
    disagree = sum(np.sign(first) != np.sign(second) for first, second in both) / len(both) if both else None
    return PairFigure(
        model, against, rows, same_text, wins / rows, (rows - wins - losses) / rows, losses / rows,
        None if disagree is None else float(disagree),
    )  # fmt: skip
