"""Whole folders, put into object storage and fetched from there."""

import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from actors.config.places import within
from actors.storage.object_folder import ObjectFolder

FETCHED_AT_ONCE = 4
LAST = "config.json"
"""Loaders of a model begin with it: where it is, the rest is there too."""


def upload(path: Path, place: str) -> None:
    """Put a file, or all that stands below a folder, into the folder at an address, under its own name.

    Raises:
        ValueError: if the storage refuses.
        StorageError: if a file does not arrive.
    """
    if path.is_file():
        ObjectFolder(place).upload(path)
        return
    for inner in sorted(path.iterdir(), key=lambda inner: (inner.name == LAST, inner.name)):
        upload(inner, within(place, path.name))


def download(place: str, folder: Path) -> None:
    """Copy the files of the folder at an address, not those of folders within, into a new folder of this machine.

    Raises:
        ValueError: if the storage refuses.
        StorageError: if a file does not arrive.
    """
    storage = ObjectFolder(place)
    folder.mkdir(parents=True)
    with ThreadPoolExecutor(FETCHED_AT_ONCE) as threads:
        list(threads.map(lambda name: storage.download(name, folder / name), storage.sizes()))


def require_writable(place: str) -> None:
    """Raise a ``ValueError`` if no file can be put at an address, read and removed."""
    folder, name = ObjectFolder(place), f"seen-{uuid.uuid4().hex}.tmp"
    folder.write(name, name.encode())
    folder.read(name)
    folder.remove(name)
