"""A slow reading of the policy gradient (MiniLLM, arXiv 2306.08543), in Python's own floats. Shares no code with ``losses/``.

A step is a list of rows, a row a list of tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tests.reference import formulas
from tests.reference.formulas import Logits


@dataclass(frozen=True)
class Token:
    """A target, and how it came about."""

    teacher: Logits
    student: Logits
    """As it is now."""
    target: int
    student_then: float | None = None
    """Its log-probability by the student when it was drawn; None if the data has it."""
    drawn_by: float | None = None
    """By which it was drawn."""


@dataclass(frozen=True)
class Knobs:
    exact_weight: float = 1.0
    discount: float = 1.0
    length_normalization: bool = True
    whiten: bool = True
    reward_scale: float = 0.5
    most_reward: float | None = 100.0
    clip_ratio: float | None = 0.2
    corpus_weight: float = 0.0


def reward(token: Token, knobs: Knobs) -> float:
    assert token.student_then is not None
    value = (formulas.log_softmax(token.teacher)[token.target] - token.student_then) / knobs.reward_scale
    return value if knobs.most_reward is None else max(-knobs.most_reward, min(value, knobs.most_reward))


def advantages(rows: Sequence[Sequence[Token]], knobs: Knobs) -> list[list[float]]:
    """Of the rows that a model wrote, by row and token; an empty list for a row of the data's."""
    found: list[list[float]] = []
    for row in rows:
        found.append([])
        if row and row[0].student_then is None:
            continue
        rewards = [reward(token, knobs) for token in row]
        for here in range(len(row)):
            value = (1 - knobs.exact_weight) * rewards[here]
            for later in range(here + 1, len(row)):
                value += knobs.discount ** (later - here) * rewards[later]
            found[-1].append(value / (len(row) - here) if knobs.length_normalization else value)
    if not knobs.whiten:
        return found
    every = [value for row in found for value in row]
    mean = formulas.mean(every)
    deviation = math.sqrt(formulas.mean([(value - mean) ** 2 for value in every]) + 1e-8)
    return [[(value - mean) / deviation for value in row] for row in found]


def step_loss(rows: Sequence[Sequence[Token]], knobs: Knobs) -> float:
    """The loss of an optimizer step over all its tokens, the teacher's support the whole vocabulary."""
    losses = []
    for row, row_advantages in zip(rows, advantages(rows, knobs), strict=True):
        for index, token in enumerate(row):
            now = formulas.log_softmax(token.student)[token.target]
            if token.student_then is None or token.drawn_by is None:
                losses.append(-knobs.corpus_weight * now)
                continue
            advantage, ratio = row_advantages[index], math.exp(now - token.student_then)
            importance = math.exp(token.student_then - token.drawn_by)
            bound = ratio
            if knobs.clip_ratio is not None:
                bound = max(1 - knobs.clip_ratio, min(ratio, 1 + knobs.clip_ratio))
            policy = max(-advantage * ratio * importance, -advantage * bound * importance)
            losses.append(policy + knobs.exact_weight * formulas.full_divergence(token.student, token.teacher))
    return formulas.mean(losses)
