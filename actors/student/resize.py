"""When the workers of a training make way for more of them; asked by the workers themselves, at a checkpoint."""

import time

from actors.placement import free_places, proven_places, read_cluster, worker_request
from actors.student.ranks import Worker
from actors.student.task import TrainingTask

PROOF_SECONDS = 2.0


class ResizeMonitor:
    """Watches for room. While the teacher still scores there is none to take: what is free then is the teacher's.

    Args:
        task: says whether workers may become more, and how many.
        worker: the one that asks.
    """

    def __init__(self, task: TrainingTask, worker: Worker) -> None:
        self._task, self._workers, self._worker = task, task.elastic, worker
        self._since = time.monotonic()

    def is_due(self) -> bool:
        """Return whether to leave so that more workers can start; all workers call it together and get the same answer."""
        if self._workers is None or self._worker.world_size >= self._workers.most:
            return False
        return self._worker.agree(self._worker.rank == 0 and self._sees_room())

    def _sees_room(self) -> bool:
        assert self._workers is not None
        if time.monotonic() - self._since < self._workers.grow_seconds or self._task.beside_teacher:
            return False
        need = worker_request(self._workers)
        return free_places(need, read_cluster()) > 0 and proven_places(need, 1, PROOF_SECONDS) == 1
