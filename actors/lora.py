"""LoRA adapters; the one file that knows peft.

It is imported where it is used: a worker without adapters, and the heads of all models pass through here, starts a second sooner.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from actors.config.models import LoraAdapter

PROOF_TOKENS = (3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8)
PROOF_TOLERANCE = 1e-2  # logits; float32 gave 1e-5 on small models, an adapter merged into the wrong matrix 4.9


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


def shared_with_adapters(model: nn.Module) -> list[str]:
    """Return the names of the layers with an adapter whose own weight is also another layer's, as a tied output head's is.

    The adapter is that layer's alone, so its weight with the adapter in it cannot be shared any more.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and not hasattr(module, "get_delta_weight"):
            owners.setdefault(id(weight), []).append(name.removesuffix(".base_layer"))
    adapted = [(name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]
    return [plain_name(name) for name, module in adapted if len(owners[id(module.weight)]) > 1]


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Return the plain model with the adapters added into its weights; weights that only one owner has changed are untied."""
    from peft import PeftModel

    assert isinstance(model, PeftModel)
    if shared_with_adapters(model):
        for module in model.modules():
            if hasattr(module, "get_delta_weight"):
                base: Any = module.get_base_layer()
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        config = model.get_base_model().config
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    return model.merge_and_unload()


@torch.no_grad()
def load_adapter(folder: str, base: PreTrainedModel) -> PreTrainedModel:
    """Return a plain model with a saved adapter added into its weights; ``base`` is in float32.

    Raises:
        ValueError: if the adapter was not made for this model, or the merged model does not predict what the two did.
    """
    from peft import PeftModel

    token_ids = torch.tensor([PROOF_TOKENS], device=base.device) % base.get_input_embeddings().num_embeddings
    try:
        adapted = PeftModel.from_pretrained(base, folder).eval()
        before = adapted(input_ids=token_ids, use_cache=False).logits
        merged = merge_adapters(adapted)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(
            f"the adapter in {folder} does not fit its base model: {str(error).strip().splitlines()[0]}"
        ) from error
    apart = float((merged(input_ids=token_ids, use_cache=False).logits - before).abs().max())
    if not apart <= PROOF_TOLERANCE:
        raise ValueError(
            f"the adapter in {folder} cannot be merged: the merged model's logits are up to {apart:.2g} from those of base and "
            "adapter; the folder of a model merged elsewhere would do"
        )
    return merged


def plain_name(name: str) -> str:
    """Return the name that a weight or a layer has in the model without adapters."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
