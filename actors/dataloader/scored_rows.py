"""Rows with the teacher's scores of them, a batch for each optimizer step. N targets of a row, K top-k."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from actors.dataloader.sampler import StepSampler
from actors.examples import ExampleFile
from actors.records import NO_TOKEN, Example, TeacherScores
from actors.score_store.store import ScoreStore
from losses.policy_gradient import DrawnTokens
from losses.teachers import HiddenTeacher
from losses.topk_teacher import TopkTeacher


class RowBatch(Protocol):
    """R rows with the teacher's scores of them; rows are named by their index in the batch, in which order ties are broken."""

    def __len__(self) -> int:
        """Return R."""
        ...

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R], tokens of each row."""
        ...

    def example(self, row: int) -> Example:
        """Return the tokens of a row."""
        ...

    def uncertainty(self, row: int) -> torch.Tensor:
        """Return the teacher's UNC at the targets of a row, float32 [N]; zeros without a teacher."""
        ...

    def drawn(self, row: int) -> DrawnTokens:
        """Return how the targets of a row, N of them, came about."""
        ...

    def teacher_losses(self) -> torch.Tensor:
        """Return the teacher's own mean loss on each row, float32 [R], in nats per target."""
        ...

    def teacher(self, rows: Sequence[int]) -> TopkTeacher | HiddenTeacher | None:
        """Return the teacher's scores at the targets of some rows, one row after the other; None without a teacher.

        Raises:
            ValueError: if there are scores of other rows in their places.
        """
        ...

    def are_scored(self) -> bool:
        """Return whether all rows and their scores are there."""
        ...

    def wait(self, timeout_seconds: float) -> float:
        """Wait until all rows and their scores are there; return the seconds waited.

        Raises:
            TimeoutError: naming what did not come.
        """
        ...


@dataclass(frozen=True, slots=True)
class FileRows:
    """R rows of a file, with the teacher's scores of them (``RowBatch``)."""

    examples: ExampleFile
    """The file."""

    store: ScoreStore | None
    """The teacher's scores of all its rows; None where the loss needs no teacher."""

    top_k: int
    """K: how many tokens of the teacher are read for each target."""

    positions: np.ndarray
    """int64 [R], where the rows stand in the file, in the order in which ties are broken."""

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R], tokens of each row."""
        return self.examples.lengths[self.positions]

    def example(self, row: int) -> Example:
        """Return the tokens of a row."""
        return self.examples[int(self.positions[row])]

    def uncertainty(self, row: int) -> torch.Tensor:
        """Return the teacher's UNC at the targets of a row, float32 [N]; zeros without a teacher."""
        if self.store is None:
            return torch.zeros(int(self.example(row).loss_mask.sum()))
        return torch.from_numpy(self.store.uncertainty_at(int(self.positions[row])).copy())

    def drawn(self, row: int) -> DrawnTokens:
        """Return that the targets of a row are the data's."""
        return DrawnTokens.of_data(int(self.example(row).loss_mask.sum()))

    def teacher_losses(self) -> torch.Tensor:
        """Return the teacher's own mean loss on each row, float32 [R], in nats per target."""
        assert self.store is not None, "a loss that asks for it has a store"
        return torch.tensor([self.store.teacher_loss_at(int(position)) for position in self.positions])

    def teacher(self, rows: Sequence[int]) -> TopkTeacher | None:
        """Return the teacher's scores at the targets of some rows, one row after the other; None without a teacher.

        Raises:
            ValueError: if the store holds scores of other rows in their places.
        """
        return None if self.store is None else as_teacher([self.scores(row) for row in rows])

    def scores(self, row: int) -> TeacherScores:
        """Return the scores of a row.

        Raises:
            ValueError: if the store holds scores of another row in its place.
        """
        assert self.store is not None, "a loss that asks for it has a store"
        scores = self.store.scores_at(int(self.positions[row]), self.top_k)
        require_same_row(self.example(row), scores)
        return scores

    def are_scored(self) -> bool:
        """Return whether the scores of all rows are there."""
        if self.store is None:
            return True
        return all(self.store.is_there(int(shard)) for shard in np.unique(self.positions // self.store.rows_per_shard))

    def wait(self, timeout_seconds: float) -> float:
        """Wait until the scores of all rows are there; return the seconds waited.

        Raises:
            TimeoutError: naming the shard that did not come.
        """
        if self.store is None:
            return 0.0
        shards = np.unique(self.positions // self.store.rows_per_shard)
        return sum(self.store.wait_for(int(shard), timeout_seconds) for shard in shards)


class ScoredRows(Protocol):
    """Where the rows of each optimizer step come from."""

    def batch(self, step: int) -> RowBatch:
        """Return the rows of a step, which counts from 1; the same on every worker."""
        ...

    def epochs_after(self, step: int) -> float:
        """Return how often the rows, or the prompts that they answer, were visited once a step is done."""
        ...


class StoredRows:
    """Rows of a file, scored into a store that may still be growing."""

    def __init__(self, examples: ExampleFile, store: ScoreStore | None, top_k: int, sampler: StepSampler) -> None:
        self._examples, self._store, self._top_k, self._sampler = examples, store, top_k, sampler

    def batch(self, step: int) -> FileRows:
        """Return the rows of a step."""
        return FileRows(self._examples, self._store, self._top_k, self._sampler.positions(step))

    def epochs_after(self, step: int) -> float:
        """Return how often the rows were visited once a step is done."""
        return self._sampler.epochs_after(step)


def as_teacher(scores: Sequence[TeacherScores]) -> TopkTeacher:
    """Return the scores of some rows, one row after the other; as many of the K as any target has."""
    topk_ids = np.concatenate([score.topk_ids for score in scores])
    kept = max(1, int((topk_ids != NO_TOKEN).sum(axis=1).max()))
    return TopkTeacher(
        target_logprob=torch.from_numpy(np.concatenate([score.target_logprob for score in scores])),
        topk_ids=torch.from_numpy(topk_ids[:, :kept].astype(np.int64)),
        topk_logprobs=torch.from_numpy(np.concatenate([score.topk_logprobs[:, :kept] for score in scores])),
        tail_logmass=torch.from_numpy(np.concatenate([score.tail_logmass for score in scores])),
    )


def all_rows(examples: ExampleFile, store: ScoreStore | None, top_k: int) -> FileRows:
    """Return all rows of a file as one batch, in their order."""
    return FileRows(examples, store, top_k, np.arange(len(examples)))


def require_same_row(example: Example, score: TeacherScores) -> None:
    """Raise a ``ValueError`` if scores are not of this row."""
    if example.key != score.key:
        raise ValueError(
            f"row {example.row} has key {example.key[:12]}, but the store holds scores of {score.key[:12]} at its place; "
            "the store belongs to other data: score again"
        )
