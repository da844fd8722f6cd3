"""What a teacher served, compared with its own plain forward pass and with the student's loop, on a few rows.

Numbers only; nothing is concluded here. T tokens of a row, N targets, K top-k, V vocabulary. Logarithms are natural.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.attention import ATTENTION_TOLERANCE, attention_error, attention_used, exact
from actors.dataloader.collator import collate
from actors.dataloader.scored_rows import all_rows
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.models import load_model, vocab_size_of
from actors.records import Example, TeacherScores
from actors.score_store.store import ScoreStore
from actors.student.causal_lm import CausalStudent
from actors.teacher.parity import ScoreParity, compare, entropies, largest_difference, named_logprobs
from actors.teacher.reference_pass import compare_row, forward_pass
from losses.config import CoupledLoss
from losses.distillation import LossSums
from losses.loss_state import LossState


@dataclass(frozen=True, slots=True)
class AttentionFound:
    """How a model's attention is computed in float32, and how far that is from its definition."""

    used: str
    """The implementation of transformers."""

    error: float
    """Nats between its log-probabilities and those of eager attention."""


@dataclass(frozen=True, slots=True)
class SelfDistillationCheck(ScoreParity):
    """Numbers about served scores, over all targets of the rows. Reference: the teacher in float32, one row at a time."""

    attention: AttentionFound
    """Of the reference."""

    eager_target_error: float | None
    """Nats, the mean error of the targets against eager attention instead; None where the reference agrees with that."""

    self_divergence: float
    """Coupled forward KL of the stored scores to the teacher as its own student, through the student's loop, nats per target."""

    self_refusal: str
    """Why the student's loop refused the scores; empty where it took them."""

    batch_error: float
    """Largest difference in nats between a row scored alone and among the others, over target and top-K.

    Stored top-K log-probabilities are rounded, so that the least difference may take them a step apart; such a step is
    taken off.
    """

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


@torch.inference_mode()
def measure_attention(source: ModelSource, examples_path: str, device: str = "cpu") -> AttentionFound:
    """Compare a model's attention in float32 with its definition, on a few tokens of the rows."""
    return _attention(_loaded(source, device), source, _rows(ExampleFile(Path(examples_path))))


@torch.inference_mode()
def measure(
    teacher: ModelSource, examples_path: str, alone_path: str, together_path: str, device: str = "cpu"
) -> SelfDistillationCheck:
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
    examples, alone, together = ExampleFile(Path(examples_path)), ScoreStore(alone_path), ScoreStore(together_path)
    model, rows = _loaded(teacher, device), _rows(examples)
    singly, beside = ([store.scores_at(at) for at in range(len(rows))] for store in (alone, together))
    comparison, attention = _compare(model, rows, singly, alone.ids_below), _attention(model, teacher, rows)
    eager_target_error = None
    if not attention.error <= ATTENTION_TOLERANCE:
        model.set_attn_implementation("eager")
        eager_target_error = _compare(model, rows, singly, alone.ids_below).mean_target_error
        model.set_attn_implementation(attention.used)
    row_entropies = [float(entropies(scores).mean()) for scores in beside]
    likeliest = np.concatenate([named_logprobs(scores).max(axis=1) for scores in beside])
    self_divergence, self_refusal = _self_divergence(model, examples, alone)
    return SelfDistillationCheck(
        **asdict(comparison),
        attention=attention,
        eager_target_error=eager_target_error,
        self_divergence=self_divergence,
        self_refusal=self_refusal,
        batch_error=max(largest_difference(one, other) for one, other in zip(singly, beside, strict=True)),
        likeliest_spread=float(likeliest.max() - likeliest.min()),
        lowest_row_entropy=min(row_entropies),
        highest_row_entropy=max(row_entropies),
        teacher_loss=-float(np.concatenate([scores.target_logprob for scores in beside]).mean(dtype=np.float64)),
        largest_topk_id=max(int(scores.topk_ids.max()) for scores in beside),
    )


def _loaded(source: ModelSource, device: str) -> PreTrainedModel:
    return load_model(exact(source)).eval().requires_grad_(False).to(device)


def _rows(examples: ExampleFile) -> list[Example]:
    return [examples[position] for position in range(len(examples))]


def _attention(model: PreTrainedModel, source: ModelSource, rows: Sequence[Example]) -> AttentionFound:
    used = attention_used(model, exact(source).attention)
    return AttentionFound(used, attention_error(model, used, rows))


def _compare(
    model: PreTrainedModel, rows: Sequence[Example], served: Sequence[TeacherScores], ids_below: int | None
) -> ScoreParity:
    return compare([compare_row(forward_pass(model, row), scores, ids_below) for row, scores in zip(rows, served, strict=True)])


def _self_divergence(model: PreTrainedModel, examples: ExampleFile, store: ScoreStore) -> tuple[float, str]:
    """Let the teacher be its own student: rows, store, shift, head and loss as in training, one row a forward pass."""
    loss = CoupledLoss(kind="coupled")
    student, state, batch = CausalStudent(model, loss), LossState.first(loss), all_rows(examples, store, store.top_k)
    weights = StepWeights(loss, seed=0, store=store).of_step(batch, [[[row] for row in range(len(batch))]], 0, state)
    total = LossSums.zero(model.device)
    for row in range(len(batch)):
        try:
            micro_batch = collate(batch, [row], vocab_size_of(model), weights)
        except ValueError as error:
            return float("nan"), f"row {examples[row].row}: {error}"
        total = total + student.loss_sums(micro_batch.to(model.device), state)
    return float(total.loss), ""
