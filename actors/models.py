"""Models of transformers: loaded from safetensors, made from a shape, written as ordinary folders."""

import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from actors.attention import attention_for
from actors.config.models import ScratchModel
from actors.model_source import ModelSource


def load_model(source: ModelSource, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the model on the CPU; its weights come from safetensors and from nothing else.

    Raises:
        ValueError: if its folder has none.
    """
    source.require_safetensors()
    config = AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=source.trust_remote_code)
    return AutoModelForCausalLM.from_pretrained(
        source.name,
        revision=source.revision,
        trust_remote_code=source.trust_remote_code,
        use_safetensors=True,
        dtype=dtype,
        attn_implementation=attention_for(config, source.attention),
    )


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


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | Path, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, safetensors only; a folder that is there is whole.

    A tokenizer that stands in a folder is copied from there, so that no code that came with it is run.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    if isinstance(tokenizer, Path):
        shutil.copytree(tokenizer, temporary)
    else:
        tokenizer.save_pretrained(temporary)
    model.save_pretrained(temporary)
    temporary.rename(folder)
