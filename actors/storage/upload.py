"""A finished folder, put into object storage for others."""

import uuid
from pathlib import Path

from actors.config.places import within
from actors.storage.object_folder import ObjectFolder

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


def require_writable(place: str) -> None:
    """Raise a ``ValueError`` if no file can be put at an address, read and removed."""
    folder, name = ObjectFolder(place), f"seen-{uuid.uuid4().hex}.tmp"
    folder.write(name, name.encode())
    folder.read(name)
    folder.remove(name)
