"""LoRA adapters; the one file that knows peft.

It is imported where it is used: a worker without adapters, and the heads of all models pass through here, starts a second sooner.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.config import LoraAdapter


def add_adapters(model: PreTrainedModel, lora: LoraAdapter) -> PreTrainedModel:
    """Freeze the model and put adapters into it; the model itself is returned, its layers replaced in place.

    Raises:
        ValueError: if no layer of the model carries one of the names in ``lora.modules``.
    """
    from peft import LoraConfig, PeftModel, get_peft_model

    modules = lora.modules if isinstance(lora.modules, str) else list(lora.modules)
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    if not isinstance(modules, str) and (missing := [name for name in modules if name not in names]):
        raise ValueError(f"student.lora.modules names {missing}, which the model does not have; all-linear would do")
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    if lora.dropout > 0 and head is not None and not isinstance(modules, str) and head.split(".")[-1] in modules:
        raise ValueError(
            f"student.lora.dropout is {lora.dropout}, but the output head {head} with an adapter is used as one matrix, which "
            f"has no dropout inside; dropout 0 would do, or modules without {head}"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.scale, lora_dropout=lora.dropout, target_modules=modules
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def adapted_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear layer, with its adapter, if it has one, added in; gradients reach the adapter."""
    layer: Any = module
    weight: Tensor = layer.weight
    if hasattr(layer, "get_delta_weight"):  # peft has put its own layer in the place of the model's
        for name in layer.active_adapters:
            weight = weight + layer.get_delta_weight(name)
    return weight


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Return the plain model with the adapters added into its weights."""
    from peft import PeftModel

    assert isinstance(model, PeftModel)
    return model.merge_and_unload()
