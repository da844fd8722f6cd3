"""A training whose number of workers follows the room there is: fewer after a loss, more once there is room again.

Ray Train's own numbers that follow the room are not used: they count what nodes have, not what is free, so beside a teacher's
replicas or other jobs a training waits without end for room that those hold.
"""

from collections.abc import Callable

from ray.train import ControllerError, WorkerGroupError

from actors.placement import plural, settled_places, worker_need
from actors.training_task import Ending
from actors.workers_config import WorkersConfig


def train_in_turns(
    name: str, workers: WorkersConfig, max_failures: int, train: Callable[[int], Ending], scoring: Callable[[], bool],
    say: Callable[[str], None],
) -> Ending:  # fmt: skip
    """Train with as many workers as there is room for; whenever they fail or make way, settle anew and go on.

    Args:
        name: of the training, for the user.
        workers: what each needs, the fewest and the most.
        max_failures: how often workers may fail.
        train: trains with so many workers from the last checkpoint on, and raises when they fail.
        scoring: whether the teacher still scores what is learned from; the fewest train then, the room beside them is its own.
        say: takes a line for the user.

    Raises:
        WorkerGroupError: if the workers fail once more than they may.
        ControllerError: if Ray Train cannot start them for another reason than a lack of room, which is waited for.
    """
    failures, before = 0, 0
    while True:
        room = 0 if scoring() else settled_places(worker_need(workers), enough=workers.most)
        count = min(max(room, workers.count), workers.most)
        if count != before:
            say(f"{name}: {'goes on' if before else 'begins'} with {plural(count, 'worker')} ({workers.count} to {workers.most})")
        before = count
        try:
            ending = train(count)
        except WorkerGroupError as failure:
            failures += 1
            if failures > max_failures:
                raise
            rank, cause = next(iter(failure.worker_failures.items()))
            why = f"{type(cause).__name__}: {str(cause).strip().splitlines()[0]}"
            say(f"{name}: worker {rank} failed ({why}); all start again from their last checkpoint")
        except ControllerError as failure:
            if type(failure.controller_failure).__name__ != "WorkerGroupStartupTimeoutError":  # no public name of Ray's
                raise
            say(f"{name}: waits for room for {plural(count, 'worker')} of {worker_need(workers)}")
        else:
            if not ending.made_way:
                return ending
