"""What a token costs: the target term and the diversity term of a KL divergence (arXiv 2402.11890, section 2).

A model's prediction at a target g is read as two things: the log-odds of the target, log p_g - log(1 - p_g), and the
shares p̂_j = p_j / (1 - p_g) in which the other tokens split what is left. Then KL(p || q) = TKD + UNC * DKD, where TKD
compares the log-odds, DKD the shares, and UNC = 1 - p_g. No 1 - p_g is ever taken by subtraction: a saturated model
keeps its log-odds long after its probabilities have rounded to 0 and 1.

A class of no mass (a logit of -inf, an empty tail) counts as one of a mass 1e-38 times that of the largest class beside
it, the least a float32 probability can hold. So a student that puts mass where the teacher has none, or the other way
round, pays 87 nats for it rather than infinitely many, and no gradient is lost. Finite logits are taken at their word.

Shapes: N targets, K top-k, V vocabulary, C classes the non-target mass falls into: the K, and the tail where it is kept.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import logsigmoid

from losses.support import TeacherSupport, working_dtype

LOG_OF_NOTHING = math.log(torch.finfo(torch.float32).tiny)  # -87.3 nats

Tail = Literal["bucket", "renormalize"]
Divergence = Literal["forward_kl", "reverse_kl"]


@dataclass(frozen=True)
class Prediction:
    """A distribution over the vocabulary, as the terms see it. Every entry is finite."""

    log_odds: Tensor
    """[N], log p_g - log(1 - p_g) of the target g."""

    log_shares: Tensor
    """[N, C], log p̂ of the other classes; normalised over C."""

    @property
    def uncertainty(self) -> Tensor:
        """[N], 1 - p_g."""
        return torch.sigmoid(-self.log_odds)

    @property
    def cross_entropy(self) -> Tensor:
        """[N], -log p_g."""
        return -logsigmoid(self.log_odds)


def student_prediction(logits: Tensor, targets: Tensor, topk_ids: Tensor, tail: Tail) -> Prediction:
    """Read logits [N, V] at targets [N], the other tokens split into topk_ids [N, K] and the tail.

    Float32 whatever the logits' type; float64 stays. One pass over the vocabulary forward, one backward.
    """
    chosen, tail_logit = split_logits(logits, torch.cat([targets[:, None], topk_ids], dim=1))
    target_logit, topk_logits = chosen[:, 0], chosen[:, 1:]
    others = torch.cat([topk_logits, tail_logit[:, None]], dim=1)
    log_odds = bounded_log_odds(target_logit, log_sum_exp(others))
    return Prediction(log_odds, normalized(others if tail == "bucket" else topk_logits))


def student_log_odds(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the log-odds [N] of the targets [N] in logits [N, V]: all that cross entropy needs."""
    target_logit, others_logit = split_logits(logits, targets[:, None])
    return bounded_log_odds(target_logit.squeeze(1), others_logit)


def teacher_prediction(teacher: TeacherSupport, tail: Tail, dtype: torch.dtype) -> Prediction:
    """Read a teacher's support. The shares are normalised by their own sum, since stored log-probabilities are rounded."""
    log_odds = bounded_log_odds(teacher.target_logprob.to(dtype), teacher.log_uncertainty.to(dtype))
    others = teacher.topk_logprobs
    if tail == "bucket":
        others = torch.cat([others, teacher.tail_logmass[:, None]], dim=1)
    return Prediction(log_odds, normalized(others.to(dtype)))


def target_and_diversity(teacher: Prediction, student: Prediction, divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Return the target term [N] and the diversity term [N].

    forward_kl: KL(p_b || q_b) and KL(p̂ || q̂), teacher p first; reverse_kl: KL(q_b || p_b) and KL(q̂ || p̂), the
    paper's "reverse" setting.
    """
    first, second = (teacher, student) if divergence == "forward_kl" else (student, teacher)
    return binary_kl(first.log_odds, second.log_odds), categorical_kl(first.log_shares, second.log_shares)


def binary_kl(p_log_odds: Tensor, q_log_odds: Tensor) -> Tensor:
    """Return KL(p || q) [N] between two distributions over {target, not the target}, from their log-odds [N]."""
    on_target = torch.sigmoid(p_log_odds) * (logsigmoid(p_log_odds) - logsigmoid(q_log_odds))
    off_target = torch.sigmoid(-p_log_odds) * (logsigmoid(-p_log_odds) - logsigmoid(-q_log_odds))
    return on_target + off_target


def categorical_kl(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """Return KL(p || q) [N] between distributions over C classes, from their log-probabilities [N, C]."""
    return (p_logprobs.exp() * (p_logprobs - q_logprobs)).sum(dim=1)


def split_logits(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits [N, M] of some tokens, and the log-sum-exp [N] over all the other tokens of [N, V].

    Args:
        logits: [N, V], any floating type; results are float32, or float64 if these are.
        ids: int64 [N, M], different from each other within a row.
    """
    chosen, rest = SplitLogits.apply(logits, ids)
    return chosen, rest


class SplitLogits(torch.autograd.Function):
    """``split_logits`` with a closed-form gradient: one buffer of the logits' size, where autograd would keep five."""

    @staticmethod
    def forward(ctx: FunctionCtx, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        values = logits.to(working_dtype(logits))
        rest = values.scatter(1, ids, -torch.inf).logsumexp(dim=1)
        ctx.save_for_backward(logits, ids, rest)
        return values.gather(1, ids), rest

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, chosen_grad: Tensor, rest_grad: Tensor) -> tuple[Tensor, None]:
        logits, ids, rest = ctx.saved_tensors  # type: ignore[attr-defined]
        # Where no token is left over, subtracting +inf makes every share 0; -inf would make it NaN.
        rest = rest.masked_fill(rest == -torch.inf, torch.inf)
        grad = (logits.to(rest.dtype) - rest[:, None]).exp_().mul_(rest_grad[:, None])
        return grad.scatter_(1, ids, chosen_grad).to(logits.dtype), None


def fill_empty(logmasses: Tensor) -> Tensor:
    """Give classes of no mass (-inf) among [N, C] a log-mass 87.3 nats below the row's largest. Theirs is no gradient."""
    largest = logmasses.detach().amax(dim=1, keepdim=True)
    largest = largest.masked_fill(largest == -torch.inf, 0.0)
    return torch.where(logmasses == -torch.inf, largest + LOG_OF_NOTHING, logmasses)


def normalized(logmasses: Tensor) -> Tensor:
    """Return finite log-probabilities [N, C] from log-masses [N, C]; uniform where no class has any mass."""
    return fill_empty(logmasses).log_softmax(dim=1)


def log_sum_exp(logmasses: Tensor) -> Tensor:
    """Return the log of the summed masses [N] of [N, C]: -inf where all are empty, with a gradient of 0 and not NaN."""
    empty = (logmasses == -torch.inf).all(dim=1)
    return fill_empty(logmasses).logsumexp(dim=1).masked_fill(empty, -torch.inf)


def bounded_log_odds(target_logmass: Tensor, others_logmass: Tensor) -> Tensor:
    """Return the log-odds [N] of target against others; ±87.3 where one of them has no mass."""
    sides = fill_empty(torch.stack([target_logmass, others_logmass], dim=1))
    return sides[:, 0] - sides[:, 1]
