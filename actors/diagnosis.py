"""What a teacher served, held against its own plain forward pass, on a few rows. Numbers only; nothing is judged here.

T tokens of a row, N targets, K top-k, V vocabulary. Logarithms are natural.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.collate import Collator
from actors.examples import ExampleFile
from actors.records import Example, TeacherScores
from actors.sampler import GlobalBatch, SamplerState
from actors.score_store import ScoreStore
from actors.student_head import vocab_size_of
from actors.student_model import StudentWithLoss, load_model
from actors.training_task import ModelSource
from losses.config import CoupledLoss
from losses.distillation import LossSums
from losses.loss_state import LossState

LOWEST_COMPARED = -24.0  # nats; stored log-probabilities are exact down to here
EARLIER, RIGHT, LATER = range(3)  # which of the model's predictions a score is held against: one before, its own, one after


@dataclass(frozen=True, slots=True)
class Measurements:
    """Numbers about served scores, over all targets of the rows. Reference: the teacher in float32, one row at a time."""

    targets: int
    """Targets the numbers are over."""

    largest_target_error: float
    """Nats, between the log-probability served for a target and the reference's."""

    mean_target_error: float
    """The same, averaged."""

    error_one_earlier: float
    """Mean error in nats if scores are held against the prediction one position before; NaN where no target has one."""

    error_one_later: float
    """The same for one position after."""

    topk_agreement: float
    """Share of the served top-K tokens that are among the reference's top-K, the target aside on both sides."""

    mass_error: float
    """Largest distance from one of the mass that target, top-K and tail hold together."""

    slope: float
    """Of served against reference log-probabilities of the same tokens; 1/T where logits were divided by T."""

    correlation: float
    """Of the same pairs. Both are taken within each target's distribution, so that no normaliser matters."""

    self_divergence: float
    """Coupled forward KL of the stored scores to the teacher as its own student, through the student's loop, nats per target."""

    self_refusal: str
    """Why the student's loop refused the scores; empty where it took them."""

    batch_error: float
    """Largest difference in nats between a row scored alone and among the others, over target and top-K."""

    likeliest_spread: float
    """Nats between the largest and the smallest of the targets' highest log-probabilities."""

    lowest_row_entropy: float
    """Nats: the smallest of the rows' mean entropies over target, top-K and tail."""

    highest_row_entropy: float
    """The largest of them."""

    teacher_loss: float
    """Mean loss of the teacher on the data's own tokens, nats per target, as served."""

    largest_topk_id: int
    """Largest token id among the top-K."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row's served scores beside what the reference says of the same tokens."""

    served: TeacherScores
    target_logprob: np.ndarray
    """float64 [3, N]: from the prediction one earlier, the right one, one later; NaN where the row has none."""
    topk_logprobs: np.ndarray
    """float64 [N, K], of the served top-K tokens."""
    agreement: np.ndarray
    """bool [N, K], which served top-K tokens are among the reference's."""


@torch.inference_mode()
def measure(teacher: ModelSource, examples_path: str, alone_path: str, together_path: str, device: str = "cpu") -> Measurements:
    """Compare stored scores of a few rows with the teacher's own forward pass in float32.

    Args:
        teacher: the model that was served.
        examples_path: the rows.
        alone_path: a complete store of their scores, each row scored by itself.
        together_path: another, all rows scored at once.
        device: where the reference is computed; 4 bytes a weight must fit there.

    Raises:
        ValueError: naming a stored shard that is damaged.
    """
    examples, alone, together = ExampleFile(Path(examples_path)), ScoreStore(Path(alone_path)), ScoreStore(Path(together_path))
    model = load_model(teacher).eval().requires_grad_(False).to(device)
    positions = range(len(examples))
    rows = [_compare(model, examples[position], alone.scores_at(position)) for position in positions]
    beside = [together.scores_at(position) for position in positions]
    error = np.abs(np.concatenate([row.target_logprob - row.served.target_logprob for row in rows], axis=1))  # [3, N]
    slope, correlation = _slope(rows)
    entropies = [float(_entropy(scores).mean()) for scores in beside]
    likeliest = np.concatenate([_named_logprobs(scores).max(axis=1) for scores in beside])
    self_divergence, self_refusal = _self_divergence(model, examples, alone)
    return Measurements(
        targets=error.shape[1],
        largest_target_error=float(error[RIGHT].max()),
        mean_target_error=float(error[RIGHT].mean()),
        error_one_earlier=_mean_of_known(error[EARLIER]),
        error_one_later=_mean_of_known(error[LATER]),
        topk_agreement=float(np.concatenate([row.agreement for row in rows]).mean()),
        mass_error=max(float(np.abs(_mass(row.served) - 1).max()) for row in rows),
        slope=slope,
        correlation=correlation,
        self_divergence=self_divergence,
        self_refusal=self_refusal,
        batch_error=max(_distance(row.served, other) for row, other in zip(rows, beside, strict=True)),
        likeliest_spread=float(likeliest.max() - likeliest.min()),
        lowest_row_entropy=min(entropies),
        highest_row_entropy=max(entropies),
        teacher_loss=-float(np.concatenate([scores.target_logprob for scores in beside]).mean(dtype=np.float64)),
        largest_topk_id=max(int(scores.topk_ids.max()) for scores in beside),
    )


