"""What can be told of a run's models before a device is taken: windows, vocabularies, attention, adapters."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from actors.attention import require_attention
from actors.engines.tensor_parallel import require_whole_heads
from actors.examples import ExampleFile
from actors.lora import add_adapters, shared_with_adapters
from orchestrator.config.run import RunConfig
from orchestrator.models.models import ROLES, Models, Role, attention_heads

WINDOW_KEYS = (
    "max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "max_target_positions", "max_sequence_length",
    "max_seq_length",
)  # fmt: skip
"""Keys of config.json that say how many positions a model knows."""
ALREADY_SCALED = ("su", "longrope", "llama3", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of rotary embeddings with which ``max_position_embeddings`` counts the scaling already."""


@dataclass(frozen=True, slots=True)
class RowLimits:
    """How far the rows of a run reach."""

    longest: int
    """Tokens of the longest row."""
    longest_prompt: int
    """Tokens of the longest prompt that evaluation has answered; 0 for none."""
    largest_id: int
    """Largest token id of the rows; -1 where it is not known."""


def row_limits(config: RunConfig, data: Path) -> RowLimits:
    """Return how far the rows that ``prepare`` has left in a folder reach."""
    train, heldout = (ExampleFile(data / f"{split}.arrow") for split in ("train", "heldout"))
    asked = range(min(config.evaluate.generate_rows, len(heldout)))
    return RowLimits(
        longest=max(int(split.lengths.max()) for split in (train, heldout)),
        longest_prompt=max((len(heldout[position].last_prompt) for position in asked), default=0),
        largest_id=max(split.largest_id for split in (train, heldout)),
    )


def require_models_fit(config: RunConfig, models: Models, rows: RowLimits) -> list[str]:
    """Raise if a model cannot read the rows, or its attention or adapters are not possible; return remarks for the user.

    Raises:
        ValueError: a line for each fault, naming the key, the value and one that would do.
    """
    if config.teacher.engine.tensor_parallel > 1:
        require_whole_heads(config.teacher.engine.tensor_parallel, *attention_heads(models))
    if config.responses is not None and config.writer_engine is not None and config.writer_engine.tensor_parallel > 1:
        writer, parallel = config.responses.writer, config.writer_engine.tensor_parallel
        require_whole_heads(parallel, *attention_heads(models, writer), section="responses.engine", role=writer)
    faults, remarks, rooms, fewer = [], [], [], []
    for role in ROLES:
        if models.made_for_the_rows(role):
            continue
        settings = models.settings(role)
        for room, fault in row_faults(config, role, settings, rows):
            faults.append(fault)
            rooms.append(room)
        for room, fault in [] if rooms else answer_faults(config, role, settings, rows):
            faults.append(fault)
            fewer.append(room)
        faults += vocabulary_faults(role, settings, rows)
        remarks += _unused_tokens(role, settings, models, rows)
        try:
            _require_attention(config, models, role, settings)
        except ValueError as error:
            faults.append(str(error))
    if rooms:
        faults.append(f"data.max_tokens={min(rooms)} would do")
    elif fewer:
        faults.append(f"evaluate.{f'max_new_tokens={min(fewer)}' if min(fewer) > 0 else 'generate_rows=0'} would do")
    if faults:
        raise ValueError("the models cannot take the rows: " + "; ".join(faults))
    return remarks + adapter_remarks(config, models)


def window_of(settings: PreTrainedConfig, served_by_vllm: bool = False) -> int | None:
    """Return how many positions a model knows, the scaling of rotary embeddings counted; None where nothing limits them.

    ``served_by_vllm``: as vLLM 0.32 counts them, which takes ``max_position_embeddings`` under YaRN as it stands.
    """
    text = settings.get_text_config()
    stated = [int(value) for key in WINDOW_KEYS if isinstance(value := getattr(text, key, None), int) and value > 0]
    if not stated:
        return None
    window = min(stated)
    kinds = getattr(text, "rope_parameters", None) or {}
    kinds = list(kinds.values()) if kinds and all(isinstance(kind, dict) for kind in kinds.values()) else [kinds]
    if "gemma3" in settings.model_type:
        return window
    for kind in kinds:
        name, factor = kind.get("rope_type"), kind.get("factor")
        if not factor or name in ALREADY_SCALED or name == "default":
            continue
        if name == "yarn":
            window = window if served_by_vllm else max(window, int(factor * kind.get("original_max_position_embeddings", window)))
        else:
            window = int(window * factor)
    return window


