"""Where the checkpoints of a training run go: to Ray Train, or nowhere."""

import tempfile
from pathlib import Path
from typing import Protocol

import ray.train
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from actors.checkpoint import Progress, load_checkpoint, save_checkpoint
from actors.workers import Worker


class Checkpoints(Protocol):
    """Keeps the latest state of a run."""

    def load(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> Progress | None:
        """Put the latest checkpoint into the three and return where it stands; None if there is none."""
        ...

    def save(
        self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, worker: Worker
    ) -> None:
        """Keep a checkpoint; all workers call it together."""
        ...


class RayTrainCheckpoints:
    """Kept by Ray Train, which starts the workers again from the latest."""

    def load(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> Progress | None:
        """Put the latest checkpoint into the three and return where it stands; None if there is none."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            return None
        with checkpoint.as_directory() as folder:
            return load_checkpoint(Path(folder), student, optimizer, schedule)

    def save(
        self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, worker: Worker
    ) -> None:
        """Keep a checkpoint; all workers call it together."""
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), student, optimizer, schedule, progress, worker.rank)
            ray.train.report({"step": progress.step}, checkpoint=ray.train.Checkpoint.from_directory(folder))


class NoCheckpoints:
    """For trials that take minutes: one that is interrupted begins anew."""

    def load(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler) -> Progress | None:
        """Find none."""
        return None

    def save(
        self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, worker: Worker
    ) -> None:
        """Keep none."""
