"""From logits to a step's loss: terms times weights, summed. N targets of this micro-batch, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from losses.config import AtkdLoss, DistillationLoss, HardLabelLoss, LossConfig, PolicyGradientLoss, TeacherLoss
from losses.divergence_config import SPLIT_DIVERGENCES
from losses.divergences import DIVERGENCES
from losses.loss_state import LossState
from losses.policy_gradient import clipped_return
from losses.prediction import student_log_odds
from losses.teachers import Teacher, predictions
from losses.terms import Terms, kl_terms
from losses.token_weights import TokenWeights
from losses.topk_teacher import Index, check_targets, working_dtype
from losses.weighing import highest_in_rows, selection_scores
from losses.weighing_config import AllTokens


@dataclass
class LossSums:
    """A loss, and sums over its tokens for reports. All are scalar tensors; all may be added, over micro-batches and ranks."""

    loss: Tensor
    """The weighted sum; the only one with a gradient."""

    divergence: Tensor
    """Sum of the divergence, unweighted."""

    target_term: Tensor
    """Sum of TKD, unweighted; 0 of a divergence that does not fall into two terms, as are the four below."""

    diversity_term: Tensor
    """Sum of DKD, unweighted."""

    easy_diversity: Tensor
    """Sum of DKD over easy tokens."""

    hard_target: Tensor
    """Sum of TKD over hard tokens."""

    hard_diversity: Tensor
    """Sum of DKD over hard tokens."""

    easy_loss: Tensor
    """The part of the loss that easy tokens make."""

    cross_entropy: Tensor
    """Sum of the cross entropy to the data's tokens, in nats, unweighted."""

    targets: Tensor
    """Number of tokens the sums are over: all targets, or those taught where a selection leaves the others out."""

    easy: Tensor
    """Number of easy tokens."""

    clipped: Tensor
    """Number of tokens that a policy gradient learns from no more, since their probability has moved far enough."""

    @staticmethod
    def zero(device: torch.device | str, dtype: torch.dtype = torch.float32) -> "LossSums":
        """Return the sums over no tokens."""
        return LossSums(*(torch.zeros((), device=device, dtype=dtype) for _ in fields(LossSums)))

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(*(mine + others for mine, others in zip(self.tensors(), other.tensors(), strict=True)))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all sums in the order of the fields, so that ``LossSums(*sums.tensors())`` is the same again."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def detach(self) -> "LossSums":
        """Return the sums without a gradient."""
        return LossSums(*(value.detach() for value in self.tensors()))

    def means(self, loss: LossConfig) -> dict[str, float]:
        """Return what this loss has to report: each term's mean in nats over the tokens it speaks of (0 where there are none).

        ``easy_loss`` is a part of the loss, not a mean.
        """
        targets, easy = max(float(self.targets), 1.0), float(self.easy)
        hard = max(float(self.targets) - easy, 1.0)
        found = {"cross_entropy": float(self.cross_entropy) / targets, "targets": float(self.targets)}
        if isinstance(loss, HardLabelLoss):
            return found
        found["divergence"] = float(self.divergence) / targets
        if isinstance(loss, PolicyGradientLoss):
            return found | {"clipped_share": float(self.clipped) / targets}
        if loss.divergence.kind in SPLIT_DIVERGENCES:
            found["target_term"] = float(self.target_term) / targets
            found["diversity_term"] = float(self.diversity_term) / targets
        if isinstance(loss, AtkdLoss):
            found["easy_share"] = easy / targets
            found["easy_diversity"] = float(self.easy_diversity) / max(easy, 1.0)
            found["hard_target"] = float(self.hard_target) / hard
            found["hard_diversity"] = float(self.hard_diversity) / hard
            found["easy_loss"] = float(self.easy_loss)
        return found


def distillation_loss(
    student_logits: Tensor,
    targets: Tensor,
    teacher: Teacher | None,
    weights: TokenWeights,
    loss: LossConfig,
    state: LossState | None = None,
    row_counts: Sequence[int] | None = None,
) -> LossSums:
    """Return the loss of N tokens: their share of the optimizer step's loss, since ``weights`` hold all divisions.

    Args:
        student_logits: [N, V], any floating type; computed in float32, or float64 if they are.
        targets: int64 [N], the data's tokens.
        teacher: what the teacher says at the targets; unused, and may be None, for the kind ``hard_label``.
        weights: of these N tokens, cut from those of the whole step.
        loss: which divergence, and which tokens are taught; the kind's part is in the weights already.
        state: where losses that change over a run stand; defaults to their first step.
        row_counts: number of targets of each row, in order; needed by losses that rank the targets of a row.

    Raises:
        ValueError: naming the argument, its shape or value, and the right one.
    """
    check_targets(student_logits, targets)
    check_teacher_and_weights(targets, student_logits.shape[1], teacher, weights, loss, row_counts)
    state = state or LossState.first(loss)
    if selects_tokens(loss):
        assert teacher is not None and row_counts is not None, "checked above"
        taught = highest_in_rows(selection_scores(student_logits, targets, teacher, loss), row_counts, state.kept_fraction)
        kept, weights = taught_alone(taught, weights, loss)
        student_logits, targets, teacher = student_logits[kept], targets[kept], teacher.select(kept)
    return weighted_sums(student_logits, targets, teacher, weights, loss, state)


