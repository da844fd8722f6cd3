"""Which rows make up which optimizer step: the same for any number of workers, and known from the step's number alone."""

import math

import numpy as np


class StepSampler:
    """Deals rows into optimizer steps, epoch after epoch; an epoch's last step may hold fewer rows.

    Args:
        rows: how many there are.
        batch_rows: rows of a step, over all workers and accumulation.
        seed: draws the order of each epoch.
        store_order_first: whether the first epoch follows the order of the store, so that it can read shards while they arrive;
            rows were shuffled once, when the data was prepared.
    """

    def __init__(self, rows: int, batch_rows: int, seed: int, store_order_first: bool) -> None:
        self._rows, self._batch_rows, self._seed, self._store_order_first = rows, batch_rows, seed, store_order_first
        self._epoch, self._order = -1, np.arange(0)  # the last that was asked for

    def positions(self, step: int) -> np.ndarray:
        """Return int64 [R], the positions of the rows of a step, which counts from 1."""
        epoch, index = self._place(step)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._order_of(epoch)
        return self._order[index * self._batch_rows : (index + 1) * self._batch_rows]

    def epochs_after(self, step: int) -> float:
        """Return how often the rows were visited once a step is done."""
        epoch, index = self._place(step)
        return epoch + min((index + 1) * self._batch_rows, self._rows) / self._rows

    def _place(self, step: int) -> tuple[int, int]:
        return divmod(step - 1, math.ceil(self._rows / self._batch_rows))

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch == 0 and self._store_order_first:
            return np.arange(self._rows)
        return np.random.default_rng([self._seed, epoch]).permutation(self._rows)


def steps_in(rows: int, batch_rows: int, epochs: float) -> int:
    """Return the number of optimizer steps of a run."""
    whole, fraction = int(epochs), epochs - int(epochs)
    return whole * math.ceil(rows / batch_rows) + math.ceil(round(fraction * rows, 6) / batch_rows)


def micro_batches(lengths: np.ndarray, rank: int, world_size: int, micro_batch_rows: int) -> list[list[int]]:
    """Return which rows of a step a worker takes, by their index in it, cut into forward passes.

    Rows are dealt by length, int64 [R], so that workers get equally much to do and the rows of a pass need little
    padding. Every worker gets equally many passes, as collectives need; a pass may be empty where rows do not go round.
    """
    mine = np.argsort(-lengths, kind="stable")[rank::world_size].tolist()
    most = math.ceil(len(lengths) / world_size)
    return [mine[start : start + micro_batch_rows] for start in range(0, most, micro_batch_rows)]
