"""Easy and hard among the targets of a whole store (``loss.scope: dataset``), with no more than a shard's in memory at a time.

The k targets of the lowest uncertainty are easy, of equal ones the earlier, as ``losses.token_weights.split_easy`` has it. So it
is enough to know the k-th: which value, and where. Floats that are not negative stand in the order of their bits. A first
histogram, over the upper 16 of these, says in which bin the k-th lies; a second, over the lower 16 of the values in that bin,
which value it is; and a walk over the shards, where. N targets of a row.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from actors.score_store.store import ScoreStore
from losses.config import AtkdLoss
from losses.token_weights import easy_count, split_easy

BINS = 1 << 16


class StoreSplit(Protocol):
    """Which targets of a store are easy."""

    def easy(self, position: int) -> Tensor:
        """Return bool [N], which targets of the example at a position are easy."""
        ...


def split_store(store: ScoreStore, loss: AtkdLoss, seed: int) -> StoreSplit:
    """Part the targets of a complete store by the split of the loss; ``seed`` draws a random one.

    The indexes are read at most three times, and nothing of the scores. What is kept is the place of the last easy target; only
    a random split keeps its draw, a byte for each target of the store, and takes 13 while it draws.
    """
    counts = [len(store.uncertainties(shard)) for shard in range(store.shard_count)]
    if loss.split == "random":
        drawn = split_easy(torch.zeros(sum(counts)), loss, seed=seed)
        return DrawnSplit(store, drawn, np.cumsum([0, *counts]))
    inverted, left = loss.split == "inverted", easy_count(sum(counts), loss)
    if left == 0:
        return RankedSplit(store, inverted, border=0, shard=-1, place=-1)

    def ranks() -> Iterator[np.ndarray]:
        return (_ranks_of(store.uncertainties(shard), inverted) for shard in range(store.shard_count))

    upper, left = _bin_of(left, (of_shard >> 16 for of_shard in ranks()))
    lower, left = _bin_of(left, (of_shard[of_shard >> 16 == upper] & (BINS - 1) for of_shard in ranks()))
    border = upper << 16 | lower
    for shard, of_shard in enumerate(ranks()):
        places = np.flatnonzero(of_shard == border)
        if left <= len(places):
            return RankedSplit(store, inverted, border, shard, int(places[left - 1]))
        left -= len(places)
    raise AssertionError("what the histograms counted stands there")


@dataclass(frozen=True, slots=True)
class RankedSplit:
    """The targets up to the last easy one are easy: those of a lower rank, and of its own those that do not stand behind it."""

    store: ScoreStore
    """Of all scores."""
    inverted: bool
    """Whether the highest uncertainty ranks first."""
    border: int
    """The rank of the last easy target."""
    shard: int
    """Its shard; -1 where no target is easy."""
    place: int
    """Its place among the targets of the shard."""

    def easy(self, position: int) -> Tensor:
        """Return bool [N], which targets of the example at a position are easy."""
        shard, first = self.store.first_target_at(position)
        ranks = _ranks_of(self.store.uncertainty_at(position), self.inverted)
        ties = ranks == self.border
        if shard >= self.shard:
            ties &= (shard == self.shard) & (first + np.arange(len(ranks)) <= self.place)
        return torch.from_numpy((ranks < self.border) | ties)


@dataclass(frozen=True, slots=True)
class DrawnSplit:
    """Some targets are easy, wherever they stand."""

    store: ScoreStore
    """Of all scores."""
    drawn: Tensor
    """bool, whether each target of the store is easy, shard after shard."""
    starts: np.ndarray
    """int64, where each shard begins among them."""

    def easy(self, position: int) -> Tensor:
        """Return bool [N], which targets of the example at a position are easy."""
        shard, place = self.store.first_target_at(position)
        first = int(self.starts[shard]) + place
        return self.drawn[first : first + len(self.store.uncertainty_at(position))]


def _ranks_of(uncertainty: np.ndarray, inverted: bool) -> np.ndarray:
    """Return uint32 for float32, in the order in which targets are called easy."""
    assert len(uncertainty) == 0 or uncertainty.min() >= 0, "masses, which were checked before they were stored"
    ranks = (uncertainty + np.float32(0)).view(np.uint32)  # -0 is equal to 0, and becomes it
    return ~ranks if inverted else ranks


def _bin_of(nth: int, parts: Iterable[np.ndarray]) -> tuple[int, int]:
    """Return the n-th value, counted from 1, of parts with values below 65,536; and n less the number of lower ones."""
    counts = np.zeros(BINS, np.int64)
    for part in parts:
        counts += np.bincount(part, minlength=BINS)
    sums = np.cumsum(counts)
    value = int(np.searchsorted(sums, nth))
    return value, nth - int(sums[value] - counts[value])
