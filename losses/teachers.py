"""What can teach: a truncated top-K, logits over the whole vocabulary, or hidden states with the head that makes logits of them.

Shapes: N targets, V vocabulary, H the teacher's hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.config import Tail
from losses.lm_head import LMHead
from losses.prediction import Prediction, dense_prediction, student_prediction, teacher_prediction
from losses.topk_teacher import Index, TopkTeacher, check_target_ids, working_dtype

TARGETS_AT_ONCE = 256  # of which logits exist while uncertainties are computed


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher's logits at N targets. Row i speaks of the prediction of the i-th target.

    Raises:
        ValueError: if the shapes do not belong together.
    """

    logits: Tensor
    """[N, V], any floating type; -inf for tokens that cannot be."""

    targets: Tensor
    """int64 [N], the targets the rows speak of."""

    def __post_init__(self) -> None:
        if self.logits.dim() != 2:
            raise ValueError(f"teacher.logits has the shape {list(self.logits.shape)}; it must be [N, V]")
        check_target_ids(self.targets, len(self.logits), self.logits.shape[1], where="teacher.logits")

    def __len__(self) -> int:
        return len(self.logits)

    @property
    @torch.no_grad()
    def uncertainty(self) -> Tensor:
        """UNC [N], the mass off the target; float32, or float64 if the logits are."""
        unc = [torch.sigmoid(-log_odds(self.select(chunk))) for chunk in chunks_of(len(self), TARGETS_AT_ONCE)]
        return torch.cat([torch.zeros(0, device=self.logits.device, dtype=working_dtype(self.logits)), *unc])

    def select(self, index: Index) -> "DenseTeacher":
        """Return the teacher of some of the targets, in the order of ``index``."""
        return DenseTeacher(self.logits[index], self.targets[index])

    def to(self, device: torch.device | str) -> "DenseTeacher":
        """Return the teacher on another device."""
        return DenseTeacher(self.logits.to(device), self.targets.to(device))

    def check(self, targets: Tensor, vocab_size: int) -> None:
        """Raise if the logits are of other targets or another vocabulary, or not valid.

        Raises:
            ValueError: naming the field, the value seen and the right one.
        """
        check_belongs(self.targets, targets, self.logits.shape[1], vocab_size)
        largest = self.logits.amax(dim=1)
        if not largest.isfinite().all():
            bad = largest[~largest.isfinite()][0].item()
            raise ValueError(f"teacher.logits holds a row whose largest value is {bad}; it must be finite")
        at_target = self.logits.gather(1, targets[:, None])
        if (at_target == -torch.inf).any():
            row = int((at_target == -torch.inf).nonzero()[0, 0])
            raise ValueError(
                f"teacher.logits of row {row} is -inf at its target {int(targets[row])}; a teacher's log-probability of the "
                "target must be finite"
            )


@dataclass(frozen=True)
class HiddenTeacher:
    """A teacher's last hidden states at N targets and its head: its logits exist only a chunk at a time.

    Raises:
        ValueError: if the shapes do not belong together.
    """

    hidden: Tensor
    """[N, H]."""

    head: LMHead
    """The teacher's own; nothing flows back into it."""

    targets: Tensor
    """int64 [N], the targets the rows speak of."""

    def __post_init__(self) -> None:
        self.head.check(self.hidden)
        check_target_ids(self.targets, len(self.hidden), self.head.vocab_size, where="teacher.hidden")

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def uncertainty(self) -> Tensor:
        """UNC [N], the mass off the target; float32, or float64 if the hidden states are."""
        unc = [self.select(chunk).dense().uncertainty for chunk in chunks_of(len(self), TARGETS_AT_ONCE)]
        return torch.cat([torch.zeros(0, device=self.hidden.device, dtype=working_dtype(self.hidden)), *unc])

    def select(self, index: Index) -> "HiddenTeacher":
        """Return the teacher of some of the targets, in the order of ``index``."""
        return HiddenTeacher(self.hidden[index], self.head, self.targets[index])

    @torch.no_grad()
    def dense(self) -> DenseTeacher:
        """Return the logits; [N, V] numbers, in the head's type whatever autocast is set to."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            return DenseTeacher(self.head.logits(self.hidden.to(self.head.weight.dtype)), self.targets)

    def check(self, targets: Tensor, vocab_size: int) -> None:
        """Raise if the hidden states are of other targets, the head of another vocabulary, or values not finite.

        Raises:
            ValueError: naming the field, the value seen and the right one.
        """
        check_belongs(self.targets, targets, self.head.vocab_size, vocab_size)
        if not self.hidden.isfinite().all():
            raise ValueError("teacher.hidden holds a value that is not finite; hidden states must be finite")


Teacher = TopkTeacher | DenseTeacher | HiddenTeacher
"""The classes of teachers; ``predictions`` has a case for each."""


def predictions(teacher: Teacher, student_logits: Tensor, targets: Tensor, tail: Tail) -> tuple[Prediction, Prediction]:
    """Return the predictions at targets [N] of the teacher, without gradient, and of a student with logits [N, V]."""
    match teacher:
        case TopkTeacher():
            student = student_prediction(student_logits, targets, teacher.topk_ids, tail)
            return teacher_prediction(teacher, tail, working_dtype(student_logits)), student
        case HiddenTeacher():
            return predictions(teacher.dense(), student_logits, targets, tail)
        case DenseTeacher():
            logits = teacher.logits.detach().to(working_dtype(student_logits))
            return dense_prediction(logits, targets), dense_prediction(student_logits, targets)


def log_odds(teacher: DenseTeacher) -> Tensor:
    """Return the log-odds [N] of the targets."""
    return dense_prediction(teacher.logits, teacher.targets).log_odds


def chunks_of(count: int, size: int) -> list[slice]:
    """Cut ``count`` rows into as few slices of at most ``size`` as will do, about equally long."""
    parts = -(-count // size)
    return [slice(index * count // parts, (index + 1) * count // parts) for index in range(parts)]


def check_belongs(own_targets: Tensor, targets: Tensor, own_vocab: int, vocab_size: int) -> None:
    """Raise if a teacher is of other targets or of another vocabulary.

    Raises:
        ValueError: naming what differs.
    """
    if len(own_targets) != len(targets):
        raise ValueError(f"teacher has {len(own_targets)} rows, but there are {len(targets)} targets; they must be as many")
    if own_vocab != vocab_size:
        raise ValueError(f"teacher has a vocabulary of {own_vocab} tokens, but the student one of {vocab_size}; they must agree")
    if not torch.equal(own_targets, targets):
        row = int((own_targets != targets).nonzero()[0])
        raise ValueError(f"teacher.targets of row {row} is {int(own_targets[row])}, but the target is {int(targets[row])}")
