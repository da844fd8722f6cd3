"""Where the checkpoints of a training run go: to Ray Train, or nowhere."""

import tempfile
from pathlib import Path
from typing import Protocol

import ray.train
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from actors.student.checkpoint import Progress, load_checkpoint, save_checkpoint
from actors.student.checkpoint_integrity import damage, set_aside, write_checksums
from actors.student.ranks import Worker


class Checkpoints(Protocol):
    """Keeps the latest state of a run."""

    def load(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, worker: Worker) -> Progress | None:
        """Put the latest whole checkpoint into the three and return where it stands; None if there is none."""
        ...

    def save(
        self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, worker: Worker
    ) -> None:
        """Keep a checkpoint; all workers call it together."""
        ...


class RayTrainCheckpoints:
    """Kept by Ray Train, which starts the workers again from the latest. One that is damaged gives way to the one before."""

    def load(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, worker: Worker) -> Progress | None:
        """Put the latest whole checkpoint into the three and return where it stands; None if there is none."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        latest = Path(checkpoint.path)
        before = [path for path in latest.parent.glob("checkpoint_*") if path.is_dir() and path.name < latest.name]
        for folder in (latest, *sorted(before, reverse=True)):
            if self._is_whole(folder, worker):
                return load_checkpoint(folder, student, optimizer, schedule)
        return None

    @staticmethod
    def _is_whole(folder: Path, worker: Worker) -> bool:
        """Look at a checkpoint together, and set it aside if any worker finds its part damaged."""
        why = damage(folder, worker.rank, worker.world_size)
        if worker.any(bool(why)):
            if why:
                set_aside(folder, why)
            return False
        return True

    def save(
        self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, worker: Worker
    ) -> None:
        """Keep a checkpoint; all workers call it together."""
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), student, optimizer, schedule, progress, worker.rank)
            write_checksums(Path(folder), worker.rank, worker.world_size)
            ray.train.report({"step": progress.step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


class NoCheckpoints:
    """For trials that take minutes: one that is interrupted begins anew."""

    def load(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, worker: Worker) -> Progress | None:
        """Find none."""
        return None

    def save(
        self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, worker: Worker
    ) -> None:
        """Keep none."""
