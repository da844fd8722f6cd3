"""A causal language model as student. N targets, H hidden size, V vocabulary."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.attention import is_flash
from actors.config.models import LoraAdapter, TrainConfig
from actors.config.passes import pass_size
from actors.dataloader.collator import MicroBatch, every_token
from actors.lora import add_adapters
from actors.model_source import ModelSource
from actors.models import head_makes_the_logits, is_classifier, load_model, output_head, plain_model, vocab_size_of
from actors.student.model import ClassifierStudent, StudentWithLoss, distribute, undistributed
from actors.student.ranks import Worker
from actors.student.sharded_weights import model_without_weights, read_shares
from losses.config import LossConfig
from losses.distillation import LossSums
from losses.fused_linear import chunked_distillation_loss
from losses.loss_state import LossState

TRIED_LENGTHS = (7, 9)
"""Tokens of the rows on which packing is tried."""
APART, APART_IN_16_BITS = 1e-4, 3e-2
"""How far a prediction may lie from that of its row alone, as a share of its logits' spread: rounding gave 1e-6 and 1e-2 in small
models of twenty families, a row that saw another one 6e-2 and more."""


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

    Raises:
        ValueError: if rows are to be packed, and the model does not keep them apart.
    """
    unread = model_without_weights(source) if train.sharding == "fsdp" else None
    model = ready_to_learn(load_model(source) if unread is None else unread, lora, train)
    student = distribute(student_of(model, loss), train, worker)
    if unread is not None:
        read_shares(student, source)
    if train.packing:
        require_apart(student, source, train, worker)
    return student


def student_of(model: PreTrainedModel, loss: LossConfig) -> StudentWithLoss:
    """Return a model with its loss, by what it predicts."""
    return ClassifierStudent(model, loss) if is_classifier(model) else CausalStudent(model, loss)


def require_apart(student: nn.Module, source: ModelSource, train: TrainConfig, worker: Worker) -> None:
    """Raise if a row would see others that are packed with it; all workers call it together.

    Raises:
        ValueError: naming the key and a value that would do.
    """
    model, tokens = plain_model(undistributed(student).model), pass_size(train)[1]
    name, settings = type(model).__name__, model.config.get_text_config()
    chunk, known = (getattr(settings, key, None) for key in ("attention_chunk_size", "max_position_embeddings"))
    if chunk and tokens > chunk:
        raise ValueError(
            f"train.packing true with train.micro_batch_tokens {tokens}: {name} attends within chunks of {chunk} tokens of a "
            f"pass, which would cut rows in two; train.micro_batch_tokens {chunk} would do, or train.packing false"
        )
    in_16_bits = is_flash(source.attention) or (train.sharding, train.precision) == ("fsdp", "bfloat16")
    tried = min(tokens, known + 1) if known else 0  # some models have a mask as long as the longest row they know
    try:
        with torch.autocast(worker.device.type, torch.bfloat16, enabled=in_16_bits):
            error = packing_error(undistributed(student), tried, worker.device)
    except (RuntimeError, TypeError) as failure:
        if type(failure) not in (RuntimeError, TypeError):
            raise  # too little memory, workers that do not hear each other
        reason = str(failure).splitlines()[0]
        raise ValueError(f"train.packing true: {name} takes no packed rows ({reason}); train.packing false would do") from failure
    if not error <= (APART_IN_16_BITS if in_16_bits else APART):
        raise ValueError(
            f"train.packing true: {name} does not keep rows apart that are packed into one, its predictions lie up to "
            f"{error:.2g} of their spread from those of each row alone; train.packing false would do"
        )


@torch.no_grad()
def packing_error(student: StudentWithLoss, tokens: int, device: torch.device) -> float:
    """Return how far predictions for two random rows in one lie from those for each alone, at most, as a share of their spread.

    A third row fills a pass of so many tokens. What compiled blocks would do is done uncompiled: they are compiled for the
    passes of a step.
    """
    compared = sum(TRIED_LENGTHS)
    lengths = [*TRIED_LENGTHS, max(0, tokens - compared)]
    rows = torch.randint(student.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(0)).split(lengths, dim=1)
    packed = every_token(torch.cat(rows, dim=1), torch.cat([torch.arange(length) for length in lengths])[None])
    passes = [*map(every_token, rows[:-1]), replace(packed, predicting=packed.predicting[:compared])]
    was_training = student.training
    student.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            *alone, together = (student(one.to(device), None)[0].float() for one in passes)
    finally:
        student.train(was_training)
    expected = torch.cat(alone)  # [T, V]
    spread = expected - expected.mean(dim=1, keepdim=True)
    return float(((together - expected).norm(dim=1) / spread.norm(dim=1)).amax())


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
    inputs: dict[str, object] = {"input_ids": batch.token_ids, "attention_mask": batch.attention_mask, "use_cache": False}
    return inputs if batch.position_ids is None else inputs | {"position_ids": batch.position_ids}
