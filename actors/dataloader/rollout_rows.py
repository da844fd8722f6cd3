"""The rows of optimizer steps of which the student wrote some. R rows of a step, N targets of a row."""

import time
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from actors.dataloader.hidden_states import as_hidden_teacher, require_right_head
from actors.dataloader.row_sources import RowSources
from actors.dataloader.sampler import Visits
from actors.dataloader.scored_rows import FileRows, StoredRows, as_teacher, require_same_row
from actors.examples import ExampleFile
from actors.records import Example, TeacherScores
from actors.score_store.rollout_log import RolloutLog, Sampled, poll_seconds
from losses.lm_head import LMHead
from losses.policy_gradient import DrawnTokens
from losses.teachers import HiddenTeacher
from losses.topk_teacher import TopkTeacher


class MixedRows:
    """R rows of a step: some as the data has them, others written by the student (``RowBatch``).

    Args:
        data: the step's rows as the data has them.
        sources: says which of them the student answers instead, or answered in an earlier step.
        log: holds what it wrote.
        step: of the training.
        head: the teacher's, where the log keeps hidden states, and the student writes all rows.
    """

    def __init__(self, data: FileRows, sources: RowSources, log: RolloutLog, step: int, head: LMHead | None = None) -> None:
        self._data, self._sources, self._log, self._step = data, sources, log, step
        self._head, self._head_is_right = head, False
        self._files: dict[int, ExampleFile] = {}  # of the steps for which its rows were written
        self._draws: dict[int, list[Sampled]] = {}  # of the same

    def __len__(self) -> int:
        return len(self._data)

    @property
    def lengths(self) -> np.ndarray:
        """int64 [R], tokens of each row."""
        lengths = self._data.lengths.copy()
        for row, (step, place) in self._places.items():
            lengths[row] = self._written(step).lengths[place]
        return lengths

    def example(self, row: int) -> Example:
        """Return the tokens of a row."""
        if row not in self._places:
            return self._data.example(row)
        step, place = self._places[row]
        return self._written(step)[place]

    def uncertainty(self, row: int) -> torch.Tensor:
        """Return the teacher's UNC at the targets of a row, float32 [N]."""
        if row not in self._places:
            return self._data.uncertainty(row)
        return torch.from_numpy(self._log.uncertainty(*self._places[row]).copy())

    def drawn(self, row: int) -> DrawnTokens:
        """Return how the targets of a row, N of them, came about."""
        if row not in self._places:
            return self._data.drawn(row)
        step, place = self._places[row]
        sampled = self._sampled(step)[place]
        drawn = sampled.logprobs if sampled.drawn_logprobs is None else sampled.drawn_logprobs
        return DrawnTokens(
            student_logprob=torch.from_numpy(sampled.logprobs.copy()),
            teacher_logprob=torch.from_numpy(self._log.teacher_logprobs(step, place).copy()),
            drawn_logprob=torch.from_numpy(drawn.copy()),
            drawn=torch.ones(len(sampled.logprobs), dtype=torch.bool),
        )

    def teacher_losses(self) -> torch.Tensor:
        """Return the teacher's own mean loss on each row, float32 [R], in nats per target."""
        return torch.tensor([self._teacher_loss(row) for row in range(len(self))])

    def teacher(self, rows: Sequence[int]) -> TopkTeacher | HiddenTeacher:
        """Return the teacher's scores at the targets of some rows, one row after the other.

        Raises:
            ValueError: if there are scores of other rows in their places, or the head is not that of the hidden states.
        """
        scores = [self._scores(row) for row in rows]
        if self._head is None:
            return as_teacher(scores)
        examples = [self.example(row) for row in rows]
        if not self._head_is_right:
            require_right_head(examples[0], scores[0], self._head)
            self._head_is_right = True
        return as_hidden_teacher(examples, scores, self._head)

    def are_scored(self) -> bool:
        """Return whether all rows and their scores are there."""
        if not self._sources.are_known(self._step):
            return False
        return self._data_used.are_scored() and (not self._is_written or self._log.is_there(self._step))

    def wait(self, timeout_seconds: float) -> float:
        """Wait until all rows and their scores are there; return the seconds waited.

        Raises:
            ScoringFailed: with the error of sampler or teacher, if they gave up.
            TimeoutError: naming the shard, or the share, that did not come.
        """
        waited = self._wait_for_share(timeout_seconds) + self._data_used.wait(timeout_seconds)
        return waited + (self._log.wait_for(self._step, timeout_seconds) if self._is_written else 0.0)

    @cached_property
    def _places(self) -> dict[int, tuple[int, int]]:
        """Of each row that the student wrote, the step for which it did, and its place there."""
        sources = self._sources.of_step(self._step)
        mine = {int(row): (self._step, place) for place, row in enumerate(np.flatnonzero(sources.written))}
        return mine | dict(sources.replayed)

    @property
    def _is_written(self) -> bool:
        """Whether some row is written for this step."""
        return any(step == self._step for step, _ in self._places.values())

    def _written(self, step: int) -> ExampleFile:
        if step not in self._files:
            self._files[step] = self._log.examples(step)
        return self._files[step]

    def _wait_for_share(self, timeout_seconds: float) -> float:
        """Wait until it is decided which rows are the student's; return the seconds waited."""
        started = time.monotonic()
        while not self._sources.are_known(self._step):
            if time.monotonic() - started > timeout_seconds:
                raise TimeoutError(
                    f"the student's share of step {self._step} was not decided within {timeout_seconds:.0f} s; the first worker "
                    "decides it after it has measured the held-out rows"
                )
            time.sleep(poll_seconds(self._sources.policy.shares or ""))
        return time.monotonic() - started

    def _sampled(self, step: int) -> list[Sampled]:
        if step not in self._draws:
            self._draws[step] = self._log.sampled(step)
        return self._draws[step]

    @property
    def _data_used(self) -> FileRows:
        """The rows that stay as the data has them."""
        kept = [row for row in range(len(self)) if row not in self._places]
        return FileRows(self._data.examples, self._data.store, self._data.top_k, self._data.positions[kept])

    def _scores(self, row: int) -> TeacherScores:
        if row not in self._places:
            return self._data.scores(row)
        scores = self._log.scores(*self._places[row], self._data.top_k)
        require_same_row(self.example(row), scores)
        return scores

    def _teacher_loss(self, row: int) -> float:
        if row in self._places:
            return self._log.teacher_loss(*self._places[row])
        assert self._data.store is not None, "rows that stay as they are were scored"
        return self._data.store.teacher_loss_at(int(self._data.positions[row]))


class RolloutRows:
    """Rows of a file, of which the student answers some prompts anew in each step (``ScoredRows``).

    Args:
        data: the rows as the data has them; without a store where the student answers all prompts.
        log: holds what it wrote.
        sources: says which rows of each step it writes.
        head: the teacher's, where the log keeps hidden states.
        visits: in which steps rows are learned from, where that is more than once; data and log know deals alone.
    """

    def __init__(
        self, data: StoredRows, log: RolloutLog, sources: RowSources, head: LMHead | None = None, visits: Visits | None = None
    ) -> None:
        self._data, self._log, self._sources, self._head, self._visits = data, log, sources, head, visits

    def batch(self, step: int) -> MixedRows:
        """Return the rows of a step."""
        deal = self._visits.deal(step) if self._visits else step
        return MixedRows(self._data.batch(deal), self._sources, self._log, deal, self._head)

    def epochs_after(self, step: int) -> float:
        """Return how often the prompts were answered once a step is done."""
        return self._data.epochs_after(self._visits.newest(step) if self._visits else step)
