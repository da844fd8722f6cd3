"""Leases in object storage, where a name cannot be taken: whoever wants a shard puts a claim of its own beside the others', looks
at all of them, and yields to any that lives. Two that claim at one moment both yield, and ask again later.

A claim, ``leases/00042/HOLDER``, lives as long as its holder writes it anew; its age is by the storage's clock, against
which each claim just put tells the time. As with files, a lease only saves work.
"""

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from actors.score_store.leases import LEASE_SECONDS, HeldLeases, Lease, is_of_dead_process
from actors.storage.object_folder import ObjectFolder

LEASES = "leases"
AT_ONCE = 16
"""Requests at a time. One takes some 30 ms, a shard eight of them, and a driver feeds many replicas."""


class ObjectLeases(HeldLeases):
    """The leases one job holds on the shards of one store in object storage; several may be taken at a time, each in its thread.

    Args:
        folder: the store's folder.
        lease_seconds: age at which a claim counts as stale; the same in all jobs that share a store.
    """

    def __init__(self, folder: ObjectFolder, lease_seconds: float = LEASE_SECONDS) -> None:
        super().__init__(folder.place, lease_seconds)
        self._folder = folder
        self.threads = self._pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="leases")
        self._releases: list[Future[None]] = []

    def take(self, shard: int) -> bool:
        """Take a shard's lease, from a holder that is dead if need be; False if another job holds it or wants it too."""
        assert shard not in self.held
        ours = self._claim(shard)
        self._put(ours)
        claims = self._folder.written_ns(_claims(shard))
        others = {name: written for name, written in claims.items() if name != ours}
        alive = [name for name, written in others.items() if self._lives(name, claims.get(ours, written) - written)]
        if alive:
            self._folder.remove(ours)
            return False
        for name in others:
            self._folder.remove(name)
        self.held.add(shard)
        return True

    def release(self, shard: int) -> None:
        """Give a shard's lease back."""
        self.held.discard(shard)
        self._folder.remove(self._claim(shard))

    def release_soon(self, shard: int) -> None:
        """Give a shard's lease back in a thread; should an earlier one not have gone, raise what it raised."""
        for done in [release for release in self._releases if release.done()]:
            self._releases.remove(done)
            done.result()
        self.held.discard(shard)
        self._releases.append(self._pool.submit(self.release, shard))

    def release_all(self) -> None:
        """Give all leases back, and take no more."""
        super().release_all()
        self._pool.shutdown()
        for release in self._releases:
            release.result()

    def clear_away_dead(self, shards: Iterable[int]) -> None:
        """Remove all claims on some finished shards: whoever claims one of these sees that it is finished."""
        finished = {_claims(shard) for shard in shards}
        for name in self._folder.written_ns(LEASES):
            if name.rpartition("/")[0] in finished:
                self._folder.remove(name)

    def keep_alive(self, shard: int) -> bool:
        """Write a claim anew; False if another job, which took it for stale, removed it."""
        if self._folder.size(self._claim(shard)) is None:
            return False
        self._put(self._claim(shard))
        return True

    def _put(self, name: str) -> None:
        self._folder.write(name, json.dumps(asdict(self.lease())).encode())

    def _lives(self, name: str, age_ns: int) -> bool:
        if age_ns > self.lease_seconds * 1e9:
            return False
        try:
            lease = Lease(**json.loads(self._folder.read(name)))
        except FileNotFoundError:
            return False
        except (ValueError, TypeError):
            return True
        return not is_of_dead_process(lease, self.host)

    def _claim(self, shard: int) -> str:
        return f"{_claims(shard)}/{self.holder}"


def _claims(shard: int) -> str:
    return f"{LEASES}/{shard:05d}"
