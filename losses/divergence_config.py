"""The divergences by which student and teacher may be compared, with their knobs. p is the teacher, q the student.

Defaults are the papers' own. Imports no torch.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from losses.section import Section


class ForwardKL(Section):
    """KL(teacher || student): the student must cover all the teacher finds likely (arXiv 1503.02531)."""

    kind: Literal["forward_kl"] = "forward_kl"


class ReverseKL(Section):
    """KL(student || teacher): the student must keep to what the teacher finds likely (arXiv 2306.08543)."""

    kind: Literal["reverse_kl"] = "reverse_kl"


class JensenShannon(Section):
    """Generalised Jensen-Shannon divergence: w KL(p || m) + (1 - w) KL(q || m), m = w p + (1 - w) q (arXiv 2306.13649)."""

    kind: Literal["jensen_shannon"] = "jensen_shannon"

    teacher_weight: float = Field(default=0.5, gt=0.0, lt=1.0)
    """w, the teacher's share of m; near 0 the value is w times forward_kl, near 1 it is 1 - w times reverse_kl."""


class SkewForwardKL(Section):
    """KL(p || s p + (1 - s) q): forward KL to a student mixed with the teacher (DistiLLM, arXiv 2402.03898)."""

    kind: Literal["skew_forward_kl"] = "skew_forward_kl"

    teacher_share: float = Field(default=0.1, gt=0.0, lt=1.0)
    """s, the share of the teacher in the second argument."""


class SkewReverseKL(Section):
    """KL(q || s q + (1 - s) p): reverse KL to a teacher mixed with the student (DistiLLM, arXiv 2402.03898)."""

    kind: Literal["skew_reverse_kl"] = "skew_reverse_kl"

    student_share: float = Field(default=0.1, gt=0.0, lt=1.0)
    """s, the share of the student in the second argument; gradients flow through both arguments."""


class AdaptiveKL(Section):
    """AKL (arXiv 2404.02657): forward KL times the head's share of |p - q|, plus reverse KL times the tail's share.

    The head are the teacher's most likely tokens; the shares carry no gradient.
    """

    kind: Literal["adaptive_kl"] = "adaptive_kl"

    head_mass: float = Field(default=0.5, gt=0.0, lt=1.0)
    """The head is the smallest set of tokens that holds at least this much of the teacher's mass."""


class TotalVariation(Section):
    """Half of sum |p - q| (f-distill, arXiv 2307.15190): the largest difference of probability over any set of tokens."""

    kind: Literal["total_variation"] = "total_variation"


class AlphaBeta(Section):
    """The alpha-beta divergence (ABKD, arXiv 2505.04560): forward KL at (1, 0), reverse KL at (0, 1), and all between."""

    kind: Literal["alpha_beta"] = "alpha_beta"

    teacher_power: float = Field(default=0.2, gt=0.0)
    """The paper's alpha, the exponent of the teacher's probabilities."""

    student_power: float = Field(default=0.7, gt=0.0)
    """The paper's beta, the exponent of the student's probabilities."""


class TopOneCrossEntropy(Section):
    """-log q of the token the teacher finds most likely, as if it had written the text (after SeqKD, arXiv 1606.07947).

    No divergence: at equality it is the cross entropy that is left, not zero.
    """

    kind: Literal["top1_cross_entropy"] = "top1_cross_entropy"


class InterpolatedTarget(Section):
    """TAID (arXiv 2501.16937): forward KL to a target between student and teacher that moves towards the teacher.

    The target is softmax((1 - t) student logits + t teacher logits), the student's part without gradient. t begins at
    ``start`` and reaches ``end``; it moves faster while the loss falls, and never lags behind a straight line.
    """

    kind: Literal["interpolated_target"] = "interpolated_target"

    start: float = Field(default=0.4, ge=0.0, le=1.0)
    """t at the first step."""

    end: float = Field(default=1.0, ge=0.0, le=1.0)
    """t at the last step, and its upper bound."""

    rate: float = Field(default=5e-4, ge=0.0)
    """How fast t may move ahead of the straight line: the paper's alpha; 0 keeps it on the line."""

    momentum: float = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay of the running mean of the loss's relative improvement."""

    @model_validator(mode="after")
    def _moves_towards_the_teacher(self) -> "InterpolatedTarget":
        if self.start > self.end:
            raise ValueError(f"start {self.start} lies beyond end {self.end}; start={self.end} would do, or a larger end")
        return self


class TemperedKL(Section):
    """T² KL(p_T || q_T), both soft-maxes at temperature T (Hinton, arXiv 1503.02531).

    A tail in one bucket is tempered as one class: use it where the teacher's top-K are all tokens there are, as the labels of a
    classifier, or with ``tail: renormalize``.
    """

    kind: Literal["tempered_kl"] = "tempered_kl"

    temperature: float = Field(default=2.0, gt=0.0)
    """T; above 1 the unlikely classes count more."""


class StudentTemperedKL(Section):
    """T² KL(p || q_T): the student alone is tempered, as with ReffAKD's soft labels (arXiv 2404.09886).

    Its least value is at a student T times as sure as the teacher, and not zero at p = q. A tail is one class, as with
    ``tempered_kl``.
    """

    kind: Literal["student_tempered_kl"] = "student_tempered_kl"

    temperature: float = Field(default=2.0, gt=0.0)
    """T; the paper tries 1, 5, 10 and 20."""


class SampledReverseKL(Section):
    """KL(q || p) estimated from the one token that the student drew, log q - log p, with the gradient of a policy's return.

    The policy gradient of MiniLLM (arXiv 2306.08543) with each token's own reward alone, no later ones: on-policy distillation in
    the words of reinforcement learning. On average over tokens drawn from q it has value and gradient of ``reverse_kl``, and it
    needs the teacher at the drawn token only. Right where the student wrote the text, and nowhere else.
    """

    kind: Literal["sampled_reverse_kl"] = "sampled_reverse_kl"

    most_nats: float | None = Field(default=None, gt=0.0)
    """Beyond this distance log q - log p counts no further, to either side; null for no bound."""


def name_alone_means_its_defaults(value: Any) -> Any:
    """``divergence: reverse_kl`` says the same as ``divergence: {kind: reverse_kl}``."""
    return {"kind": value} if isinstance(value, str) else value


Divergence = Annotated[
    Annotated[
        ForwardKL
        | ReverseKL
        | JensenShannon
        | SkewForwardKL
        | SkewReverseKL
        | AdaptiveKL
        | TotalVariation
        | AlphaBeta
        | TopOneCrossEntropy
        | InterpolatedTarget
        | TemperedKL
        | StudentTemperedKL
        | SampledReverseKL,
        Field(discriminator="kind"),
    ],
    BeforeValidator(name_alone_means_its_defaults),
]

SPLIT_DIVERGENCES = ("forward_kl", "reverse_kl")
"""Those that fall into a target term and a diversity term, so that a kind of loss may weigh them apart."""
