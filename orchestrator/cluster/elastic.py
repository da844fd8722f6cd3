"""A training whose number of workers follows the room there is: fewer after a loss, more once there is room again.

Ray Train's own numbers that follow the room are not used: they count what nodes have, not what is free, so beside a teacher's
replicas or other jobs a training waits without end for room that those hold.
"""

import logging
from collections.abc import Callable

from ray.train import ControllerError, FailureConfig, TrainingFailedError

from actors.config.workers import WorkersConfig
from actors.format import plural
from actors.placement import proven_places, worker_request
from actors.student.task import WorkerResult

logger = logging.getLogger("atkd")

NO_TRY_OF_ITS_OWN = FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0)
"""Ray Train starts the same number of workers again, and here that number is to be counted anew."""
NO_ROOM, LOST_AT_START = "WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"
"""What a controller's failure is called when workers did not find room in time, or were lost while they started; Ray has no
public names for these."""


def train_in_turns(
    name: str, workers: WorkersConfig, max_failures: int, train: Callable[[int], WorkerResult], scoring: Callable[[], bool],
) -> WorkerResult:  # fmt: skip
    """Train with as many workers as there is room for; whenever they fail or make way, count again and continue.

    Args:
        name: of the training, for the user.
        workers: what each needs, the fewest and the most.
        max_failures: how often workers may fail.
        train: trains with so many workers from the last checkpoint on, and raises when they fail.
        scoring: whether the teacher still scores; the fewest train then, the room beside them is its own.

    Raises:
        TrainingFailedError: if the workers fail once more than they may, or Ray Train for another reason than a lack of room.
    """
    failures, before = 0, 0
    while True:
        room = 0 if scoring() else proven_places(worker_request(workers), workers.most)
        count = max(room, workers.count)
        if count != before:
            how = "continues" if before else "starts"
            logger.info(f"{name}: {how} with {plural(count, 'worker')} ({workers.count} to {workers.most})")
        before = count
        try:
            ending = train(count)
        except TrainingFailedError as failure:
            if _kind(failure) == NO_ROOM:
                logger.info(f"{name}: waits for room for {plural(count, 'worker')} of {worker_request(workers)}")
                continue
            failures += 1
            if failures > max_failures or _kind(failure) not in ("", LOST_AT_START):
                raise
            logger.warning(f"{name}: {_why(failure)}; all start again from their last checkpoint")
        else:
            if not ending.resize_requested:
                return ending


def _kind(failure: TrainingFailedError) -> str:
    """Return the name of what befell the controller; empty if it were workers that failed."""
    return type(failure.controller_failure).__name__ if isinstance(failure, ControllerError) else ""


def _why(failure: TrainingFailedError) -> str:
    failed = getattr(failure, "worker_failures", None) or {None: getattr(failure, "controller_failure", failure)}
    rank, cause = next(iter(failed.items()))
    line = (str(cause).strip().splitlines() or [""])[0]
    return f"{'workers' if rank is None else f'worker {rank}'} failed ({type(cause).__name__}: {line})"
