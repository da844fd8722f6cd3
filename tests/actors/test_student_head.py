"""The output head as the loss uses it: what architectures do to their logits, and adapters on it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, LlamaForCausalLM, PreTrainedModel

from actors.config.models import LoraAdapter
from actors.lora import add_adapters, merge_adapters
from actors.model_source import ModelSource
from actors.models import head_makes_the_logits, load_model, output_head, vocab_size_of
from tests.worlds import VOCAB, tiny_llama

SHAPE = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0, "initializer_range": 0.3,
}  # fmt: skip
IDS = torch.tensor([[5, 9, 2, 7]])


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0))


@pytest.mark.parametrize("make", [cohere, granite])
def test_a_factor_of_the_logits_is_read_from_the_configuration(make: Any) -> None:
    torch.manual_seed(0)
    model = make().eval()
    assert output_head(model).scale == 0.25 and head_makes_the_logits(model)
    hidden = model.get_decoder()(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(output_head(model).logits(hidden), model(input_ids=IDS).logits)


class Inverted(LlamaForCausalLM):
    """A model that does to its logits what no configuration says."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(*args, **kwargs)
        outputs.logits = -outputs.logits
        return outputs


def test_a_model_that_does_something_else_to_its_logits_is_found_out(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path / "model", seed=0)
    assert head_makes_the_logits(LlamaForCausalLM.from_pretrained(folder))
    inverted = Inverted.from_pretrained(folder).train()
    assert not head_makes_the_logits(inverted)
    assert inverted.training, "the trial leaves the model as it was"


def test_an_adapter_on_the_head_is_part_of_it_and_learns(tmp_path: Path) -> None:
    model = load_model(ModelSource(str(tiny_llama(tmp_path / "model", seed=0, tied=False))))
    adapted = add_adapters(model, LoraAdapter(rank=2, modules=("lm_head",)))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight)
    assert head_makes_the_logits(adapted) and vocab_size_of(adapted) == VOCAB
    output_head(adapted).weight.square().sum().backward()
    trained = {name: weight.grad for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained and all(gradient is not None and gradient.any() for gradient in trained.values())
    whole = output_head(adapted).weight.detach().clone()
    torch.testing.assert_close(merge_adapters(adapted).lm_head.weight, whole)


def test_dropout_before_an_adapter_on_the_head_is_refused(tmp_path: Path) -> None:
    model = load_model(ModelSource(str(tiny_llama(tmp_path / "model", seed=0, tied=False))))
    lora = LoraAdapter(rank=2, dropout=0.1, modules=("q_proj", "lm_head"))
    with pytest.raises(ValueError, match=r"student\.lora\.dropout is 0\.1, but the output head lm_head .* dropout 0 would do"):
        add_adapters(model, lora)
