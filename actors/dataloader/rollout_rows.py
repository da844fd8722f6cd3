"""The rows of optimizer steps of which the student wrote some. R rows of a step, N targets of a row."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from actors.dataloader.sampler import Visits
from actors.dataloader.scored_rows import FileRows, StoredRows, as_teacher, require_same_row
from actors.examples import ExampleFile
from actors.records import Example, TeacherScores
from actors.score_store.rollout_log import RolloutLog, Sampled
from losses.policy_gradient import DrawnTokens
from losses.topk_teacher import TopkTeacher


def written_by_student(seed: int, step: int, rows: int, share: float) -> np.ndarray:
    """Return a bool [R] mask of the rows of a step to whose prompts the student writes the response; each by a toss of its own.

    The same on every worker, and for whoever writes them.
    """
    return np.random.default_rng([seed, step]).random(rows) < share


class MixedRows:
    """R rows of a step: some as the data has them, others written by the student (``RowBatch``).

    Args:
        data: the step's rows as the data has them.
        written: bool [R], which of them the student answers instead; in the log they stand in this order.
        log: holds what it wrote.
        step: of the training.
    """

    def __init__(self, data: FileRows, written: np.ndarray, log: RolloutLog, step: int) -> None:
        self._data, self._log, self._step = data, log, step
        self._place = {int(row): place for place, row in enumerate(np.flatnonzero(written))}
        """Of each row that the student wrote, its place in the log."""

    def __len__(self) -> int:
        return len(self._data)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R], tokens of each row."""
        lengths = self._data.lengths.copy()
        if self._place:
            lengths[list(self._place)] = self._written.lengths
        return lengths

    def example(self, row: int) -> Example:
        """Return the tokens of a row."""
        return self._written[self._place[row]] if row in self._place else self._data.example(row)

    def uncertainty(self, row: int) -> torch.Tensor:
        """Return the teacher's UNC at the targets of a row, float32 [N]."""
        if row not in self._place:
            return self._data.uncertainty(row)
        return torch.from_numpy(self._log.uncertainty(self._step, self._place[row]).copy())

    def drawn(self, row: int) -> DrawnTokens:
        """Return how the targets of a row, N of them, came about."""
        if row not in self._place:
            return self._data.drawn(row)
        sampled = self._sampled[self._place[row]]
        drawn = sampled.logprobs if sampled.drawn_logprobs is None else sampled.drawn_logprobs
        return DrawnTokens(
            student_logprob=torch.from_numpy(sampled.logprobs.copy()),
            teacher_logprob=torch.from_numpy(self._log.teacher_logprobs(self._step, self._place[row]).copy()),
            drawn_logprob=torch.from_numpy(drawn.copy()),
            drawn=torch.ones(len(sampled.logprobs), dtype=torch.bool),
        )

    def teacher_losses(self) -> torch.Tensor:
        """Return the teacher's own mean loss on each row, float32 [R], in nats per target."""
        return torch.tensor([self._teacher_loss(row) for row in range(len(self))])

    def teacher(self, rows: Sequence[int]) -> TopkTeacher:
        """Return the teacher's scores at the targets of some rows, one row after the other.

        Raises:
            ValueError: if there are scores of other rows in their places.
        """
        return as_teacher([self._scores(row) for row in rows])

    def are_scored(self) -> bool:
        """Return whether all rows and their scores are there."""
        return self._data_used.are_scored() and (not self._place or self._log.is_there(self._step))

    def wait(self, timeout_seconds: float) -> float:
        """Wait until all rows and their scores are there; return the seconds waited.

        Raises:
            ScoringFailed: with the error of sampler or teacher, if they gave up.
            TimeoutError: naming the shard that did not come.
        """
        waited = self._data_used.wait(timeout_seconds)
        return waited + (self._log.wait_for(self._step, timeout_seconds) if self._place else 0.0)

    @cached_property
    def _written(self) -> ExampleFile:
        return self._log.examples(self._step)

    @cached_property
    def _sampled(self) -> list[Sampled]:
        return self._log.sampled(self._step)

    @property
    def _data_used(self) -> FileRows:
        """The rows that stay as the data has them."""
        kept = [row for row in range(len(self)) if row not in self._place]
        return FileRows(self._data.examples, self._data.store, self._data.top_k, self._data.positions[kept])

    def _scores(self, row: int) -> TeacherScores:
        if row not in self._place:
            return self._data.scores(row)
        scores = self._log.scores(self._step, self._place[row], self._data.top_k)
        require_same_row(self.example(row), scores)
        return scores

    def _teacher_loss(self, row: int) -> float:
        if row in self._place:
            return self._log.teacher_loss(self._step, self._place[row])
        assert self._data.store is not None, "rows that stay as they are were scored"
        return self._data.store.teacher_loss_at(int(self._data.positions[row]))


class RolloutRows:
    """Rows of a file, of which the student answers some prompts anew in each step (``ScoredRows``).

    Args:
        data: the rows as the data has them; without a store where the student answers all prompts.
        log: holds what it wrote.
        share: of the rows, which the student writes.
        seed: tosses for each row.
        visits: in which steps rows are learned from, where that is more than once; data and log know deals alone.
    """

    def __init__(self, data: StoredRows, log: RolloutLog, share: float, seed: int, visits: Visits | None = None) -> None:
        self._data, self._log, self._share, self._seed, self._visits = data, log, share, seed, visits

    def batch(self, step: int) -> MixedRows:
        """Return the rows of a step."""
        deal = self._visits.deal(step) if self._visits else step
        rows = self._data.batch(deal)
        return MixedRows(rows, written_by_student(self._seed, deal, len(rows), self._share), self._log, deal)

    def epochs_after(self, step: int) -> float:
        """Return how often the prompts were answered once a step is done."""
        return self._data.epochs_after(self._visits.newest(step) if self._visits else step)
