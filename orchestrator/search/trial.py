"""What one trial of a search does, in a process of its own: train the student of its point, and report how it went."""

import gc
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.tune
import torch

from actors.config.places import parent_and_name
from actors.examples import ExampleFile
from actors.monitors.metrics_log import read_metrics
from actors.storage.folder import open_folder
from actors.storage.mirror import kept_alike
from actors.student.loop import distil
from actors.student.task import AnswerSchedule, TrainingTask, ValidationSchedule
from actors.student.train_checkpoints import NoCheckpoints
from actors.teacher.service import ScoreService
from orchestrator.cluster.run_copies import place_of, sync_other_nodes
from orchestrator.config.tune import rung_steps
from orchestrator.models.drawn_student import draw_student, models_of_trial
from orchestrator.models.models import Models
from orchestrator.run.responses import training_rows
from orchestrator.run.rollouts import RolloutStage, optimizer_steps, rollout_task, rollouts_folder
from orchestrator.run.stages import distillation_task
from orchestrator.run.training import train_model
from orchestrator.search.bound_space import BoundSpace
from orchestrator.search.controller import Assignment, ControllerHandle, Outcome


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a search share; sent to each."""

    space: BoundSpace
    """Makes a configuration of a point."""
    run_folder: Path
    """The run's folder, with data, models and tokenizer, or a node's copy of it."""
    folder: Path
    """Where trials leave their metrics and checkpoints."""
    training_store: str | None
    """The complete store of the training rows; None where the student writes all rows of all trials."""
    heldout_store: str
    """The complete store of the held-out rows."""
    rungs: int
    """How often a trial is measured."""
    in_process: bool
    """Train in the trial's own process, which is kept for the next trial, or in Ray Train workers."""
    controller: ControllerHandle
    """Handle of the ``SearchController``."""
    answers: bool = False
    """Whether students answer held-out prompts at their end."""
    teacher: ScoreService | None = None
    """Scores what the students of trials write."""

    def models(self, assignment: Assignment) -> Models:
        """Return the models of a trial, which may have a student of its own."""
        config, base = self.space.config_of(assignment.point), self.space.config
        return models_of_trial(config, base, self.run_folder, self.drawn_student(assignment.trial))

    def draw_student(self, assignment: Assignment) -> int | None:
        """Draw the student of a trial if it has one of its own, and return how many weights it has; None if it is not drawn."""
        parameters = draw_student(self.models(assignment), Models(self.space.config, self.run_folder))
        if parameters is not None and (mirror := self.space.config.mirror) is not None:
            mirror.sync()
            sync_other_nodes(mirror)  # samplers and workers may be on any
        return parameters

    def task(self, assignment: Assignment) -> TrainingTask:
        """Return the training of a trial, with its validation.

        Raises:
            ValueError: if it has fewer steps than there are rungs.
        """
        config, base = self.space.config_of(assignment.point), self.space.config
        models = self.models(assignment)
        total_steps = optimizer_steps(config, len(ExampleFile(training_rows(config, self.run_folder))))
        validation = ValidationSchedule(
            trial=assignment.trial,
            steps=rung_steps(total_steps, self.rungs),
            examples=str(self.run_folder / "data" / "heldout.arrow"),
            store=self.heldout_store,
            top_k=base.scores.top_k,  # not the trial's own: all are measured alike
            batch_rows=base.evaluate.batch_rows,
            controller=self.controller,
            ordered=base.ordered,
            answers=self._answers(models) if self.answers else None,
        )
        folder = self.trial_folder(assignment.trial)
        store = self.training_store if config.learns_from_data else None
        return replace(
            distillation_task(config, self.run_folder, models, store),
            name=_name_of(assignment.trial),
            seed=assignment.seed,
            metrics=str(folder),
            output=None,
            validation=validation,
            rollouts=rollout_task(config, folder, self.run_folder, models),
        )

    def _answers(self, models: Models) -> AnswerSchedule:
        """Return what each student answers, in the manner of the run's evaluation."""
        texts = self.run_folder / "data" / "heldout_texts.jsonl"
        return AnswerSchedule(str(texts), models.tokenizer_source(), self.space.config.evaluate)

    def rollouts(self, assignment: Assignment, task: TrainingTask) -> AbstractContextManager[None]:
        """Return what writes rows beside the training of a trial; nothing where it has no rollouts."""
        if task.rollouts is None:
            return nullcontext()
        config, folder = self.space.config_of(assignment.point), self.trial_folder(assignment.trial)
        stage = RolloutStage(config, self.run_folder, self.models(assignment), task.rollouts, task.seed)
        teacher = self.teacher
        assert teacher is not None, "a search whose trials may have rollouts has one"
        return stage.in_background(lambda: nullcontext(teacher), folder, folder)

    def trial_folder(self, trial: int) -> Path:
        """Return where a trial leaves its metrics."""
        return _folder_of(self.folder, trial)

    def drawn_student(self, trial: int) -> Path:
        """Return where a trial keeps the first weights of a student of its own while it runs."""
        return self.trial_folder(trial) / "student"

    def checkpoints_folder(self, trial: int) -> str:
        """Return where Ray Train keeps the checkpoints of a trial while it runs: a path, or an address."""
        return place_of(self.space.config.mirror, self.trial_folder(trial) / "checkpoints")

    def rollouts_folder(self, trial: int) -> str:
        """Return where a trial keeps what its student writes while it runs: a path, or an address."""
        return place_of(self.space.config.mirror, rollouts_folder(self.trial_folder(trial)))

    def tune_folder(self) -> str:
        """Return where Ray Tune keeps its own books while the search runs: a path, or an address."""
        return place_of(self.space.config.mirror, self.folder / "ray_tune")


