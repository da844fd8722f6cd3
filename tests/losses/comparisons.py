"""The divergences with several knobs each, and their values by ``losses/`` and by the slow reading. N targets, V vocabulary."""

from dataclasses import dataclass, field

import torch
from pydantic import TypeAdapter
from torch import Tensor

from losses.config import Tail
from losses.divergence_config import Divergence
from losses.divergences import DIVERGENCES
from losses.loss_state import LossState
from losses.teachers import DenseTeacher, Teacher, predictions
from losses.topk_teacher import TopkTeacher
from tests.reference import divergences, formulas

CONFIG: TypeAdapter[Divergence] = TypeAdapter(Divergence)


@dataclass(frozen=True)
class Case:
    """A divergence with its knobs, and where its memory stands."""

    kind: str
    knobs: dict[str, float] = field(default_factory=dict)
    t: float | None = None
    """Of the interpolated target alone."""

    def __str__(self) -> str:
        return "-".join([self.kind, *map(str, self.knobs.values()), *([] if self.t is None else [str(self.t)])])

    @property
    def config(self) -> Divergence:
        return CONFIG.validate_python({"kind": self.kind, **self.knobs})

    @property
    def state(self) -> LossState:
        return LossState() if self.t is None else LossState(teacher_share=self.t)

    def values(self, teacher: Teacher, student: Tensor, targets: Tensor, tail: Tail = "bucket") -> Tensor:
        """What each target costs, [N], from student logits [N, V]."""
        sides = predictions(teacher, student, targets, tail)
        return DIVERGENCES[self.kind](*sides, self.config, self.state).whole

    def reference(
        self, teacher: Tensor, student: Tensor, targets: Tensor, top_k: int | None = None, tail: Tail = "bucket"
    ) -> list[float]:
        """The same from both sides' logits [N, V], by the slow reading."""
        knobs = self.knobs if self.t is None else {**self.knobs, "t": self.t}
        expected = []
        for p, q, g in zip(teacher.tolist(), student.tolist(), targets.tolist(), strict=True):
            kept = None if top_k is None else formulas.most_likely_others(p, g, top_k)
            expected.append(divergences.value(self.kind, p, q, g, kept, tail, **knobs))
        return expected


CASES = [
    Case("forward_kl"),
    Case("reverse_kl"),
    Case("jensen_shannon", {"teacher_weight": 0.5}),
    Case("jensen_shannon", {"teacher_weight": 0.1}),
    Case("jensen_shannon", {"teacher_weight": 0.9}),
    Case("skew_forward_kl", {"teacher_share": 0.1}),
    Case("skew_forward_kl", {"teacher_share": 0.7}),
    Case("skew_reverse_kl", {"student_share": 0.1}),
    Case("skew_reverse_kl", {"student_share": 0.7}),
    Case("adaptive_kl", {"head_mass": 0.5}),
    Case("adaptive_kl", {"head_mass": 0.1}),
    Case("adaptive_kl", {"head_mass": 0.95}),
    Case("total_variation"),
    Case("alpha_beta", {"teacher_power": 0.2, "student_power": 0.7}),
    Case("alpha_beta", {"teacher_power": 1.0, "student_power": 1.0}),
    Case("alpha_beta", {"teacher_power": 2.0, "student_power": 0.3}),
    Case("top1_cross_entropy"),
    Case("interpolated_target", t=0.4),
    Case("interpolated_target", t=0.0),
    Case("interpolated_target", t=1.0),
    Case("tempered_kl", {"temperature": 2.0}),
    Case("tempered_kl", {"temperature": 0.5}),
    Case("student_tempered_kl", {"temperature": 2.0}),
    Case("student_tempered_kl", {"temperature": 5.0}),
    Case("sampled_reverse_kl"),
    Case("sampled_reverse_kl", {"most_nats": 0.7}),
]

DETACHED = ("adaptive_kl", "interpolated_target", "sampled_reverse_kl")
"""Part of their value carries no gradient: finite differences would see it."""

ONE_OF_EACH = [next(case for case in CASES if case.kind == kind) for kind in DIVERGENCES]


def teacher_of(logits: Tensor, targets: Tensor, top_k: int | None) -> Teacher:
    """A truncated teacher, or with no ``top_k`` a dense one."""
    return DenseTeacher(logits, targets) if top_k is None else TopkTeacher.from_logits(logits, targets, top_k)


def random_tokens(count: int, vocab_size: int, spread: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [N, V] of teacher and student in float64, and targets [N]."""
    generator = torch.Generator().manual_seed(seed)
    teacher, student = spread * torch.randn(2, count, vocab_size, generator=generator, dtype=torch.float64)
    return teacher, student, torch.randint(vocab_size, (count,), generator=generator)
