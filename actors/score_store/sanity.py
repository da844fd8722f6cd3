"""How a shard's scores are spread over its rows, and whether a new shard looks like those before it.

Rows are shuffled before they are cut into shards, so shards are samples of one population: where they are not, it is the
teacher that changed. N targets of a row, K top-k.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from actors.records import Example, TeacherScores

FEWEST_ROWS = 64
"""Of smaller shards nothing is concluded. Among so many rows, a sound shard's median leaves the 5 to 95 % range of a single
shard before it about once in a hundred million, whatever the distribution; among 32 it would once in twenty thousand."""
SAME_NATS = 1e-4
"""Distributions closer than this at each of their K likeliest tokens count as the same."""
MEANINGS = {"target_logprob": "log-probability of the target", "entropy": "entropy"}


@dataclass(frozen=True, slots=True)
class Spread:
    """Quantiles over the rows of a shard, in nats."""

    low: float
    """5 % of the rows are below."""
    median: float
    """Half of the rows are below."""
    high: float
    """95 % of the rows are below."""


@dataclass(frozen=True, slots=True)
class RowMeans:
    """Each row's means over its targets, in nats, float64 [rows]."""

    target_logprob: np.ndarray
    """The teacher's log-probability of the target."""
    entropy: np.ndarray
    """Entropy over target, top-K and the tail as one class: what the full entropy is at least."""

    @staticmethod
    def of(scores: Sequence[TeacherScores]) -> "RowMeans":
        """Average the scores of each row."""
        return RowMeans(
            np.array([score.target_logprob.mean(dtype=np.float64) for score in scores]),
            np.array([_entropies(score).mean() for score in scores]),
        )

    def spread(self, name: str) -> Spread:
        """Return the quantiles of one of the two."""
        low, median, high = np.quantile(getattr(self, name), (0.05, 0.5, 0.95)).tolist()
        return Spread(low, median, high)


@dataclass(frozen=True, slots=True)
class ScoreRange:
    """Where the rows of the shards so far lie: the least of their 5 % quantiles and the largest of their 95 % ones."""

    shards: int
    """Shards that it speaks of."""
    target_logprob: tuple[float, float]
    """Nats."""
    entropy: tuple[float, float]
    """Nats."""

    @staticmethod
    def over(spreads: Iterable[tuple[Spread, Spread]]) -> "ScoreRange | None":
        """Return the range over shards, each given as its spreads of target_logprob and entropy; None over none."""
        known: ScoreRange | None = None
        for target_logprob, entropy in spreads:
            known = ScoreRange.widened(known, target_logprob, entropy)
        return known

    @staticmethod
    def widened(known: "ScoreRange | None", target_logprob: Spread, entropy: Spread) -> "ScoreRange":
        """Return the range with one more shard in it."""
        if known is None:
            return ScoreRange(1, (target_logprob.low, target_logprob.high), (entropy.low, entropy.high))
        return ScoreRange(known.shards + 1, _wider(known.target_logprob, target_logprob), _wider(known.entropy, entropy))

    def require(self, rows: Sequence[Example], means: RowMeans) -> None:
        """Raise if most rows of a shard lie outside the range, on one side.

        Raises:
            ValueError: naming the row farthest off, its value, the shard's median and the range.
        """
        if len(rows) < FEWEST_ROWS:
            return
        for name, (low, high) in (("target_logprob", self.target_logprob), ("entropy", self.entropy)):
            values, median = getattr(means, name), means.spread(name).median
            if low - SAME_NATS <= median <= high + SAME_NATS:
                continue
            farthest = int(values.argmin() if median < low else values.argmax())
            raise ValueError(
                f"the shard's rows have a median {MEANINGS[name]} of {median:.3f} nats (row {rows[farthest].row}: "
                f"{values[farthest]:.3f}), 90 % of the rows scored before lie between {low:.3f} and {high:.3f} "
                f"({self.shards} shards): what scores now is not what scored then; have `doctor` measure the teacher, and "
                "delete the store if it is the earlier shards that are wrong"
            )


def require_rows_differ(rows: Sequence[Example], scores: Sequence[TeacherScores]) -> None:
    """Raise if the teacher gives the same distribution at every target of several rows, whatever comes before it.

    Raises:
        ValueError: naming the rows and the likeliest tokens' log-probabilities.
    """
    if len(rows) < 2:
        return
    whole = all(np.isneginf(score.tail_logmass).all() for score in scores)
    first = _likeliest(rows[0], scores[0], whole)
    for row, score in zip(rows, scores, strict=True):
        here = _likeliest(row, score, whole)
        if (here.token != first.token[0]).any() or np.abs(here.logprobs - first.logprobs[0]).max() > SAME_NATS:
            return
    contexts = {row.token_ids[:position].tobytes() for row in rows for position in row.target_positions}
    if len(contexts) > 1:
        raise ValueError(
            f"rows {rows[0].row} to {rows[-1].row}: the same distribution (token {first.token[0]} with log-probability "
            f"{first.logprobs[0, 0]:.3f}, and so on) at all targets, though {len(contexts)} different texts come before "
            "them; the teacher does not read its input"
        )


@dataclass(frozen=True, slots=True)
class _Likeliest:
    """The head of each target's distribution, the target among it where it is likely enough."""

    token: np.ndarray
    """int32 [N], the likeliest token."""
    logprobs: np.ndarray
    """float32 [N, K], log-probabilities of the likeliest, descending; [N, K + 1] where there are no others, as of classes."""


def _likeliest(row: Example, scores: TeacherScores, whole: bool) -> _Likeliest:
    """Return the likeliest tokens: target and top-K if they are ``whole``, else one fewer, as the target may be any other."""
    everything = np.concatenate([scores.target_logprob[:, None], scores.topk_logprobs], axis=1)
    token = np.where(scores.target_logprob > scores.topk_logprobs[:, 0], row.targets, scores.topk_ids[:, 0])
    descending = -np.sort(-everything, axis=1)
    return _Likeliest(token, descending if whole else descending[:, :-1])


def _entropies(scores: TeacherScores) -> np.ndarray:
    """float64 [N], in nats."""
    columns = (scores.target_logprob[:, None], scores.topk_logprobs, scores.tail_logmass[:, None])
    logprobs = np.concatenate(columns, axis=1).astype(np.float64)
    return -(np.exp(logprobs) * np.maximum(logprobs, -700.0)).sum(axis=1)


def _wider(known: tuple[float, float], spread: Spread) -> tuple[float, float]:
    return min(known[0], spread.low), max(known[1], spread.high)
