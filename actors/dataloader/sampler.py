"""Which rows make up which optimizer step: the same global batches for any number of workers."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class SamplerState:
    """Where a run stands in its data; part of every checkpoint."""

    seed: int
    """Draws the order of each epoch."""
    epoch: int = 0
    """Passes finished."""
    consumed: int = 0
    """Rows of the present epoch already taught, over all workers."""

    def to_dict(self) -> dict[str, int]:
        """Return plain fields."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class GlobalBatch:
    """The rows of one optimizer step, over all workers and accumulation."""

    positions: np.ndarray
    """int64 [rows], positions in the example file, in the order in which ties are broken."""

    after: SamplerState
    """The state once this step is done."""


def epoch_order(rows: int, seed: int, epoch: int, store_order_first: bool) -> np.ndarray:
    """Return int64 [rows]: the order in which an epoch visits the rows.

    The first epoch may follow the order of the store, so that it can read shards while they arrive; rows were shuffled
    once, when the data was prepared.
    """
    if epoch == 0 and store_order_first:
        return np.arange(rows)
    return np.random.default_rng([seed, epoch]).permutation(rows)


def steps_in(rows: int, batch_rows: int, epochs: float) -> int:
    """Return the number of optimizer steps of a run; an epoch's last step may hold fewer rows."""
    whole, fraction = int(epochs), epochs - int(epochs)
    return whole * math.ceil(rows / batch_rows) + math.ceil(round(fraction * rows, 6) / batch_rows)


def global_batches(rows: int, batch_rows: int, state: SamplerState, store_order_first: bool) -> Iterator[GlobalBatch]:
    """Yield batches from ``state`` on, epoch after epoch, without end."""
    while True:
        order = epoch_order(rows, state.seed, state.epoch, store_order_first)
        while state.consumed < rows:
            stop = min(state.consumed + batch_rows, rows)
            positions = order[state.consumed : stop]
            state = SamplerState(state.seed, state.epoch, stop) if stop < rows else SamplerState(state.seed, state.epoch + 1, 0)
            yield GlobalBatch(positions, state)
            if state.consumed == 0:
                break


def micro_batches(lengths: np.ndarray, rank: int, world_size: int, micro_batch_rows: int) -> list[list[int]]:
    """Return which rows of a global batch a worker takes, by their index in it, cut into forward passes.

    Rows are dealt by length, int64 [rows], so that workers get equally much to do and the rows of a pass need little
    padding. Every worker gets equally many passes, as collectives need; a pass may be empty where rows do not go round.
    """
    mine = np.argsort(-lengths, kind="stable")[rank::world_size].tolist()
    most = math.ceil(len(lengths) / world_size)
    return [mine[start : start + micro_batch_rows] for start in range(0, most, micro_batch_rows)]
