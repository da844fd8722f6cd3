"""Configuration schema of the loss: one class a kind, each with the fields that act in it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from losses.divergence_config import SPLIT_DIVERGENCES, Divergence, ForwardKL
from losses.section import Section
from losses.weighing_config import AllTokens, EqualSamples, SampleWeighing, TokenSelection

Tail = Literal["bucket", "renormalize"]


class DistillationLoss(Section):
    """What every loss that listens to a teacher shares."""

    divergence: Divergence = ForwardKL()
    """How student and teacher are compared, by name (``reverse_kl``) or with its knobs (``{kind: alpha_beta, ...}``)."""

    tail: Tail = "bucket"
    """What becomes of the mass outside target and top-K: one extra class on both sides, or both sides renormalised."""

    tokens: TokenSelection = AllTokens()
    """Which targets the teacher teaches; the others get no distillation loss."""

    samples: SampleWeighing = EqualSamples()
    """How much each row counts."""

    distillation_weight: float = Field(default=1.0, ge=0.0)
    """Factor of the distillation loss, for mixtures with the cross entropy."""

    cross_entropy_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the cross entropy to the data's own tokens, added to the distillation loss."""


class SplitLoss(DistillationLoss):
    """A loss that weighs the two terms of a divergence apart."""

    kind: str

    @model_validator(mode="after")
    def _divergence_has_two_terms(self) -> "SplitLoss":
        if self.divergence.kind not in SPLIT_DIVERGENCES:
            raise ValueError(
                f"divergence {self.divergence.kind} does not fall into a target and a diversity term that the kind "
                f"{self.kind} could weigh apart; divergence forward_kl or reverse_kl does, and kind coupled takes any"
            )
        return self


class CoupledLoss(DistillationLoss):
    """The plain divergence, averaged over the targets. For a KL it is TKD + UNC * DKD."""

    kind: Literal["coupled"]


class DecoupledLoss(SplitLoss):
    """TKD + DKD: the diversity term freed of its factor UNC (arXiv 2402.11890, section 3)."""

    kind: Literal["decoupled"]


class TargetOnlyLoss(SplitLoss):
    """TKD alone: how sure the teacher is of the target."""

    kind: Literal["target_only"]


class DiversityOnlyLoss(SplitLoss):
    """DKD alone: how the teacher ranks all other tokens."""

    kind: Literal["diversity_only"]


class AtkdLoss(SplitLoss):
    """Adaptive teaching (arXiv 2402.11890): easy tokens get DKD, hard tokens get TKD + DKD."""

    kind: Literal["atkd"]

    easy_ratio: float = Field(default=0.5, ge=0.0, le=1.0)
    """Share of the targets, those with the lowest uncertainty, that count as easy."""

    easy_weight: float = Field(default=0.2, ge=0.0, le=1.0)
    """The paper's lambda: weight of the easy tokens; hard tokens weigh one minus it."""

    scope: Literal["batch", "dataset", "microbatch"] = "batch"
    """Among which tokens easy and hard are ranked: the whole optimizer step over all ranks, the whole score store,
    or one device's forward pass, as the authors' code does (lower median, strictly below is easy)."""

    normalize: Literal["groups", "tokens"] = "groups"
    """Divide each group's sum by its own size (the paper), or both by the number of all targets."""

    split: Literal["uncertainty", "random", "inverted"] = "uncertainty"
    """How tokens are ranked: by the teacher's uncertainty, or, as controls, at random or the wrong way round."""

    @model_validator(mode="after")
    def _microbatch_is_the_authors_rule(self) -> "AtkdLoss":
        if self.scope == "microbatch" and self.easy_ratio != 0.5:
            raise ValueError(
                f"scope microbatch splits at the median, as the authors' code does, and has no easy_ratio {self.easy_ratio}: "
                f"leave easy_ratio at 0.5, or use scope batch"
            )
        if self.scope == "microbatch" and self.split != "uncertainty":
            raise ValueError(f"scope microbatch is the authors' rule and has no split {self.split!r}; scope batch has")
        return self


class HardLabelLoss(Section):
    """Cross entropy to the data's own tokens; no teacher is needed."""

    kind: Literal["hard_label"]


class PolicyGradientLoss(Section):
    """Reverse KL of whole responses, from those that the student wrote, by policy gradient (MiniLLM, arXiv 2306.08543).

    A token's reward is log p - log q; its advantage adds up its own reward and those of all later tokens. On-policy distillation
    from each token's reward alone ("OPD") is ``discount: 0`` with ``exact_weight``, ``length_normalization`` and ``whiten`` off.
    losses/policy_gradient.py has the equations, and for which settings the gradient has no bias.
    """

    kind: Literal["policy_gradient"]

    exact_weight: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of a token's own reward that is taken as its exact mean, reverse KL over the teacher's support, rather than as that
    of the drawn token alone."""

    discount: float = Field(default=1.0, ge=0.0, le=1.0)
    """The paper's gamma: by how much the reward of each later token counts less than that of the one before it."""

    length_normalization: bool = True
    """Divide a token's advantage by the number of tokens from it to the end of its response."""

    whiten: bool = True
    """Shift and scale the advantages of a step to mean 0 and standard deviation 1."""

    reward_scale: float = Field(default=0.5, gt=0.0)
    """Rewards are divided by it."""

    most_reward: float | None = Field(default=100.0, gt=0.0)
    """Beyond this a reward, once it is divided, counts no further, to either side; null for no bound."""

    clip_ratio: float | None = Field(default=0.2, gt=0.0, lt=1.0)
    """The paper's epsilon: a token whose probability has moved further than by this factor the way its advantage wants is learned
    from no more until it is drawn anew; null for no bound."""

    corpus_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the cross entropy of the rows that stay as the data has them, which are not distilled; the paper's pre-training
    loss."""

    tail: Tail = "bucket"
    """As of the other kinds; for the exact part."""


TeacherLoss = AtkdLoss | CoupledLoss | DecoupledLoss | TargetOnlyLoss | DiversityOnlyLoss

LossConfig = Annotated[TeacherLoss | PolicyGradientLoss | HardLabelLoss, Field(discriminator="kind")]
