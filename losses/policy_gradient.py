"""Reverse KL of whole responses by policy gradient (MiniLLM, arXiv 2306.08543): what each drawn token weighs, and its term.

p is the teacher, s the student when it wrote, q the student now; y_t the tokens of a response of T, each drawn from s, or, where
the teacher writes some of them, from the mixture m = a p + (1 - a) s of the two. With

    reward      r_t = (log p(y_t) - log s(y_t)) / reward_scale, within ± most_reward
    advantage   A_t = (1 - x) r_t + sum over t' > t of discount^(t' - t) r_t',   x = exact_weight
                over T - t + 1 where lengths are normalised; then, over the step, to mean 0 and deviation 1 where it is whitened
    importance  w_t = s(y_t) / m(y_t);   ratio  R_t = q(y_t) / s(y_t)

the loss of a token is  x KL(q || p)  -  min(w_t A_t R_t, w_t A_t clip(R_t, 1 - clip_ratio, 1 + clip_ratio)),  the KL taken over
the teacher's support at the token's position.

**Where it has no bias.** Let no reward be scaled or clipped, ``discount`` be 1, and lengths and whitening be off. While q is
still s, the mean over responses drawn from s of its gradient, summed over tokens, is that of the sequences' KL(q || p), whatever
x is: over y_t drawn from q, r_t times the gradient of log q(y_t) has the mean of the negative gradient of KL(q || p) at that
position, so that the one may stand for the other (the paper's decomposition: at x = 1 its single-step part and its long part,
which holds later tokens' rewards alone). The KL here is over the support, and exact if that is the vocabulary; x = 0 needs the
teacher at the drawn tokens only. Lengths, whitening and scale change the gradient, as the paper wants it.

**With a mixture** each token has its own weight alone, as in the paper, so that what is unbiased is another gradient: that of
how the student draws y_t, where all before it and all after it are drawn from the mixture. The product of all weights would be
right for the sequence, and of a variance without bound. The KL at a position needs no weight: w_t, whose mean is 1, would only
add variance.

**Other than the authors' code** w stands outside the clip: there w R is clipped, so that tokens which the mixture has made likely
or unlikely lose their gradient before the student has moved. And there r_t stays in A_t beside the exact KL, and counts twice.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from losses.config import PolicyGradientLoss
from losses.token_weights import TokenWeights

LEAST_VARIANCE = 1e-8
"""Added to that of advantages before they are divided by its root: a step of equal ones has none."""
MOST_LOG_RATIO = 20.0
"""Beyond this ratio of probabilities nothing is learned; its exponential would leave what float32 holds."""


@dataclass(frozen=True)
class DrawnTokens:
    """How each of N tokens came about; log-probabilities are natural, at temperature 1.

    Raises:
        ValueError: if the fields are not of one length.
    """

    student_logprob: Tensor
    """float32 [N], by the student when the token was drawn; 0 of a token that the data has, as are the two below."""

    teacher_logprob: Tensor
    """float32 [N], by the teacher."""

    drawn_logprob: Tensor
    """float32 [N], by which it was drawn: the student's, or that of the mixture of student and teacher."""

    drawn: Tensor
    """bool [N], whether a model drew it; the others are the data's."""

    def __post_init__(self) -> None:
        for name in ("student_logprob", "teacher_logprob", "drawn_logprob"):
            shape, drawn_shape = list(getattr(self, name).shape), list(self.drawn.shape)
            if shape != drawn_shape or len(shape) != 1:
                raise ValueError(f"{name} has the shape {shape} and drawn {drawn_shape}; both must be [N]")

    def __len__(self) -> int:
        return len(self.drawn)

    @staticmethod
    def of_data(count: int) -> "DrawnTokens":
        """Return ``count`` tokens that the data has."""
        nothing = torch.zeros(count)
        return DrawnTokens(nothing, nothing, nothing, torch.zeros(count, dtype=torch.bool))

    @staticmethod
    def concatenate(parts: Sequence["DrawnTokens"]) -> "DrawnTokens":
        """Return the tokens of all parts, one after the other."""
        return DrawnTokens(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(DrawnTokens)))


