"""Leases: which job scores which shard of a store, so that jobs that fill one store at once score each shard once.

A lease is a small file beside the shards, ``shard-00042.lease``, that names its holder; it lives as long as its holder
refreshes its mtime. Leases only save work: a shard that two jobs score after all is the same shard, written twice.
"""

import errno
import json
import logging
import os
import socket
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from actors.files import filesystem_time_ns

logger = logging.getLogger("atkd")

Result = TypeVar("Result")

LEASE_SECONDS = 60.0
"""A lease that was not refreshed for so long is stale: another job may take it over."""
REFRESHES = 10
"""Refreshes within the life of a lease; a few may come late."""
GONE = (errno.ENOENT, errno.ESTALE)  # over NFS a file that another node has just removed is stale


@dataclass(frozen=True, slots=True)
class Lease:
    """What a lease file says, to other jobs and to a person who finds it."""

    host: str
    """The holder's machine and its space of process ids."""
    pid: int
    """The holder's process."""
    holder: str
    """Random id of the holder; process ids come again."""
    taken: str
    """UTC, by the holder's clock; for people only, since the clocks of nodes differ."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """A lease file as it was found."""

    lease: Lease | None
    """None while its holder is still writing it."""
    mtime_ns: int
    """When it was last refreshed, by the clock of the filesystem."""


class HeldLeases(ABC):
    """The leases one job holds on the shards of one store. For one thread, but where there are ``threads`` to take them in.

    Args:
        place: the store's, for messages.
        lease_seconds: age at which a lease counts as stale; the same in all jobs that share a store.
    """

    def __init__(self, place: str, lease_seconds: float) -> None:
        self.place, self.lease_seconds = place, lease_seconds
        self.host, self.holder = _this_host(), uuid.uuid4().hex
        self.held: set[int] = set()
        self.threads: ThreadPoolExecutor | None = None
        """Where leases are asked for over a network: threads in which several may be taken at a time."""
        self._refreshed = time.monotonic()

    @abstractmethod
    def take(self, shard: int) -> bool:
        """Take a shard's lease, from a holder that is dead if need be; False if another job holds it."""

    @abstractmethod
    def keep_alive(self, shard: int) -> bool:
        """Say that a lease still lives; False if another job took it over."""

    @abstractmethod
    def release(self, shard: int) -> None:
        """Give a shard's lease back."""

    @abstractmethod
    def clear_away_dead(self, shards: Iterable[int]) -> None:
        """Remove what is left of the leases of some finished shards, as by a job that was killed before it gave one back."""

    def refresh(self) -> None:
        """Keep what is held alive; does nothing if it was done a short while ago."""
        if time.monotonic() - self._refreshed < self.lease_seconds / REFRESHES:
            return
        self._refreshed = time.monotonic()
        held = sorted(tuple(self.held))  # others may be taken meanwhile
        for shard, alive in zip(held, self._for_each(self.keep_alive, held), strict=True):
            if not alive:
                logger.warning("another job took over the lease of shard %d of %s and may score it too", shard, self.place)
                self.held.discard(shard)

    def release_soon(self, shard: int) -> None:
        """Give back the lease of a shard that is not taken again; who gives it need not wait for that."""
        self.release(shard)

    def release_all(self) -> None:
        """Give all leases back, and take no more."""
        list(self._for_each(self.release, sorted(tuple(self.held))))

    def _for_each(self, work: Callable[[int], Result], shards: Sequence[int]) -> Iterable[Result]:
        """Do work for each shard, many at once where there are threads."""
        return map(work, shards) if self.threads is None else self.threads.map(work, shards)

    def lease(self) -> Lease:
        """Return what a lease says that is taken now."""
        return Lease(self.host, os.getpid(), self.holder, datetime.now(UTC).isoformat())


class FileLeases(HeldLeases):
    """Leases as files, beside the shards of a store on a filesystem.

    Args:
        folder: the store's folder.
        lease_seconds: age at which a lease counts as stale; the same in all jobs that share a store.
    """

    def __init__(self, folder: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        super().__init__(str(folder), lease_seconds)
        self._folder = folder

    def take(self, shard: int) -> bool:
        """Take a shard's lease, from a holder that is dead if need be; False if another job holds it."""
        assert shard not in self.held
        path = self._path(shard)
        if self._create(path) or (self._clear_away(path) and self._create(path)):
            self.held.add(shard)
            return True
        return False

    def keep_alive(self, shard: int) -> bool:
        """Renew a lease's mtime; False if another job took it over."""
        if not self._is_ours(shard):
            return False
        with suppress(FileNotFoundError):
            os.utime(self._path(shard))
        return True

    def release(self, shard: int) -> None:
        """Give a shard's lease back."""
        self.held.discard(shard)
        if self._is_ours(shard):
            self._path(shard).unlink(missing_ok=True)

    def clear_away_dead(self, shards: Iterable[int]) -> None:
        """Remove the stale leases of some shards: whoever was killed between finishing one and giving its lease back left one."""
        for shard in shards:
            if self._path(shard).exists():
                self._clear_away(self._path(shard))

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:05d}.lease"

    def _is_ours(self, shard: int) -> bool:
        seen = _look(self._path(shard))
        return seen is not None and seen.lease is not None and seen.lease.holder == self.holder

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "w") as file:
            json.dump(asdict(self.lease()), file)
        return True

    def _clear_away(self, path: Path) -> bool:
        """Remove a stale lease; False if another job holds it.

        It is renamed first, and looked at again under a name that nobody else knows: of two jobs that found it stale,
        the slower one may have moved the lease that the faster one has taken since, and puts it back.
        """
        seen = _look(path)
        if seen is None:
            return True
        if not self._is_stale(seen):
            return False
        moved = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.tmp")
        try:
            os.rename(path, moved)
        except FileNotFoundError:
            return True
        if _look(moved) != seen:
            os.rename(moved, path)
            return False
        moved.unlink()
        return True

    def _is_stale(self, seen: _Seen) -> bool:
        if seen.lease is not None and is_of_dead_process(seen.lease, self.host):
            return True
        # An mtime far ahead comes from another clock; as it says nothing, the lease must not live until then.
        return abs(filesystem_time_ns(self._folder) - seen.mtime_ns) > self.lease_seconds * 1e9


def _look(path: Path) -> _Seen | None:
    try:
        with open(path) as file:  # opening asks an NFS server for the present mtime; os.stat may answer with a cached one
            content, mtime_ns = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except OSError as error:
        if error.errno in GONE:
            return None
        raise
    try:
        return _Seen(Lease(**json.loads(content)), mtime_ns)
    except (ValueError, TypeError):
        return _Seen(None, mtime_ns)


def is_of_dead_process(lease: Lease, host: str) -> bool:
    """Whether a lease's holder ran on this machine and has ended."""
    return lease.host == host and not _is_running(lease.pid)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _this_host() -> str:
    """Name this machine and its space of process ids; containers often share the name, and count processes alike."""
    parts = [socket.gethostname()]
    with suppress(OSError):  # not on Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)
