"""Which of transformers' attention implementations computes a model as it is defined. T tokens, V vocabulary.

An implementation leaves out what it does not know without a word: ``sdpa`` a soft cap on attention logits, flash attention
2 and 3 the learned sinks. ``eager`` is the definition, written in each model's own file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from actors.model_source import ModelSource
from actors.records import LOWEST_COMPARED, Example

ATTENTION_TOLERANCE = 1e-3  # nats; rounding in float32 gave 1e-5, a soft cap left out 0.3
PROVED_TOKENS = 64
PAST_WINDOW = 32  # positions beyond a sliding window, which are those that show whether it is there
LONGEST_PROOF = 1024  # tokens; eager holds [heads, T, T] in float32


def attention_for(config: PreTrainedConfig, attention: str) -> str | None:
    """Return the implementation to load a model with; None for the library's own choice, which classes with sinks rule for."""
    if attention == "auto":
        return "eager" if soft_cap(config) else None
    return attention


def soft_cap(config: PreTrainedConfig) -> float | None:
    """Return the bound of the attention logits, where the model has one."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None)


def exact(source: ModelSource) -> ModelSource:
    """Return the model as it is computed in float32, for which flash attention has no kernels."""
    return replace(source, attention="auto") if is_flash(source.attention) else source


def require_attention(
    config: PreTrainedConfig, attention: str, key: str, computed_in: Mapping[str, str], trust_remote_code: bool = False,
    learns_on_cpu: bool = False,
) -> None:  # fmt: skip
    """Raise if an implementation of attention cannot compute a model as it is defined, by its configuration.

    Whether its package is installed where it is needed is not asked: the driver's machine may be another.

    Args:
        config: the model's.
        attention: the value of the key.
        key: its name, such as ``student.model.attention``.
        computed_in: for each key that sets the type of a forward pass of this model, its value.
        trust_remote_code: whether the model's own code may be run.
        learns_on_cpu: whether the model is trained, and by workers without a GPU.

    Raises:
        ValueError: naming the key, the value and one that would do.
    """
    if attention in ("auto", "eager"):
        return
    if attention == "sdpa" and (cap := soft_cap(config)):
        raise ValueError(f"{key} sdpa leaves out the soft cap of {cap:g} on the model's attention logits; {key} eager would do")
    if attention == "flex_attention" and learns_on_cpu:
        raise ValueError(f"{key} flex_attention has no backward pass on CPUs; {key} auto would do, or workers.gpus 1")
    for precision_key, precision in computed_in.items():
        if is_flash(attention) and precision == "float32":
            raise ValueError(
                f"{key} {attention} computes in 16 bits alone, and {precision_key} is float32; {precision_key} bfloat16 would "
                f"do, or {key} auto"
            )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=trust_remote_code)
    if is_flash(attention) and any(name.endswith("sinks") for name, _ in model.named_parameters()):
        raise ValueError(f"{key} {attention} leaves out the model's attention sinks; {key} eager would do")
    try:
        model.get_correct_attn_implementation(attention, is_init_check=True)
    except ImportError:
        pass
    except ValueError as error:
        reason = str(error).split(". ")[0]
        raise ValueError(f"{key} {attention} is not for this model, transformers says: {reason}; {key} auto would do") from error


def attention_used(model: PreTrainedModel, attention: str) -> str:
    """Return the name of the implementation that a model loaded with this setting computes with."""
    return attention_for(model.config, attention) or model.get_correct_attn_implementation(None)


def attention_error(model: PreTrainedModel, used: str, rows: Sequence[Example]) -> float:
    """Return the nats between a model and its definition, the same weights with eager attention, on the beginning of one row.

    Of each position the token that differs most is taken, of the last ``PAST_WINDOW`` positions the median: a router of
    experts that stands between two may turn with the rounding at single positions.
    """
    if used == "eager":
        return 0.0
    token_ids = proof_of(model.config, rows).to(model.device)
    own = _logprobs(model, token_ids)
    model.set_attn_implementation("eager")
    try:
        defined = _logprobs(model, token_ids)
    finally:
        model.set_attn_implementation(used)
    # Where the definition itself is no number, the weights are to blame, and the checks of the scores say so.
    distance = (own - defined).abs().masked_fill(~(defined >= LOWEST_COMPARED), 0.0).amax(dim=1)  # [T]
    return float(distance[-PAST_WINDOW:].median())


def proof_of(config: PreTrainedConfig, rows: Sequence[Example]) -> torch.Tensor:
    """Return the tokens on which a model is compared with its definition, int64 [T].

    They are the longest row's, as far as beyond the model's smallest window, where that costs little.
    """
    settings = config.get_text_config()
    windows = [getattr(settings, name, None) for name in ("sliding_window", "attention_chunk_size")]
    lengths = [window + PAST_WINDOW for window in windows if window and window + PAST_WINDOW <= LONGEST_PROOF]
    longest = max(rows, key=lambda row: len(row.token_ids)).token_ids
    return torch.from_numpy(longest[: max([PROVED_TOKENS, *lengths])].astype("int64"))


@torch.inference_mode()
def _logprobs(model: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
    """float32 [T, V]."""
    return model(input_ids=token_ids[None], use_cache=False).logits[0].float().log_softmax(dim=1)


def is_flash(attention: str) -> bool:
    """Return whether an implementation is flash attention, which computes in 16 bits alone."""
    return attention.startswith("flash")
