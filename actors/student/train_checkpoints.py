"""Where the checkpoints of a training run go: to Ray Train, or nowhere; and what proves one whole.

Each worker writes down the checksums of its files, and a reader compares them. A kill leaves no half checkpoint that counts: Ray
Train takes one up only when all workers have handed theirs in, and where its list of them is lost, half of one lacks checksums.
What is found here besides is what happened to the files later: cut short, flipped, gone. A training's checkpoints stand in one
folder, on a disk that all nodes see or in object storage.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import ray.train
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from actors.config.places import in_object_storage, within
from actors.storage.folder import Folder, open_folder
from actors.storage.mirror import Mirror
from actors.student.checkpoint import Progress, load_checkpoint, save_checkpoint
from actors.student.ranks import Worker

PREFIX = "checkpoint_"
"""How Ray Train's names of checkpoints begin; the rest is the time, so that they sort by age."""
CHECKSUMS = "checksums-{rank}.json"
SET_ASIDE = "damaged-{checkpoint}.txt"
"""Stands beside a checkpoint that is damaged, says why, and stays when that is deleted."""


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
    """Kept by Ray Train, which starts the workers again from the latest. One that is damaged gives way to the one before.

    Args:
        place: path or address of the training's folder.
        mirror: how the nodes' copies of the run's folder are kept alike; None where all nodes see the same.
    """

    def __init__(self, place: str, mirror: Mirror | None = None) -> None:
        self._folder, self._mirror = open_folder(place), mirror

    def load(self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, worker: Worker) -> Progress | None:
        """Put the latest whole checkpoint into the three and return where it stands; None if there is none."""
        latest = ray.train.get_checkpoint()  # None too where its list of them was lost
        for name in reversed(checkpoints_up_to(None if latest is None else Path(latest.path).name, self._folder)):
            with self._at_hand(name, worker) as copy:
                if self._is_whole(name, copy, worker):
                    return load_checkpoint(copy, student, optimizer, schedule)
        return None

    @contextmanager
    def _at_hand(self, name: str, worker: Worker) -> Iterator[Path]:
        """Have a checkpoint on a disk of this node; all workers call it together, and those of a node share a copy."""
        place = within(self._folder.place, name)
        if not self._remote:
            yield Path(place)
            return
        from actors.storage.transfers import download  # loads the clouds' libraries, which a folder on a disk does not need

        copy = Path(tempfile.gettempdir()) / f"atkd-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
        first = ray.train.get_context().get_local_rank() == 0
        if first:
            shutil.rmtree(copy, ignore_errors=True)  # of a worker that was killed here
            download(place, copy)
        worker.barrier()
        yield copy
        worker.barrier()
        if first:
            shutil.rmtree(copy, ignore_errors=True)

    def _is_whole(self, name: str, copy: Path, worker: Worker) -> bool:
        """Look at a checkpoint together, and set it aside if any worker finds its part damaged."""
        why = damage(copy, worker.rank, worker.world_size)
        if worker.any(bool(why)):
            if why:
                set_aside(self._folder, name, why)
            return False
        return True

    def save(
        self, student: nn.Module, optimizer: Optimizer, schedule: LRScheduler, progress: Progress, worker: Worker
    ) -> None:
        """Keep a checkpoint; all workers call it together."""
        if self._mirror is not None and worker.rank == 0:
            self._mirror.sync()  # who resumes from it finds what was recorded up to here
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(Path(folder), student, optimizer, schedule, progress, worker.rank)
            write_checksums(Path(folder), worker.rank, worker.world_size)
            part = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": progress.step}, part, checkpoint_upload_fn=self._upload if self._remote else None)

    @property
    def _remote(self) -> bool:
        return in_object_storage(self._folder.place)

    def _upload(self, part: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        """Put a worker's part of a checkpoint into object storage: Ray Train's own copying is silent about uploads that break."""
        from actors.storage.transfers import upload

        place = within(self._folder.place, name)
        for path in sorted(Path(part.path).iterdir()):
            upload(path, place)
        return ray.train.Checkpoint(*open_folder(place).opened())


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


def checkpoints_up_to(latest: str | None, folder: Folder) -> list[str]:
    """Return the names of a training's checkpoints up to the latest that counts, or of all where that is not known, oldest first,
    without those set aside."""
    aside = {line.split(":")[0] for line in damaged_checkpoints(folder)}
    names = [name for name in folder.folders() if name.startswith(PREFIX) and name not in aside]
    return [name for name in names if latest is None or name <= latest]


def set_aside(folder: Folder, checkpoint: str, why: str) -> None:
    """Mark a training's checkpoint as damaged, so that no start looks at it again; its files stay, for Ray Train to delete."""
    folder.write(SET_ASIDE.format(checkpoint=checkpoint), why.encode())


def damaged_checkpoints(folder: Folder) -> list[str]:
    """Return a line for each checkpoint of a training that was set aside, oldest first: its name, and what is wrong with it."""
    before, after = SET_ASIDE.split("{checkpoint}")
    marks = sorted(name for name in folder.sizes() if name.startswith(before) and name.endswith(after))
    return [f"{name[len(before) : -len(after)]}: {folder.read(name).decode()}" for name in marks]


def _checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
