"""Models without some of their layers, beside a plain loop over the blocks that were kept. T tokens, V vocabulary."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    T5Config,
    XLMConfig,
)

from orchestrator.models.layer_cut import (
    cut_model,
    cut_settings,
    evenly,
    first_and_last,
    layers_of,
    most_influential,
    renumber,
    require_same_blocks,
)

VOCAB, LAYERS, WINDOW, KEPT = 96, 6, 8, (0, 2, 3, 5)
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 64, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
GPT2 = {
    "vocab_size": VOCAB, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "initializer_range": 0.3,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**GROUPED),
    "mistral": MistralConfig(**GROUPED, sliding_window=WINDOW),
    "qwen2": Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=3),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma2": Gemma2Config(**GROUPED, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(**GROUPED, sliding_window=WINDOW),
    "opt": OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=64, num_hidden_layers=LAYERS, num_attention_heads=4, max_position_embeddings=64,
        word_embed_proj_dim=32, init_std=0.3, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "gpt_neox": GPTNeoXConfig(**COMMON),
    "gpt2": GPT2Config(**GPT2),
}  # fmt: skip


def made(settings: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(settings), attn_implementation="eager").eval()


def cut_of(settings: PreTrainedConfig, kept: Sequence[int]) -> PreTrainedModel:
    model = made(settings)
    cut_model(model, kept)
    renumber(model)
    return model


def tokens(length: int) -> Tensor:
    return torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(1))


def caught_by(module: nn.Module, run: Callable[[], object]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module is called with while something runs."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hook = module.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    run()
    hook.remove()
    return calls[0]


def without_blocks(model: PreTrainedModel, name: str, kept: Sequence[int], row: Tensor) -> Tensor:
    """Logits [1, T, V] of a loop over the kept blocks, each called with what the whole model calls it with but the states."""
    blocks = model.get_submodule(name)
    called = [caught_by(block, lambda: model(row, use_cache=False)) for block in blocks]
    args, kwargs = called[0]
    hidden = args[0] if args else kwargs["hidden_states"]
    for layer in kept:
        args, kwargs = called[layer]
        states = {} if args else {"hidden_states": hidden}
        output = blocks[layer](*((hidden, *args[1:]) if args else ()), **{**kwargs, **states})
        hidden = output if isinstance(output, Tensor) else output[0]
    last = len(blocks) - 1
    hook = blocks[last].register_forward_hook(
        lambda _, __, found: hidden if isinstance(found, Tensor) else (hidden, *found[1:])
    )
    logits = model(row, use_cache=False).logits
    hook.remove()
    return logits


BLOCKS = {"opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h"}


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_cut_model_is_the_kept_blocks_of_the_teacher(family: str, tmp_path: Path) -> None:
    settings, row = FAMILIES[family], tokens(3 * WINDOW)
    expected = without_blocks(made(settings), BLOCKS.get(family, "model.layers"), KEPT, row)
    require_same_blocks(settings, KEPT)
    student = cut_of(settings, KEPT)
    torch.testing.assert_close(student(row, use_cache=False).logits, expected)

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert again.config.num_hidden_layers == len(KEPT) and again.generation_config.eos_token_id == 0
    assert all(torch.equal(weight, student.state_dict()[name]) for name, weight in again.state_dict().items())
    assert torch.equal(again(row, use_cache=False).logits, student(row, use_cache=False).logits)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_cut_model_generates_with_a_cache_as_without(family: str) -> None:
    student, row = cut_of(FAMILIES[family], KEPT), tokens(2 * WINDOW)
    cached = student.generate(row, do_sample=False, max_new_tokens=8, min_new_tokens=8)
    plain = row
    for _ in range(8):
        logits = student(plain, use_cache=False).logits[:, -1]
        logits[:, 0] = -torch.inf  # the end, which min_new_tokens forbids
        plain = torch.cat([plain, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(cached, plain)


def test_lists_with_an_entry_a_layer_are_cut_alike() -> None:
    gemma = FAMILIES["gemma3"]
    assert cut_settings(gemma, KEPT).layer_types == [gemma.layer_types[layer] for layer in KEPT]
    assert cut_settings(gemma, (0, 5)).layer_types == ["sliding_attention", "full_attention"]
    assert gemma.num_hidden_layers == LAYERS == len(gemma.layer_types)
    assert cut_settings(FAMILIES["gpt2"], KEPT).n_layer == len(KEPT)


@pytest.mark.parametrize(
    ("layers", "count", "even", "ends"),
    [
        (30, 10, (0, 3, 6, 10, 13, 16, 19, 23, 26, 29), (0, 1, 2, 3, 4, 25, 26, 27, 28, 29)),
        (12, 6, (0, 2, 4, 7, 9, 11), (0, 1, 2, 9, 10, 11)),
        (5, 3, (0, 2, 4), (0, 1, 4)),
        (4, 1, (0,), (0,)),
        (2, 1, (0,), (0,)),
    ],
)
def test_a_count_keeps_layers_at_equal_distances_or_both_ends(
    layers: int, count: int, even: tuple[int, ...], ends: tuple[int, ...]
) -> None:
    assert evenly(layers, count) == even
    assert first_and_last(layers, count) == ends


def test_the_layers_of_the_largest_influence_are_kept_in_their_order() -> None:
    assert most_influential([0.3, 0.1, 0.2, 0.9], 2) == (0, 3)
    assert most_influential([0.5, 0.5, 0.5], 2) == (0, 1)


def quantized() -> PreTrainedConfig:
    settings = LlamaConfig(**GROUPED)
    settings.quantization_config = {"quant_method": "awq"}
    return settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (T5Config(), r"a T5Config, cannot be: it has an encoder too.*student\.model\.kind=pretrained or scratch would do"),
        (quantized(), r"its weights are quantized; teacher\.model\.name of the model before quantization would do"),
        (
            XLMConfig(vocab_size=VOCAB, emb_dim=32, n_layers=LAYERS, n_heads=4),
            r"the teacher, a XLMConfig, cannot be: its XLMModel has lists of modules: attentions, layer_norm1, ffns, layer_norm2",
        ),
        (
            GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True),
            r"its layer 2 would be another as layer 1, since what it does depends on its place \(attn\.scaling 0\.\d+, not 0\.",
        ),
        (
            DeepseekV3Config(
                **COMMON, num_key_value_heads=4, first_k_dense_replace=3, n_routed_experts=4, n_group=1, topk_group=1,
                num_experts_per_tok=2, moe_intermediate_size=16, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8,
                qk_nope_head_dim=8,
            ),
            r"a DeepseekV3Config, cannot be: its layer 3 would be another as layer 2",
        ),
    ],
    ids=["encoder", "quantized", "several lists", "scaled by place", "dense first"],
)  # fmt: skip
def test_what_cannot_be_cut_is_refused_by_its_class(settings: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layers_of(settings)
        require_same_blocks(settings, KEPT)


def test_a_decoder_of_a_pair_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="it has an encoder too"):
        layers_of(BartConfig())
