"""The models of a run on torch's meta device, before there are any weights: every shape, no number."""

import torch
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from actors.attention import attention_for
from actors.config.model_kinds import CutModel, ScratchModel
from actors.config.models import LoraAdapter
from actors.lora import add_adapters
from actors.models import scratch_model
from orchestrator.config.run import RunConfig
from orchestrator.models.layer_cut import cut_settings, layers_of, named_layers, require_same_blocks
from orchestrator.models.models import Models, Role, config_of
from orchestrator.planning.shapes import Workload


def meta_model(config: RunConfig, role: Role, work: Workload) -> PreTrainedModel:
    """Return the model of a role on torch's meta device: every shape, no number.

    Raises:
        ValueError: if the configuration of a pretrained model is neither here nor can be fetched, or the student cannot be cut
            from the teacher.
    """
    model = config.teacher.model if role == "teacher" else config.student.model
    with torch.device("meta"):
        if model.kind == "scratch":
            return _scratch(model, config, work)
        source = Models(config, config.run_dir).named(role)
        settings = _cut(model, config, work) if model.kind == "cut" else config_of(source, f"{role}.model.name")
        eager = "eager" if attention_for(settings, source.attention) == "eager" else None  # the others are fused, as the default
        return AutoModelForCausalLM.from_config(
            settings, trust_remote_code=source.trust_remote_code, attn_implementation=eager
        )


def _scratch(model: ScratchModel, config: RunConfig, work: Workload) -> PreTrainedModel:
    return scratch_model(model, plain_tokenizer(), scratch_vocab_size(config, work), config.longest_text, seed=0)


def _cut(model: CutModel, config: RunConfig, work: Workload) -> PreTrainedConfig:
    teacher = meta_model(config, "teacher", work).config
    kept = named_layers(model, layers_of(teacher))
    require_same_blocks(teacher, kept, Models(config, config.run_dir).named("teacher").trust_remote_code)
    return cut_settings(teacher, kept)


def scratch_vocab_size(config: RunConfig, work: Workload) -> int:
    """Return V of the models that are made from scratch."""
    if config.tokenizer is not None:
        return work.vocab_size or config.tokenizer.vocab_size
    settings = config_of(Models(config, config.run_dir).named("teacher"), "teacher.model.name")
    return max(work.vocab_size or 0, int(settings.get_text_config().vocab_size))


def plain_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer of two tokens, for models of which only shapes and speed matter."""
    words = tokenizer_models.WordLevel({"a": 0, "b": 1}, unk_token="b")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="a", pad_token="a", unk_token="b")


def adapted(model: PreTrainedModel, lora: LoraAdapter | None) -> PreTrainedModel:
    """Return a model on the meta device with its adapters, if it is to have any, ready to learn."""
    if lora is not None:
        with torch.device("meta"):
            model = add_adapters(model, lora)
    return model.train()
