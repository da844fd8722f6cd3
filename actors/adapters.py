"""LoRA adapters; the one file that knows peft."""

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from actors.config import LoraAdapter


def add_adapters(model: PreTrainedModel, lora: LoraAdapter) -> PreTrainedModel:
    """Freeze the model and put adapters into it; the model itself is returned, its layers replaced in place.

    Raises:
        ValueError: if no layer of the model carries one of the names in ``lora.modules``.
    """
    modules = lora.modules if isinstance(lora.modules, str) else list(lora.modules)
    names = {name.split(".")[-1] for name, _ in model.named_modules()}
    if not isinstance(modules, str) and (missing := [name for name in modules if name not in names]):
        raise ValueError(f"student.lora.modules names {missing}, which the model does not have; all-linear would do")
    config = LoraConfig(
        task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.scale, lora_dropout=lora.dropout, target_modules=modules
    )
    adapted = get_peft_model(model, config)
    assert isinstance(adapted, PeftModel)
    return adapted


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Return the plain model with the adapters added into its weights."""
    assert isinstance(model, PeftModel)
    return model.merge_and_unload()
