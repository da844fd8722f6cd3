"""What Ray Train runs in each worker. Its controller loads this module too, so the loop is imported only where it runs."""

from actors.student.task import TrainingDiverged, TrainingTask, WorkerResult


def train_worker(config: dict[str, TrainingTask]) -> WorkerResult:
    """Run one worker to the end of its task, or as far as it gets.

    Ray Train starts the workers again after whatever is raised.
    """
    from actors.score_store.store import ScoringFailed
    from actors.student.loop import distil
    from actors.student.train_checkpoints import RayTrainCheckpoints

    try:
        return distil(config["task"], RayTrainCheckpoints())
    except (ScoringFailed, TrainingDiverged, TimeoutError, ValueError) as error:
        return WorkerResult(error=f"{type(error).__name__}: {error}")