def run_trial(config: dict[str, Any], context: TrialContext) -> None:
    """Train and measure one student; whatever goes wrong with it is the trial's outcome, and the search continues.

    The function Ray Tune calls: ``config["trial"]`` is the trial's number, all else the controller knows.
    """
    with kept_alike(context.space.config.mirror):
        outcome = _outcome_of(config["trial"], context)
    ray.tune.report({"status": outcome.status, "value": outcome.value})


def _outcome_of(number: int, context: TrialContext) -> Outcome:
    """Train, measure, tell the controller and tidy up."""
    assignment: Assignment = ray.get(context.controller.assignment.remote(number))
    error = parameters = None
    shutil.rmtree(context.trial_folder(number), ignore_errors=True)  # of one that was interrupted: its measures are void
    drop_folder(context.rollouts_folder(number))
    try:
        parameters = context.draw_student(assignment)
        _train(context, assignment)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
    outcome: Outcome = ray.get(context.controller.ended.remote(number, *spent(context.folder, number), error, parameters))
    shutil.rmtree(context.drawn_student(number), ignore_errors=True)
    for place in (context.rollouts_folder(number), context.checkpoints_folder(number)):
        drop_folder(place)
    _tidy_up()
    return outcome


def drop_folder(place: str) -> None:
    """Remove a folder, by path or address, as far as it is there."""
    parent, name = parent_and_name(place)
    open_folder(parent).remove_folder(name)


def spent(trials: Path, number: int) -> tuple[int, int]:
    """Return how many steps a trial took, and how many tokens they taught, as its metrics in the folder of all trials say."""
    steps = read_metrics(_folder_of(trials, number) / f"{_name_of(number)}.jsonl")
    return int(steps[-1]["step"]) if steps else 0, int(sum(step["tokens"] for step in steps))


def _name_of(number: int) -> str:
    return f"trial_{number:04d}"


def _folder_of(trials: Path, number: int) -> Path:
    return trials / f"{number:04d}"


def _train(context: TrialContext, assignment: Assignment) -> None:
    workers = context.space.config.workers
    task = context.task(assignment)
    with context.rollouts(assignment, task):
        if context.in_process:
            distil(task, NoCheckpoints())
        else:
            train_model(task, workers, context.checkpoints_folder(assignment.trial))


def _tidy_up() -> None:
    """Leave nothing of this student to the next trial of the process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
