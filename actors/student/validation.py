"""Validation while training: the student is measured on the held-out rows after some steps, and told whether to continue."""

import time
from pathlib import Path

import ray
import torch
from torch import nn

from actors.evaluation.metrics import HeldoutMetrics, HeldoutRows, batches_by_length
from actors.examples import ExampleFile
from actors.score_store.store import ScoreStore
from actors.student.model import autocast, undistributed
from actors.student.ranks import Worker
from actors.student.task import TrainingTask


class Validator:
    """Examines the student of a trial; of an ordinary run, which has no validation, never."""

    def __init__(self, task: TrainingTask, worker: Worker, vocab_size: int) -> None:
        self._task, self._worker, self._schedule = task, worker, task.validation
        self._started = time.monotonic()
        if (schedule := self._schedule) is not None:
            self._heldout = HeldoutPasses(
                task, worker, Path(schedule.examples), schedule.store, schedule.top_k, schedule.batch_rows, vocab_size,
                schedule.ordered,
            )  # fmt: skip

    def goes_on(self, student: nn.Module, step: int) -> bool:
        """Validate the student if that is due after this step; return whether training continues. All workers call it.

        Raises:
            ValueError: on all workers, if the logits of any of them are not finite.
        """
        if self._schedule is None or step not in self._schedule.steps:
            return True
        counted = self._heldout.counted(student)
        measures = {**counted.measures(), **counted.of_labels()}
        told = True
        if self._worker.rank == 0:
            rung, seconds = self._schedule.steps.index(step), time.monotonic() - self._started
            told = ray.get(self._schedule.controller.measured.remote(self._schedule.trial, rung, step, measures, seconds))
        return self._worker.agree(told)


class HeldoutPasses:
    """Forward passes of a student in training over the held-out rows, shared out among its workers.

    Args:
        task: of the training.
        worker: this one.
        examples: the held-out rows as token ids.
        store: the complete store of the teacher's scores of them.
        top_k: how many of the store's K are used.
        batch_rows: rows of one forward pass.
        vocab_size: of the student.
        ordered: whether the labels of a classifier are grades.
    """

    def __init__(
        self, task: TrainingTask, worker: Worker, examples: Path, store: str, top_k: int, batch_rows: int, vocab_size: int,
        ordered: bool = False,
    ) -> None:  # fmt: skip
        self._task, self._worker, self._batch_rows, self._ordered = task, worker, batch_rows, ordered
        self._examples = ExampleFile(examples)
        self._rows = HeldoutRows(self._examples, ScoreStore(store), top_k, vocab_size)

    @torch.no_grad()
    def counted(self, student: nn.Module) -> HeldoutMetrics:
        """Count over all held-out targets; each worker takes its share of the batches, and all have the same sums.

        Raises:
            ValueError: on all workers, if the logits of any of them are not finite.
        """
        batches = list(batches_by_length(self._examples.lengths, self._batch_rows))
        heldout, world_size = HeldoutMetrics(self._task.model.classes, self._ordered), self._worker.world_size
        module = undistributed(student)
        module.eval()
        for first in range(0, len(batches), world_size):
            mine = first + self._worker.rank
            # Where the students are sharded, all workers take part in each forward pass, those without a batch too.
            batch = self._rows.batch(batches[min(mine, len(batches) - 1)]).to(self._worker.device)
            with autocast(self._task.train, self._worker.device):
                (logits,) = module(batch, None)
            if mine < len(batches):
                heldout.add_logits(logits, batch)
        module.train()
        if world_size > 1:
            heldout.sum_over_workers(self._worker.device)
        heldout.require_finite(self._task.name)
        return heldout
