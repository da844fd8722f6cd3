"""From hidden states to a step's loss, without the logits: output head and loss, some targets at a time.

Only one chunk's logits [n, V] exist at once; going backward they are computed again.
Shapes: N targets, n targets of a chunk, H hidden size, V vocabulary.
"""

from torch import Tensor
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from losses.config import LossConfig
from losses.distillation import LossSums, check_teacher_and_weights, weighted_sums
from losses.support import TeacherSupport, check_target_ids
from losses.teaching import TokenWeights


def chunked_distillation_loss(
    hidden: Tensor,
    head_weight: Tensor,
    head_bias: Tensor | None,
    targets: Tensor,
    teacher: TeacherSupport | None,
    weights: TokenWeights,
    loss: LossConfig,
    chunk_targets: int = 1024,
) -> LossSums:
    """Return what ``distillation_loss`` would of ``hidden @ head_weight.T + head_bias``, and the same gradients.

    Args:
        hidden: [N, H], the student's last hidden states where the targets are predicted. N may be 0: the loss is then
            zero, and still connected to ``hidden`` and the head.
        head_weight: [V, H], weight of the output head.
        head_bias: [V], or None.
        targets: int64 [N]; ``teacher``, ``weights`` and ``loss`` as in ``distillation_loss``.
        chunk_targets: targets of a chunk; memory is chunk_targets * V numbers, a few times.

    Raises:
        ValueError: naming the argument, its shape or value, and the right one.
    """
    check_head(hidden, head_weight, head_bias)
    check_target_ids(targets, len(hidden), len(head_weight), where="hidden")
    check_teacher_and_weights(targets, len(head_weight), teacher, weights, loss)
    if chunk_targets < 1:
        raise ValueError(f"chunk_targets is {chunk_targets}; it must be at least 1")

    def chunk_sums(chunk_hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: slice) -> LossSums:
        chunk_teacher = None if teacher is None else teacher.select(chunk)
        logits = linear(chunk_hidden, weight, bias)
        return weighted_sums(logits, targets[chunk], chunk_teacher, weights.select(chunk), loss)

    if len(hidden) <= chunk_targets:
        return chunk_sums(hidden, head_weight, head_bias, slice(None))
    total: LossSums | None = None
    for start in range(0, len(hidden), chunk_targets):
        chunk = slice(start, start + chunk_targets)
        sums: LossSums = checkpoint(
            chunk_sums, hidden[chunk], head_weight, head_bias, chunk, use_reentrant=False, preserve_rng_state=False
        )
        total = sums if total is None else total + sums
    assert total is not None, "there is a first chunk"
    return total


def check_head(hidden: Tensor, head_weight: Tensor, head_bias: Tensor | None) -> None:
    """Refuse a head that does not fit the hidden states.

    Raises:
        ValueError: naming the argument, its shape and the right one.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden has the shape {list(hidden.shape)}; it must be [N, H]")
    if head_weight.dim() != 2 or head_weight.shape[1] != hidden.shape[1]:
        shape, size = list(head_weight.shape), hidden.shape[1]
        raise ValueError(f"head_weight has the shape {shape}; with hidden states of size {size} it must be [V, {size}]")
    if head_bias is not None and head_bias.shape != head_weight.shape[:1]:
        raise ValueError(f"head_bias has the shape {list(head_bias.shape)}; it must be [{len(head_weight)}], or None")
