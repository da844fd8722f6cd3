"""What a token costs: the target term and the diversity term of a KL divergence (arXiv 2402.11890, section 2).

KL(p || q) = TKD + UNC * DKD: TKD compares the log-odds of the target, DKD the shares in which the other tokens split what
is left, and UNC = 1 - p_g. Shapes: N targets, C classes beside the target.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from losses.prediction import Prediction


@dataclass(frozen=True)
class Terms:
    """What each of N tokens costs, in nats, before any weight."""

    whole: Tensor
    """[N], the divergence."""

    target: Tensor | None = None
    """[N], TKD; None of a divergence that does not fall into two terms."""

    diversity: Tensor | None = None
    """[N], DKD; None where TKD is."""


def kl_terms(first: Prediction, second: Prediction) -> Terms:
    """Return KL(first || second) and its two terms."""
    target, diversity = target_term(first, second), diversity_term(first, second)
    return Terms(target + first.uncertainty * diversity, target, diversity)


def target_term(first: Prediction, second: Prediction) -> Tensor:
    """TKD [N] = KL(p_b || q_b), over the two classes {target, not the target}; p is the first argument."""
    return binary_kl(first.log_odds, second.log_odds)


def diversity_term(first: Prediction, second: Prediction) -> Tensor:
    """DKD [N] = KL(p̂ || q̂), over the classes beside the target; p is the first argument."""
    return categorical_kl(first.nontarget_logprobs, second.nontarget_logprobs)


def binary_kl(p_log_odds: Tensor, q_log_odds: Tensor) -> Tensor:
    """Return KL(p || q) [N] between two distributions over {target, not the target}, from their log-odds [N]."""
    on_target = torch.sigmoid(p_log_odds) * (logsigmoid(p_log_odds) - logsigmoid(q_log_odds))
    off_target = torch.sigmoid(-p_log_odds) * (logsigmoid(-p_log_odds) - logsigmoid(-q_log_odds))
    return on_target + off_target


def categorical_kl(p_logprobs: Tensor, q_logprobs: Tensor) -> Tensor:
    """Return KL(p || q) [N] between distributions over C classes, from their log-probabilities [N, C]."""
    return (p_logprobs.exp() * (p_logprobs - q_logprobs)).sum(dim=1)
