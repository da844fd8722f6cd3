"""What the user may say about the loss. One class a teaching; a knob exists only where it acts."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen section of the configuration: unknown keys are errors, the docstring under a field is its help text."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class DistillationLoss(Section):
    """What every loss that listens to a teacher shares."""

    divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    """forward_kl = KL(teacher || student); reverse_kl = KL(student || teacher)."""

    tail: Literal["bucket", "renormalize"] = "bucket"
    """What becomes of the mass outside target and top-K: one extra class on both sides, or both sides renormalised."""

    cross_entropy_weight: float = Field(default=0.0, ge=0.0)
    """Weight of the cross entropy to the data's own tokens, added to the distillation loss."""


class CoupledLoss(DistillationLoss):
    """The plain divergence: KL = TKD + UNC * DKD, averaged over the targets."""

    teaching: Literal["coupled"]


class DecoupledLoss(DistillationLoss):
    """TKD + DKD: the diversity term freed of its factor UNC (arXiv 2402.11890, section 3)."""

    teaching: Literal["decoupled"]


class TargetOnlyLoss(DistillationLoss):
    """TKD alone: how sure the teacher is of the target."""

    teaching: Literal["target_only"]


class DiversityOnlyLoss(DistillationLoss):
    """DKD alone: how the teacher ranks all other tokens."""

    teaching: Literal["diversity_only"]


class AtkdLoss(DistillationLoss):
    """Adaptive teaching (arXiv 2402.11890): easy tokens get DKD, hard tokens get TKD + DKD."""

    teaching: Literal["atkd"]

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

    teaching: Literal["hard_label"]


LossConfig = Annotated[
    AtkdLoss | CoupledLoss | DecoupledLoss | TargetOnlyLoss | DiversityOnlyLoss | HardLabelLoss,
    Field(discriminator="teaching"),
]
