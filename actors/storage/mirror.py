"""A folder that each node has on its own disk, at one path, kept alike by way of a folder in object storage.

Whoever wrote files calls ``sync``, and so does whoever is about to read. Each file has one writer at a time. Where it was changed
on both sides, what was written last counts, so nodes and storage must tell about the same time.
"""

import fcntl
import hashlib
import json
import os
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, TypeAlias, TypeVar
from urllib.parse import urlsplit

from actors.files import write_atomically
from actors.storage.local_copies import cache_folder

if TYPE_CHECKING:
    from actors.storage.object_folder import ObjectFolder  # loads the clouds' libraries

Known = TypeVar("Known")
Stamp: TypeAlias = tuple[int, int]
"""A file's bytes, and when it was written, in nanoseconds."""

RECORD, LOCK = ".mirror.json", ".mirror.lock"
COMING = ".coming"
"""Stands in a new folder in the storage until all of its files do."""
LEFT_OUT = frozenset({RECORD, LOCK, "lock", "checkpoints", "ray_tune", "leases", "rollouts"})
"""Names of what is the node's own affair, or stands in the storage by itself."""
LAST = "stages"
"""The folder whose files say that others are there."""
SECONDS = 10.0
"""Between two looks of whoever keeps a folder alike."""
AT_ONCE = 8


def folder_on_nodes(address: str) -> Path:
    """Return where nodes have their copies of a folder: below ``runs`` in their cache, by its path in the bucket."""
    parts = urlsplit(address)
    bucket = hashlib.sha256(f"{parts.scheme}://{parts.netloc}?{parts.query}".encode()).hexdigest()[:8]
    return cache_folder() / "runs" / f"{parts.netloc.partition('@')[0]}-{bucket}" / parts.path.strip("/")


