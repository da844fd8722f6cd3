"""The truncated teacher: its log-probability of the target, of its K most likely others, and what mass is left.

Shapes: N targets, K top-k, V vocabulary. Logarithms are natural.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

NO_TOKEN = -1
"""The id in a column of the top-K that names no token, where a row keeps fewer than K; its log-probability is -inf."""

Index = slice | Tensor
"""Which of the N targets to take: a slice, positions, or a mask."""


@dataclass(frozen=True)
class TopkTeacher:
    """What a teacher says at N targets. Row i of every field speaks of the prediction of the i-th target.

    Raises:
        ValueError: if the shapes do not belong together. ``check`` looks at the values.
    """

    target_logprob: Tensor
    """float32 [N], log-probability of the target."""

    topk_ids: Tensor
    """int64 [N, K], K other tokens, all different; the target is never among them. ``NO_TOKEN`` in columns not used."""

    topk_logprobs: Tensor
    """float32 [N, K], their log-probabilities."""

    tail_logmass: Tensor
    """float32 [N], log of the mass outside target and top-K; -inf where nothing is left."""

    def __post_init__(self) -> None:
        if self.target_logprob.dim() != 1:
            raise ValueError(f"target_logprob has the shape {list(self.target_logprob.shape)}; it must be [N]")
        count = len(self.target_logprob)
        if self.topk_ids.dim() != 2 or len(self.topk_ids) != count or self.topk_ids.shape[1] < 1:
            shape = list(self.topk_ids.shape)
            raise ValueError(f"topk_ids has the shape {shape}; with {count} targets it must be [{count}, K], K at least 1")
        if self.topk_logprobs.shape != self.topk_ids.shape:
            shape, right = list(self.topk_logprobs.shape), list(self.topk_ids.shape)
            raise ValueError(f"topk_logprobs has the shape {shape}; it must be that of topk_ids, {right}")
        if self.tail_logmass.shape != self.target_logprob.shape:
            raise ValueError(f"tail_logmass has the shape {list(self.tail_logmass.shape)}; it must be [{count}]")

    def __len__(self) -> int:
        return len(self.target_logprob)

    @property
    def named(self) -> Tensor:
        """bool [N, K], which columns of the top-K name a token."""
        return self.topk_ids != NO_TOKEN

    @property
    def uncertainty(self) -> Tensor:
        """UNC [N], the mass off the target: the larger of 1 - p_g and the sum of the top-K.

        The first is exact unless p_g rounds to one; then the second still sees what the first cannot.
        """
        return torch.maximum(-torch.expm1(self.target_logprob.clamp(max=0.0)), self.topk_logprobs.exp().sum(dim=1))

    @property
    def log_uncertainty(self) -> Tensor:
        """log UNC [N], finer than the logarithm of ``uncertainty``: it does not underflow."""
        off_target = torch.log(-torch.expm1(self.target_logprob.clamp(max=0.0)))
        return torch.maximum(off_target, self.topk_logprobs.logsumexp(dim=1))

    def select(self, index: Index) -> "TopkTeacher":
        """Return the support of some of the targets, in the order of ``index``."""
        return TopkTeacher(self.target_logprob[index], self.topk_ids[index], self.topk_logprobs[index], self.tail_logmass[index])

    def to(self, device: torch.device | str) -> "TopkTeacher":
        """Return the support on another device."""
        return TopkTeacher(*(tensor.to(device) for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the fields, in their order."""
        return self.target_logprob, self.topk_ids, self.topk_logprobs, self.tail_logmass

    def check(self, targets: Tensor, vocab_size: int) -> None:
        """Raise if the values cannot be a teacher's over this vocabulary [V] at these targets [N].

        Raises:
            ValueError: naming the field, the value seen and the right one.
        """
        top_k = self.topk_ids.shape[1]
        if len(self) != len(targets):
            raise ValueError(f"teacher has {len(self)} rows, but there are {len(targets)} targets; they must be as many")
        if top_k >= vocab_size:
            raise ValueError(
                f"topk_ids has K={top_k} columns, but a vocabulary of {vocab_size} tokens has only {vocab_size - 1} "
                f"besides the target; K must be at most {vocab_size - 1}"
            )
        if len(self) == 0:
            return
        if not self.target_logprob.isfinite().all():
            bad = self.target_logprob[~self.target_logprob.isfinite()][0].item()
            raise ValueError(f"target_logprob holds {bad}; a teacher's log-probability of the target must be finite")
        for name, values in (("topk_logprobs", self.topk_logprobs), ("tail_logmass", self.tail_logmass)):
            largest = values.amax().item()  # NaN if there is one, as amax passes it on
            if not largest < 1.0:
                raise ValueError(f"{name} holds {largest}; a log-probability is a number of at most 0, or -inf")
        self._check_ids(targets, vocab_size)

    def _check_ids(self, targets: Tensor, vocab_size: int) -> None:
        lowest, highest = (int(bound) for bound in self.topk_ids.aminmax())
        if lowest < NO_TOKEN or highest >= vocab_size:
            wrong = lowest if lowest < NO_TOKEN else highest
            raise ValueError(f"topk_ids holds {wrong}; ids of a vocabulary of {vocab_size} tokens are 0 to {vocab_size - 1}")
        if lowest == NO_TOKEN and (self.topk_logprobs[self.topk_ids == NO_TOKEN] > -torch.inf).any():
            raise ValueError(f"topk_ids holds {NO_TOKEN}, no token, where topk_logprobs is not -inf; it must be -inf there")
        doubled = (self.topk_ids == targets[:, None]).any(dim=1)
        if doubled.any():
            row = int(doubled.nonzero()[0])
            raise ValueError(
                f"topk_ids of row {row} holds its target {int(targets[row])}; the top-K are tokens other than the target"
            )
        in_order = self.topk_ids.sort(dim=1).values
        repeated = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != NO_TOKEN)
        if repeated.any():
            row, column = (int(index) for index in repeated.nonzero()[0])
            raise ValueError(f"topk_ids of row {row} holds {int(in_order[row, column])} twice; the top-K must all be different")

    def keep_mass(self, share: float) -> "TopkTeacher":
        """Keep of each row the shortest run of its likeliest tokens that holds ``share`` of the mass off the target.

        The columns come out most likely first and stay K; those not kept become ``NO_TOKEN``, and their mass joins the tail.

        Raises:
            ValueError: if ``share`` is not above 0 and at most 1.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}; it must be above 0 and at most 1")
        logprobs, order = self.topk_logprobs.sort(dim=1, descending=True, stable=True)
        held_before = logprobs.exp().cumsum(dim=1) - logprobs.exp()
        dropped = held_before >= share * self.uncertainty[:, None]
        dropped_logmass = logprobs.masked_fill(~dropped, -torch.inf).logsumexp(dim=1)
        return TopkTeacher(
            self.target_logprob, self.topk_ids.gather(1, order).masked_fill(dropped, NO_TOKEN),
            logprobs.masked_fill(dropped, -torch.inf), torch.logaddexp(self.tail_logmass, dropped_logmass),
        )  # fmt: skip

    @staticmethod
    @torch.no_grad()
    def from_logits(teacher_logits: Tensor, targets: Tensor, top_k: int | None = None) -> "TopkTeacher":
        """Reduce a teacher's logits [N, V] to its support at the targets [N].

        ``top_k`` None or V - 1 keeps all others, in the order of their ids, and the tail is exactly empty; otherwise the
        K most likely are kept, most likely first. Computed in float32, or float64 if the logits are.

        Raises:
            ValueError: if the shapes do not agree, a target leaves the vocabulary or ``top_k`` exceeds V - 1.
        """
        check_targets(teacher_logits, targets, "teacher_logits")
        others_count = teacher_logits.shape[1] - 1
        if others_count < 1 or not 1 <= (others_count if top_k is None else top_k) <= others_count:
            raise ValueError(
                f"top_k is {top_k} for teacher_logits of the shape {list(teacher_logits.shape)}; it must be 1 to {others_count}"
            )
        logits = teacher_logits.to(working_dtype(teacher_logits))
        ids = torch.arange(others_count, device=logits.device).expand(len(targets), -1)
        ids = ids + (ids >= targets[:, None])  # every id but the target's
        others = logits.gather(1, ids)
        others_logmass = others.logsumexp(dim=1)
        target_logit = logits.gather(1, targets[:, None]).squeeze(1)
        # Through the log-odds: where the target holds nearly all mass, its logit minus a log-sum-exp is mere rounding.
        log_odds = target_logit - others_logmass
        log_normalizer = target_logit - logsigmoid(log_odds)
        kept, tail = others, torch.full_like(others_logmass, -torch.inf)
        if top_k is not None and top_k < others_count:
            kept, columns = others.topk(top_k, dim=1)
            tail = others.scatter(1, columns, -torch.inf).logsumexp(dim=1)
            ids = ids.gather(1, columns)
        return TopkTeacher(logsigmoid(log_odds), ids, kept - log_normalizer[:, None], tail - log_normalizer)


def working_dtype(values: Tensor) -> torch.dtype:
    """Return the type losses are computed in: float64 for float64, float32 for all others."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def check_targets(logits: Tensor, targets: Tensor, name: str = "student_logits") -> None:
    """Raise if logits are not [N, V], or targets are not N ids of that vocabulary.

    Raises:
        ValueError: naming the argument, its shape or value, and the right one.
    """
    if logits.dim() != 2:
        raise ValueError(f"{name} has the shape {list(logits.shape)}; it must be [N, V]")
    check_target_ids(targets, logits.shape[0], logits.shape[1], where=name)


def check_target_ids(targets: Tensor, count: int, vocab_size: int, where: str, check_values: bool = True) -> None:
    """Raise if targets are not ``count`` ids of a vocabulary of ``vocab_size`` tokens; checks the ids on request.

    Raises:
        ValueError: naming the shape or the value, and the right one.
    """
    if targets.shape != (count,):
        raise ValueError(f"targets has the shape {list(targets.shape)}; with {count} rows in {where} it must be [{count}]")
    if count == 0 or not check_values:
        return
    lowest, highest = (int(bound) for bound in targets.aminmax())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise ValueError(f"targets holds {wrong}; ids of a vocabulary of {vocab_size} tokens are 0 to {vocab_size - 1}")
