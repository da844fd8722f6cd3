"""Leases: which job scores which shard of a store, so that jobs that fill one store at once score each shard once.

A lease is a small file beside the shards, ``shard-00042.lease``, that names its holder; it lives as long as its holder
refreshes its mtime. Leases only save work: a shard that two jobs score after all is the same shard, written twice.
"""

import errno
import json
import logging
import os
import socket
import tempfile
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

logger = logging.getLogger("atkd")

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


class ShardLeases:
    """The leases one job holds on the shards of one store. For one thread.

    Args:
        folder: the store's folder.
        lease_seconds: age at which a lease counts as stale; the same in all jobs that share a store.
    """

    def __init__(self, folder: Path, lease_seconds: float = LEASE_SECONDS) -> None:
        self._folder = folder
        self._lease_seconds = lease_seconds
        self._host = _this_host()
        self._holder = uuid.uuid4().hex
        self._held: set[int] = set()
        self._refreshed = time.monotonic()

    def take(self, shard: int) -> bool:
        """Take a shard's lease, from a holder that is dead if need be; False if another job holds it."""
        assert shard not in self._held
        path = self._path(shard)
        if self._create(path) or (self._clear_away(path) and self._create(path)):
            self._held.add(shard)
            return True
        return False

    def refresh(self) -> None:
        """Keep what is held alive; does nothing if it was done a short while ago."""
        if time.monotonic() - self._refreshed < self._lease_seconds / REFRESHES:
            return
        self._refreshed = time.monotonic()
        for shard in sorted(self._held):
            if self._is_ours(shard):
                with suppress(FileNotFoundError):
                    os.utime(self._path(shard))
            else:
                logger.warning("another job took over the lease of shard %d of %s and may score it too", shard, self._folder)
                self._held.discard(shard)

    def release(self, shard: int) -> None:
        """Give a shard's lease back."""
        self._held.discard(shard)
        if self._is_ours(shard):
            self._path(shard).unlink(missing_ok=True)

    def release_all(self) -> None:
        """Give all leases back."""
        for shard in sorted(self._held):
            self.release(shard)

    def clear_away_dead(self, shards: Iterable[int]) -> None:
        """Remove the stale leases of some shards: whoever was killed between finishing one and giving its lease back left one."""
        for shard in shards:
            if self._path(shard).exists():
                self._clear_away(self._path(shard))

    def _path(self, shard: int) -> Path:
        return self._folder / f"shard-{shard:05d}.lease"

    def _is_ours(self, shard: int) -> bool:
        seen = _look(self._path(shard))
        return seen is not None and seen.lease is not None and seen.lease.holder == self._holder

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "w") as file:
            json.dump(asdict(Lease(self._host, os.getpid(), self._holder, datetime.now(UTC).isoformat())), file)
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
        if seen.lease is not None and seen.lease.host == self._host and not _is_running(seen.lease.pid):
            return True
        # An mtime far ahead comes from another clock; as it says nothing, the lease must not live until then.
        return abs(filesystem_time_ns(self._folder) - seen.mtime_ns) > self._lease_seconds * 1e9


def filesystem_time_ns(folder: Path) -> int:
    """Return the time on the clock that sets mtimes in a folder: on a shared filesystem the server's, not this node's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix="clock-", suffix=".tmp") as file:
        return os.fstat(file.fileno()).st_mtime_ns


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
