"""Served scores compared with the teacher's own plain forward pass: the numbers. Nothing is concluded here.

N targets, K top-k. Logarithms are natural.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.records import LOWEST_COMPARED, Example, TeacherScores
from actors.score_store.encoding import STEPS_PER_NAT

LEAST_LIKELY = -8.0
"""Nats: targets that the reference finds less likely are set aside. In 16 bits their errors are larger than those of others, and
there are so few that some rows say little about them."""
HIGH = 0.99
EARLIER, RIGHT, LATER = range(3)  # which of the model's predictions a score is compared with: one before, its own, one after


@dataclass(frozen=True, slots=True)
class Probe:
    """Rows whose scores are compared with the teacher's plain forward pass when it starts."""

    rows: Sequence[Example]
    """Of all lengths; none compares nothing."""

    shorter: Sequence[Example] = ()
    """Rows with short prompts, from which some are taken where there is no time for ``rows``."""


@dataclass(frozen=True, slots=True)
class ScoreParity:
    """Numbers about served scores, over all targets of the rows. Reference: the teacher in float32, one row at a time."""

    rows: int
    """Rows the numbers are over."""

    targets: int
    """And their targets."""

    set_aside: int
    """Of these, targets that the reference finds less likely than ``LEAST_LIKELY``; none where that would be most of them."""

    largest_target_error: float
    """Nats, between the log-probability served for a target and the reference's; over all targets."""

    furthest_row: int
    """The row, by its place in the dataset, that has this target."""

    mean_target_error: float
    """Nats, the error averaged over targets that are not set aside."""

    high_target_error: float
    """Nats, the 99 % quantile of the error over targets that are not set aside."""

    error_one_earlier: float
    """Mean error in nats if scores are compared with the prediction one position before; NaN where no target has one."""

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


@dataclass(frozen=True, slots=True)
class ComparedRow:
    """A row's served scores beside what the reference says of the same tokens."""

    row: int
    """Its place in the dataset."""
    served: TeacherScores
    """What was served."""
    target_logprob: np.ndarray
    """float64 [3, N], the reference's."""
    topk_logprobs: np.ndarray
    """float64 [N, K], of the served top-K tokens."""
    agreement: np.ndarray
    """bool [N, K], which served top-K tokens are among the reference's."""


def compare(rows: Sequence[ComparedRow]) -> ScoreParity:
    """Return the numbers over all rows."""
    expected = np.concatenate([row.target_logprob for row in rows], axis=1)  # [3, N]
    error = np.abs(expected - np.concatenate([row.served.target_logprob for row in rows]))
    likely = _likely(expected[RIGHT])
    place = int(np.argmax(error[RIGHT]))
    slope, correlation = _slope(rows)
    return ScoreParity(
        rows=len(rows),
        targets=error.shape[1],
        set_aside=int((~likely).sum()),
        largest_target_error=float(error[RIGHT].max()),
        furthest_row=int(np.repeat([row.row for row in rows], [len(row.served.target_logprob) for row in rows])[place]),
        mean_target_error=float(error[RIGHT][likely].mean()),
        high_target_error=float(np.quantile(error[RIGHT][likely], HIGH)),
        error_one_earlier=_mean_of_known(error[EARLIER], expected[EARLIER]),
        error_one_later=_mean_of_known(error[LATER], expected[LATER]),
        topk_agreement=float(np.concatenate([row.agreement for row in rows]).mean()),
        mass_error=max(float(np.abs(np.exp(classes(row.served)).sum(axis=1) - 1).max()) for row in rows),
        slope=slope,
        correlation=correlation,
    )


def named_logprobs(scores: TeacherScores) -> np.ndarray:
    """Return float64 [N, K+1], the target's log-probability first."""
    return np.concatenate([scores.target_logprob[:, None], scores.topk_logprobs], axis=1).astype(np.float64)


def classes(scores: TeacherScores) -> np.ndarray:
    """Return float64 [N, K+2], log-probabilities of target, top-K and tail."""
    return np.concatenate([named_logprobs(scores), scores.tail_logmass[:, None].astype(np.float64)], axis=1)


def entropies(scores: TeacherScores) -> np.ndarray:
    """Return float64 [N], the entropy over target, top-K and tail, in nats."""
    logprobs = classes(scores)
    return -(np.exp(logprobs) * np.maximum(logprobs, np.finfo(np.float64).min)).sum(axis=1)


def largest_difference(one: TeacherScores, other: TeacherScores, *, exact: bool = False) -> float:
    """Return the largest difference of log-probabilities in nats; the top-K by rank, since tokens that tie may change places.

    Args:
        one: stored scores of a row.
        other: the same row's in another store.
        exact: whether the stores keep them as they are. Elsewhere those of the top-K are rounded, so that the least difference
            may take them a step apart, and a step is taken off.
    """
    apart = np.abs(named_logprobs(one) - named_logprobs(other))
    step = 0.0 if exact else 1 / STEPS_PER_NAT
    return float(max(apart[:, 0].max(), apart[:, 1:].max() - step))


def _likely(expected: np.ndarray) -> np.ndarray:
    """Return bool [N], the targets to judge by; all, if fewer than half are likely: this teacher knows little of these rows."""
    likely = ~(expected < LEAST_LIKELY)  # what is no number is not set aside
    return likely if 2 * likely.sum() >= len(likely) else np.ones_like(likely)


def _mean_of_known(error: np.ndarray, expected: np.ndarray) -> float:
    known = ~np.isnan(expected)
    if not known.any():
        return float("nan")
    error, likely = error[known], _likely(expected[known])
    return float(error[likely].mean())


def _slope(rows: Sequence[ComparedRow]) -> tuple[float, float]:
    """Return slope and correlation of served against reference log-probabilities, each target's own means taken off."""
    ours = np.concatenate([named_logprobs(row.served) for row in rows])  # [N, K+1]
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