def policy_gradient_weights(tokens: DrawnTokens, row_counts: Sequence[int], loss: PolicyGradientLoss) -> TokenWeights:
    """Return the weights of all N tokens of an optimizer step.

    Args:
        tokens: how they were drawn, row after row.
        row_counts: number of targets of each row.
        loss: the loss.

    Raises:
        ValueError: if the rows do not add up to N.
    """
    each = tokens.drawn.to(tokens.student_logprob.dtype) / max(len(tokens), 1)
    importance = (tokens.student_logprob - tokens.drawn_logprob).exp()
    nothing = torch.zeros_like(each)
    return TokenWeights(
        divergence=loss.exact_weight * each,
        target=nothing,
        diversity=nothing,
        cross_entropy=loss.corpus_weight * (~tokens.drawn).to(each.dtype) / max(len(tokens), 1),
        advantage=each * importance * advantages(tokens, row_counts, loss),
        sampled_logprob=tokens.student_logprob,
        easy=torch.zeros_like(tokens.drawn),
    )


def advantages(tokens: DrawnTokens, row_counts: Sequence[int], loss: PolicyGradientLoss) -> Tensor:
    """Return the advantage A [N] of each token; 0 of those that the data has. Arguments as of ``policy_gradient_weights``.

    Raises:
        ValueError: if the rows do not add up to N.
    """
    if sum(row_counts) != len(tokens):
        raise ValueError(f"row_counts adds up to {sum(row_counts)}, but there are {len(tokens)} tokens; they must be as many")
    if not len(tokens):
        return torch.zeros_like(tokens.student_logprob)
    rewards = (tokens.teacher_logprob - tokens.student_logprob).double() / loss.reward_scale
    if loss.most_reward is not None:
        rewards = rewards.clamp(-loss.most_reward, loss.most_reward)
    found = returns(rewards, row_counts, loss.discount) - loss.exact_weight * rewards
    if loss.length_normalization:
        found = found / torch.cat([torch.arange(count, 0, -1) for count in row_counts])
    if loss.whiten and tokens.drawn.any():
        own = found[tokens.drawn]
        found = (found - own.mean()) / (own.var(correction=0) + LEAST_VARIANCE).sqrt()
    return found.where(tokens.drawn, torch.zeros_like(found)).to(tokens.student_logprob.dtype)


def returns(rewards: Tensor, row_counts: Sequence[int], discount: float) -> Tensor:
    """Return for each of N tokens its reward and the discounted rewards of those after it in its row, [N]."""
    padded = pad_sequence(list(rewards.split(list(row_counts))), batch_first=True)  # zeros, which add nothing
    after = torch.zeros_like(padded[:, 0])
    for column in range(padded.shape[1] - 1, -1, -1):
        after = padded[:, column] + discount * after
        padded[:, column] = after
    return torch.cat([row[:count] for row, count in zip(padded, row_counts, strict=True)])


def clipped_return(
    logprob: Tensor, advantage: Tensor, sampled_logprob: Tensor, loss: PolicyGradientLoss
) -> tuple[Tensor, Tensor]:
    """Return what is to be maximised, min(A R, A clip(R)), and bool which tokens are held by the clip; both [N].

    Args:
        logprob: [N], the student's log-probability of each token now, with its gradient.
        advantage: [N], the weighted advantage.
        sampled_logprob: [N], the student's log-probability when the token was drawn.
        loss: has the bounds.
    """
    ratio = (logprob - sampled_logprob).clamp(-MOST_LOG_RATIO, MOST_LOG_RATIO).exp()
    free = advantage * ratio
    if loss.clip_ratio is None:
        return free, torch.zeros_like(free, dtype=torch.bool)
    bound = advantage * ratio.clamp(1 - loss.clip_ratio, 1 + loss.clip_ratio)
    return torch.minimum(free, bound), bound < free
