"""Which tokens are taught and how much each row counts, beside the weights of the loss's kind. N targets, V vocabulary.

Selections rank the targets of one row among each other, so that a row's loss does not depend on the rows beside it; how
many are kept is known from the row's length alone, so that a step's loss needs no number from another worker.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from losses.config import TeacherLoss
from losses.loss_state import LossState
from losses.teachers import Teacher, predictions
from losses.topk_teacher import working_dtype
from losses.weighing_config import DistantTokens, TeacherLossSamples, UncertainStudentTokens, UncertainTeacherTokens


def sample_weights(teacher_loss: Tensor, samples: TeacherLossSamples, state: LossState) -> Tensor:
    """Return the weight [R] of rows from the teacher's own mean loss [R] on them, in nats per target.

    exp(-1 / sqrt(d)) with d = exp(-steepness (x - threshold)); arXiv 2405.08019.
    """
    threshold = samples.threshold_start + (samples.threshold_end - samples.threshold_start) * state.progress
    return torch.exp(-torch.exp(samples.steepness * (teacher_loss - threshold) / 2))


def kept_count(count: int, fraction: float) -> int:
    """Return how many of a row's ``count`` targets are taught: the share, rounded, but at least one of those there are."""
    return min(count, max(1, round(fraction * count)))


def selection_factor(row_counts: Sequence[int], fraction: float) -> float:
    """Return by how much taught tokens weigh more because the others weigh nothing: targets of the step over taught ones."""
    taught = sum(kept_count(count, fraction) for count in row_counts)
    return sum(row_counts) / taught if taught else 1.0


def highest_in_rows(scores: Tensor, row_counts: Sequence[int], fraction: float) -> Tensor:
    """Return a bool [N] mask of the targets that are taught: in each row those of the highest score, ties by position.

    Args:
        scores: [N], row after row.
        row_counts: number of targets of each row.
        fraction: share of each row's targets.

    Raises:
        ValueError: if the rows do not add up to N.
    """
    if sum(row_counts) != len(scores):
        raise ValueError(f"row_counts adds up to {sum(row_counts)}, but there are {len(scores)} targets; they must be as many")
    taught = torch.zeros_like(scores, dtype=torch.bool)
    for row_scores, row_taught in zip(scores.split(list(row_counts)), taught.split(list(row_counts)), strict=True):
        order = torch.argsort(row_scores, stable=True, descending=True)
        row_taught[order[: kept_count(len(order), fraction)]] = True
    return taught


@torch.no_grad()
def selection_scores(student_logits: Tensor, targets: Tensor, teacher: Teacher, loss: TeacherLoss) -> Tensor:
    """Return by what the targets of a row are ranked, [N]; the highest are taught.

    The teacher's uncertainty; the entropy of the student in nats; or the Hellinger distance of both, which is
    sqrt(sum (sqrt p - sqrt q)^2 / 2), over the classes that the teacher's support knows.
    """
    match loss.tokens:
        case UncertainTeacherTokens():
            return teacher.uncertainty
        case UncertainStudentTokens():
            logprobs = student_logits.to(working_dtype(student_logits)).log_softmax(dim=1)
            return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(dim=1)
        case DistantTokens():
            p, q = (side.logprobs for side in predictions(teacher, student_logits, targets, loss.tail))
            return ((p / 2).exp() - (q / 2).exp()).norm(dim=1) / math.sqrt(2)
    raise AssertionError(f"{loss.tokens.kind} ranks nothing")
