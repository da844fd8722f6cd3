"""A model's prediction at a target, as the losses read it, from logits [N, V] or from a teacher's support.

A prediction at a target g is two things: the log-odds of the target, log p_g - log(1 - p_g), and the shares
p̂_j = p_j / (1 - p_g) in which the other tokens split what is left. No 1 - p_g is ever taken by subtraction: a saturated
model keeps its log-odds long after its probabilities have rounded to 0 and 1.

A class of no mass (a logit of -inf or below -1e30, an empty tail) counts as one of a mass 1e-38 times that of the largest
class beside it, the least a float32 probability can hold. So a student that puts mass where the teacher has none, or the
other way round, pays 87 nats for it rather than infinitely many, and no gradient is lost. Other logits are taken at their
word.

Shapes: N targets, K top-k, V vocabulary, C classes the non-target mass falls into: the K tokens, and the tail where it is
kept; or, of a dense teacher, all V tokens, among which the target is one of no mass.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import logsigmoid

from losses.config import Tail
from losses.topk_teacher import NO_TOKEN, TopkTeacher, working_dtype

LOG_OF_NOTHING = math.log(torch.finfo(torch.float32).tiny)  # -87.3 nats
LOWEST = -1e30  # logits below stand for -inf: masks are written as the least finite number, whose multiples overflow


@dataclass(frozen=True)
class Prediction:
    """A distribution over the vocabulary, read at a target. Every entry is finite."""

    log_odds: Tensor
    """[N], log p_g - log(1 - p_g) of the target g."""

    nontarget_logprobs: Tensor
    """[N, C], log p̂ of the other classes; normalised over C."""

    target_column: Tensor | None = None
    """int64 [N], which of the C = V classes is the target, where all tokens have a column; None where the target has none."""

    has_tail: bool = False
    """Whether the last of the C classes is the tail, many tokens together."""

    @property
    def uncertainty(self) -> Tensor:
        """[N], 1 - p_g."""
        return torch.sigmoid(-self.log_odds)

    @property
    def cross_entropy(self) -> Tensor:
        """[N], -log p_g."""
        return -logsigmoid(self.log_odds)

    @property
    def logprobs(self) -> Tensor:
        """Log-probabilities of the target and the other classes: [N, V] by token, or [N, 1 + C] with the target first."""
        others = self.nontarget_logprobs + logsigmoid(-self.log_odds)[:, None]
        target = logsigmoid(self.log_odds)[:, None]
        if self.target_column is None:
            return torch.cat([target, others], dim=1)
        return others.scatter(1, self.target_column[:, None], target)


def student_prediction(logits: Tensor, targets: Tensor, topk_ids: Tensor, tail: Tail) -> Prediction:
    """Read logits [N, V] at targets [N], the other tokens split into topk_ids [N, K] and the tail.

    Float32 whatever the logits' type; float64 stays. One pass over the vocabulary forward, one backward.
    """
    chosen, tail_logit = split_logits(logits, targets, topk_ids)
    target_logit, topk_logits = chosen[:, 0], chosen[:, 1:]
    others = torch.cat([topk_logits, tail_logit[:, None]], dim=1)
    log_odds = bounded_log_odds(target_logit, log_sum_exp(others))
    return Prediction(log_odds, normalized(others if tail == "bucket" else topk_logits), has_tail=tail == "bucket")


def student_log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-odds [N] of the targets [N] in logits [N, V]: all that cross entropy needs."""
    target_logit, others_logit = split_logits(logits, targets, targets.new_empty(len(targets), 0))
    return bounded_log_odds(target_logit.squeeze(1), others_logit)


def dense_prediction(logits: Tensor, targets: Tensor) -> Prediction:
    """Read logits [N, V] of either model at targets [N], every other token a class of its own."""
    target_logit, others_logit, nontarget_logprobs = DenseSplit.apply(logits, targets)
    return Prediction(bounded_log_odds(target_logit, others_logit), nontarget_logprobs, target_column=targets)


def teacher_prediction(teacher: TopkTeacher, tail: Tail, dtype: torch.dtype) -> Prediction:
    """Read a teacher's support. The shares are normalised by their own sum, since stored log-probabilities are rounded."""
    log_odds = bounded_log_odds(teacher.target_logprob.to(dtype), teacher.log_uncertainty.to(dtype))
    others = teacher.topk_logprobs
    if tail == "bucket":
        others = torch.cat([others, teacher.tail_logmass[:, None]], dim=1)
    return Prediction(log_odds, normalized(others.to(dtype)), has_tail=tail == "bucket")


