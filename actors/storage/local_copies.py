"""Copies, on a node's own disk, of files in object storage that do not change; all processes of the node share them.

``ATKD_CACHE`` names their folder (``~/.cache/atkd`` otherwise), ``ATKD_CACHE_GIB`` their size at most (50 otherwise): both are
the node's own affair and so stand in its environment. Copies that were used lately are not evicted for new ones: a store that is
larger than the cache, read in random order, would otherwise be fetched again for every row.
"""

import fcntl
import hashlib
import math
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISREG

FOLDER, LIMIT = "ATKD_CACHE", "ATKD_CACHE_GIB"
DEFAULT_GIB = 50.0
IDLE_SECONDS = 3600.0
"""A copy that nobody has used for so long may be evicted."""
TOUCH_SECONDS = 300.0
"""Between two notes of a process that it uses a copy."""


class LocalCopies:
    """The copies of the files of one place.

    Args:
        place: their address.
    """

    def __init__(self, place: str) -> None:
        self._root, self._limit = cache_folder(), cache_bytes()
        self._folder = self._root / hashlib.sha256(place.encode()).hexdigest()[:24]
        self._touched: dict[str, float] = {}

    def find(self, name: str) -> Path | None:
        """Return the copy of a file; None if there is none."""
        path, now = self._folder / name, time.monotonic()
        if now - self._touched.get(name, -math.inf) < TOUCH_SECONDS:
            return path if path.exists() else None
        try:
            os.utime(path)
        except FileNotFoundError:
            return None
        self._touched[name] = now
        return path

    def keep(self, name: str, size: int, read: Callable[[], bytes]) -> Path | None:
        """Copy a file and return the copy; None, without reading it, where there is no room for its bytes."""
        if not self._make_room(size):
            return None
        content, path = read(), self._folder / name
        temporary = path.with_name(f"{name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError:  # the disk is full, or the folder was removed
            temporary.unlink(missing_ok=True)
            return None
        self._touched[name] = time.monotonic()
        return path

    def drop(self, name: str) -> bool:
        """Remove the copy of a file; whether there was one."""
        self._touched.pop(name, None)
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def _make_room(self, size: int) -> bool:
        """Evict what was idle for long, the longest first, until so many bytes fit; whether they do."""
        if size > self._limit:
            return False
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            used = self._used()
            if used + size > self._limit:
                used = self._evict(size)
            fits = used + size <= self._limit
            (self._root / "used").write_text(str(used + size if fits else used))
        return fits

    def _used(self) -> int:
        """Return the bytes of all copies, as they were counted when room was made for each."""
        try:
            return int((self._root / "used").read_text())
        except (FileNotFoundError, ValueError):
            return sum(size for _, size, _ in self._all())

    def _evict(self, size: int) -> int:
        """Remove idle copies of all places and return the bytes that are left, counted anew."""
        copies, now = sorted(self._all()), time.time()
        used = sum(size for _, size, _ in copies)
        for used_last, bytes_, path in copies:
            if used + size <= self._limit or now - used_last < IDLE_SECONDS:
                break
            path.unlink(missing_ok=True)
            used -= bytes_
        return used

    def _all(self) -> Iterator[tuple[float, int, Path]]:
        """Yield when each copy was used last, its bytes, and its path."""
        for path in self._root.glob("*/*"):
            with suppress(FileNotFoundError):
                facts = path.stat()
                if not S_ISREG(facts.st_mode):
                    continue  # whole models stand here too
                yield facts.st_mtime, facts.st_size, path

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._root / "lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def cache_folder() -> Path:
    """Return the folder of this node's copies."""
    return Path(os.environ.get(FOLDER) or "~/.cache/atkd").expanduser().absolute()


def cache_bytes() -> int:
    """Return how many bytes this node's copies may take.

    Raises:
        ValueError: if the environment names no such size.
    """
    text = os.environ.get(LIMIT) or str(DEFAULT_GIB)
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not 0 <= gib < math.inf:
        raise ValueError(f"the environment's {LIMIT} is {text!r}, which is no size; {LIMIT}={DEFAULT_GIB:.0f} would do")
    return int(gib * 2**30)
