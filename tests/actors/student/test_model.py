"""From a batch to a loss, for plain heads and for architectures that change the head's output."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from actors.config.model_kinds import ScratchModel
from actors.config.models import LoraAdapter, TrainConfig
from actors.dataloader.collator import MicroBatch, collate
from actors.dataloader.scored_rows import FileRows
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile
from actors.lora import add_adapters, merge_adapters
from actors.model_source import ModelSource
from actors.models import load_model, save_model, scratch_model
from actors.student.causal_lm import CausalStudent, decoder_layers, make_student, prepare_model
from actors.student.model import distribute, undistributed
from actors.student.ranks import Worker
from losses.config import HardLabelLoss
from losses.distillation import LossSums
from losses.loss_state import LossState
from tests.worlds import VOCAB, scored_world, tiny_llama, word_tokenizer

HARD_LABEL = HardLabelLoss(kind="hard_label")


def batch_in(folder: Path) -> MicroBatch:
    path, _ = scored_world(folder, rows=6)
    batch = FileRows(ExampleFile(path), None, 8, np.array([1, 4, 2]))
    weights = StepWeights(HARD_LABEL, seed=0, store=None).of_step(batch, [[[0, 1, 2]]], step=1, state=LossState())
    return collate(batch, [0, 1, 2], VOCAB, weights)


def plain_cross_entropy(model: nn.Module, batch: MicroBatch) -> float:
    """The mean over targets of the model's own full logits, each row run alone and without padding."""
    losses = []
    for row, length in enumerate(batch.attention_mask.sum(dim=1).tolist()):
        ids = batch.token_ids[row : row + 1, :length]
        logprobs = model(input_ids=ids).logits.double().log_softmax(dim=-1)[0]
        first, last = row * batch.token_ids.shape[1], (row + 1) * batch.token_ids.shape[1]
        for flat in batch.predicting.tolist():
            if first <= flat < last:
                losses.append(-logprobs[flat - first, ids[0, flat - first + 1]].item())
    return sum(losses) / len(losses)


def gemma(soft_cap: float | None) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=soft_cap,
            initializer_range=0.5,
        )  # fmt: skip
    ).eval()


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_the_loss_is_that_of_the_models_own_logits(tmp_path: Path, soft_cap: float | None) -> None:
    model, batch = gemma(soft_cap), batch_in(tmp_path)
    sums = LossSums(*CausalStudent(model, HARD_LABEL)(batch, LossState()))
    assert sums.loss.item() == pytest.approx(plain_cross_entropy(model, batch), rel=1e-4)


def test_a_llama_with_its_own_head_gives_the_loss_of_its_logits(tmp_path: Path) -> None:
    model = load_model(ModelSource(str(tiny_llama(tmp_path / "model", seed=0, tied=False))))
    batch = batch_in(tmp_path)
    assert LossSums(*CausalStudent(model, HARD_LABEL)(batch, LossState())).loss.item() == pytest.approx(
        plain_cross_entropy(model, batch), rel=1e-5
    )


def test_adapters_train_alone_change_nothing_at_first_and_can_be_merged(tmp_path: Path) -> None:
    source = ModelSource(str(tiny_llama(tmp_path / "model", seed=0)))
    plain, batch = load_model(source), batch_in(tmp_path)
    model = prepare_model(source, LoraAdapter(rank=2), TrainConfig())
    assert all("lora" in name for name, weight in model.named_parameters() if weight.requires_grad)
    adapted = LossSums(*CausalStudent(model, HARD_LABEL)(batch, LossState())).loss
    assert adapted.item() == pytest.approx(plain_cross_entropy(plain, batch), rel=1e-5)
    assert merge_adapters(model).state_dict().keys() == plain.state_dict().keys()


def test_adapters_on_layers_that_are_not_there_are_refused(tmp_path: Path) -> None:
    model = load_model(ModelSource(str(tiny_llama(tmp_path / "model", seed=0))))
    with pytest.raises(ValueError, match=r"student\.lora\.modules names \['c_attn'\].* all-linear would do"):
        add_adapters(model, LoraAdapter(modules=("q_proj", "c_attn")))


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    source, batch = ModelSource(str(tiny_llama(tmp_path / "model", seed=0, layers=2))), batch_in(tmp_path)
    gradients = []
    for checkpointing in (False, True):
        model = prepare_model(source, None, TrainConfig(gradient_checkpointing=checkpointing))
        CausalStudent(model, HARD_LABEL)(batch, LossState())[0].backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_model_without_blocks_cannot_be_sharded() -> None:
    class Flat(nn.Module):
        def get_decoder(self) -> nn.Module:
            return nn.Linear(2, 2)

    with pytest.raises(ValueError, match="sharding fsdp and train.compile find no blocks in Flat; replicate and false would do"):
        decoder_layers(Flat())  # type: ignore[arg-type]


def test_a_lone_worker_gets_the_plain_module(tmp_path: Path) -> None:
    student = CausalStudent(load_model(ModelSource(str(tiny_llama(tmp_path / "model", seed=0)))), HARD_LABEL)
    assert distribute(student, TrainConfig(), Worker(0, 1, torch.device("cpu"))) is student


def test_scratch_models_come_from_their_seed_and_are_saved_whole(tmp_path: Path) -> None:
    shape = ScratchModel(kind="scratch", hidden_size=16, layers=1, heads=2, kv_heads=1)
    one, same, other = (scratch_model(shape, word_tokenizer(), VOCAB, 32, seed).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)

    (tmp_path / "saved.tmp").mkdir()
    (tmp_path / "saved.tmp" / "leftover").write_text("of a run that was killed")
    save_model(scratch_model(shape, word_tokenizer(), VOCAB, 32, seed=3), word_tokenizer(), tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(weight, one[name]) for name, weight in loaded.state_dict().items())
    assert not (tmp_path / "saved" / "leftover").exists() and not (tmp_path / "saved.tmp").exists()
    assert loaded.config.num_key_value_heads == 1 and loaded.config.eos_token_id == 0


def test_weights_that_are_pickles_are_not_read(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", seed=1)
    source = ModelSource(str(folder))
    torch.save(load_model(source).state_dict(), folder / "pytorch_model.bin")
    load_model(source)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{folder} holds no \*\.safetensors, .* transformers' save_pretrained would do"):
        load_model(source)


def test_the_head_is_tried_without_the_decoder(tmp_path: Path) -> None:
    model = load_model(ModelSource(str(tiny_llama(tmp_path / "model", seed=0, layers=2))))
    ran: list[nn.Module] = []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda module, _: ran.append(module))
    student = CausalStudent(model, HARD_LABEL)
    assert student.through_head and not ran
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, "it is as it was, tied"
    student(batch_in(tmp_path), LossState())
    assert ran == list(decoder_layers(model))


@pytest.mark.slow
def test_a_compiled_student_learns_the_same(tmp_path: Path) -> None:
    source, batch = ModelSource(str(tiny_llama(tmp_path / "model", seed=0, layers=2))), batch_in(tmp_path)
    losses, gradients = [], []
    for compiled in (False, True):
        worker = Worker(0, 1, torch.device("cpu"))
        student = make_student(source, None, HARD_LABEL, TrainConfig(compile=compiled), worker)
        compiles = [bool(layer._compiled_call_impl) for layer in undistributed(student).blocks()]
        assert compiles == [compiled] * 2 and not student.model.get_decoder()._compiled_call_impl
        sums = LossSums(*student(batch, LossState()))
        sums.loss.backward()
        losses.append(sums.loss.item())
        gradients.append([weight.grad for weight in student.parameters()])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
