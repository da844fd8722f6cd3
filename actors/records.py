"""What crosses between teacher and student.

T tokens of a row, N targets of it, K top-k, C candidates, H hidden size, V vocabulary.
"""

import hashlib
from dataclasses import dataclass, replace

import numpy as np

BFLOAT16_EXPONENT = np.uint16(0x7F80)  # all of its bits are set where a number is not finite
LOWEST_COMPARED = -24.0  # nats; stored log-probabilities are exact down to here
MASS_TOLERANCE = 1e-3  # room for a teacher that computes in 16 bits
NO_TOKEN = -1
"""The id in a column of the top-K that is not kept, as in ``losses.topk_teacher``; its log-probability is -inf."""
LOWEST_OF_CANDIDATES = -32.0
"""Nats, below which a candidate's log-probability counts as this: about where those end that a store keeps."""
UNIFORM_TOLERANCE = 1e-4  # nats between the largest and the smallest of K log-probabilities


def example_key(token_ids: np.ndarray, loss_mask: np.ndarray) -> str:
    """Name an example by its content: 32 hex digits over its token ids and its loss mask."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(np.ascontiguousarray(token_ids, dtype="<i4").tobytes())
    digest.update(np.packbits(np.asarray(loss_mask, dtype=bool)).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class Example:
    """One row as the models see it."""

    token_ids: np.ndarray
    """int32 [T], the whole row: prompt and response."""

    loss_mask: np.ndarray
    """bool [T], True where the token is a target. Never at position 0: nothing predicts the first token."""

    key: str
    """``example_key`` of the two arrays."""

    row: int
    """Index of the row in the dataset it came from, for messages and reports."""

    candidates: np.ndarray | None = None
    """int32 [N, C], tokens of which the teacher's log-probabilities are wanted at each target besides its own most likely ones;
    ``NO_TOKEN`` where there are fewer. No part of the key, and not written to files."""

    @property
    def target_positions(self) -> np.ndarray:
        """int64 [N], the positions of the targets."""
        return np.flatnonzero(self.loss_mask)

    @property
    def targets(self) -> np.ndarray:
        """int32 [N], the target tokens."""
        return self.token_ids[self.loss_mask]

    @property
    def last_prompt(self) -> np.ndarray:
        """int32, the tokens before the last stretch of targets: what a model continues when it is asked for an answer."""
        targets = self.target_positions
        return self.token_ids[: targets[np.flatnonzero(np.diff(targets, prepend=-1) > 1)[-1]]]


@dataclass(frozen=True, slots=True)
class TeacherScores:
    """What the teacher says about one example. Row i speaks of the prediction of the i-th target, for all fields."""

    key: str
    """The example's key."""

    target_logprob: np.ndarray
    """float32 [N], log-probability of the target."""

    topk_ids: np.ndarray
    """int32 [N, K], the K most likely tokens other than the target, most likely first; ``NO_TOKEN`` after the last one kept. With
    candidates [N, K + C], those and the candidates."""

    topk_logprobs: np.ndarray
    """float32 [N, K], their log-probabilities, descending; -inf after the last one kept."""

    tail_logmass: np.ndarray
    """float32 [N], log of the mass outside target and top-K; -inf where nothing is left."""

    hidden: np.ndarray | None = None
    """uint16 [N, H], the bits in bfloat16 of the teacher's last hidden states where it predicts the targets; None if not kept."""


def uncertainty(scores: TeacherScores) -> np.ndarray:
    """Return UNC, the teacher's mass off the target, float32 [N] (arXiv 2402.11890, section 3)."""
    return _non_target_mass(scores.target_logprob, scores.topk_logprobs).astype(np.float32)


def _non_target_mass(target_logprob: np.ndarray, topk_logprobs: np.ndarray) -> np.ndarray:
    """float64 [N]: ``max(1 - p_target, sum of the top-K)``; the second is exact where p_target rounds to one."""
    topk_mass = np.exp(topk_logprobs.astype(np.float64)).sum(axis=-1)
    return np.maximum(-np.expm1(target_logprob.astype(np.float64)), topk_mass)


def tail_logmass(target_logprob: np.ndarray, topk_logprobs: np.ndarray) -> np.ndarray:
    """Return the log of the mass outside target [N] and top-K [N, K], float32 [N]; -inf where nothing is left."""
    topk_mass = np.exp(topk_logprobs.astype(np.float64)).sum(axis=-1)
    with np.errstate(divide="ignore"):
        return np.log(_non_target_mass(target_logprob, topk_logprobs) - topk_mass).astype(np.float32)


def truncate_scores(scores: TeacherScores, top_k: int) -> TeacherScores:
    """Return the scores a store made with a smaller K would hold: the dropped tokens join the tail."""
    if top_k > scores.topk_ids.shape[1]:
        raise ValueError(f"top_k {top_k} exceeds the K={scores.topk_ids.shape[1]} of the scores; ask for at most that")
    dropped = scores.topk_logprobs[:, top_k:].astype(np.float64)
    masses = np.concatenate([np.exp(dropped), np.exp(scores.tail_logmass.astype(np.float64))[:, None]], axis=1)
    with np.errstate(divide="ignore"):
        tail = np.log(masses.sum(axis=1)).astype(np.float32)
    return replace(scores, topk_ids=scores.topk_ids[:, :top_k], topk_logprobs=scores.topk_logprobs[:, :top_k], tail_logmass=tail)