def row_faults(config: RunConfig, role: Role, settings: PreTrainedConfig, rows: RowLimits) -> list[tuple[int, str]]:
    """Return, for each use of a model whose window the longest row exceeds, how long a row may be, and what is wrong in words."""
    window, known = window_of(settings), f"the {role} {name_of(config, role)} knows"
    faults = []
    if role == "teacher":
        by_vllm = config.teacher.engine.kind == "vllm"
        served = window_of(settings, by_vllm)
        if served is not None and rows.longest > served - by_vllm:
            generates = ", one of which vLLM keeps for a token that it generates" if by_vllm else ""
            faults.append((served - by_vllm, f"the longest row has {rows.longest} tokens, {known} {served} positions{generates}"))
    trained = role == "student" or config.teacher.finetune is not None
    if window is not None and trained and rows.longest > window and not faults:
        faults.append((window, f"the longest row has {rows.longest} tokens, {known} {window} positions"))
    return faults


def answer_faults(config: RunConfig, role: Role, settings: PreTrainedConfig, rows: RowLimits) -> list[tuple[int, str]]:
    """Return how long an answer may be and what is wrong in words, if prompt and answer of an evaluation exceed the window."""
    window, room = window_of(settings), config.evaluate.max_new_tokens
    if window is None or not rows.longest_prompt or rows.longest_prompt + room <= window:
        return []
    fault = (
        f"evaluation continues a prompt of {rows.longest_prompt} tokens by evaluate.max_new_tokens {room}, the {role} "
        f"{name_of(config, role)} knows {window} positions"
    )
    return [(window - rows.longest_prompt, fault)]


def name_of(config: RunConfig, role: Role) -> str:
    """Return the name that the configuration gives a role's pretrained model; what is cut from the teacher has the teacher's."""
    model = (config.teacher if role == "teacher" else config.student).model
    if model.kind == "cut":
        return f"cut from {name_of(config, 'teacher')}"
    return model.name if model.kind == "pretrained" else "made from scratch"


def vocabulary_faults(role: Role, settings: PreTrainedConfig, rows: RowLimits) -> list[str]:
    """Return a line if the rows use tokens that a model's head does not have."""
    vocab_size = int(settings.get_text_config().vocab_size)
    if rows.largest_id < vocab_size:
        return []
    return [
        f"the rows use token {rows.largest_id}, and the {role} knows {vocab_size} tokens: its tokenizer has more tokens than the "
        f"model has rows in its head; a {role}.model resized to its tokenizer (resize_token_embeddings) would do"
    ]


def adapter_remarks(config: RunConfig, models: Models) -> list[str]:
    """Put the student's adapters into it without any number in it, and return what is to be known of the result.

    Raises:
        ValueError: if the adapters do not go into this student.
    """
    if config.student.lora is None:
        return []
    source = models.named("student")
    if models.made_for_the_rows("student") and not Path(source.name).is_dir():
        return []  # a plan makes no models
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.settings("student"), trust_remote_code=source.trust_remote_code)
        adapted = add_adapters(model, config.student.lora)
    shared = shared_with_adapters(adapted)
    if not shared:
        return []
    more = sum(adapted.get_submodule(f"base_model.model.{name}").weight.numel() for name in shared)
    return [
        f"student.lora.modules gives {', '.join(shared)} an adapter of its own, and the weight is shared with another layer: the "
        f"exported student has the two apart, {more:,} weights more"
    ]


def _unused_tokens(role: Role, settings: PreTrainedConfig, models: Models, rows: RowLimits) -> list[str]:
    vocab_size = int(settings.get_text_config().vocab_size)
    if rows.largest_id < 0:
        return []
    remarks = []
    tokens = len(models.tokenizer())
    if tokens > vocab_size:
        remarks.append(
            f"the tokenizer has {tokens} tokens, the {role} knows {vocab_size}: the others stand in no row, and a prompt that "
            "uses one cannot be answered"
        )
    if role == "student" and (own := models.students_own_tokens):
        remarks.append(
            f"the student's tokenizer has {len(own)} tokens that the teacher's has not ({', '.join(map(repr, own[:3]))}"
            f"{', ...' if len(own) > 3 else ''}); they stand in no row, and the exported tokenizer is the teacher's"
        )
    return remarks


def _require_attention(config: RunConfig, models: Models, role: Role, settings: PreTrainedConfig) -> None:
    source, named_by = models.named(role), "teacher" if models.side(role).model.kind == "cut" else role
    computed_in: dict[str, str] = {"evaluate.precision": config.evaluate.precision}
    if role == "student":
        computed_in["train.precision"] = config.train.precision
    elif config.teacher.engine.kind == "transformers":
        computed_in["teacher.engine.dtype"] = config.teacher.engine.dtype
    if (fit := models.side(role).finetune) is not None:
        computed_in[f"{role}.finetune.train.precision"] = fit.train.precision
    trainings = ([config.workers] if role == "student" else []) + ([fit.workers] if fit is not None else [])
    require_attention(
        settings, source.attention, f"{named_by}.model.attention", computed_in, source.trust_remote_code,
        learns_on_cpu=any(workers.gpus == 0 for workers in trainings),
    )  # fmt: skip
