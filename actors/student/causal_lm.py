"""A causal language model as student. N targets, H hidden size, V vocabulary."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.config.models import LoraAdapter, TrainConfig
from actors.dataloader.collator import MicroBatch
from actors.lora import add_adapters
from actors.model_source import ModelSource
from actors.models import head_makes_the_logits, load_model, output_head, plain_model, vocab_size_of
from actors.student.model import StudentWithLoss, distribute
from actors.student.ranks import Worker
from actors.student.sharded_weights import model_without_weights, read_shares
from losses.config import LossConfig
from losses.distillation import LossSums
from losses.fused_linear import chunked_distillation_loss
from losses.loss_state import LossState


class CausalStudent(StudentWithLoss):
    """Learns through its output head, chunk by chunk, where the head alone makes the logits; else from its own logits."""

    model: PreTrainedModel

    def __init__(self, model: PreTrainedModel, loss: LossConfig) -> None:
        super().__init__(model, loss, vocab_size_of(model))
        self.through_head = head_makes_the_logits(model)

    def target_logits(self, batch: MicroBatch) -> torch.Tensor:
        """Return the logits [N, V] that predict the batch's targets."""
        if not self.through_head:
            return self.model(**_inputs(batch)).logits.flatten(0, 1)[batch.predicting]
        return output_head(self.model).logits(self._hidden(batch))

    def blocks(self) -> Iterable[nn.Module]:
        """Return the blocks of the decoder."""
        return decoder_layers(self.model)

    def loss_sums(self, batch: MicroBatch, state: LossState) -> LossSums:
        """Return the batch's share of the step's loss and the sums for its metrics."""
        if not self.through_head:
            return super().loss_sums(batch, state)
        assert batch.weights is not None, "a batch that is learned from has weights"
        return chunked_distillation_loss(
            self._hidden(batch), output_head(self.model), batch.targets, batch.teacher, batch.weights, self.loss, state,
            batch.row_counts, check_values=False,
        )  # fmt: skip  # collate looked at the values

    def _hidden(self, batch: MicroBatch) -> torch.Tensor:
        """[N, H], what the head is applied to at the targets."""
        outputs = plain_model(self.model).get_decoder()(**_inputs(batch))
        return outputs.last_hidden_state.flatten(0, 1)[batch.predicting]


def make_student(
    source: ModelSource, lora: LoraAdapter | None, loss: LossConfig, train: TrainConfig, worker: Worker
) -> nn.Module:
    """Return the student, ready to learn, as it stands on its workers; all of them call it together.

    What is sharded is read by each worker as far as its share goes.
    """
    unread = model_without_weights(source) if train.sharding == "fsdp" else None
    model = ready_to_learn(load_model(source) if unread is None else unread, lora, train)
    student = distribute(CausalStudent(model, loss), train, worker)
    if unread is not None:
        read_shares(student, source)
    return student


def prepare_model(source: ModelSource, lora: LoraAdapter | None, train: TrainConfig) -> PreTrainedModel:
    """Load the student whole and make it ready to learn."""
    return ready_to_learn(load_model(source), lora, train)


def ready_to_learn(model: PreTrainedModel, lora: LoraAdapter | None, train: TrainConfig) -> PreTrainedModel:
    """Put adapters into the model, if it is to have any, and let it save memory, if it is to."""
    if train.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if lora is not None:
        model = add_adapters(model, lora)
        if train.gradient_checkpointing:
            model.enable_input_require_grads()
    return model.train()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the blocks of the decoder, the units of sharding and of compiling."""
    lists = [child for child in plain_model(model).get_decoder().children() if isinstance(child, nn.ModuleList)]
    if not lists:
        raise ValueError(
            f"train.sharding fsdp and train.compile find no blocks in {type(plain_model(model)).__name__}; replicate and false "
            "would do"
        )
    return max(lists, key=len)


def _inputs(batch: MicroBatch) -> dict[str, object]:
    return {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask, "use_cache": False}
