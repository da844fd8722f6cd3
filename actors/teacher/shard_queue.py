"""Which shard a replica scores next, which shards are set aside, and which are another job's. Knows nothing of Ray."""

import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from itertools import islice
from pathlib import Path
from typing import Literal

from actors.config.places import resolved
from actors.examples import ExampleFile
from actors.score_store.open_leases import open_leases
from actors.score_store.sanity import ScoreRange
from actors.score_store.shard_files import ShardInfo
from actors.score_store.store import ScoreStore

TRIES = 3
"""A shard on which so many replicas died is set aside."""
ASK_AGAIN_SECONDS = 0.5
"""How often a shard that another job holds is asked for again."""
Claim = Literal["ours", "there", "held by another"]
"""What became of a shard whose lease was asked for."""
ROWS_NAMED = 32
"""Rows of a shard that a message names one by one."""


class ShardQueue:
    """The order in which shards are handed out, and what is thought of those on which replicas died.

    A replica holds up to ``window`` shards. When it dies the blame is uncertain: each shard it held becomes a suspect. A
    suspect is tried alone, by a replica that holds nothing else; so only a shard on which replicas died that held nothing
    else comes to ``TRIES`` deaths.

    A replica is proven unless it has died since it last scored a shard. One that is not proves itself on a shard above
    suspicion, so that neither a broken device condemns a shard, nor a few bad shards in a row a device.
    """

    def __init__(self, shards: Iterable[int], window: int) -> None:
        self._fresh = deque(shards)
        self._suspects: deque[int] = deque()
        self._put_off: list[int] = []
        self._deaths: Counter[int] = Counter()
        self._window = window
        self.set_aside: dict[int, str] = {}
        """Shard to the last error on it."""

    def __len__(self) -> int:
        """Shards that wait, those put off included."""
        return len(self._fresh) + len(self._suspects) + len(self._put_off)

    def next(self, held: Sequence[int], *, proven: bool, others_proven: bool) -> int | None:
        """Take the next shard for a replica that holds some; None if there is none for it now.

        Args:
            held: the shards that the replica works on.
            proven: whether the replica has not died since it last scored a shard.
            others_proven: whether there is any other replica of which that is true; suspects are left to it.
        """
        if held:
            alone = not proven or held[0] in self._deaths or len(self._suspects) > 0
            return self._fresh.popleft() if self._fresh and not alone and len(held) < self._window else None
        if proven and self._suspects:
            return self._suspects.popleft()
        if self._fresh:
            return self._fresh.popleft()
        return self._suspects.popleft() if self._suspects and not others_proven else None

    def died_on(self, shards: Sequence[int], error: str) -> None:
        """Note that a replica died while it held shards; they wait again as suspects, or are set aside."""
        for shard in shards:
            self._deaths[shard] += 1
            if self._deaths[shard] < TRIES:
                self._suspects.append(shard)
            else:
                assert len(shards) == 1, "suspects are tried alone"
                self.set_aside[shard] = error

    def upcoming(self, count: int) -> list[int]:
        """Return the shards above suspicion that come next, at most so many."""
        return list(islice(self._fresh, count))

    def put_off(self, shard: int) -> None:
        """Keep a shard that cannot be handed out now."""
        self._put_off.append(shard)

    def ask_again(self) -> None:
        """Let the shards that were put off wait in front again, in their order."""
        for shard in sorted(self._put_off, reverse=True):
            (self._suspects if shard in self._deaths else self._fresh).appendleft(shard)
        self._put_off.clear()


