"""A node's copies of weights that go through object storage, from the node that trains to those that sample.

In the storage a folder of weights is whole once its proof is there, which comes last. By the proof a node knows whether its copy
is one of what stands there now: no two sets of weights predict the same numbers.
"""

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from actors.config.places import in_object_storage, parent_and_name
from actors.files import whole_folder
from actors.model_source import ModelSource
from actors.storage.local_copies import cache_folder

PROOF = "proof.json"
IDLE_SECONDS = 86400.0
"""After which copies of weights of another training go, whose processes were killed."""


class WeightCopies:
    """The copies of one student's weights.

    Args:
        address: of the folder that holds the folders of all versions; each is named for the step after which it was taken.
    """

    def __init__(self, address: str) -> None:
        from actors.storage.object_folder import ObjectFolder  # loads the clouds' libraries

        self._storage = ObjectFolder(address)
        self._folder, self._lock = _folder_of(address), _lock_of(address)
        self._folder.mkdir(parents=True, exist_ok=True)
        for other in self._folder.parent.iterdir():
            with suppress(FileNotFoundError):  # another process of the node may be as tidy
                if other.is_dir() and other != self._folder and time.time() - other.stat().st_mtime > IDLE_SECONDS:
                    shutil.rmtree(other, ignore_errors=True)

    def write(self, name: str, save: Callable[[Path], None]) -> None:
        """Let ``save`` fill a new folder, its proof included, and put it into the storage; copies of what is gone there go."""
        path = self._folder / name
        with self._alone():
            shutil.rmtree(path, ignore_errors=True)
            with whole_folder(path) as unfinished:
                save(unfinished)
        for file in sorted(path.iterdir(), key=lambda file: file.name == PROOF):
            self._storage.upload(file, f"{name}/{file.name}")
        with self._alone():
            self._keep_only({*self._storage.folders()})

    def fetch(self, name: str) -> Path:
        """Return the copy of a folder, made if need be; those of earlier steps go.

        Raises:
            FileNotFoundError: if the folder is not in the storage.
        """
        path = self._folder / name
        with self._alone():
            proof = self._storage.read(f"{name}/{PROOF}")
            if not (path / PROOF).exists() or (path / PROOF).read_bytes() != proof:
                self._copy(path)
            self._keep_only({one.name for one in self._folder.iterdir() if (step_of(one.name) or 0) >= (step_of(name) or 0)})
        return path

    def _copy(self, path: Path) -> None:
        from actors.storage.transfers import download

        shutil.rmtree(path, ignore_errors=True)
        with whole_folder(path) as coming:
            download(self._storage.place_of(path.name), coming)

    def _keep_only(self, names: Container[str]) -> None:
        for path in self._folder.iterdir():
            if path.name not in names:
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process of the node at a time change the copies."""
        with open(self._lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._folder.mkdir(exist_ok=True)
            os.utime(self._folder)
            yield


def drop_copies(address: str) -> None:
    """Remove this node's copies of the weights of a training that is over."""
    shutil.rmtree(_folder_of(address), ignore_errors=True)
    _lock_of(address).unlink(missing_ok=True)


def on_this_node(model: ModelSource) -> ModelSource:
    """Return weights as this node can load them: of those in object storage its own copy."""
    if not in_object_storage(model.name):
        return model
    address, name = parent_and_name(model.name)
    return replace(model, name=str(WeightCopies(address).fetch(name)))


def _folder_of(address: str) -> Path:
    return cache_folder() / "weights" / hashlib.sha256(address.encode()).hexdigest()[:16]


def _lock_of(address: str) -> Path:
    folder = _folder_of(address)
    return folder.with_name(f"{folder.name}.lock")


def step_of(name: str) -> int | None:
    """Return the step in the name of a folder of weights; None if it is none."""
    found = re.fullmatch(r"step-(\d+)", name)
    return int(found[1]) if found else None
