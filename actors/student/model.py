"""A student as the training loop sees it: a module that turns a batch into a loss, on one worker or sharded over many.

A language model stands in a file of its own (``causal_lm``), a classifier here. N targets, V vocabulary, B rows, C classes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from actors.config.models import TrainConfig
from actors.dataloader.class_rows import row_logits
from actors.dataloader.collator import MicroBatch
from actors.student.ranks import Worker
from losses.config import LossConfig
from losses.distillation import LossSums, distillation_loss
from losses.loss_state import LossState


class StudentWithLoss(nn.Module, ABC):
    """A student and its loss in one forward, so that DDP and FSDP see a single call.

    Args:
        model: the student.
        loss: what it learns by.
        vocab_size: V.
    """

    def __init__(self, model: nn.Module, loss: LossConfig, vocab_size: int) -> None:
        super().__init__()
        self.model, self.loss, self.vocab_size = model, loss, vocab_size

    def forward(self, batch: MicroBatch, state: LossState | None) -> tuple[torch.Tensor, ...]:
        """Return the batch's share of the step's loss, and the sums for its metrics, as the tensors of a ``LossSums``.

        Without a state nothing is learned: the one tensor is the logits [N, V] at the targets. A plain tuple, because DDP
        and FSDP look for tensors in what a module returns, and one forward for both, because FSDP gathers weights for it.
        """
        return self.loss_sums(batch, state).tensors() if state is not None else (self.target_logits(batch),)

    @abstractmethod
    def target_logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return the logits [N, V] that predict the batch's targets."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """Return the units of sharding and of compiling.

        Raises:
            ValueError: if the model has none that are known.
        """

    def loss_sums(self, batch: MicroBatch, state: LossState) -> LossSums:
        """Return the batch's share of the step's loss and the sums for its metrics."""
        assert batch.weights is not None, "a batch that is learned from has weights"
        return distillation_loss(
            self.target_logits(batch), batch.targets, batch.teacher, batch.weights, self.loss, state, batch.row_counts
        )


class ClassifierStudent(StudentWithLoss):
    """Learns the label that stands behind each row's features, which it does not see."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, loss: LossConfig) -> None:
        super().__init__(model, loss, model.config.num_labels)

    def target_logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return the logits [B, C] of the rows."""
        return row_logits(self.model, batch)

    def blocks(self) -> Iterable[nn.Module]:
        """Return the largest list of blocks that the model has.

        Raises:
            ValueError: if it has none.
        """
        lists = [module for module in self.model.modules() if isinstance(module, nn.ModuleList)]
        if not lists:
            raise ValueError(
                f"train.sharding fsdp and train.compile find no blocks in {type(self.model).__name__}; replicate and false "
                "would do"
            )
        return max(lists, key=len)


def distribute(student: StudentWithLoss, train: TrainConfig, worker: Worker) -> nn.Module:
    """Replicate the student over the workers, or shard it; a lone worker with ``replicate`` gets the plain module.

    Sharding takes a block at a time to the device, and keeps this worker's share of it there. In bfloat16 the shares stay
    float32, and blocks are gathered in 16 bits; gradients are reduced in float32. Blocks are compiled each by itself, before they
    are sharded: what gathers their weights would break a graph of more.
    """
    if train.compile:
        for block in student.blocks():
            block.compile()
    if train.sharding == "fsdp":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        settings: dict[str, Any] = {"mp_policy": policy} if train.precision == "bfloat16" else {}
        for block in student.blocks():
            fully_shard(block, **settings)
        fully_shard(student, **settings)
        return student
    student.to(worker.device)
    if worker.world_size == 1:
        return student
    return DistributedDataParallel(student)


def undistributed(student: nn.Module) -> StudentWithLoss:
    """Return the student itself, whether or not DDP stands around it."""
    module = student.module if isinstance(student, DistributedDataParallel) else student
    assert isinstance(module, StudentWithLoss)
    return module


def set_gradient_sync(student: nn.Module, sync: bool) -> None:
    """Set whether the next backward pass reduces gradients over the workers: of replicas only the last of a step does.

    Shards reduce them in each pass: kept until the last, they would be whole on every device.
    """
    if isinstance(student, DistributedDataParallel):
        student.require_backward_grad_sync = sync


def autocast(train: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of a forward pass in the configured precision; shards have theirs from ``distribute``."""
    if train.precision == "bfloat16" and train.sharding == "replicate":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
