"""From hidden states to a step's loss, without the logits: output head and loss, some targets at a time.

Gradients are computed together with the loss, while a chunk's logits exist, and wait for the backward pass: the head is
multiplied once forward and twice for its two gradients, as in a plain model. The loss itself is ``weighted_sums``, run on a
few rows at a time so that its intermediate results stay in the processor's cache; on an accelerator, on the whole chunk.

Shapes: N targets, n targets of a chunk, H hidden size, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from losses.config import LossConfig
from losses.distillation import LossSums, check_teacher_and_weights, selects_tokens, taught_alone, weighted_sums
from losses.lm_head import LMHead
from losses.loss_state import LossState
from losses.teachers import HiddenTeacher, Teacher, chunks_of
from losses.token_weights import TokenWeights
from losses.topk_teacher import Index, check_target_ids, working_dtype
from losses.weighing import highest_in_rows, selection_scores

CHUNK_TARGETS = {"cpu": 192}
CHUNK_TARGETS_ELSEWHERE = 1024
CACHED_NUMBERS = 1 << 20  # logits whose loss is computed at once on a CPU: 4 MiB of float32


def chunked_distillation_loss(
    hidden: Tensor,
    head: LMHead,
    targets: Tensor,
    teacher: Teacher | None,
    weights: TokenWeights,
    loss: LossConfig,
    state: LossState | None = None,
    row_counts: Sequence[int] | None = None,
    chunk_targets: int | None = None,
    check_values: bool = True,
) -> LossSums:
    """Return what ``distillation_loss`` would of ``head.logits(hidden)``, and the same gradients of hidden states and head.

    Under autocast the head is multiplied in autocast's type; the loss is computed in float32, and the head's gradient is
    added up in the head's own type. Gradients of gradients are not available.

    Args:
        hidden: [N, H], the student's last hidden states where the targets are predicted. N may be 0: the loss is then
            zero, and still connected to ``hidden`` and the head.
        head: the student's output head.
        targets: int64 [N]; ``teacher``, ``weights``, ``loss``, ``state`` and ``row_counts`` as in ``distillation_loss``.
        chunk_targets: targets of a chunk; memory is chunk_targets * V numbers, and little more. 192 on a CPU and 1024
            elsewhere by default.
        check_values: False if the caller has passed the same targets and teacher to ``teacher.check`` already, best while
            they were on the CPU: to look at values on an accelerator is to wait for it.

    Raises:
        ValueError: naming the argument, its shape or value, and the right one.
    """
    head.check(hidden)
    check_target_ids(targets, len(hidden), head.vocab_size, where="hidden", check_values=check_values)
    check_teacher_and_weights(targets, head.vocab_size, teacher, weights, loss, row_counts, check_values)
    if chunk_targets is None:
        chunk_targets = CHUNK_TARGETS.get(hidden.device.type, CHUNK_TARGETS_ELSEWHERE)
    if chunk_targets < 1:
        raise ValueError(f"chunk_targets is {chunk_targets}; it must be at least 1")
    task = FusedLinearTask(targets, teacher, weights, loss, state or LossState.first(loss), chunk_targets)
    if selects_tokens(loss):
        assert row_counts is not None, "checked above"
        hidden, task = task.taught(hidden, head, row_counts)
    return LossSums(*LossThroughHead.apply(hidden, head.weight, head.bias, head, task))


@dataclass(frozen=True)
class FusedLinearTask:
    """All that a chunked loss needs beside hidden states and head."""

    targets: Tensor
    teacher: Teacher | None
    weights: TokenWeights
    loss: LossConfig
    state: LossState
    chunk_targets: int

    def select(self, index: Index) -> "FusedLinearTask":
        """Return the task of some of the targets."""
        teacher = None if self.teacher is None else self.teacher.select(index)
        return replace(self, targets=self.targets[index], teacher=teacher, weights=self.weights.select(index))

    def taught(self, hidden: Tensor, head: LMHead, row_counts: Sequence[int]) -> tuple[Tensor, "FusedLinearTask"]:
        """Return the hidden states of the targets that are taught, and their task; costs one more pass of the head."""
        assert selects_tokens(self.loss), "checked by the caller"
        scores = [hidden.new_zeros(0, dtype=working_dtype(hidden))]
        for _, part, logits in chunks_with_logits(*in_compute_type(hidden, head), self):
            for rows in blocks_of(logits):
                block = part.select(rows)
                assert block.teacher is not None, "checked by the caller"
                scores.append(selection_scores(logits[rows], block.targets, block.teacher, self.loss))
        in_rows = highest_in_rows(torch.cat(scores), row_counts, self.state.kept_fraction)
        kept, weights = taught_alone(in_rows, self.weights, self.loss)
        return hidden[kept], replace(self.select(kept), weights=weights)

    def sums(self, logits: Tensor) -> LossSums:
        """Return the sums over the targets, from their logits."""
        return weighted_sums(logits, self.targets, self.teacher, self.weights, self.loss, self.state)

    def sums_and_gradient(self, logits: Tensor) -> tuple[LossSums, Tensor]:
        """Return the sums over the targets, and the gradient of their loss to the logits."""
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            sums = self.sums(leaf)
            (gradient,) = torch.autograd.grad(sums.loss, leaf)
        return sums.detach(), gradient


class LossThroughHead(torch.autograd.Function):
    """The tensors of ``LossSums``; the first, the loss, has gradients to hidden states, head weight and head bias."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: LMHead, task: FusedLinearTask
    ) -> tuple[Tensor, ...]:
        gradients = Gradients.like(hidden, weight, bias, ctx.needs_input_grad[:3])  # type: ignore[attr-defined]
        total = LossSums.zero(hidden.device, working_dtype(hidden))
        hidden, head = in_compute_type(hidden, head)
        for chunk, part, logits in chunks_with_logits(hidden, head, task):
            for rows in blocks_of(logits):
                block = part.select(rows)
                if not gradients.wanted:
                    total = total + block.sums(logits[rows])
                    continue
                sums, gradient = block.sums_and_gradient(logits[rows])
                total = total + sums
                logits[rows] = head.linear_gradient(gradient, logits[rows])
            if gradients.wanted:
                gradients.add(chunk, logits, hidden[chunk], head)
        ctx.save_for_backward(*gradients.tensors)  # type: ignore[arg-type]  # None may be saved
        ctx.mark_non_differentiable(*total.tensors()[1:])
        return total.tensors()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved: tuple[Tensor | None, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
        # Asking whether the factor is 1 would stall an accelerator; there, multiplying is cheap.
        if loss_grad.device.type == "cpu" and loss_grad.item() == 1.0:
            return *saved, None, None
        return *(None if gradient is None else gradient * loss_grad for gradient in saved), None, None


@dataclass(frozen=True)
class Gradients:
    """Gradients of the loss, filled chunk by chunk; None where none is wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @staticmethod
    def like(hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: Sequence[bool]) -> "Gradients":
        """Return room for those that are wanted; zeros where there are no targets to fill it.

        What is summed over chunks is float32 at least: of hundreds of 16-bit parts the last would be rounded away.
        """
        make = torch.empty_like if len(hidden) else torch.zeros_like
        dtypes = (hidden.dtype, working_dtype(weight), working_dtype(weight))
        values = zip((hidden, weight, bias), wanted, dtypes, strict=True)
        return Gradients(*(make(value, dtype=dtype) if value is not None and want else None for value, want, dtype in values))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The three."""
        return self.hidden, self.weight, self.bias

    @property
    def wanted(self) -> bool:
        """Whether there is one to fill."""
        return any(value is not None for value in self.tensors)

    def add(self, chunk: slice, gradient: Tensor, hidden: Tensor, head: LMHead) -> None:
        """Add what a chunk's gradient [n, V] means for its hidden states [n, H] and for the head; chunks come in order."""
        first = chunk.start == 0
        if self.hidden is not None:
            self.hidden[chunk] = gradient @ head.weight
        if self.weight is not None and self.weight.dtype == gradient.dtype:
            self.weight.addmm_(gradient.T, hidden, beta=0 if first else 1)
        elif self.weight is not None:
            add_(self.weight, gradient.T @ hidden, first)
        if self.bias is not None:
            add_(self.bias, gradient.sum(dim=0), first)


def add_(total: Tensor, part: Tensor, first: bool) -> None:
    """Add a part to a total that has no value before the first."""
    if first:
        total.copy_(part)
    else:
        total.add_(part)


@torch.no_grad()
def chunks_with_logits(hidden: Tensor, head: LMHead, task: FusedLinearTask) -> Iterator[tuple[slice, FusedLinearTask, Tensor]]:
    """Yield each chunk's place among the targets, its task and its logits [n, V]; all chunks' logits share one buffer."""
    chunks = chunks_of(len(hidden), task.chunk_targets)
    buffer = hidden.new_empty(max((chunk.stop - chunk.start for chunk in chunks), default=0), head.vocab_size)
    for chunk in chunks:
        part = task.select(chunk)
        if isinstance(part.teacher, HiddenTeacher):
            part = replace(part, teacher=part.teacher.dense())
        yield chunk, part, head.logits_into(buffer, hidden[chunk])


def in_compute_type(hidden: Tensor, head: LMHead) -> tuple[Tensor, LMHead]:
    """Return both in the type in which they are multiplied: autocast's, or else the head's own."""
    device, dtype = hidden.device.type, head.weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), head.to(dtype)


def blocks_of(logits: Tensor) -> list[slice]:
    """Cut the rows of a chunk's logits [n, V] into those whose loss is computed at once."""
    if logits.device.type != "cpu":
        return [slice(0, len(logits))]
    return chunks_of(len(logits), max(1, CACHED_NUMBERS // logits.shape[1]))