def keep_mass(scores: TeacherScores, share: float) -> TeacherScores:
    """Keep of each row's top-K the shortest run that holds ``share`` of the mass off the target; the rest joins the tail.

    The same rule as ``TopkTeacher.keep_mass``, for scores that are about to be stored.
    """
    masses = np.exp(scores.topk_logprobs.astype(np.float64))
    held_before = masses.cumsum(axis=1) - masses
    wanted = share * _non_target_mass(scores.target_logprob, scores.topk_logprobs)
    dropped = held_before >= wanted[:, None]
    with np.errstate(divide="ignore"):
        tail = np.log(np.exp(scores.tail_logmass.astype(np.float64)) + (masses * dropped).sum(axis=1)).astype(np.float32)
    ids = np.where(dropped, np.int32(NO_TOKEN), scores.topk_ids)
    logprobs = np.where(dropped, np.float32(-np.inf), scores.topk_logprobs)
    return replace(scores, topk_ids=ids, topk_logprobs=logprobs, tail_logmass=tail)


def with_candidates(example: Example, scores: TeacherScores, logprobs: np.ndarray) -> TeacherScores:
    """Return the scores of the union of a teacher's top-K and the row's own candidates, each token once and the target left out.

    Args:
        example: the row, with candidates [N, C].
        scores: of its teacher, with K tokens.
        logprobs: [N, C], the teacher's log-probabilities of the candidates; whatever where there is ``NO_TOKEN``.

    Returns:
        Scores with K + C columns, most likely first, ``NO_TOKEN`` after the last.
    """
    assert example.candidates is not None, "the caller looked"
    ids = np.concatenate([scores.topk_ids, example.candidates], axis=1)
    values = np.concatenate([scores.topk_logprobs, np.maximum(logprobs, LOWEST_OF_CANDIDATES)], axis=1).astype(np.float32)
    by_id = np.argsort(ids, axis=1, kind="stable")  # of two that are equal the teacher's own comes first
    ids, values = np.take_along_axis(ids, by_id, axis=1), np.take_along_axis(values, by_id, axis=1)
    dropped = (ids == NO_TOKEN) | (ids == example.targets[:, None])
    dropped[:, 1:] |= ids[:, 1:] == ids[:, :-1]
    ids, values = np.where(dropped, np.int32(NO_TOKEN), ids), np.where(dropped, np.float32(-np.inf), values)
    likeliest = np.argsort(-values, axis=1, kind="stable")
    ids, values = np.take_along_axis(ids, likeliest, axis=1), np.take_along_axis(values, likeliest, axis=1)
    return replace(scores, topk_ids=ids, topk_logprobs=values, tail_logmass=tail_logmass(scores.target_logprob, values))


def check_scores(example: Example, scores: TeacherScores, ids_below: int) -> None:
    """Raise if scores cannot come from a working teacher.

    Raises:
        ValueError: naming the row, the quantity and the value, if the shapes or the key belong to another example,
            a log-probability is not finite or above zero, the mass exceeds one, an id lies outside the vocabulary
            or every distribution of the row is uniform.
    """
    targets, where = int(example.loss_mask.sum()), f"row {example.row} (key {example.key[:12]})"
    if scores.key != example.key:
        raise ValueError(f"{where}: the scores carry key {scores.key[:12]}, those of another row")
    top_k = scores.topk_ids.shape[-1]
    shapes = (scores.target_logprob.shape, scores.topk_ids.shape, scores.topk_logprobs.shape, scores.tail_logmass.shape)
    if shapes != ((targets,), (targets, top_k), (targets, top_k), (targets,)):
        raise ValueError(f"{where}: has {targets} targets, but its scores have the shapes {shapes}")
    if scores.hidden is not None and len(scores.hidden) != targets:
        raise ValueError(f"{where}: has {targets} targets, but hidden states of {len(scores.hidden)}")
    named = (scores.topk_ids != NO_TOKEN) | ~np.isneginf(scores.topk_logprobs)  # [N, K]
    for name, values in (("target_logprob", scores.target_logprob), ("topk_logprobs", scores.topk_logprobs[named])):
        if not np.isfinite(values).all():
            raise ValueError(f"{where}: {name} holds {values[~np.isfinite(values)][0]}; the teacher's scores must be finite")
        if (values > 1e-5).any():
            raise ValueError(f"{where}: {name} holds {values.max():.4g}; a log-probability is never above 0")
    mass = np.exp(scores.target_logprob.astype(np.float64)) + np.exp(scores.topk_logprobs.astype(np.float64)).sum(axis=1)
    if (mass > 1 + MASS_TOLERANCE).any():
        raise ValueError(f"{where}: target and top-K hold a mass of {mass.max():.6f}; at most 1 can be right")
    if scores.hidden is not None and ((scores.hidden & BFLOAT16_EXPONENT) == BFLOAT16_EXPONENT).any():
        raise ValueError(f"{where}: hidden holds a value that is not finite; the teacher's hidden states must be finite")
    ids = scores.topk_ids[named]
    if (ids < 0).any() or (ids >= ids_below).any():
        raise ValueError(f"{where}: topk_ids holds {ids.max()}; tokens that can be named are below {ids_below}")
    lowest = np.where(named, scores.topk_logprobs, np.inf).min(axis=1)
    spread = scores.topk_logprobs.max(axis=1) - lowest
    if targets > 1 and top_k > 1 and (spread < UNIFORM_TOLERANCE).all() and (named.sum(axis=1) > 1).all():
        raise ValueError(f"{where}: all {targets} distributions are uniform; the teacher's weights are not what they should be")
