"""From rows to the tensors of one forward pass. The only place where targets are shifted against predictions.

B rows, T tokens of a row, N targets, K top-k.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from actors.dataloader.scored_rows import RowBatch
from actors.records import Example
from losses.teachers import HiddenTeacher
from losses.token_weights import TokenWeights
from losses.topk_teacher import TopkTeacher, check_target_ids

PADDING = 0  # any id will do: padding is neither attended to nor a target


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass needs; positions are flat, row by row."""

    token_ids: torch.Tensor
    """int64 [B, T], padded on the right; packed, [1, T], one row after the other."""

    attention_mask: torch.Tensor | None
    """int64 [B, T], 0 on padding; None of packed rows: without a mask alone attention keeps them apart, by their positions."""

    position_ids: torch.Tensor | None
    """int64 [1, T] of packed rows, the place of each token in its own row; None where that is its place in the tensor."""

    predicting: torch.Tensor
    """int64 [N], flat positions in [B * T] whose output predicts a target: one before the target's own."""

    targets: torch.Tensor
    """int64 [N], the targets in the same order."""

    teacher: TopkTeacher | HiddenTeacher | None
    """The teacher's scores of the same N targets; None where the loss needs no teacher."""

    weights: TokenWeights | None
    """The weights of the same N targets, normalised over the whole optimizer step; None where nothing is learned."""

    row_counts: tuple[int, ...]
    """Number of targets of each row; they add up to N."""

    def weighed(self, weights: Sequence[TokenWeights]) -> "MicroBatch":
        """Return the batch with the weights of its rows' targets; with none it adds nothing to loss and gradients."""
        together = TokenWeights.concatenate(list(weights)) if weights else TokenWeights.zero(len(self.targets))
        return replace(self, weights=together.to(self.targets.device))

    def to(self, device: torch.device) -> "MicroBatch":
        """Return a copy on another device; from pinned memory it is made while the caller goes on."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MicroBatch":
        """Return a copy in pinned memory, from which an accelerator fetches by itself."""
        return self._changed(torch.Tensor.pin_memory)

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "MicroBatch":
        return MicroBatch(
            change(self.token_ids),
            None if self.attention_mask is None else change(self.attention_mask),
            None if self.position_ids is None else change(self.position_ids),
            change(self.predicting), change(self.targets), _changed_teacher(self.teacher, change),
            TokenWeights(*(change(tensor) for tensor in self.weights.tensors())) if self.weights else None,
            self.row_counts,
        )  # fmt: skip


def _changed_teacher(
    teacher: TopkTeacher | HiddenTeacher | None, change: Callable[[torch.Tensor], torch.Tensor]
) -> TopkTeacher | HiddenTeacher | None:
    match teacher:
        case TopkTeacher():
            return TopkTeacher(*(change(tensor) for tensor in teacher.tensors()))
        case HiddenTeacher():  # whose head is where it is needed, once for all batches
            return HiddenTeacher(change(teacher.hidden), teacher.head, change(teacher.targets))
        case None:
            return None


def collate(
    batch: RowBatch, rows: Sequence[int], vocab_size: int, weights: Sequence[TokenWeights] | None = None, packed: bool = False
) -> MicroBatch:
    """Return the tensors of one forward pass over some rows of a batch.

    Targets and scores are looked at here, on the CPU, so that the loss need not: an accelerator would have to wait.

    Args:
        batch: the rows.
        rows: which of them.
        vocab_size: of the model.
        weights: those of all rows of the batch, to learn; None to predict alone.
        packed: whether they are laid into one row, without padding.

    Raises:
        ValueError: if targets or scores are not of the model's vocabulary, or the scores are of other rows.
    """
    micro_batch = _unscored([batch.example(row) for row in rows], packed)
    check_target_ids(micro_batch.targets, len(micro_batch.targets), vocab_size, where="the rows")
    teacher = batch.teacher(rows)
    if teacher is not None:
        teacher.check(micro_batch.targets, vocab_size)
    micro_batch = replace(micro_batch, teacher=teacher)
    return micro_batch if weights is None else micro_batch.weighed([weights[row] for row in rows])


def every_token(token_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> MicroBatch:
    """Return a pass over one row [1, T] that asks for the prediction at each of its tokens, and learns nothing.

    ``position_ids``, int64 [1, T], if several rows are packed into it.
    """
    tokens = token_ids.shape[1]
    mask = torch.ones_like(token_ids) if position_ids is None else None
    everywhere, nothing = torch.arange(tokens, device=token_ids.device), TokenWeights.zero(tokens)
    return MicroBatch(token_ids, mask, position_ids, everywhere, token_ids[0], None, nothing, (tokens,))


def _unscored(examples: Sequence[Example], packed: bool) -> MicroBatch:
    token_ids, attention_mask, position_ids, begins = _in_one_row(examples) if packed else _side_by_side(examples)
    predicting = [begin + example.target_positions - 1 for begin, example in zip(begins, examples, strict=True)]
    return MicroBatch(
        token_ids=torch.from_numpy(token_ids),
        attention_mask=None if attention_mask is None else torch.from_numpy(attention_mask),
        position_ids=None if position_ids is None else torch.from_numpy(position_ids),
        predicting=torch.from_numpy(np.concatenate(predicting)),
        targets=torch.from_numpy(np.concatenate([example.targets for example in examples]).astype(np.int64)),
        teacher=None,
        weights=None,
        row_counts=tuple(len(example.targets) for example in examples),
    )


_Laid = tuple[np.ndarray, np.ndarray | None, np.ndarray | None, Sequence[int]]
"""Token ids, attention mask and positions as in ``MicroBatch``, and the flat position at which each row begins."""


def _side_by_side(examples: Sequence[Example]) -> _Laid:
    length = max(len(example.token_ids) for example in examples)
    token_ids = np.full((len(examples), length), PADDING, dtype=np.int64)
    attention_mask = np.zeros_like(token_ids)
    for index, example in enumerate(examples):
        token_ids[index, : len(example.token_ids)] = example.token_ids
        attention_mask[index, : len(example.token_ids)] = 1
    return token_ids, attention_mask, None, range(0, token_ids.size, length)


def _in_one_row(examples: Sequence[Example]) -> _Laid:
    lengths = [len(example.token_ids) for example in examples]
    token_ids = np.concatenate([example.token_ids for example in examples]).astype(np.int64)
    position_ids = np.concatenate([np.arange(length) for length in lengths])
    return token_ids[None], None, position_ids[None], [0, *np.cumsum(lengths[:-1]).tolist()]
