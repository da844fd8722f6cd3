"""Teacher scores as bytes: fixed-point log-probabilities, split token ids, the numbers of a row together. N targets, K top-k.

A top-K log-probability is stored as a uint16 count of 1/2048 nats below zero: an error of at most 2.5e-4 nats down to
-31.99, below which it stays there. An id is stored as its low 16 bits, and, for vocabularies above 65,536, its high 8 bits.
Target and tail keep float32. With the uncertainty, which stands in the shard's index, that is 4 K + 12 bytes a target, or
5 K + 12. A store that keeps fewer than K tokens where they hold enough mass says how many in 2 bytes a target, and stores no
others. Hidden states, if they are kept, are 16 bits each.

An exact store keeps the top-K in float32 too, 2 K bytes a target more. Scores of classes are stored so: a row has one target and
few classes, and unlikely ones matter once a temperature divides them.
"""

from dataclasses import dataclass

import numpy as np

from actors.records import NO_TOKEN, TeacherScores

STEPS_PER_NAT = 2048
LOWEST_STEP = 65_535


def encode_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """float32 [...] of values at most 0, to uint16 [...]."""
    return np.minimum(np.rint(logprobs.astype(np.float64) * -STEPS_PER_NAT), LOWEST_STEP).clip(0).astype("<u2")


def decode_logprobs(steps: np.ndarray) -> np.ndarray:
    """uint16 [...] to float32 [...]."""
    return steps.astype(np.float32) * np.float32(-1 / STEPS_PER_NAT)


@dataclass(frozen=True, slots=True)
class RowEncoding:
    """How the rows of a store become bytes and come back."""

    top_k: int
    """K, the width in which rows are given and returned."""
    vocab_size: int
    """V, above which there is no id."""
    ragged: bool
    """Whether ``NO_TOKEN`` is left out."""
    hidden_size: int = 0
    """H, if hidden states are kept; else 0."""
    exact: bool = False
    """Whether log-probabilities of the top-K come back bit for bit, in float32, and not in steps of 1/2048 nat."""

    def encode(self, scores: TeacherScores) -> bytes:
        """Return a row's scores, its key aside, column after column."""
        assert self.vocab_size <= 1 << 24, "ids are stored in 24 bits"
        kept = scores.topk_ids != NO_TOKEN  # [N, K]
        assert self.ragged or kept.all(), "all K tokens of each target are there"
        ids, logprobs = scores.topk_ids[kept], scores.topk_logprobs[kept]
        columns = [scores.target_logprob.astype("<f4"), scores.tail_logmass.astype("<f4")]
        if self.ragged:
            columns.append(kept.sum(axis=1).astype("<u2"))
        columns += [logprobs.astype("<f4") if self.exact else encode_logprobs(logprobs), (ids & 0xFFFF).astype("<u2")]
        if self.wide_ids:
            columns.append((ids >> 16).astype("u1"))
        if self.hidden_size:
            assert scores.hidden is not None and scores.hidden.shape[1] == self.hidden_size, "the teacher was asked for them"
            columns.append(scores.hidden.astype("<u2"))
        return b"".join(column.tobytes() for column in columns)

    def decode(self, content: bytes, key: str, targets: int) -> TeacherScores:
        """Return the scores of a row with this key and so many targets."""
        fields = _Fields(content)
        target_logprob, tail_logmass = fields.next("<f4", targets), fields.next("<f4", targets)
        counts = fields.next("<u2", targets) if self.ragged else np.full(targets, self.top_k)
        tokens = int(counts.sum())
        logprobs = fields.next("<f4", tokens).astype(np.float32) if self.exact else decode_logprobs(fields.next("<u2", tokens))
        ids = fields.next("<u2", tokens).astype(np.int32)
        if self.wide_ids:
            ids |= fields.next("u1", tokens).astype(np.int32) << 16
        hidden = None
        if self.hidden_size:
            hidden = fields.next("<u2", targets * self.hidden_size).reshape(targets, self.hidden_size)
        if self.ragged:
            kept = np.arange(self.top_k) < counts[:, None]  # [N, K]
            ids, logprobs = _spread_out(ids, kept, NO_TOKEN), _spread_out(logprobs, kept, -np.inf)
        shape = (targets, self.top_k)
        return TeacherScores(key, target_logprob, ids.reshape(shape), logprobs.reshape(shape), tail_logmass, hidden)

    @property
    def wide_ids(self) -> bool:
        """Whether 16 bits do not hold an id."""
        return self.vocab_size > 1 << 16


class _Fields:
    """Reads the columns of a row, one after the other."""

    def __init__(self, content: bytes) -> None:
        self._content, self._offset = content, 0

    def next(self, dtype: str, count: int) -> np.ndarray:
        column = np.frombuffer(self._content, dtype, count, self._offset)
        self._offset += column.nbytes
        return column


def _spread_out(values: np.ndarray, kept: np.ndarray, empty: float) -> np.ndarray:
    """Lay values out into the places [N, K] that are kept."""
    places = np.full(kept.shape, empty, dtype=values.dtype)
    places[kept] = values
    return places
