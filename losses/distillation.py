"""From logits to a step's loss: terms times weights, summed. N targets of this micro-batch, V vocabulary."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from losses.config import HardLabelLoss, LossConfig
from losses.support import TeacherSupport, check_targets, working_dtype
from losses.teaching import TokenWeights
from losses.terms import (
    Prediction,
    student_log_odds,
    student_prediction,
    target_and_diversity,
    teacher_prediction,
)


@dataclass
class LossSums:
    """A loss, and sums over its tokens for reports. All are scalar tensors; all may be added, over micro-batches and ranks."""

    loss: Tensor
    """The weighted sum; the only one with a gradient."""

    target_term: Tensor
    """Sum of TKD, unweighted."""

    diversity_term: Tensor
    """Sum of DKD, unweighted."""

    easy_diversity: Tensor
    """Sum of DKD over easy tokens."""

    hard_target: Tensor
    """Sum of TKD over hard tokens."""

    hard_diversity: Tensor
    """Sum of DKD over hard tokens."""

    cross_entropy: Tensor
    """Sum of the cross entropy to the data's tokens, in nats, unweighted."""

    targets: Tensor
    """Number of tokens."""

    easy: Tensor
    """Number of easy tokens."""

    @staticmethod
    def zero(device: torch.device | str) -> "LossSums":
        """Return the sums over no tokens."""
        return LossSums(*(torch.zeros((), device=device) for _ in fields(LossSums)))

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(*(mine + others for mine, others in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all sums in the order of the fields, so that ``LossSums(*sums.tensors())`` is the same again."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def detach(self) -> "LossSums":
        """Return the sums without a gradient."""
        return LossSums(*(value.detach() for value in self.tensors()))

    def means(self) -> dict[str, float]:
        """Return each term's mean, in nats, over the tokens it speaks of (0 where there are none), and the easy share."""
        targets, easy = max(float(self.targets), 1.0), float(self.easy)
        hard = max(float(self.targets) - easy, 1.0)
        return {
            "target_term": float(self.target_term) / targets,
            "diversity_term": float(self.diversity_term) / targets,
            "easy_diversity": float(self.easy_diversity) / max(easy, 1.0),
            "hard_target": float(self.hard_target) / hard,
            "hard_diversity": float(self.hard_diversity) / hard,
            "cross_entropy": float(self.cross_entropy) / targets,
            "targets": float(self.targets),
            "easy_share": easy / targets,
        }


def distillation_loss(
    student_logits: Tensor, targets: Tensor, teacher: TeacherSupport | None, weights: TokenWeights, loss: LossConfig
) -> LossSums:
    """Return the loss of N tokens: their share of the optimizer step's loss, since ``weights`` hold all divisions.

    Args:
        student_logits: [N, V], any floating type; computed in float32, or float64 if they are.
        targets: int64 [N], the data's tokens.
        teacher: what the teacher says at the targets; unused, and may be None, for teaching ``hard_label``.
        weights: of these N tokens, cut from those of the whole step.
        loss: which divergence; the teaching's part is in the weights already.

    Raises:
        ValueError: naming the argument, its shape or value, and the right one.
    """
    check_targets(student_logits, targets)
    check_teacher_and_weights(targets, student_logits.shape[1], teacher, weights, loss)
    return weighted_sums(student_logits, targets, teacher, weights, loss)


def check_teacher_and_weights(
    targets: Tensor, vocab_size: int, teacher: TeacherSupport | None, weights: TokenWeights, loss: LossConfig
) -> None:
    """Refuse a teacher or weights that do not belong to the targets [N].

    Raises:
        ValueError: naming the argument, its shape or value, and the right one.
    """
    if len(weights) != len(targets):
        raise ValueError(f"weights has {len(weights)} rows, but there are {len(targets)} targets; they must be as many")
    if isinstance(loss, HardLabelLoss):
        return
    if teacher is None:
        raise ValueError(f"teacher is None, but teaching {loss.teaching} needs one; only hard_label does without")
    teacher.check(targets, vocab_size)


def weighted_sums(
    student_logits: Tensor, targets: Tensor, teacher: TeacherSupport | None, weights: TokenWeights, loss: LossConfig
) -> LossSums:
    """``distillation_loss`` on arguments that have been checked."""
    dtype = working_dtype(student_logits)
    cross_entropy_weight, target_weight = weights.cross_entropy.to(dtype), weights.target.to(dtype)
    diversity_weight = weights.diversity.to(dtype)
    if isinstance(loss, HardLabelLoss):
        log_odds = student_log_odds(student_logits, targets)
        student = Prediction(log_odds, log_odds.new_zeros(len(targets), 1))
        target_term = diversity_term = torch.zeros_like(log_odds)
    else:
        assert teacher is not None, "checked by the caller"
        student = student_prediction(student_logits, targets, teacher.topk_ids, loss.tail)
        teacher_side = teacher_prediction(teacher, loss.tail, dtype)
        target_term, diversity_term = target_and_diversity(teacher_side, student, loss.divergence)
        if loss.teaching == "coupled" and loss.divergence == "reverse_kl":
            # KL(q || p) couples by the first argument's mass off the target: the student's, and it has a gradient.
            diversity_weight = diversity_weight * student.uncertainty
    cross_entropy = student.cross_entropy
    total = target_weight * target_term + diversity_weight * diversity_term + cross_entropy_weight * cross_entropy
    return summed(total.sum(), target_term.detach(), diversity_term.detach(), cross_entropy.detach(), weights.easy)


def summed(loss: Tensor, target_term: Tensor, diversity_term: Tensor, cross_entropy: Tensor, easy: Tensor) -> LossSums:
    """Put a loss together with the sums of its terms [N], of all tokens and of each group."""
    is_easy = easy.to(target_term.dtype)
    return LossSums(
        loss=loss,
        target_term=target_term.sum(),
        diversity_term=diversity_term.sum(),
        easy_diversity=(diversity_term * is_easy).sum(),
        hard_target=(target_term * (1 - is_easy)).sum(),
        hard_diversity=(diversity_term * (1 - is_easy)).sum(),
        cross_entropy=cross_entropy.sum(),
        targets=torch.full_like(target_term.sum(), len(easy)),
        easy=is_easy.sum(),
    )
