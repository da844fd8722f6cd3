"""What a teacher of labels served, compared with its own plain forward pass, on a few rows. Numbers only.

Each row has one target, its label; the K others are all other labels. C classes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from actors.attention import exact
from actors.examples import ExampleFile
from actors.model_source import ModelSource
from actors.models import load_model
from actors.networks.classifier import class_logits
from actors.records import LOWEST_COMPARED, Example, TeacherScores
from actors.score_store.store import ScoreStore
from actors.teacher.parity import ComparedRow, ScoreParity, compare, entropies, largest_difference, named_logprobs

Words = tuple[tuple[int, ...], ...]
"""Token ids of each label's word."""


@dataclass(frozen=True, slots=True)
class ClassParity(ScoreParity):
    """Numbers about served scores of labels, over the rows. Reference: the teacher in float32, one row at a time."""

    others_error: float
    """Largest difference in nats between served and reference log-probabilities of all other labels; those that the reference
    finds less likely than ``LOWEST_COMPARED`` are left out."""

    batch_error: float
    """Largest difference in nats between a row scored alone and among the others (``largest_difference``)."""

    lowest_entropy: float
    """Nats: the smallest entropy of a row over all labels."""

    highest_entropy: float
    """The largest."""

    spread: float
    """Nats: how far a row's log-probabilities lie from their own mean, the root of the mean square over rows."""

    teacher_loss: float
    """Mean loss of the teacher on the rows' labels, nats a row, as served."""


@torch.inference_mode()
def measure_classes(
    teacher: ModelSource, words: Words, examples_path: str, alone_path: str, together_path: str, device: str = "cpu"
) -> ClassParity:
    """Compare stored scores of a few rows with the teacher's own forward pass in float32.

    Args:
        teacher: the model that was served, its logits divided by nothing.
        words: of a language model that answers with them; empty for a classifier.
        examples_path: the rows as the teacher reads them.
        alone_path: a complete, exact store of their scores, each row scored by itself.
        together_path: another, all rows scored at once.
        device: where the reference is computed; 4 bytes a weight must fit there.

    Raises:
        ValueError: naming a stored shard that is damaged.
    """
    examples, alone, together = ExampleFile(Path(examples_path)), ScoreStore(alone_path), ScoreStore(together_path)
    assert alone.exact and together.exact, "no rounding is taken off"
    model = load_model(exact(teacher)).eval().to(device)
    rows = [examples[position] for position in range(len(examples))]
    singly, beside = ([store.scores_at(at) for at in range(len(rows))] for store in (alone, together))
    expected = [plain_logprobs(model, row, words) for row in rows]
    found = [float(entropies(scores)[0]) for scores in beside]
    return ClassParity(
        **asdict(compare([_compared(row, scores, of) for row, scores, of in zip(rows, singly, expected, strict=True)])),
        others_error=max(_others_error(scores, of) for scores, of in zip(singly, expected, strict=True)),
        batch_error=max(largest_difference(one, other, exact=True) for one, other in zip(singly, beside, strict=True)),
        lowest_entropy=min(found),
        highest_entropy=max(found),
        spread=float(np.sqrt(np.mean([named_logprobs(scores).var() for scores in singly]))),
        teacher_loss=-float(np.mean([scores.target_logprob[0] for scores in beside])),
    )


def plain_logprobs(model: PreTrainedModel, row: Example, words: Words = ()) -> np.ndarray:
    """Return float64 [C], a teacher's log-probabilities of the labels of one row by itself.

    Args:
        model: a classifier, or a language model that answers with words.
        row: features, or a prompt, and the label behind them.
        words: of a language model.
    """
    if words:
        of_words = torch.stack([_of_word(model, row.token_ids[:-1], word) for word in words])
        return of_words.log_softmax(dim=0).cpu().numpy()
    token_ids = torch.from_numpy(row.token_ids.astype(np.int64))[None].to(model.device)
    label = torch.tensor([token_ids.shape[1] - 1], device=model.device)
    logits = class_logits(model, token_ids, torch.ones_like(token_ids), label)[0]
    return logits.double().log_softmax(dim=0).cpu().numpy()


def _of_word(model: PreTrainedModel, prompt: np.ndarray, word: Sequence[int]) -> torch.Tensor:
    """Return float64 [], the log-probability of a word behind a prompt, summed over its tokens."""
    token_ids = torch.from_numpy(np.concatenate([prompt, word]).astype(np.int64)).to(model.device)
    logits = model(input_ids=token_ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(dim=1).gather(1, token_ids[len(prompt) :, None]).sum()


def _others_error(served: TeacherScores, expected: np.ndarray) -> float:
    reference = expected[served.topk_ids[0]]
    apart = np.abs(served.topk_logprobs[0] - reference)[reference > LOWEST_COMPARED]
    return float(apart.max(initial=0.0))


def _compared(row: Example, served: TeacherScores, expected: np.ndarray) -> ComparedRow:
    nothing = np.full(1, np.nan)  # there is no label one position earlier or later
    return ComparedRow(
        row=row.row,
        served=served,
        target_logprob=np.stack([nothing, expected[row.targets], nothing]),
        topk_logprobs=expected[served.topk_ids],
        agreement=served.topk_ids != row.targets[:, None],
    )
