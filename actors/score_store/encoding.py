"""Teacher scores as bytes: Arrow IPC, fixed-point log-probabilities, split token ids. N targets, K top-k.

A top-K log-probability is stored as a uint16 count of 1/2048 nats below zero: an error of at most 2.5e-4 nats down to
-31.99, below which it stays there. An id is stored as its low 16 bits, and, for vocabularies above 65,536, its high 8 bits.
Target, tail and uncertainty keep float32; the last could be had from the others, but ranking the tokens of a large step
must not read K numbers for each. That is 4 K + 12 bytes a target, or 5 K + 12. A store that keeps fewer than K tokens where
they hold enough mass says how many in 2 bytes a target, and stores no others.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from actors.records import NO_TOKEN, TeacherScores, uncertainty

STEPS_PER_NAT = 2048
LOWEST_STEP = 65_535


def encode_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """float32 [...] of values at most 0, to uint16 [...]."""
    return np.minimum(np.rint(logprobs.astype(np.float64) * -STEPS_PER_NAT), LOWEST_STEP).clip(0).astype(np.uint16)


def decode_logprobs(steps: np.ndarray) -> np.ndarray:
    """uint16 [...] to float32 [...]."""
    return steps.astype(np.float32) * np.float32(-1 / STEPS_PER_NAT)


def encode_shard(scores: Sequence[TeacherScores], vocab_size: int, ragged: bool = False) -> bytes:
    """Return the Arrow IPC file of one shard: a row an example, in the given order; ``ragged`` leaves out ``NO_TOKEN``."""
    assert vocab_size <= 1 << 24, "ids are stored in 24 bits"
    ids = np.concatenate([score.topk_ids for score in scores])
    steps = encode_logprobs(np.concatenate([score.topk_logprobs for score in scores]))
    row_starts = np.concatenate([[0], np.cumsum([len(score.target_logprob) for score in scores])])
    offsets = pa.array(row_starts.astype(np.int32))

    def per_target(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values))

    columns = {
        "key": pa.array([score.key for score in scores]),
        "target_logprob": per_target(np.concatenate([score.target_logprob for score in scores]).astype(np.float32)),
        "tail_logmass": per_target(np.concatenate([score.tail_logmass for score in scores]).astype(np.float32)),
        "uncertainty": per_target(np.concatenate([uncertainty(score) for score in scores])),
    }
    if ragged:
        kept = ids != NO_TOKEN  # [N, K]
        counts = kept.sum(axis=1)
        columns["topk_counts"] = per_target(counts.astype(np.uint16))
        token_offsets = pa.array(np.concatenate([[0], np.cumsum(counts)])[row_starts].astype(np.int32))
        ids, steps = ids[kept], steps[kept]

    def per_token(values: np.ndarray) -> pa.Array:
        if ragged:
            return pa.ListArray.from_arrays(token_offsets, pa.array(values))
        return pa.ListArray.from_arrays(offsets, pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1]))

    columns["topk_steps"] = per_token(steps)
    columns["topk_ids_low"] = per_token((ids & 0xFFFF).astype(np.uint16))
    if vocab_size > 1 << 16:
        columns["topk_ids_high"] = per_token((ids >> 16).astype(np.uint8))
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


class ShardView:
    """The scores of one shard, by row; arrays are views into the mapped file until a row is asked for.

    Args:
        buffer: the file.
        top_k: K, the width in which rows are returned.
    """

    def __init__(self, buffer: pa.Buffer, top_k: int) -> None:
        batch = pa.ipc.open_file(buffer).get_batch(0)
        names = batch.schema.names
        self.keys: list[str] = batch["key"].to_pylist()
        self._top_k = top_k
        self._offsets = np.asarray(batch["target_logprob"].offsets)
        self._target_logprob = np.asarray(batch["target_logprob"].values)
        self._tail_logmass = np.asarray(batch["tail_logmass"].values)
        self._uncertainty = np.asarray(batch["uncertainty"].values)
        self._counts = np.asarray(batch["topk_counts"].values) if "topk_counts" in names else None
        self._token_offsets = self._offsets * top_k if self._counts is None else np.asarray(batch["topk_steps"].offsets)
        self._topk_steps = _tokens(batch["topk_steps"])
        self._topk_ids_low = _tokens(batch["topk_ids_low"])
        self._topk_ids_high = _tokens(batch["topk_ids_high"]) if "topk_ids_high" in names else None

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> TeacherScores:
        here = slice(self._offsets[row], self._offsets[row + 1])
        tokens = slice(self._token_offsets[row], self._token_offsets[row + 1])
        ids = self._topk_ids_low[tokens].astype(np.int32)
        if self._topk_ids_high is not None:
            ids |= self._topk_ids_high[tokens].astype(np.int32) << 16
        logprobs = decode_logprobs(self._topk_steps[tokens])
        if self._counts is None:
            ids, logprobs = ids.reshape(-1, self._top_k), logprobs.reshape(-1, self._top_k)
        else:
            kept = np.arange(self._top_k) < self._counts[here][:, None]  # [N, K]
            ids, logprobs = _spread_out(ids, kept, NO_TOKEN), _spread_out(logprobs, kept, -np.inf)
        return TeacherScores(self.keys[row], self._target_logprob[here], ids, logprobs, self._tail_logmass[here])

    def uncertainty(self, row: int) -> np.ndarray:
        """float32 [N], the teacher's mass off the target; a view, no other column is touched."""
        return self._uncertainty[self._offsets[row] : self._offsets[row + 1]]

    def target_logprob(self, row: int) -> np.ndarray:
        """float32 [N], the teacher's log-probability of the target; a view, no other column is touched."""
        return self._target_logprob[self._offsets[row] : self._offsets[row + 1]]


def _tokens(column: pa.ListArray) -> np.ndarray:
    """Return the values of a column over all tokens of the shard, row by row, target by target."""
    values = column.values
    return np.asarray(values.values if isinstance(values, pa.FixedSizeListArray) else values)


def _spread_out(values: np.ndarray, kept: np.ndarray, empty: float) -> np.ndarray:
    """Lay values out into the places [N, K] that are kept."""
    places = np.full(kept.shape, empty, dtype=values.dtype)
    places[kept] = values
    return places
