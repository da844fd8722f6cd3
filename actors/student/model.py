"""The student as a module that turns a batch into a loss. N targets, H hidden size, V vocabulary."""

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from actors.config.models import LoraAdapter, TrainConfig
from actors.dataloader.collator import MicroBatch
from actors.lora import add_adapters
from actors.model_source import ModelSource
from actors.models import head_makes_the_logits, load_model, output_head, plain_model
from actors.student.ranks import Worker
from losses.config import LossConfig
from losses.distillation import LossSums, distillation_loss
from losses.fused_linear import chunked_distillation_loss
from losses.loss_state import LossState


class StudentWithLoss(nn.Module):
    """The student and its loss in one forward, so that DDP and FSDP see a single call."""

    def __init__(self, model: PreTrainedModel, loss: LossConfig) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.through_head = head_makes_the_logits(model)

    def forward(self, batch: MicroBatch, state: LossState | None) -> tuple[torch.Tensor, ...]:
        """Return the batch's share of the step's loss, and the sums for its metrics, as the tensors of a ``LossSums``.

        Without a state nothing is learned: the one tensor is the logits [N, V] at the targets. A plain tuple, because DDP
        and FSDP look for tensors in what a module returns, and one forward for both, because FSDP gathers weights for it.
        """
        return self.loss_sums(batch, state).tensors() if state is not None else (self.target_logits(batch),)

    def target_logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return the logits [N, V] that predict the batch's targets."""
        if not self.through_head:
            return self.model(**_inputs(batch)).logits.flatten(0, 1)[batch.predicting]
        return output_head(self.model).logits(self._hidden(batch))

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        """[N, H], what the head is applied to at the targets."""
        outputs = plain_model(self.model).get_decoder()(**_inputs(batch))
        return outputs.last_hidden_state.flatten(0, 1)[batch.predicting]

    def loss_sums(self, batch: MicroBatch, state: LossState) -> LossSums:
        """Return the batch's share of the step's loss and the sums for its metrics."""
        assert batch.weights is not None, "a batch that is learned from has weights"
        taught = (batch.targets, batch.teacher, batch.weights, self.loss, state, batch.row_counts)
        if not self.through_head:
            return distillation_loss(self.target_logits(batch), *taught)
        return chunked_distillation_loss(self._hidden(batch), output_head(self.model), *taught, check_values=False)  # collate did


def _inputs(batch: MicroBatch) -> dict[str, object]:
    return {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask, "use_cache": False}


def prepare_model(source: ModelSource, lora: LoraAdapter | None, train: TrainConfig) -> PreTrainedModel:
    """Load the student and make it ready to learn."""
    model = load_model(source)
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None:
        model = add_adapters(model, lora)
        if train.gradient_checkpointing:
            model.enable_input_require_grads()
    if train.compile:
        plain_model(model).get_decoder().compile()
    return model.train()


def distribute(student: StudentWithLoss, train: TrainConfig, worker: Worker) -> nn.Module:
    """Replicate the student over the workers, or shard it; a lone worker with ``replicate`` gets the plain module."""
    student.to(worker.device)
    if train.sharding == "fsdp":
        for layer in decoder_layers(student.model):
            fully_shard(layer)
        fully_shard(student)
        return student
    if worker.world_size == 1:
        return student
    return DistributedDataParallel(student)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of the decoder, the units of sharding."""
    lists = [child for child in plain_model(model).get_decoder().children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ValueError(f"train.sharding fsdp finds no blocks in {type(plain_model(model)).__name__}; replicate would do")
    return max(lists, key=len)


def set_gradient_sync(student: nn.Module, sync: bool) -> None:
    """Say whether the next backward pass reduces gradients over the workers: only the last of a step does."""
    if isinstance(student, DistributedDataParallel):
        student.require_backward_grad_sync = sync
    elif isinstance(student, FSDPModule):
        student.set_requires_gradient_sync(sync)
