"""Files in object storage that are read whole, as they are now, through copies on this node."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from actors.config.places import parent_and_name, resolved
from actors.storage.object_folder import ObjectFolder


def fetched_files(place: str, wanted: Callable[[str], bool]) -> list[Path]:
    """Return copies of the file at an address, or of those in a folder there whose names are wanted, in the order of names; none
    if nothing is there.

    Raises:
        ValueError: if the storage refuses, or the node's cache has no room for them.
    """
    folder, names = _found(place, wanted)
    folder.forget(names)
    return [folder.copy_of(name) for name in names]


def fingerprint(place: str, wanted: Callable[[str], bool]) -> str | None:
    """Return a hash over names, sizes and times of the files that ``fetched_files`` would return; None if there is none."""
    folder, names = _found(place, wanted)
    if not names:
        return None
    sizes, written = folder.sizes(), folder.written_ns("")
    return hashlib.sha256(repr([(name, sizes[name], written[name]) for name in names]).encode()).hexdigest()


def _found(place: str, wanted: Callable[[str], bool]) -> tuple[ObjectFolder, list[str]]:
    """Return the folder in which files stand, and their names."""
    address = resolved(place)
    parent, name = parent_and_name(address)
    if name:
        folder = ObjectFolder(parent)
        if folder.size(name) is not None:
            return folder, [name]
    folder = ObjectFolder(address)
    return folder, sorted(filter(wanted, folder.sizes()))
