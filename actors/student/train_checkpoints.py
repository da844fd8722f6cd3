"""Where the checkpoints of a training run go: to Ray Train, or nowhere; and what proves one whole.

Each worker writes down the checksums of its files, and a reader compares them. A kill leaves no half checkpoint that counts,
since Ray Train takes one up only when all workers have handed theirs in. What is found here is what happened to the files later:
cut short, flipped, gone.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Protocol

import ray.train
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from actors.student.checkpoint import Progress, load_checkpoint, save_checkpoint
from actors.student.ranks import Worker

CHECKSUMS = "checksums-{rank}.json"
DAMAGED = "damaged.txt"
BOOK = "damaged.jsonl"


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


def write_checksums(folder: Path, rank: int, world_size: int) -> None:
    """Write down what this worker's folder holds: its part of a checkpoint."""
    files = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
    (folder / CHECKSUMS.format(rank=rank)).write_text(json.dumps({"workers": world_size, "sha256": files}))


def damage(folder: Path, rank: int, world_size: int) -> str:
    """Return what is wrong with a checkpoint, looking only at every ``world_size``-th file from ``rank`` on; empty if nothing is.

    All of ``world_size`` readers together look at all files; as many may read as like, however many wrote.
    """
    if (folder / DAMAGED).exists():
        return (folder / DAMAGED).read_text()
    try:
        workers = json.loads((folder / CHECKSUMS.format(rank=0)).read_text())["workers"]
        of_each = [json.loads((folder / CHECKSUMS.format(rank=writer)).read_text()) for writer in range(workers)]
        wanted = sorted((name, checksum) for one in of_each for name, checksum in one["sha256"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its list of files cannot be read ({type(error).__name__}: {error})"
    for name, checksum in wanted[rank::world_size]:
        path = folder / name
        if not path.is_file():
            return f"{name} is gone"
        if _checksum(path) != checksum:
            return f"{name} is not as it was written"
    return ""


def set_aside(folder: Path, why: str) -> None:
    """Mark a checkpoint as damaged, so that no later start looks at it again; its files stay, for Ray Train to delete.

    The training's folder keeps a line about it when the checkpoint is gone.
    """
    (folder / DAMAGED).write_text(why)
    with open(folder.parent / BOOK, "a") as file:
        file.write(json.dumps({"checkpoint": folder.name, "damage": why}) + "\n")


def damaged_checkpoints(folder: Path) -> list[str]:
    """Return a line for each checkpoint of a training that was set aside: its name, and what is wrong with it."""
    if not (folder / BOOK).exists():
        return []
    found = [json.loads(line) for line in (folder / BOOK).read_text().splitlines()]
    return [f"{one['checkpoint']}: {one['damage']}" for one in found]


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