def taught_alone(taught: Tensor, weights: TokenWeights, loss: TeacherLoss) -> tuple[Index, TokenWeights]:
    """Return which of N tokens to compute, and their weights, when the teacher teaches only some of them.

    The others are left out, or, where cross entropy is mixed in, keep that alone.
    """
    if loss.cross_entropy_weight == 0:
        return taught, weights.select(taught)
    return slice(None), weights.times(taught.to(weights.divergence), 1.0)


def selects_tokens(loss: LossConfig) -> TypeGuard[TeacherLoss]:
    """Whether only some of the targets are taught."""
    return isinstance(loss, DistillationLoss) and not isinstance(loss.tokens, AllTokens)


def check_teacher_and_weights(
    targets: Tensor, vocab_size: int, teacher: Teacher | None, weights: TokenWeights, loss: LossConfig,
    row_counts: Sequence[int] | None, check_values: bool = True,
) -> None:  # fmt: skip
    """Raise if teacher, weights or rows do not belong to the targets [N]; checks the teacher's values on request.

    Raises:
        ValueError: naming the argument, its shape or value, and the right one.
    """
    if len(weights) != len(targets):
        raise ValueError(f"weights has {len(weights)} rows, but there are {len(targets)} targets; they must be as many")
    if isinstance(loss, HardLabelLoss):
        return
    if teacher is None:
        raise ValueError(f"teacher is None, but loss.kind {loss.kind} needs one; only hard_label does without")
    if len(teacher) != len(targets):
        raise ValueError(f"teacher has {len(teacher)} rows, but there are {len(targets)} targets; they must be as many")
    if check_values:
        teacher.check(targets, vocab_size)
    if selects_tokens(loss) and row_counts is None:
        raise ValueError(
            f"row_counts is None, but tokens {loss.tokens.kind} ranks the targets of each row: pass the number of targets of each"
        )


def weighted_sums(
    student_logits: Tensor, targets: Tensor, teacher: Teacher | None, weights: TokenWeights, loss: LossConfig, state: LossState
) -> LossSums:
    """``distillation_loss`` of tokens that are all taught, on arguments that have been checked."""
    dtype = working_dtype(student_logits)
    if isinstance(loss, HardLabelLoss):
        log_odds = student_log_odds(student_logits, targets)
        terms = Terms(torch.zeros_like(log_odds))
    else:
        assert teacher is not None, "checked by the caller"
        teacher_side, student_side = predictions(teacher, student_logits, targets, loss.tail)
        log_odds = student_side.log_odds
        if isinstance(loss, PolicyGradientLoss):
            terms = Terms(kl_terms(student_side, teacher_side).whole)
        else:
            terms = DIVERGENCES[loss.divergence.kind](teacher_side, student_side, loss.divergence, state)
    cross_entropy = -logsigmoid(log_odds)
    total = weights.divergence.to(dtype) * terms.whole + weights.cross_entropy.to(dtype) * cross_entropy
    if terms.target is not None and terms.diversity is not None:
        total = total + weights.target.to(dtype) * terms.target + weights.diversity.to(dtype) * terms.diversity
    clipped = torch.zeros_like(weights.easy)
    if isinstance(loss, PolicyGradientLoss):
        gain, clipped = clipped_return(-cross_entropy, weights.advantage.to(dtype), weights.sampled_logprob.to(dtype), loss)
        total = total - gain
    return summed(total, terms, cross_entropy.detach(), weights.easy, clipped)


def summed(losses: Tensor, terms: Terms, cross_entropy: Tensor, easy: Tensor, clipped: Tensor) -> LossSums:
    """Sum the tokens' weighted losses [N] and their terms [N], of all tokens and of each group."""
    whole = terms.whole.detach()
    nothing = torch.zeros_like(whole)
    target = nothing if terms.target is None else terms.target.detach()
    diversity = nothing if terms.diversity is None else terms.diversity.detach()
    is_easy = easy.to(whole.dtype)
    return LossSums(
        loss=losses.sum(),
        divergence=whole.sum(),
        target_term=target.sum(),
        diversity_term=diversity.sum(),
        easy_diversity=(diversity * is_easy).sum(),
        hard_target=(target * (1 - is_easy)).sum(),
        hard_diversity=(diversity * (1 - is_easy)).sum(),
        easy_loss=(losses.detach() * is_easy).sum(),
        cross_entropy=cross_entropy.sum(),
        targets=torch.full_like(whole.sum(), len(easy)),
        easy=is_easy.sum(),
        clipped=clipped.to(whole.dtype).sum(),
    )
