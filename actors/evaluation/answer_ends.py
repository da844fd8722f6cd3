"""Where an answer ends: the token ids at which generation stops, settled once for a run and kept beside its tokenizer.

A chat's turns end with one token, the tokenizer's end-of-sequence token may be another, and a model's own generation settings
may name more. An answer ends at any of them, whichever is called eos. Evaluation, the exported folder and the engines that
serve it read them from here.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from actors.model_source import ModelSource


@dataclass(frozen=True, slots=True)
class AnswerEnds:
    """The tokens that end an answer."""

    ids: tuple[int, ...]
    """Token ids, the most usual first."""
    ignored: tuple[int, ...]
    """Ids that a model's generation settings name as ends, but that are no special tokens of the tokenizer."""


def settle_answer_ends(
    tokenizer: PreTrainedTokenizerBase, turn_ends: Iterable[str], models: Iterable[ModelSource]
) -> AnswerEnds:
    """Return all tokens that end an answer.

    Args:
        tokenizer: of the run.
        turn_ends: the special tokens that end the rendered rows' answers, the most usual first; empty texts do not count.
        models: pretrained models whose generation settings name ends too.

    Raises:
        ValueError: if there is none.
    """
    special = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    named = [token_id for model in models for token_id in own_ends(model)]
    ids = [int(tokenizer.convert_tokens_to_ids(end)) for end in turn_ends if end]
    ids += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids += [token_id for token_id in named if token_id in special]
    if not ids:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no end-of-sequence token, no turn ends in a special token, and "
            "no model's generation_config.json names an eos_token_id, so no answer would end; a data.format.template that ends "
            "each turn with a special token would do"
        )
    ignored = [token_id for token_id in named if token_id not in special]
    return AnswerEnds(tuple(dict.fromkeys(ids)), tuple(dict.fromkeys(ignored)))


def own_ends(model: ModelSource) -> tuple[int, ...]:
    """Return the ends that a model's generation_config.json names, or where it has none, its config.json."""
    ends: int | list[int] | None = None
    with suppress(OSError):
        ends = GenerationConfig.from_pretrained(model.name, revision=model.revision).eos_token_id
    if ends is None:
        with suppress(OSError, ValueError):
            config = AutoConfig.from_pretrained(
                model.name, revision=model.revision, trust_remote_code=model.trust_remote_code
            )
            ends = getattr(config.get_text_config(), "eos_token_id", None)
    if ends is None:
        return ()
    return tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)


def write_answer_ends(ends: AnswerEnds, tokenizer: PreTrainedTokenizerBase, tokenizer_folder: Path) -> None:
    """Keep the ends beside the run's tokenizer, in the form that transformers and vLLM read."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends.ids[0]
    settings = GenerationConfig(eos_token_id=list(ends.ids), pad_token_id=pad, bos_token_id=tokenizer.bos_token_id)
    settings.save_pretrained(tokenizer_folder)


def read_answer_ends(tokenizer_folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ends kept beside a tokenizer; where none are, its end-of-sequence token alone.

    Raises:
        ValueError: if there is no such token either.
    """
    ends: int | list[int] | None = None
    with suppress(OSError):
        ends = GenerationConfig.from_pretrained(tokenizer_folder).eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    if ends is None:
        raise ValueError(f"the tokenizer {tokenizer_folder} has no end-of-sequence token, so no answer would end")
    return tuple(ends) if isinstance(ends, list) else (int(ends),)


def stop_as_evaluated(model: PreTrainedModel, tokenizer_folder: Path) -> None:
    """Make a model's own settings end its answers where the run's ends are; whether it samples, and how, stays as it was."""
    try:
        kept = GenerationConfig.from_pretrained(tokenizer_folder)
    except OSError:  # a tokenizer alone: the model's settings are all there is
        return
    settings = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError:  # some are published with a temperature beside greedy decoding, and such settings cannot be saved
        settings = model.generation_config = GenerationConfig()
    settings.eos_token_id, settings.pad_token_id = kept.eos_token_id, kept.pad_token_id
    settings.bos_token_id = kept.bos_token_id if kept.bos_token_id is not None else settings.bos_token_id
    model.config.get_text_config().eos_token_id = kept.eos_token_id
