"""Which tokens are taught, and how much each row counts. Composable with every divergence and kind of loss. Imports no torch."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from losses.divergence_config import name_alone_means_its_defaults
from losses.section import Section


class AllTokens(Section):
    """Every target is taught."""

    kind: Literal["all"] = "all"


class UncertainTeacherTokens(Section):
    """The targets of each row of which the teacher is least sure: the highest 1 - p_g."""

    kind: Literal["teacher_uncertainty"]

    fraction: float = Field(gt=0.0, le=1.0)
    """Share of a row's targets that is taught, rounded, at least one."""


class UncertainStudentTokens(Section):
    """SE-KD (arXiv 2602.01395): the targets of each row at which the student's own distribution has the highest entropy."""

    kind: Literal["student_entropy"] = "student_entropy"

    fraction: float = Field(default=0.2, gt=0.0, le=1.0)
    """Share of a row's targets that is taught, rounded, at least one (the paper's: 0.2)."""


class DistantTokens(Section):
    """Token-AdaKD (arXiv 2510.11615): the targets of each row at which student and teacher differ most in Hellinger distance.

    With ``step_size`` above 0 the share follows the loss: it shrinks by that factor each time the running loss has fallen
    by ``tolerance``, and grows each time it has risen as much.
    """

    kind: Literal["hellinger"] = "hellinger"

    fraction: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of a row's targets that is taught, rounded, at least one; with ``step_size`` above 0, where it begins."""

    step_size: float = Field(default=0.0, ge=0.0, lt=1.0)
    """Relative change of the share at a time (the paper's delta, 0.05 in its GPT-2 runs); 0 keeps it as it is."""

    tolerance: float = Field(default=0.05, gt=0.0, lt=1.0)
    """Relative change of the running loss that moves the share (the paper's epsilon)."""

    floor: float = Field(default=0.1, gt=0.0, le=1.0)
    """The share never falls below this."""

    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay of the running loss."""

    @model_validator(mode="after")
    def _begins_above_its_floor(self) -> "DistantTokens":
        if self.step_size > 0 and self.fraction < self.floor:
            raise ValueError(f"fraction {self.fraction} begins below floor {self.floor}; floor={self.fraction} would do")
        return self


TokenSelection = Annotated[
    Annotated[AllTokens | UncertainTeacherTokens | UncertainStudentTokens | DistantTokens, Field(discriminator="kind")],
    BeforeValidator(name_alone_means_its_defaults),
]


class EqualSamples(Section):
    """Every target counts the same, whatever row it stands in."""

    kind: Literal["equal"] = "equal"


class TeacherLossSamples(Section):
    """AdaKD for speech recognition (arXiv 2405.08019): rows count by how well the teacher itself does on them.

    A row of mean teacher loss x (nats per target) has the difficulty factor d = exp(-steepness (x - threshold)) and the
    weight exp(-1 / sqrt(d)): near 1 where the teacher is good, near 0 where it is poor. The weight multiplies the
    distillation loss of the row; one minus it multiplies its share of the cross entropy that is mixed in, if any. The
    threshold moves in a straight line over the run, so that harder rows enter later.
    """

    kind: Literal["teacher_loss"]

    steepness: float = Field(default=1.0, gt=0.0)
    """How fast the weight falls with the teacher's loss, per nat."""

    threshold_start: float
    """Threshold at the first step, nats per target: rows with this teacher loss weigh exp(-1) = 0.37."""

    threshold_end: float
    """Threshold at the last step; above ``threshold_start`` for a curriculum from easy to hard."""


SampleWeighing = Annotated[
    Annotated[EqualSamples | TeacherLossSamples, Field(discriminator="kind")],
    BeforeValidator(name_alone_means_its_defaults),
]