def split_logits(logits: Tensor, targets: Tensor, topk_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [N, 1 + K] of the targets and of the top-K, and the log-sum-exp [N] over all other tokens.

    Args:
        logits: [N, V], any floating type; results are float32, or float64 if these are.
        targets: int64 [N].
        topk_ids: int64 [N, K], different from each other and from the target within a row; ``NO_TOKEN`` for a column
            that names none, whose logit is -inf.
    """
    named = topk_ids != NO_TOKEN
    # The target stands in for columns without a token: it is set apart already, and their own gradient is zero.
    ids = torch.cat([targets[:, None], torch.where(named, topk_ids, targets[:, None])], dim=1)
    chosen, rest = SplitLogits.apply(logits, ids)
    return torch.cat([chosen[:, :1], chosen[:, 1:].masked_fill(~named, -torch.inf)], dim=1), rest


class SplitLogits(torch.autograd.Function):
    """Some tokens' logits [N, M] and the log-sum-exp [N] of the others, with the closed-form gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        values = logits.to(working_dtype(logits))
        others = values.scatter(1, ids, -torch.inf)  # one copy, used up: a log-sum-exp in place
        largest = others.amax(dim=1, keepdim=True)
        largest = largest.masked_fill(largest == -torch.inf, 0.0)
        rest = others.sub_(largest).exp_().sum(dim=1).log_().add_(largest.squeeze(1))
        ctx.save_for_backward(logits, ids, rest)
        return values.gather(1, ids), rest

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, chosen_grad: Tensor, rest_grad: Tensor) -> tuple[Tensor, None]:
        logits, ids, rest = ctx.saved_tensors  # type: ignore[attr-defined]
        # Where no token is left over, subtracting +inf makes every share 0; -inf would make it NaN.
        rest = rest.masked_fill(rest == -torch.inf, torch.inf)
        grad = (logits.to(rest.dtype) - rest[:, None]).exp_().mul_(rest_grad[:, None])
        return grad.scatter_(1, ids, 0.0).scatter_add_(1, ids, chosen_grad).to(logits.dtype), None


class DenseSplit(torch.autograd.Function):
    """The target's logit [N], the others' log-sum-exp [N] and their log-shares [N, V], with the closed-form gradient.

    The target's own column of the log-shares is that of a class of no mass, and so are those of logits of -inf.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        column = targets[:, None]
        target_logit = logits.gather(1, column).squeeze(1).to(working_dtype(logits))
        values = logits.to(working_dtype(logits), copy=True).scatter_(1, column, -torch.inf)
        largest = values.amax(dim=1, keepdim=True)
        nobody = largest < LOWEST  # no token but the target has any mass
        values.sub_(largest.masked_fill(nobody, 0.0)).masked_fill_(values < LOWEST, LOG_OF_NOTHING)
        normalizer = values.exp().sum(dim=1, keepdim=True).log_()
        nontarget_logprobs = values.sub_(normalizer)
        ctx.save_for_backward(nontarget_logprobs, column)
        ctx.dtype = logits.dtype  # type: ignore[attr-defined]
        return target_logit, (largest + normalizer).squeeze(1), nontarget_logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, target_grad: Tensor, others_grad: Tensor, shares_grad: Tensor) -> tuple[Tensor, None]:
        nontarget_logprobs, column = ctx.saved_tensors  # type: ignore[attr-defined]
        each = (others_grad - shares_grad.sum(dim=1))[:, None]
        grad = nontarget_logprobs.exp().mul_(each).add_(shares_grad)
        return grad.scatter_(1, column, target_grad[:, None]).to(ctx.dtype), None  # type: ignore[attr-defined]


def fill_empty(logmasses: Tensor) -> Tensor:
    """Give classes of no mass (-inf) among [N, C] a log-mass 87.3 nats below the row's largest. Theirs is no gradient."""
    largest = logmasses.detach().amax(dim=1, keepdim=True)
    largest = largest.masked_fill(largest < LOWEST, 0.0)
    return torch.where(logmasses < LOWEST, largest + LOG_OF_NOTHING, logmasses)


def normalized(logmasses: Tensor) -> Tensor:
    """Return finite log-probabilities [N, C] from log-masses [N, C]; uniform where no class has any mass."""
    return fill_empty(logmasses).log_softmax(dim=1)


def log_sum_exp(logmasses: Tensor) -> Tensor:
    """Return the log of the summed masses [N] of [N, C]: -inf where all are empty, with a gradient of 0 and not NaN."""
    empty = (logmasses < LOWEST).all(dim=1)
    return fill_empty(logmasses).logsumexp(dim=1).masked_fill(empty, -torch.inf)


def bounded_log_odds(target_logmass: Tensor, others_logmass: Tensor) -> Tensor:
    """Return the log-odds [N] of target against others; ±87.3 where one of them has no mass."""
    sides = fill_empty(torch.stack([target_logmass, others_logmass], dim=1))
    return sides[:, 0] - sides[:, 1]
