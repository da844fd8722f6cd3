"""The teacher's plain forward pass over a few rows, with which served scores are compared. T tokens, N targets, V vocabulary."""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from actors.attention import ATTENTION_TOLERANCE, attention_error, attention_for, attention_used, exact, proof_of
from actors.model_source import ModelSource
from actors.models import load_model
from actors.records import Example, TeacherScores, example_key
from actors.teacher.parity import ComparedRow, Probe
from actors.teacher.reference_budget import pace_of, rows_in_time, why_no_room

PROBE_TARGETS = 64  # of a row; [64, V] float32 of a vocabulary of 150,000 is 38 MB


@dataclass(frozen=True, slots=True)
class Reference:
    """What the forward pass says of one row."""

    example: Example
    """The row."""
    logprobs: torch.Tensor
    """float32 [N, V], the distributions that predict its targets."""
    target_logprob: np.ndarray
    """float64 [3, N]: from the prediction one earlier, the right one, one later; NaN where the row has none."""


@dataclass(frozen=True, slots=True)
class References:
    """The forward pass over the rows of a probe, or over some of them."""

    rows: list[Reference]
    """One of each row that is compared."""
    remark: str = ""
    """In words, which rows of the probe are left out and why; empty where none is."""


def beginning(example: Example) -> Example:
    """Return the row as far as its ``PROBE_TARGETS``-th target; the whole row where it has no more."""
    positions = example.target_positions[:PROBE_TARGETS]
    token_ids, loss_mask = example.token_ids[: positions[-1] + 1], example.loss_mask[: positions[-1] + 1]
    return Example(token_ids, loss_mask, example_key(token_ids, loss_mask), example.row)


def references(teacher: ModelSource, probe: Probe, device: str) -> References | str:
    """Return the teacher's forward pass over a few rows in float32; or in words why there is none.

    There is none where its weights do not fit in memory, where even a short row takes too long, or where they are quantized,
    since those are other weights in float32.

    Raises:
        ValueError: if the teacher cannot be loaded or run, or its attention is not the one it is defined with.
    """
    config = AutoConfig.from_pretrained(teacher.name, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    if getattr(config, "quantization_config", None):
        return "the teacher's weights are quantized, and what they give in float32 is another model's"
    weights = count_weights(config, teacher.trust_remote_code)
    if why := why_no_room(weights, device):
        return why
    pace, beside = pace_of(weights, device), _tokens_of_proof(teacher, config, probe)
    examples = rows_in_time(probe, pace.most_tokens() - beside)
    remark = ""
    if [row.key for row in examples] != [row.key for row in probe.rows]:
        tokens = beside + sum(len(row.token_ids) for row in probe.rows)
        remark = pace.why_fewer(len(probe.rows), tokens, len(examples))
    if not examples:
        return remark
    try:
        model = load_model(exact(teacher)).eval().requires_grad_(False).to(device)
        used = attention_used(model, exact(teacher).attention)
        off = attention_error(model, used, examples)
        found = [forward_pass(model, example) for example in examples]
    except Exception as error:  # a model's own code may raise anything
        raise ValueError(
            f"the teacher's scores cannot be compared with a plain forward pass, which raised {type(error).__name__}: {error}; "
            "scores.compare_rows 0 goes without"
        ) from error
    del model
    if device == "cuda":
        torch.cuda.empty_cache()  # the engine asks how much is free
    if not off <= ATTENTION_TOLERANCE:
        raise ValueError(
            f"with teacher.model.attention {used} transformers gives log-probabilities {off:.1e} nats off those of eager "
            f"attention, the model's definition (may {ATTENTION_TOLERANCE:g}); teacher.model.attention eager would do"
        )
    return References(found, remark)


def _tokens_of_proof(teacher: ModelSource, config: PreTrainedConfig, probe: Probe) -> int:
    """Return how many tokens go through the model to compare its attention with eager attention."""
    if attention_for(config, exact(teacher).attention) == "eager":
        return 0
    return 2 * len(proof_of(config, probe.rows))


def count_weights(config: PreTrainedConfig, trust_remote_code: bool = False, classifies: bool = False) -> int:
    """Return how many weights a model has, from its configuration alone; those that are tied count once."""
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, trust_remote_code=trust_remote_code)
    return sum(weight.numel() for weight in model.parameters())


@torch.inference_mode()
def forward_pass(model: PreTrainedModel, example: Example) -> Reference:
    """Run one row through the model alone: no padding, no mask."""
    token_ids = torch.from_numpy(example.token_ids.astype(np.int64))[None].to(model.device)
    logits = model(input_ids=token_ids, use_cache=False).logits[0].float()  # [T, V]
    before = torch.from_numpy(example.target_positions - 1).to(model.device)
    targets = torch.from_numpy(example.targets.astype(np.int64)).to(model.device)[:, None]
    nearby = [_target_logprob(logits, before + offset, targets) for offset in (-1, 0, 1)]
    return Reference(example, logits[before].log_softmax(dim=1).cpu(), torch.stack(nearby).double().cpu().numpy())


def compare_row(reference: Reference, served: TeacherScores, ids_below: int | None = None) -> ComparedRow:
    """Read the reference at the tokens that were served, of which none is named from ``ids_below`` on."""
    ids = torch.from_numpy(served.topk_ids.astype(np.int64))  # [N, K]
    targets = torch.from_numpy(reference.example.targets.astype(np.int64))[:, None]
    best_others = reference.logprobs.scatter(1, targets, -torch.inf)[:, :ids_below].topk(ids.shape[1], dim=1).indices
    among = torch.zeros_like(reference.logprobs).scatter(1, best_others, 1.0).gather(1, ids) > 0
    topk_logprobs = reference.logprobs.gather(1, ids).double().numpy()
    return ComparedRow(reference.example.row, served, reference.target_logprob, topk_logprobs, among.numpy())


def _target_logprob(logits: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return [N], the log-probabilities of the targets [N, 1] where ``positions`` [N] predict; NaN outside the row."""
    there = (positions >= 0) & (positions < len(logits))
    logprobs = logits[positions.clamp(0, len(logits) - 1)].log_softmax(dim=1).gather(1, targets)[:, 0]
    return logprobs.masked_fill(~there, torch.nan)
