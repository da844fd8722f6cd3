"""Which token is taught what: the weight of each token's target term and of its diversity term.

A divergence gives every token its terms; a kind of loss gives every token its weights. A step's loss is

    sum over its tokens i of   divergence_i * D_i  +  target_i * TKD_i  +  diversity_i * DKD_i  +  cross_entropy_i * CE_i
                               -  min(advantage_i * ratio_i, advantage_i * clipped ratio_i)

and the weights below already hold every division by the number of tokens. They are computed once for a whole optimizer
step, over all ranks and all accumulated micro-batches; the step's loss is then a plain sum, however it was cut.

| kind                 | divergence D | target TKD           | diversity DKD        | advantage | cross entropy CE |
|----------------------|--------------|----------------------|----------------------|-----------|------------------|
| coupled              | 1 / N        | 0                    | 0                    | 0         | c / N            |
| decoupled            | 0            | 1 / N                | 1 / N                | 0         | c / N            |
| target_only          | 0            | 1 / N                | 0                    | 0         | c / N            |
| diversity_only       | 0            | 0                    | 1 / N                | 0         | c / N            |
| atkd, easy token     | 0            | 0                    | λ / N_easy           | 0         | c / N            |
| atkd, hard token     | 0            | (1 - λ) / N_hard     | (1 - λ) / N_hard     | 0         | c / N            |
| policy_gradient, own | x / N        | 0                    | 0                    | w A / N   | 0                |
| policy_gradient, data| 0            | 0                    | 0                    | 0         | c / N            |
| hard_label           | 0            | 0                    | 0                    | 0         | 1 / N            |

A KL divergence is D = TKD + UNC * DKD, so coupled and decoupled differ by the factor UNC = 1 - p_g, the mass off the
target. λ is ``easy_weight``, c ``cross_entropy_weight`` or ``corpus_weight``, x ``exact_weight``; N tokens of the step. All but
the cross entropy are times ``distillation_weight``. Of ``policy_gradient`` D is reverse KL, a token is a model's own or the
data's, and ``policy_gradient.py`` has A, w and the ratio. Source: arXiv 2402.11890, section 3.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from losses.config import (
    AtkdLoss,
    CoupledLoss,
    DecoupledLoss,
    DiversityOnlyLoss,
    HardLabelLoss,
    LossConfig,
    PolicyGradientLoss,
    TargetOnlyLoss,
)
from losses.topk_teacher import Index


@dataclass(frozen=True)
class TokenWeights:
    """What each of N tokens weighs in the loss of its optimizer step.

    Raises:
        ValueError: if they are not of one length.
    """

    divergence: Tensor
    """float32 [N], weight of the whole divergence."""

    target: Tensor
    """float32 [N], weight of the target term."""

    diversity: Tensor
    """float32 [N], weight of the diversity term."""

    cross_entropy: Tensor
    """float32 [N], weight of the cross entropy to the data's token."""

    advantage: Tensor
    """float32 [N], weight of the ratio of probabilities that a policy gradient moves, with its sign; 0 of other kinds."""

    sampled_logprob: Tensor
    """float32 [N], the student's log-probability of the token when it was drawn, to which that ratio refers; 0 of other kinds."""

    easy: Tensor
    """bool [N], which tokens are easy; all False where the kind of loss does not split."""

    def __post_init__(self) -> None:
        easy_shape = list(self.easy.shape)
        for name in (field.name for field in fields(self)):
            shape = list(getattr(self, name).shape)
            if shape != easy_shape or len(shape) != 1:
                raise ValueError(f"weights.{name} has the shape {shape} and weights.easy {easy_shape}; both must be [N]")

    @staticmethod
    def zero(count: int) -> "TokenWeights":
        """Return the weights of ``count`` tokens that add nothing."""
        nothing = torch.zeros(count)
        return TokenWeights(nothing, nothing, nothing, nothing, nothing, nothing, torch.zeros(count, dtype=torch.bool))

    @staticmethod
    def concatenate(parts: Sequence["TokenWeights"]) -> "TokenWeights":
        """Return the weights of all parts, one after the other."""
        return TokenWeights(*(torch.cat(tensors) for tensors in zip(*(part.tensors() for part in parts), strict=True)))

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def split(self, counts: Sequence[int]) -> list["TokenWeights"]:
        """Cut the weights into parts of ``counts`` tokens, such as the rows of a step."""
        return [TokenWeights(*parts) for parts in zip(*(values.split(list(counts)) for values in self.tensors()), strict=True)]

    def __len__(self) -> int:
        return len(self.easy)

    def select(self, index: Index) -> "TokenWeights":
        """Return the weights of some of the tokens, such as one micro-batch, in the order of ``index``."""
        return TokenWeights(*(values[index] for values in self.tensors()))

    def scaled(self, factor: float) -> "TokenWeights":
        """Return the weights times a factor, for callers whose framework averages over ranks or micro-batches."""
        return self.times(factor, factor)

    def times(self, distillation: Tensor | float, cross_entropy: Tensor | float) -> "TokenWeights":
        """Return the weights, those of the distillation terms times one factor, or [N] of them, the cross entropy's another."""
        return TokenWeights(
            self.divergence * distillation, self.target * distillation, self.diversity * distillation,
            self.cross_entropy * cross_entropy, self.advantage * distillation, self.sampled_logprob, self.easy,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> "TokenWeights":
        """Return the weights on another device."""
        return TokenWeights(*(values.to(device) for values in self.tensors()))


def split_easy(uncertainty: Tensor, loss: AtkdLoss, *, seed: int) -> Tensor:
    """Return a bool [N] mask of the easy tokens; the others are hard.

    Pass the uncertainty [N] of all tokens the scope ranks together: those of the whole optimizer step (``batch``), of
    the whole score store (``dataset``), or of one device's forward pass (``microbatch``).

    Scopes ``batch`` and ``dataset``: ``round(easy_ratio * N)`` tokens are easy, to the nearest whole number and a half
    to the even one. They are those of the lowest uncertainty, ties to the earlier position; or, as controls, as many
    drawn by ``seed``, or those of the highest uncertainty.
    Scope ``microbatch``: those strictly below the lower median, as the authors' code does; perhaps none.

    Raises:
        ValueError: if the uncertainty is not [N], or holds NaN.
    """
    if uncertainty.dim() != 1:
        raise ValueError(f"uncertainty has the shape {list(uncertainty.shape)}; it must be [N]")
    if uncertainty.isnan().any():
        raise ValueError("uncertainty holds NaN; the teacher's scores must be finite before tokens can be ranked")
    if loss.scope == "microbatch":
        return below_lower_median(uncertainty)
    order = rank_tokens(uncertainty, loss, seed)
    easy = torch.zeros_like(uncertainty, dtype=torch.bool)
    easy[order[: easy_count(len(uncertainty), loss)]] = True
    return easy


def easy_count(tokens: int, loss: AtkdLoss) -> int:
    """Return how many of so many tokens are easy in scopes ``batch`` and ``dataset``."""
    return round(loss.easy_ratio * tokens)


def easy_border(uncertainty: Tensor, loss: AtkdLoss) -> float | None:
    """Return the highest uncertainty [N] of the tokens that are easy by it; None if none is. Costs less than to rank them."""
    count = easy_count(len(uncertainty), loss)
    return float(uncertainty.kthvalue(count).values) if count else None


def rank_tokens(uncertainty: Tensor, loss: AtkdLoss, seed: int) -> Tensor:
    """Return the positions [N], those to be called easy first. Equal tokens keep their order."""
    if loss.split == "random":
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(uncertainty), generator=generator).to(uncertainty.device)
    return torch.argsort(uncertainty, stable=True, descending=loss.split == "inverted")