class ScoringWork:
    """What is missing in one store, shared with the other jobs that fill it: a shard is handed out under its lease.

    Where leases are asked for over a network, those of the shards that come next are taken while others are scored.

    Args:
        examples_path: the file of examples.
        store: to fill.
        window: how many shards a replica holds.
        lease_seconds: age at which another job's lease counts as stale.
        ahead: how many leases are taken ahead at most: more would keep other jobs from shards that nobody here can score yet.
    """

    def __init__(self, examples_path: Path, store: ScoreStore, window: int, lease_seconds: float, ahead: int = 1) -> None:
        self.examples_path = examples_path
        self.store, self.store_place = store, resolved(store.place)
        missing = store.missing_shards()
        self._queue = ShardQueue(missing, window)
        self._leases = open_leases(store.folder, lease_seconds)
        self._leases.clear_away_dead(sorted(set(range(store.shard_count)) - set(missing)))
        self._ahead, self._claims = ahead, dict[int, Future[Claim]]()
        self._asked = time.monotonic()
        self.known = store.known_range()
        """Where the rows of the shards lie that were found, or scored here."""

    @property
    def waits(self) -> bool:
        """Whether any shard waits, here or for another job."""
        return self.waiting > 0

    @property
    def waiting(self) -> int:
        """How many shards wait, here or for another job."""
        return len(self._queue)

    def next(self, held: Sequence[int], *, proven: bool, others_proven: bool) -> int | None:
        """Take the next shard that is still missing and that no other job scores, as ``ShardQueue.next``.

        Raises:
            ScoringFailed: with the other job's words, if the scoring of this store was declared failed.
        """
        while (shard := self._queue.next(held, proven=proven, others_proven=others_proven)) is not None:
            self._claim_ahead()
            claimed = self._claims.pop(shard).result() if shard in self._claims else self._claim(shard)
            if claimed == "ours":
                return shard
            if claimed == "held by another":
                self._queue.put_off(shard)
        return None

    def _claim_ahead(self) -> None:
        if self._leases.threads is not None:
            for shard in self._queue.upcoming(self._ahead):
                if shard not in self._claims:
                    self._claims[shard] = self._leases.threads.submit(self._claim, shard)

    def _claim(self, shard: int) -> Claim:
        """Take the lease of a shard that is still missing."""
        if self._is_there(shard):
            return "there"
        if not self._leases.take(shard):
            return "held by another"
        if self.store.is_there(shard):  # its holder finished it before it gave up the lease that is now ours
            self._leases.release(shard)
            return "there"
        return "ours"

    def scored(self, shard: int, info: ShardInfo) -> None:
        """Give back the lease of a shard that is there now, and know its range."""
        self._leases.release_soon(shard)
        self.known = ScoreRange.widened(self.known, info.target_logprob, info.entropy)

    def died_on(self, shards: Sequence[int], error: str) -> None:
        """Note that a replica died while it held shards. Those set aside stay ours: no other job shall lose replicas on them."""
        self._queue.died_on(shards, error)
        for shard in shards:
            if shard not in self._queue.set_aside:
                self._leases.release(shard)

    def keep_up(self) -> None:
        """Refresh our leases, and ask again for what other jobs held. To be called every second or so."""
        self._leases.refresh()
        if time.monotonic() - self._asked > ASK_AGAIN_SECONDS:
            self._asked = time.monotonic()
            self._queue.ask_again()

    def close(self) -> None:
        """Give all leases back, those that are just being taken too."""
        for claim in self._claims.values():
            claim.cancel()
        wait(claim for claim in self._claims.values() if not claim.cancelled())
        self._leases.release_all()

    def describe(self, shard: int) -> str:
        """Name a shard and its place in the file of examples."""
        positions = self.store.positions(shard)
        return f"shard {shard} (rows {positions[0]} to {positions[-1]} of {self.examples_path.name})"

    def describe_set_aside(self) -> str:
        """Name the shards set aside, the rows of the dataset in them, and their last errors; empty if there is none."""
        if not self._queue.set_aside:
            return ""
        examples = ExampleFile(self.examples_path)
        return "; ".join(
            f"{self.describe(shard)} was set aside after {TRIES} replicas died on it, the last with: {error}; "
            f"it holds the dataset's {_named([examples.row(position) for position in self.store.positions(shard)])}"
            for shard, error in sorted(self._queue.set_aside.items())
        )

    def _is_there(self, shard: int) -> bool:
        try:
            self.store.wait_for(shard, timeout_seconds=0.0, poll_seconds=0.0)
        except TimeoutError:
            return False
        return True


def _named(rows: Sequence[int]) -> str:
    named = ", ".join(str(row) for row in sorted(rows)[:ROWS_NAMED])
    return f"rows {named}" + (f" and {len(rows) - ROWS_NAMED} more" if len(rows) > ROWS_NAMED else "")
