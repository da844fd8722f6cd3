"""The teacher's temperature: fitted on the held-out rows, so that its probabilities are right as often as they say.

B rows, C classes. Temperature scaling (Guo et al., arXiv 1706.04599, section 4.2): the one number by which logits are divided
that gives the held-out labels the least log loss.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actors.dataloader.scored_rows import all_rows
from actors.evaluation.metrics import HeldoutMetrics
from actors.examples import ExampleFile
from actors.score_store.store import ScoreStore
from losses.topk_teacher import TopkTeacher

logger = logging.getLogger("atkd")

COLDEST, HOTTEST = 0.02, 50.0
"""Between these a temperature is looked for. Beyond, the labels are all right, or the teacher knows nothing of them."""
HALVINGS = 60


def fit_temperature(logprobs: Tensor, labels: Tensor) -> float:
    """Return the temperature by which the labels have the least log loss, between ``COLDEST`` and ``HOTTEST``.

    The log loss is convex in the inverse temperature b, and its slope there is the mean over rows of E_p[z] - z_label with
    p = softmax(b z): the root is found by bisection.

    Args:
        logprobs: [B, C], of the teacher as it is.
        labels: int64 [B].
    """
    z = logprobs.double()
    of_labels = z.gather(1, labels[:, None])[:, 0]
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(HALVINGS):
        middle = (low * high) ** 0.5
        slope = ((z * middle).softmax(dim=1) * z).sum(dim=1) - of_labels
        low, high = (middle, high) if float(slope.mean()) < 0 else (low, middle)
    return 1 / (low * high) ** 0.5


def calibration_of(examples: ExampleFile, store: ScoreStore) -> dict[str, Any]:
    """Return the temperature of a teacher's held-out rows, and log loss and calibration error before and after.

    Args:
        examples: the held-out rows as the teacher reads them.
        store: its complete scores of them, all C classes of each.
    """
    labels = torch.tensor([int(examples[row].targets[0]) for row in range(len(examples))])
    scores = all_rows(examples, store, store.top_k).teacher(range(len(examples)))
    assert scores is not None, "the rows have a store"
    logprobs = torch.zeros(len(examples), store.top_k + 1, dtype=torch.float64)
    logprobs.scatter_(1, labels[:, None], scores.target_logprob.double()[:, None])
    logprobs.scatter_(1, scores.topk_ids, scores.topk_logprobs.double())
    temperature = fit_temperature(logprobs, labels)
    before, after = (_measured(logprobs, labels, scores, divisor) for divisor in (1.0, temperature))
    found = {"temperature": temperature, "rows": len(examples), "before": before, "after": after}
    for line in in_words(found):
        logger.info(f"calibrate: {line}")
    return found


def in_words(found: Mapping[str, Any]) -> list[str]:
    """Return what a calibration came to."""
    before, after, temperature = found["before"], found["after"], found["temperature"]
    lines = [
        f"the teacher's logits are divided by {temperature:.3g}: on {found['rows']} held-out rows its log loss goes from "
        f"{before['heldout_loss']:.4f} to {after['heldout_loss']:.4f} nats, its calibration error from "
        f"{100 * before['calibration_error']:.1f} % to {100 * after['calibration_error']:.1f} %"
    ]
    if temperature > 0.99 * HOTTEST:
        lines.append("no temperature makes the teacher better than one that knows nothing: it says little about these rows")
    if temperature < 1.01 * COLDEST:
        lines.append("the teacher is right about every held-out row, and no temperature is too low: it is taken as sure of all")
    return lines


def _measured(logprobs: Tensor, labels: Tensor, scores: TopkTeacher, temperature: float) -> dict[str, float]:
    heldout = HeldoutMetrics()
    heldout.add((logprobs / temperature).log_softmax(dim=1), labels, scores)
    measures = heldout.measures()
    return {name: measures[name] for name in ("heldout_loss", "calibration_error")}

