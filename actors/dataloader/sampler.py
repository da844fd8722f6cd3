"""Which rows make up which optimizer step: the same for any number of workers, and known from the step's number alone."""

import math
from dataclasses import dataclass

import numpy as np

from actors.config.models import TrainConfig


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

    def rows_of(self, step: int) -> int:
        """Return R, how many rows a step has."""
        _, index = self._place(step)
        return min(self._batch_rows, self._rows - index * self._batch_rows)

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


@dataclass(frozen=True, slots=True)
class Visits:
    """Which optimizer step learns from the rows of which deal, where the rows of a window are visited several times.

    A deal is what a step would take if all were visited once. The deals of a window follow each other, all of them again and
    again, until the next window begins; the last may be shorter. Deals and steps count from 1.
    """

    deals: int
    """How many there are."""
    window: int = 1
    """Deals of a window."""
    times: int = 1
    """Visits of each."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all visits."""
        return self.deals * self.times

    def deal(self, step: int) -> int:
        """Return whose rows a step learns from."""
        first, count, place = self._place(step)
        return first + place % count

    def first_step(self, deal: int) -> int:
        """Return the step of a deal's first visit."""
        window, place = divmod(deal - 1, self.window)
        return window * self.window * self.times + place + 1

    def newest(self, step: int) -> int:
        """Return the last deal that has been visited once a step is done."""
        first, count, place = self._place(step)
        return first + min(place, count - 1)

    def _place(self, step: int) -> tuple[int, int, int]:
        """Return a window's first deal, how many it has, and how many steps of it lie before one."""
        window, place = divmod(step - 1, self.window * self.times)
        first = window * self.window + 1
        return first, min(self.window, self.deals - first + 1), place


Layout = list[list[list[int]]]
"""For each worker, for each of its forward passes, the rows of the step it takes, by their index in the step."""


def layout_of(lengths: np.ndarray, world_size: int, train: TrainConfig) -> Layout:
    """Cut the rows of a step into the forward passes of its workers.

    Rows are dealt by length, int64 [R], so that workers get equally much to do and the rows of a pass need little
    padding. Every worker gets equally many passes, as collectives need; a pass may be empty where rows do not go round.
    """
    order = np.argsort(-lengths, kind="stable")
    of_workers = [order[rank::world_size].tolist() for rank in range(world_size)]
    if train.micro_batch_tokens is None:
        layout = [_cut_by_rows(rows, train.micro_batch_rows) for rows in of_workers]
    elif train.packing:
        layout = [_packed(rows, lengths, train.micro_batch_tokens) for rows in of_workers]
    else:
        layout = [_cut_by_tokens(rows, lengths, train.micro_batch_tokens) for rows in of_workers]
    most = max(len(passes) for passes in layout)
    return [passes + [[] for _ in range(most - len(passes))] for passes in layout]


def _cut_by_rows(rows: list[int], count: int) -> list[list[int]]:
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def _cut_by_tokens(rows: list[int], lengths: np.ndarray, tokens: int) -> list[list[int]]:
    """Cut rows, the longest first, into passes of at most so many tokens with padding, or of one row."""
    passes: list[list[int]] = []
    for row in rows:
        if passes and (len(passes[-1]) + 1) * lengths[passes[-1][0]] <= tokens:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes


def _packed(rows: list[int], lengths: np.ndarray, tokens: int) -> list[list[int]]:
    """Lay rows, the longest first, each into the first pass that has room for it, of so many tokens; or of one longer row."""
    passes: list[list[int]] = []
    room: list[int] = []
    for row in rows:
        length = int(lengths[row])
        place = next((index for index, left in enumerate(room) if length <= left), len(passes))
        if place == len(passes):
            passes.append([])
            room.append(tokens)
        passes[place].append(row)
        room[place] -= length
    return passes
