"""The teacher's output head alone, which makes logits of its hidden states. H hidden size, V vocabulary."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.model_source import ModelSource
from actors.models import head_makes_the_logits, output_head, weights_folder
from losses.lm_head import LMHead

WOULD_DO = "rollouts.wire=candidates would do"


def read_head(source: ModelSource, dtype: torch.dtype, device: torch.device | str = "cpu") -> LMHead:
    """Return a model's output head [V, H]; of its files nothing else is read.

    Raises:
        ValueError: as ``require_head_alone``, or if the files do not hold it under the model's own names.
    """
    model = require_head_alone(source)
    linear: nn.Linear = model.get_output_embeddings()
    name = _name_of(model, linear)
    stored = [f"{name}.weight"]
    if model.config.get_text_config().tie_word_embeddings:
        stored.append(f"{_name_of(model, model.get_input_embeddings())}.weight")
    folder = weights_folder(source)
    weight = _read(folder, stored, tuple(linear.weight.shape))
    bias = None if linear.bias is None else _read(folder, [f"{name}.bias"], tuple(linear.bias.shape)).to(device, dtype)
    return replace(output_head(model), weight=weight.to(device, dtype), bias=bias)


def require_head_alone(source: ModelSource) -> PreTrainedModel:
    """Return a model without weights, if its head alone makes its logits.

    Raises:
        ValueError: naming the model and what would do, if it does not.
    """
    config = AutoConfig.from_pretrained(source.name, revision=source.revision, trust_remote_code=source.trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=source.trust_remote_code)
    require_head_of(model)
    return model


def require_head_of(model: PreTrainedModel) -> None:
    """Raise if a model's head alone does not make its logits.

    Raises:
        ValueError: naming its class and what would do.
    """
    if not head_makes_the_logits(model):
        raise ValueError(
            f"rollouts.wire is hidden, but the output head of the teacher, a {type(model).__name__}, does not alone make its "
            f"logits of its hidden states; {WOULD_DO}"
        )


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _read(folder: Path, names: list[str], shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor of the first of these names that the files hold."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in set(names) & set(tensors.keys()):
                if tuple(tensors.get_slice(name).get_shape()) == shape:
                    return tensors.get_tensor(name)
    raise ValueError(
        f"rollouts.wire is hidden, but no file of {folder} holds a tensor {' or '.join(names)} of the shape {list(shape)}, the "
        f"teacher's output head; {WOULD_DO}"
    )