def below_lower_median(uncertainty: Tensor) -> Tensor:
    """Return bool [N], True strictly below the median; of an even number of values, below the lower of the middle two."""
    if len(uncertainty) == 0:
        return torch.zeros_like(uncertainty, dtype=torch.bool)
    return uncertainty < uncertainty.median()


def token_weights(uncertainty: Tensor, loss: LossConfig, easy: Tensor | None = None) -> TokenWeights:
    """Return the weights of all N tokens of an optimizer step; the table above.

    Args:
        uncertainty: float32 [N], the teacher's UNC. A loss without a teacher reads its length alone.
        loss: which kind.
        easy: bool [N] from ``split_easy``; required by ``atkd``, by the others only passed on for reports.

    Raises:
        ValueError: if ``easy`` is missing or of another shape, or the kind is ``policy_gradient``, which knows more of a token.
    """
    if easy is None:
        if isinstance(loss, AtkdLoss):
            raise ValueError("easy is None, but loss.kind atkd needs to know which tokens are easy: pass split_easy(...)")
        easy = torch.zeros_like(uncertainty, dtype=torch.bool)
    if uncertainty.dim() != 1 or easy.shape != uncertainty.shape:
        raise ValueError(f"uncertainty has the shape {list(uncertainty.shape)} and easy {list(easy.shape)}; both must be [N]")

    each = torch.full_like(uncertainty, 1 / max(len(uncertainty), 1))
    whole = target = diversity = nothing = torch.zeros_like(uncertainty)
    match loss:
        case HardLabelLoss():
            return TokenWeights(whole, target, diversity, each, nothing, nothing, easy)
        case PolicyGradientLoss():
            raise ValueError("loss.kind policy_gradient weighs tokens by how they were drawn: call policy_gradient_weights(...)")
        case CoupledLoss():
            whole = each
        case DecoupledLoss():
            target = diversity = each
        case TargetOnlyLoss():
            target = each
        case DiversityOnlyLoss():
            diversity = each
        case AtkdLoss():
            target, diversity = adaptive_weights(easy, loss, like=uncertainty)
    weights = TokenWeights(whole, target, diversity, each, nothing, nothing, easy)
    return weights.times(loss.distillation_weight, loss.cross_entropy_weight)


def adaptive_weights(easy: Tensor, loss: AtkdLoss, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target and diversity weights of adaptive kind: easy tokens are spared the target term.

    Each group is averaged over its own size, or both over all tokens (``normalize: tokens``). A group without tokens
    has no one to give its weight to, and adds nothing.
    """
    easy_count, hard_count = easy.sum(), (~easy).sum()
    if loss.normalize == "tokens":
        easy_count = hard_count = easy_count + hard_count
    easy_share = loss.easy_weight / easy_count.clamp(min=1).to(like)
    hard_share = (1 - loss.easy_weight) / hard_count.clamp(min=1).to(like)
    target = torch.where(easy, torch.zeros_like(like), hard_share)
    diversity = torch.where(easy, easy_share, hard_share)
    return target, diversity
