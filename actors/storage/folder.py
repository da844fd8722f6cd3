"""A folder of files that are whole or not there, wherever it stands."""

import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from actors.config.places import in_object_storage, resolved
from actors.files import filesystem_time_ns, write_atomically

if TYPE_CHECKING:
    from actors.storage.object_folder import FileSystem  # loads the clouds' libraries


class Folder(Protocol):
    """A folder of files; names have no slash."""

    place: str
    """Its path or address."""
    poll_seconds: float
    """Between two looks of whoever waits for a file."""

    def opened(self) -> "tuple[str, FileSystem | None]":
        """Return the folder's path and the filesystem in which it is one, for libraries that speak to pyarrow's; None for the
        machine's own."""
        ...

    def place_of(self, name: str) -> str:
        """Return the path or the address of a file."""
        ...

    def begin(self) -> None:
        """Let files be written here."""
        ...

    def folders(self) -> list[str]:
        """Return the names of the folders within, sorted."""
        ...

    def names(self) -> list[str]:
        """Return the names of all that is there."""
        ...

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file that is there."""
        ...

    def size(self, name: str) -> int | None:
        """Return a file's bytes; None if it is not there."""
        ...

    def read(self, name: str) -> bytes:
        """Return what a file holds now.

        Raises:
            FileNotFoundError: if it is not there.
        """
        ...

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Return what some files hold now.

        Raises:
            FileNotFoundError: if one is not there.
        """
        ...

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes from ``start`` up to ``end`` of a file that does not change, fewer where it ends before.

        Raises:
            FileNotFoundError: if it is not there.
        """
        ...

    def mapped(self, name: str) -> pa.Buffer:
        """Return a file that does not change, without a copy in memory where there is one on the disk.

        Raises:
            FileNotFoundError: if it is not there.
        """
        ...

    def fetch(self, names: Iterable[str]) -> None:
        """Have files that do not change at hand, many at once; what is not there, or finds no room, is left out."""
        ...

    def forget(self, names: Iterable[str]) -> bool:
        """Drop this node's copies of files, which are then read anew; False where a file is its own copy."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write a file; it is whole or it is not there."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        ...

    def remove_folder(self, name: str) -> None:
        """Remove a folder within and all that is in it, as far as it is there."""
        ...

    def remove_leftovers(self, idle_seconds: float) -> None:
        """Remove what processes left that were killed while they wrote, and that has not changed for so long."""
        ...


class DiskFolder:
    """A folder on a filesystem, which all nodes see at this path if they are to read it."""

    poll_seconds = 0.2

    def __init__(self, path: Path) -> None:
        self.path, self.place = path, str(path)

    def opened(self) -> "tuple[str, FileSystem | None]":
        """Return the folder's path; it is in the machine's own filesystem."""
        return self.place, None

    def place_of(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.path / name)

    def begin(self) -> None:
        """Make the folder."""
        self.path.mkdir(parents=True, exist_ok=True)

    def folders(self) -> list[str]:
        """Return the names of the folders within, sorted."""
        try:
            return sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir())
        except FileNotFoundError:
            return []

    def names(self) -> list[str]:
        """Return the names of all that is there."""
        return [entry.name for entry in os.scandir(self.path)]

    def sizes(self) -> dict[str, int]:
        """Return the bytes of each file that is there."""
        with suppress(FileNotFoundError):
            return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file()}
        return {}

    def size(self, name: str) -> int | None:
        """Return a file's bytes; None if it is not there."""
        try:
            return (self.path / name).stat().st_size
        except FileNotFoundError:
            return None

    def read(self, name: str) -> bytes:
        """Return what a file holds now."""
        return (self.path / name).read_bytes()

    def read_all(self, names: Sequence[str]) -> list[bytes]:
        """Return what some files hold now."""
        return [self.read(name) for name in names]

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Return the bytes of a file from ``start`` up to ``end``, fewer where it ends before."""
        with open(self.path / name, "rb") as file:
            return os.pread(file.fileno(), end - start, start)

    def mapped(self, name: str) -> pa.Buffer:
        """Return a file as a map of the disk."""
        return pa.memory_map(str(self.path / name)).read_buffer()

    def fetch(self, names: Iterable[str]) -> None:
        """Do nothing: the files are at hand."""

    def forget(self, names: Iterable[str]) -> bool:
        """Return False: there are no copies."""
        return False

    def write(self, name: str, content: bytes) -> None:
        """Write a file under another name, sync it and rename it."""
        write_atomically(self.path / name, content)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def remove_folder(self, name: str) -> None:
        """Remove a folder within and all that is in it, as far as it is there and can be removed."""
        shutil.rmtree(self.path / name, ignore_errors=True)

    def remove_leftovers(self, idle_seconds: float) -> None:
        """Remove temporary files that have not changed for so long, by the clock of the filesystem."""
        now_ns = filesystem_time_ns(self.path)
        for path in self.path.glob("*.tmp"):
            with suppress(FileNotFoundError):  # another job may be as tidy
                if now_ns - path.stat().st_mtime_ns > idle_seconds * 1e9:
                    path.unlink()


def open_folder(place: str | Path) -> Folder:
    """Return the folder at a path or an address; it need not be there.

    Raises:
        ValueError: if an address cannot be used; it says why, and what would do.
    """
    if not in_object_storage(place):
        return DiskFolder(Path(place))
    from actors.storage.object_folder import ObjectFolder  # loads a cloud's library, which a folder on a disk does not need

    return ObjectFolder(resolved(str(place)))
