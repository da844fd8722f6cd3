"""The teacher's plain forward pass over a few rows, with which served scores are compared. T tokens, N targets, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from actors.attention import ATTENTION_TOLERANCE, attention_error, attention_used, exact
from actors.model_source import ModelSource
from actors.models import load_model
from actors.records import Example, TeacherScores, example_key
from actors.teacher.parity import ComparedRow

PROBE_TARGETS = 64  # of a row; [64, V] float32 of a vocabulary of 150,000 is 38 MB
ROOM_FOR_A_FORWARD_PASS = 1.2  # times the weights


@dataclass(frozen=True, slots=True)
class Reference:
    """What the forward pass says of one row."""

    example: Example
    """The row."""
    logprobs: torch.Tensor
    """float32 [N, V], the distributions that predict its targets."""
    target_logprob: np.ndarray
    """float64 [3, N]: from the prediction one earlier, the right one, one later; NaN where the row has none."""


def beginning(example: Example) -> Example:
    """Return the row as far as its ``PROBE_TARGETS``-th target; the whole row where it has no more."""
    positions = example.target_positions[:PROBE_TARGETS]
    token_ids, loss_mask = example.token_ids[: positions[-1] + 1], example.loss_mask[: positions[-1] + 1]
    return Example(token_ids, loss_mask, example_key(token_ids, loss_mask), example.row)


def references(teacher: ModelSource, examples: Sequence[Example], device: str) -> list[Reference] | str:
    """Return the teacher's forward pass over a few rows in float32; or in words why there is none.

    There is none where its weights do not fit in memory, or are quantized, since those are other weights in float32.

    Raises:
        ValueError: if the teacher cannot be loaded or run, or its attention is not the one it is defined with.
    """
    config = AutoConfig.from_pretrained(teacher.name, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)
    if getattr(config, "quantization_config", None):
        return "the teacher's weights are quantized, and what they give in float32 is another model's"
    weights = count_weights(config, teacher.trust_remote_code)
    wanted, free = 4 * ROOM_FOR_A_FORWARD_PASS * weights, free_memory(device)
    if wanted > free:
        return (
            f"in float32 the teacher takes {wanted / 2**30:.1f} GiB, and its replica finds {free / 2**30:.1f} GiB free "
            f"({'GPU' if device == 'cuda' else 'CPU'})"
        )
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
    return found


def count_weights(config: PreTrainedConfig, trust_remote_code: bool = False) -> int:
    """Return how many weights a model has, from its configuration alone; those that are tied count once."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(weight.numel() for weight in model.parameters())


def free_memory(device: str) -> int:
    """Return the free bytes of this process's GPU (``cuda``) or of its node."""
    return int(torch.cuda.mem_get_info()[0]) if device == "cuda" else int(psutil.virtual_memory().available)


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
