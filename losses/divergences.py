"""How student and teacher are compared over the whole vocabulary: one function a divergence, in nats a token.

p is the teacher, q the student, both read at the same N targets as log-probabilities [N, C] over the same C classes: all
tokens of a dense teacher; target, top-K and tail of a truncated one. All but ``top1_cross_entropy`` are zero at p = q.
Merging classes never raises the KLs, their skewed forms, Jensen-Shannon and total variation, so a tail in one bucket stays
below their dense value; the others have no such law. docs/add_a_loss.md says how to add one.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from losses.divergence_config import (
    AdaptiveKL,
    AlphaBeta,
    ForwardKL,
    InterpolatedTarget,
    JensenShannon,
    ReverseKL,
    SampledReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    StudentTemperedKL,
    TemperedKL,
    TopOneCrossEntropy,
    TotalVariation,
)
from losses.loss_state import LossState
from losses.prediction import LOG_OF_NOTHING, Prediction
from losses.terms import Terms, categorical_kl, kl_terms

DivergenceFunction = Callable[[Prediction, Prediction, Any, LossState], Terms]
"""(teacher, student, the divergence's own config, the state of this step) -> what each token costs."""

EQUAL_NATS = 1e-5  # by which log-probabilities of equal tokens may differ in float32
NOTHING_NATS = 1e-4  # by which the share of a class of no mass may differ from its log: some roundings at -87 in float32
LIKELY_AT_ONCE = 64  # tokens looked at when the head of a distribution is sought; four times as many, while they do not do


def forward_kl(teacher: Prediction, student: Prediction, divergence: ForwardKL, state: LossState) -> Terms:
    """KL(p || q) = TKD + UNC * DKD, UNC the teacher's."""
    return kl_terms(teacher, student)


def reverse_kl(teacher: Prediction, student: Prediction, divergence: ReverseKL, state: LossState) -> Terms:
    """KL(q || p) = TKD + UNC * DKD, UNC the student's, with its gradient."""
    return kl_terms(student, teacher)


def jensen_shannon(teacher: Prediction, student: Prediction, divergence: JensenShannon, state: LossState) -> Terms:
    """w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q."""
    p, q, weight = teacher.logprobs, student.logprobs, divergence.teacher_weight
    m = log_mixture(p, q, weight)
    return Terms(weight * categorical_kl(p, m) + (1 - weight) * categorical_kl(q, m))


def skew_forward_kl(teacher: Prediction, student: Prediction, divergence: SkewForwardKL, state: LossState) -> Terms:
    """KL(p || s p + (1 - s) q)."""
    p, q = teacher.logprobs, student.logprobs
    return Terms(categorical_kl(p, log_mixture(p, q, divergence.teacher_share)))


def skew_reverse_kl(teacher: Prediction, student: Prediction, divergence: SkewReverseKL, state: LossState) -> Terms:
    """KL(q || s q + (1 - s) p)."""
    p, q = teacher.logprobs, student.logprobs
    return Terms(categorical_kl(q, log_mixture(q, p, divergence.student_share)))


def adaptive_kl(teacher: Prediction, student: Prediction, divergence: AdaptiveKL, state: LossState) -> Terms:
    """h KL(p || q) + (1 - h) KL(q || p), h the head's share of sum |p - q|; a half each where p = q."""
    p, q = teacher.logprobs, student.logprobs
    gap = (p.exp() - q.detach().exp()).abs_()
    in_head = gap.where(head_of(teacher, p, divergence.head_mass), torch.zeros_like(gap)).sum(dim=1)
    everywhere = gap.sum(dim=1)
    head_share = torch.where(everywhere > 0, in_head / everywhere, torch.full_like(in_head, 0.5))
    return Terms(head_share * categorical_kl(p, q) + (1 - head_share) * categorical_kl(q, p))


def total_variation(teacher: Prediction, student: Prediction, divergence: TotalVariation, state: LossState) -> Terms:
    """Half of sum |p - q|."""
    return Terms((teacher.logprobs.exp() - student.logprobs.exp()).abs().sum(dim=1) / 2)


def tempered_kl(teacher: Prediction, student: Prediction, divergence: TemperedKL, state: LossState) -> Terms:
    """T² KL(p_T || q_T)."""
    temperature = divergence.temperature
    p, q = tempered(teacher, temperature), tempered(student, temperature)
    return Terms(temperature**2 * categorical_kl(p, q))


def student_tempered_kl(teacher: Prediction, student: Prediction, divergence: StudentTemperedKL, state: LossState) -> Terms:
    """T² KL(p || q_T)."""
    temperature = divergence.temperature
    return Terms(temperature**2 * categorical_kl(teacher.logprobs, tempered(student, temperature)))


def tempered(prediction: Prediction, temperature: float) -> Tensor:
    """Return log-probabilities [N, C] at a temperature; classes of no mass get none."""
    shares = prediction.nontarget_logprobs
    largest = shares.detach().amax(dim=1, keepdim=True)
    empty = (shares - largest - LOG_OF_NOTHING).abs() < NOTHING_NATS  # those below are of mass, taken at their word
    scaled = torch.where(empty, largest / temperature + LOG_OF_NOTHING, shares / temperature)
    others = scaled + logsigmoid(-prediction.log_odds)[:, None] / temperature
    target = logsigmoid(prediction.log_odds)[:, None] / temperature
    if prediction.target_column is None:
        return torch.cat([target, others], dim=1).log_softmax(dim=1)
    return others.scatter(1, prediction.target_column[:, None], target).log_softmax(dim=1)


def alpha_beta(teacher: Prediction, student: Prediction, divergence: AlphaBeta, state: LossState) -> Terms:
    """-1 / (a b) * sum of p^a q^b - a / (a + b) p^(a + b) - b / (a + b) q^(a + b)."""
    p, q, a, b = teacher.logprobs, student.logprobs, divergence.teacher_power, divergence.student_power
    both = (a * p + b * q).exp()
    teacher_alone = a / (a + b) * ((a + b) * p).exp()
    student_alone = b / (a + b) * ((a + b) * q).exp()
    return Terms((teacher_alone + student_alone - both).sum(dim=1) / (a * b))


def top1_cross_entropy(teacher: Prediction, student: Prediction, divergence: TopOneCrossEntropy, state: LossState) -> Terms:
    """-log q of the teacher's most likely token; the tail is no token."""
    likely = single_tokens(teacher, teacher.logprobs).argmax(dim=1, keepdim=True)
    return Terms(-student.logprobs.gather(1, likely).squeeze(1))


def interpolated_target(teacher: Prediction, student: Prediction, divergence: InterpolatedTarget, state: LossState) -> Terms:
    """KL(r || q) with r = softmax((1 - t) log q + t log p), the q in r without gradient; t is ``state.teacher_share``."""
    p, q = teacher.logprobs, student.logprobs
    target = torch.lerp(q.detach(), p, state.teacher_share).log_softmax(dim=1)
    return Terms(categorical_kl(target, q))


def sampled_reverse_kl(teacher: Prediction, student: Prediction, divergence: SampledReverseKL, state: LossState) -> Terms:
    """k = log q_g - log p_g of the target g, with the gradient k * d log q_g; k itself carries none."""
    student_logprob, most = -student.cross_entropy, divergence.most_nats
    gap = (student_logprob + teacher.cross_entropy).detach()
    gap = gap if most is None else gap.clamp(-most, most)
    return Terms(gap + gap * (student_logprob - student_logprob.detach()))


def log_mixture(first: Tensor, second: Tensor, first_weight: float) -> Tensor:
    """Return log(w p + (1 - w) q) [N, C] from log-probabilities [N, C]."""
    return torch.logaddexp(first + math.log(first_weight), second + math.log1p(-first_weight))


def single_tokens(prediction: Prediction, logprobs: Tensor) -> Tensor:
    """Return the log-probabilities [N, C] of those classes that are one token each."""
    return logprobs[:, :-1] if prediction.has_tail else logprobs


def head_of(prediction: Prediction, logprobs: Tensor, mass: float) -> Tensor:
    """Return a bool [N, C] mask of the smallest set of tokens that holds ``mass``.

    Tokens that are equal but for rounding are in or out together.

    The tail, many tokens of unknown mass each, is in the head only if all tokens with a class of their own do not do.
    """
    tokens = single_tokens(prediction, logprobs)
    count = LIKELY_AT_ONCE
    while True:
        likely = tokens.topk(min(count, tokens.shape[1]), dim=1).values
        held = likely.exp().cumsum(dim=1)
        if count >= tokens.shape[1] or bool((held[:, -1] >= mass).all()):
            break
        count *= 4
    needed = (held < mass).sum(dim=1, keepdim=True)  # tokens before the one that reaches the mass
    last = likely.gather(1, needed.clamp(max=likely.shape[1] - 1))
    head = logprobs >= last - EQUAL_NATS
    if prediction.has_tail:
        head[:, -1:] = needed == likely.shape[1]
    return head


DIVERGENCES: dict[str, DivergenceFunction] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_forward_kl": skew_forward_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "adaptive_kl": adaptive_kl,
    "total_variation": total_variation,
    "alpha_beta": alpha_beta,
    "top1_cross_entropy": top1_cross_entropy,
    "interpolated_target": interpolated_target,
    "tempered_kl": tempered_kl,
    "student_tempered_kl": student_tempered_kl,
    "sampled_reverse_kl": sampled_reverse_kl,
}
"""Those that a user may name."""
