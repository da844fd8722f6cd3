"""Where a transformers model's hidden states become logits, so that the loss can do that step itself, chunk by chunk."""

import torch
from transformers import PreTrainedModel

from actors.lora import adapted_weight
from losses.lm_head import LMHead

PROBE_TOKENS = (0, 1, 0)
ROUNDING = 1e-5  # relative and in logits: a soft cap of 30 takes 4e-4 of a logit of 1


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model itself, whether or not adapters are wrapped around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vocab_size_of(model: PreTrainedModel) -> int:
    """Return how many tokens the model tells apart."""
    return len(plain_model(model).get_output_embeddings().weight)


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
    """Whether the last hidden states times ``output_head`` are the model's own logits, tried on a few tokens.

    False for architectures that do something else on the way; their logits must come from their own forward pass.
    """
    base, was_training = plain_model(model), model.training
    token_ids = torch.tensor([PROBE_TOKENS], device=model.device)
    model.eval()
    try:
        hidden = base.get_decoder()(input_ids=token_ids, use_cache=False).last_hidden_state
        expected = base(input_ids=token_ids, use_cache=False).logits
        found = output_head(model).logits(hidden[0])
    except (AttributeError, ValueError):
        return False
    finally:
        model.train(was_training)
    return found.shape == expected[0].shape and torch.allclose(found, expected[0], rtol=ROUNDING, atol=ROUNDING)