@dataclass(frozen=True, slots=True)
class Mirror:
    """A folder at one path on all nodes, and the folder in object storage by which it is kept alike."""

    folder: str
    """Its path."""
    address: str
    """Of the folder in object storage."""

    def sync(self, *, whole: bool = False) -> None:
        """Put what was written here since the last time, and get what others have put.

        A file that was removed there is removed here. One that was removed here alone stays there; it comes back if the folder is
        to be ``whole``, as for a process that begins to work in it and has it for itself.

        Raises:
            ValueError: if the storage refuses.
            StorageError: if the storage does not answer.
        """
        from actors.storage.object_folder import ObjectFolder

        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with self._alone():
            _Syncing(Path(self.folder), ObjectFolder(self.address)).run(whole)

    def discard(self, path: Path) -> None:
        """Remove a file of the folder here and in the storage, if it is there; other nodes lose it when they look next."""
        from actors.storage.object_folder import ObjectFolder

        Path(self.folder).mkdir(parents=True, exist_ok=True)
        with self._alone():
            ObjectFolder(self.address).remove(path.relative_to(self.folder).as_posix())
            path.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one process of the node at a time change the folder."""
        with open(Path(self.folder) / LOCK, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@contextmanager
def kept_alike(mirror: Mirror | None, seconds: float | None = SECONDS) -> Iterator[None]:
    """Sync before and after the body, whether or not it fails, and every so often while it runs, with ``seconds=None`` not then.
    Without a mirror do nothing."""
    if mirror is None:
        yield
        return
    done = threading.Event()
    mirror.sync()
    thread = threading.Thread(target=_sync_until, args=(done, mirror, seconds or 0.0), name="mirror", daemon=True)
    if seconds is not None:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if seconds is not None:
            thread.join()
        mirror.sync()


def _sync_until(done: threading.Event, mirror: Mirror, seconds: float) -> None:
    while not done.wait(seconds):
        with suppress(OSError, ValueError):  # the storage may answer again; the sync after the body says so if it does not
            mirror.sync()


@dataclass(frozen=True, slots=True)
class _Seen:
    """A file when both sides were last alike."""

    here: Stamp
    there: Stamp


class _Syncing:
    """One comparison of a folder with its likeness, and what follows from it."""

    def __init__(self, folder: Path, storage: "ObjectFolder") -> None:
        self._folder, self._storage = folder, storage
        self._record = _read_record(folder / RECORD)

    def run(self, whole: bool) -> None:
        """Make both alike."""
        nested = [path.parent.relative_to(self._folder).as_posix() for path in self._folder.rglob(f"*/{RECORD}")]
        self._here, listed = _without(nested, files_in(self._folder)), self._storage.files()
        half = sorted(name.rpartition("/")[0] for name in listed if PurePosixPath(name).name == COMING)
        if whole:  # nobody is putting anything: who did was killed
            for folder in half:
                self._storage.remove_folder(folder)
            listed, self._record = _without(half, listed), _without(half, self._record)
        self._there = _without([*half, *nested], {name: stamp for name, stamp in listed.items() if _counts(name)})
        putting, getting = [], []
        for name in sorted({*self._here, *self._there, *self._record}):
            here, there, seen = self._here.get(name), self._there.get(name), self._record.get(name)
            if here is None and there is None:
                self._record.pop(name, None)
            elif seen is None and here is not None and here == there:  # it came from there, and is not on record any more
                self._record[name] = _Seen(here, here)
            elif here is not None and (seen is None or here != seen.here) and not _newer(there, seen, here):
                putting.append(name)
            elif there is not None and (seen is None or there != seen.there or (whole and here is None)):
                getting.append(name)
            elif seen is not None and name not in listed:  # one that is in a folder that another node is putting is there still
                (self._folder / name).unlink(missing_ok=True)
                del self._record[name]
        for names, move in ((putting, self._put), (getting, self._get)):
            for group in _in_order(names):
                move(group)
        if putting or getting or not (self._folder / RECORD).exists():
            _write_record(self._folder / RECORD, self._record)

    def _get(self, names: Sequence[str]) -> None:
        for name in names:
            (self._folder / name).parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(AT_ONCE) as threads:
            list(threads.map(self._get_one, names))
        self._note(names, self._there)

    def _get_one(self, name: str) -> None:
        path = self._folder / name
        temporary = path.with_name(f"{path.name}.coming.tmp")
        try:
            self._storage.download(name, temporary)
            os.utime(temporary, ns=(self._there[name][1],) * 2)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _put(self, names: Sequence[str]) -> None:
        """Put files; those of each new folder count once all of them are there."""
        by_folder = defaultdict(list)
        for name in names:
            by_folder[self._new_folder(name)].append(name)
        for folder, within in sorted(by_folder.items()):
            if folder:
                self._storage.write(f"{folder}/{COMING}", b"")
            with ThreadPoolExecutor(AT_ONCE) as threads:
                list(threads.map(self._put_one, within))
            if folder:
                self._storage.remove(f"{folder}/{COMING}")
        self._note(names, self._storage.files())

    def _put_one(self, name: str) -> None:
        with suppress(FileNotFoundError):  # removed since it was seen
            self._storage.upload(self._folder / name, name)

    def _new_folder(self, name: str) -> str:
        """Return the outermost folder of a file that is not in the storage yet; an empty text if all are."""
        for folder in reversed(PurePosixPath(name).parents[:-1]):
            if not any(other.startswith(f"{folder}/") for other in self._there):
                return str(folder)
        return ""

    def _note(self, names: Iterable[str], there: Mapping[str, Stamp]) -> None:
        """Record that files are alike now: as they were seen here before they were put, or as they have just come."""
        came = files_in(self._folder) if there is self._there else self._here
        for name in names:
            if name in came and name in there:
                self._record[name] = _Seen(came[name], there[name])


def _newer(there: Stamp | None, seen: _Seen | None, here: Stamp) -> bool:
    """Whether a file that was changed here was changed there too, and later."""
    return there is not None and (seen is None or there != seen.there) and there[1] > here[1]


def files_in(folder: Path) -> dict[str, Stamp]:
    """Return the stamp of each file below a folder that is to be alike, by its path within."""
    found: dict[str, Stamp] = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if _counts(name):
            with suppress(FileNotFoundError):
                if path.is_file():
                    facts = path.stat()
                    found[name] = (facts.st_size, facts.st_mtime_ns)
    return found


def _counts(name: str) -> bool:
    """Whether a file is to be alike; never one that would come to stand outside of the folder."""
    return not any(part in LEFT_OUT or part == ".." or part.endswith(".tmp") for part in name.split("/"))


def _without(folders: Sequence[str], files: Mapping[str, Known]) -> dict[str, Known]:
    """Return what is not below some folders: those that are half there, and those within that have a mirror of their own."""
    return {name: known for name, known in files.items() if not any(name.startswith(f"{folder}/") for folder in folders)}


def _in_order(names: Sequence[str]) -> Iterator[list[str]]:
    """Yield groups of names, each of which may be seen only when those before are there."""
    last = [name for name in names if name.startswith(f"{LAST}/")]
    for group in ([name for name in names if name not in last], last):
        if group:
            yield group


def _read_record(path: Path) -> dict[str, _Seen]:
    try:
        content = json.loads(path.read_bytes())
        return {name: _Seen(tuple(here), tuple(there)) for name, (here, there) in content.items()}
    except (FileNotFoundError, ValueError):  # without one, what was written last counts
        return {}


def _write_record(path: Path, record: Mapping[str, _Seen]) -> None:
    write_atomically(path, json.dumps({name: (seen.here, seen.there) for name, seen in record.items()}).encode())