def _compare(model: PreTrainedModel, example: Example, served: TeacherScores) -> _Row:
    """Read the reference at the tokens that were served. The row goes through the model alone: no padding, no mask."""
    token_ids = torch.from_numpy(example.token_ids.astype(np.int64))[None].to(model.device)
    logits = model(input_ids=token_ids, use_cache=False).logits[0].float()  # [T, V]
    before = torch.from_numpy(example.target_positions - 1).to(model.device)
    targets = torch.from_numpy(example.targets.astype(np.int64)).to(model.device)[:, None]
    ids = torch.from_numpy(served.topk_ids.astype(np.int64)).to(model.device)
    nearby = [_target_logprob(logits, before + offset, targets) for offset in (-1, 0, 1)]
    logprobs = logits[before].log_softmax(dim=1)  # [N, V]
    best_others = logprobs.scatter(1, targets, -torch.inf).topk(ids.shape[1], dim=1).indices
    return _Row(
        served=served,
        target_logprob=torch.stack(nearby).double().cpu().numpy(),
        topk_logprobs=logprobs.gather(1, ids).double().cpu().numpy(),
        agreement=(torch.zeros_like(logprobs).scatter(1, best_others, 1.0).gather(1, ids) > 0).cpu().numpy(),
    )


def _target_logprob(logits: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return [N], the log-probabilities of the targets [N, 1] where ``positions`` [N] predict; NaN outside the row."""
    there = (positions >= 0) & (positions < len(logits))
    logprobs = logits[positions.clamp(0, len(logits) - 1)].log_softmax(dim=1).gather(1, targets)[:, 0]
    return logprobs.masked_fill(~there, torch.nan)


def _mean_of_known(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _named_logprobs(scores: TeacherScores) -> np.ndarray:
    """float64 [N, K+1], the target first."""
    return np.concatenate([scores.target_logprob[:, None], scores.topk_logprobs], axis=1).astype(np.float64)


def _classes(scores: TeacherScores) -> np.ndarray:
    """float64 [N, K+2], log-probabilities of target, top-K and tail."""
    return np.concatenate([_named_logprobs(scores), scores.tail_logmass[:, None].astype(np.float64)], axis=1)


def _mass(scores: TeacherScores) -> np.ndarray:
    return np.exp(_classes(scores)).sum(axis=1)


def _entropy(scores: TeacherScores) -> np.ndarray:
    """float64 [N], entropy over target, top-K and tail, in nats."""
    logprobs = _classes(scores)
    return -(np.exp(logprobs) * np.maximum(logprobs, np.finfo(np.float64).min)).sum(axis=1)


def _distance(one: TeacherScores, other: TeacherScores) -> float:
    """Largest difference of log-probabilities in nats; the top-K by rank, since tokens that tie may change places."""
    return float(np.abs(_named_logprobs(one) - _named_logprobs(other)).max())


def _slope(rows: Sequence[_Row]) -> tuple[float, float]:
    """Return slope and correlation of served against reference log-probabilities, each target's own means taken off."""
    ours = np.concatenate([_named_logprobs(row.served) for row in rows])  # [N, K+1]
    theirs = np.concatenate([np.concatenate([row.target_logprob[RIGHT][:, None], row.topk_logprobs], axis=1) for row in rows])
    compared = ours > LOWEST_COMPARED
    counts = np.maximum(compared.sum(axis=1, keepdims=True), 1)

    def centred(values: np.ndarray) -> np.ndarray:
        values = np.where(compared, values, 0.0)
        return np.where(compared, values - values.sum(axis=1, keepdims=True) / counts, 0.0)

    ours, theirs = centred(ours), centred(theirs)
    together, own, others = (ours * theirs).sum(), (ours**2).sum(), (theirs**2).sum()
    if not own * others > 0:
        return float("nan"), float("nan")
    return float(together / others), float(together / np.sqrt(own * others))


def _self_divergence(model: PreTrainedModel, examples: ExampleFile, store: ScoreStore) -> tuple[float, str]:
    """Let the teacher be its own student: rows, store, shift, head and loss as in training, one row a forward pass."""
    loss = CoupledLoss(teaching="coupled")
    state, rows = LossState.first(loss), range(len(examples))
    collator = Collator(examples, store, loss, store.top_k, seed=0, vocab_size=vocab_size_of(model))
    student = StudentWithLoss(model, loss)
    batch = GlobalBatch(np.arange(len(examples)), SamplerState(seed=0))
    weights = collator.weights(batch, [[[row] for row in rows]], step=0, state=state)
    total = LossSums.zero(model.device)
    for row in rows:
        try:
            micro_batch = collator.micro_batch(batch, [row], weights)
        except ValueError as error:
            return float("nan"), f"row {examples[row].row}: {error}"
        total = total + student.loss_sums(micro_batch.to(model.device), state)
    return float(total.loss), ""
