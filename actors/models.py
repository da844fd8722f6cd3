"""Models of transformers: loaded from safetensors, made from a shape, written as ordinary folders.

And where their hidden states become logits, so that the loss can do that step itself, chunk by chunk.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from actors.attention import attention_for
from actors.config.model_kinds import ScratchModel
from actors.files import whole_folder
from actors.lora import adapted_weight
from actors.model_source import ModelSource
from actors.networks.classifier import register
from losses.lm_head import LMHead

PROBE_TOKENS, PROBE_POSITIONS = 64, 3
register()  # whoever loads models here finds small classifiers too
ROUNDING = 1e-5  # relative and in logits: a soft cap of 30 takes 4e-4 of a logit of 1


def load_model(source: ModelSource, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model on the CPU; its weights come from safetensors and from nothing else.

    Raises:
        ValueError: if its folder has none.
    """
    source.require_safetensors()
    config = AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=source.trust_remote_code)
    if source.classes:
        return load_classifier(source, dtype, attention_for(config, source.attention))
    return AutoModelForCausalLM.from_pretrained(
        source.name,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        use_safetensors=True,
        dtype=dtype,
        attn_implementation=attention_for(config, source.attention),
    )


def load_classifier(source: ModelSource, dtype: torch.dtype = torch.float32, attention: str | None = None) -> PreTrainedModel:
    """Return a sequence classifier on the CPU, its attention computed as said, or as the library chooses.

    Raises:
        ValueError: if it tells apart more or fewer labels than the source says.
    """
    model = AutoModelForSequenceClassification.from_pretrained(
        source.name, revision=source.revision, trust_remote_code=source.trust_remote_code, use_safetensors=True, dtype=dtype,
        attn_implementation=attention,
    )  # fmt: skip
    if model.config.num_labels != source.classes:
        raise ValueError(
            f"{source.name} tells {model.config.num_labels} labels apart, and task.labels has {source.classes}; a classifier of "
            "these labels would do, or a model without a classification head"
        )
    return model


def weights_folder(source: ModelSource) -> Path:
    """Return the folder in which all files of the weights are; those of a model on the hub are fetched."""
    where = {"revision": source.revision}
    try:
        index = cached_file(source.name, SAFE_WEIGHTS_NAME, **where)
    except OSError:
        index = cached_file(source.name, SAFE_WEIGHTS_INDEX_NAME, **where)
        for name in sorted(set(json.loads(Path(index).read_text())["weight_map"].values())):
            cached_file(source.name, name, **where)
    return Path(index).parent


def scratch_model(
    shape: ScratchModel, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_positions: int, seed: int
) -> PreTrainedModel:
    """Return a Llama-type model with random weights, the same for the same seed."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size or 3 * shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        max_position_embeddings=max_positions,
        tie_word_embeddings=shape.tie_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | Path | None, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, safetensors only; a folder that is there is whole. Some models have no tokenizer.

    A tokenizer that stands in a folder is copied from there, so that no code that came with it is run.
    """
    with whole_folder(folder) as temporary:
        if isinstance(tokenizer, Path):
            shutil.copytree(tokenizer, temporary)
        elif tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        model.save_pretrained(temporary)


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model itself, whether or not adapters are wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vocab_size_of(model: PreTrainedModel) -> int:
    """Return how many tokens the model tells apart, or how many labels."""
    if is_classifier(model):
        return int(plain_model(model).config.num_labels)
    return len(plain_model(model).get_output_embeddings().weight)


def is_classifier(model: PreTrainedModel) -> bool:
    """Whether a model predicts a label of a whole row rather than its next tokens."""
    return plain_model(model).get_output_embeddings() is None


def output_head(model: PreTrainedModel) -> LMHead:
    """Return the model's output head with all that its architecture does to the logits, as far as its configuration says."""
    base = plain_model(model)
    settings, module = base.config.get_text_config(), base.get_output_embeddings()
    scale = getattr(settings, "logit_scale", None) or getattr(settings, "lm_head_multiplier", None) or 1.0
    if divisor := getattr(settings, "logits_scaling", None):
        scale = scale / divisor
    softcap = getattr(settings, "final_logit_softcapping", None)
    return LMHead(adapted_weight(module), getattr(module, "bias", None), float(scale), softcap)


@torch.no_grad()
def head_makes_the_logits(model: PreTrainedModel) -> bool:
    """Whether the last hidden states times ``output_head`` are the model's own logits, tried on states drawn at random.

    Only what follows the decoder is run, with a head of a few tokens: that costs the same for a model of any size, and needs none
    of its weights. False for architectures that do something else on the way; their logits must come from their own forward pass.
    """
    base = plain_model(model)
    try:
        decoder, head = base.get_decoder(), base.get_output_embeddings()
    except AttributeError:
        return False
    linear = head.get_base_layer() if hasattr(head, "get_base_layer") else head  # with an adapter on it
    if decoder is None or decoder is base or type(linear) is not nn.Linear:
        return False
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn((1, PROBE_POSITIONS, linear.in_features), generator=generator)
    stand_in = nn.Linear(linear.in_features, PROBE_TOKENS, bias=linear.bias is not None, device="cpu", dtype=torch.float32)
    for weight in stand_in.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    decoder.forward = lambda *_, **__: _Decoded(hidden)
    base.set_output_embeddings(stand_in)
    try:
        expected = base(input_ids=torch.zeros((1, PROBE_POSITIONS), dtype=torch.int64), use_cache=False).logits[0]
        found = output_head(base).logits(hidden[0])
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        del decoder.forward
        base.set_output_embeddings(head)
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=ROUNDING, atol=ROUNDING)


class _Decoded:
    """What a decoder returns: its last hidden states, and None for whatever else it is asked for."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int | slice) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        return None
