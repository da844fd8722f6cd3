"""Validation while training: the student is measured on the held-out rows after some steps, and told whether to continue."""

import time
from collections.abc import Sequence
from pathlib import Path

import ray
import torch
import torch.distributed
from torch import nn
from transformers import AutoTokenizer

from actors.evaluation.answer_ends import read_answer_ends
from actors.evaluation.answers import AnswerComparison, GeneratedAnswer, read_heldout_texts
from actors.evaluation.generation import generate_answers
from actors.evaluation.metrics import HeldoutMetrics, HeldoutRows, batches_by_length
from actors.examples import ExampleFile
from actors.models import plain_model
from actors.score_store.store import ScoreStore
from actors.student.model import autocast, undistributed
from actors.student.ranks import Worker
from actors.student.task import AnswerSchedule, TrainingTask


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
            asked = schedule.answers
            self._answers = None if asked is None else HeldoutAnswers(task, worker, schedule.examples, asked)

    def goes_on(self, student: nn.Module, step: int) -> bool:
        """Validate the student if that is due after this step; return whether training continues. All workers call it.

        Raises:
            ValueError: on all workers, if the logits of any of them are not finite.
        """
        if self._schedule is None or step not in self._schedule.steps:
            return True
        counted = self._heldout.counted(student)
        measures = {**counted.measures(), **counted.of_labels()}
        if self._answers is not None and step == self._schedule.steps[-1]:
            measures |= self._answers.measures(student)
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


class HeldoutAnswers:
    """Answers of a student in training to held-out prompts, shared out among its workers.

    Args:
        task: of the training.
        worker: this one, which holds the whole student.
        examples: the held-out rows as token ids.
        schedule: which prompts, and how they are answered.

    Raises:
        ValueError: if texts and examples do not belong together, or a reference has no answer.
    """

    def __init__(self, task: TrainingTask, worker: Worker, examples: str, schedule: AnswerSchedule) -> None:
        self._task, self._worker, self._evaluate = task, worker, schedule.evaluate
        rows, source = ExampleFile(Path(examples)), schedule.tokenizer
        texts = read_heldout_texts(Path(schedule.texts), rows.rows.tolist())[: self._evaluate.generate_rows]
        self._comparison = AnswerComparison(self._evaluate.answer_pattern)
        self._comparison.require_answers(texts)
        self._tasks = sorted({text.task for text in texts}, key=lambda task: (task is not None, task or ""))
        mine = range(worker.rank, len(texts), worker.world_size)
        self._texts, self._prompts = [texts[row] for row in mine], [rows[row].last_prompt for row in mine]
        self._tokenizer = AutoTokenizer.from_pretrained(
            source.name, revision=source.revision, trust_remote_code=source.trust_remote_code
        )
        self._ends = read_answer_ends(Path(source.name), self._tokenizer)

    @torch.no_grad()
    def measures(self, student: nn.Module) -> dict[str, float | None]:
        """Return exact match and Rouge-L of the answers, as an evaluation has them; all workers call it together.

        That of each kind of task, by which ``evaluate.by_task`` says, is called ``rouge_l.TASK``.
        """
        module = undistributed(student)
        module.eval()
        # Rows that grow by a token a pass would be compiled anew for each length.
        with torch.compiler.set_stance("force_eager"), autocast(self._task.train, self._worker.device):
            texts = generate_answers(plain_model(module.model), self._tokenizer, self._prompts, self._evaluate, self._ends)
        module.train()
        answers = [self._comparison.compare(*both) for both in zip(self._texts, texts, strict=True)]
        sums = torch.tensor([answer_sums(answers, task) for task in self._tasks], dtype=torch.float64)  # [tasks, 4]
        if self._worker.world_size > 1:
            sums = sums.to(self._worker.device)
            torch.distributed.all_reduce(sums)
        measures, shown = means_of(sums.sum(dim=0).tolist()), self._evaluate.by_task
        by_task = {task: means_of(of_task)[shown] for task, of_task in zip(self._tasks, sums.tolist(), strict=True)}
        return measures | {f"{shown}.{task}": value for task, value in by_task.items() if task is not None}


def answer_sums(answers: Sequence[GeneratedAnswer], task: str | None) -> list[float]:
    """Return how many answers to one kind of task there are and are right, how many have a Rouge-L, and its sum."""
    of_task = [answer for answer in answers if answer.task == task]
    rouge = [answer.rouge_l for answer in of_task if answer.rouge_l is not None]
    return [len(of_task), sum(answer.correct for answer in of_task), len(rouge), sum(rouge)]


def means_of(sums: Sequence[float]) -> dict[str, float | None]:
    """Return exact match and Rouge-L from the four sums of ``answer_sums``."""
    answered, right, compared, rouge = sums
    return {"exact_match": right / answered, "rouge_l": rouge / compared if compared else None}
