"""Students that a search draws for one trial, whose shape is another than the run's."""

from pathlib import Path

from actors.config.model_kinds import is_drawn
from actors.teacher.reference_pass import count_weights
from orchestrator.config.run import RunConfig
from orchestrator.config.task import ClassificationTask
from orchestrator.models.classifiers import make_classifiers
from orchestrator.models.models import Models, config_of


def models_of_trial(config: RunConfig, run: RunConfig, run_folder: Path, drawn_student: Path) -> Models:
    """Return the models of a trial: the run's, but for a student of another shape.

    Args:
        config: of the trial.
        run: configuration of the run.
        run_folder: folder of the run.
        drawn_student: where the trial keeps a student of its own.
    """
    return Models(config, run_folder, drawn_student if config.student.model != run.student.model else None)


def draw_student(models: Models, run: Models) -> int | None:
    """Draw the student of a trial, if it has one of its own, as a run of the trial's configuration would.

    Neither the vocabulary nor the labels follow from the shape, so the scores serve it as they serve the run's own.

    Args:
        models: of the trial.
        run: of the run, whose own student is there.

    Returns:
        How many weights the student has; None for one that is not drawn.
    """
    if not is_drawn(models.config.student.model):
        return None
    if models.drawn_student is not None:
        _draw(models, run)
    return count_weights(config_of(models.made("student")), classifies=models.config.classes > 0)


def _draw(models: Models, run: Models) -> None:
    task = models.config.task
    if isinstance(task, ClassificationTask):
        image_shape = tuple(config_of(run.made("student")).image_shape)
        make_classifiers(models, task, {"student": None if image_shape else models.tokenizer()}, image_shape)
    else:
        models.make_scratch_models(models.tokenizer(), ("student",))
