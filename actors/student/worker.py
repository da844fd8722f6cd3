"""What Ray Train runs in each worker. Its controller loads this module too, so the loop is imported only where it runs."""

from contextlib import suppress
from pathlib import Path
from typing import TypedDict

from actors.storage.mirror import kept_alike
from actors.student.task import TrainingDiverged, TrainingTask, WorkerResult


class TrainLoopConfig(TypedDict):
    """What Ray Train hands each worker."""

    task: TrainingTask
    """What is to be trained."""
    checkpoints: str
    """Path or address of the training's folder of checkpoints."""


def train_worker(config: TrainLoopConfig) -> WorkerResult:
    """Run one worker to the end of its task, or as far as it gets.

    Ray Train ends all workers when one raises, and starts them again. An error that trying again cannot mend is returned by a
    lone worker, or where all workers have it. Else it is written down and raised, so that no other worker waits for this one in a
    collective; the workers that are started again find it and return it.
    """
    import torch.distributed

    from actors.score_store.store import ScoringFailed
    from actors.student.loop import distil
    from actors.student.train_checkpoints import RayTrainCheckpoints

    task = config["task"]
    with kept_alike(task.mirror):
        if (error := read_fatal_error(task)) is not None:
            return WorkerResult(error=error)
        try:
            return distil(task, RayTrainCheckpoints(config["checkpoints"], task.mirror))
        except (ScoringFailed, TrainingDiverged, TimeoutError, ValueError) as error:
            alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
            if alone or isinstance(error, TrainingDiverged):
                return WorkerResult(error=f"{type(error).__name__}: {error}")
            with suppress(FileExistsError), open(fatal_error_path(task), "x") as file:  # the first worker's error is the cause
                file.write(f"{type(error).__name__}: {error}")
            raise


def fatal_error_path(task: TrainingTask) -> Path:
    """Return the file in which a worker leaves an error that trying again cannot mend."""
    return Path(task.metrics) / f"{task.name}.error"


def read_fatal_error(task: TrainingTask) -> str | None:
    """Return the error that a worker left; None if there is none."""
    with suppress(FileNotFoundError):
        return fatal_error_path(task).read_text() or None  # empty: it is being written
    return None
