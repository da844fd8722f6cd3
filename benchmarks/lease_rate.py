"""How many shards a second the driver can hand out where the store stands: its own requests alone, no replica scores anything.

    python -m benchmarks.lease_rate s3://bucket/folder [--shards 400] [--replicas 1 16 64]

Each time a store is begun there, which is removed afterwards. Every replica holds two shards and gives one back as soon as the
driver looks, so that nothing is waited for but the storage.
"""

import argparse
import time
import uuid
from pathlib import Path

from actors.config.places import resolved, within
from actors.score_store.sanity import Spread
from actors.score_store.shard_files import ShardInfo
from actors.score_store.store import ScoreStore
from actors.storage.folder import open_folder
from actors.teacher.pool import WINDOW
from actors.teacher.shard_queue import ScoringWork
from benchmarks.bars import Bar, print_table, report

SHARD_TOKENS = 256_000
REPLICA_TOKENS_PER_SECOND = 20_000
SCORED = ShardInfo(
    shard=0, rows=1, targets=1, row_bytes=1, index_bytes=1, index_sha256="", mean_tail_mass=0.0, mean_kept=1.0,
    target_logprob=Spread(0.0, 0.0, 0.0), entropy=Spread(0.0, 0.0, 0.0),
)  # fmt: skip


def handed_out(place: str, shards: int, replicas: int) -> float:
    """Hand out all shards of a store to replicas that are always done, and take them back; return how many a second."""
    name = f"lease-rate-{uuid.uuid4().hex[:12]}"
    store = ScoreStore.open_or_create(within(place, name), {"top_k": 1, "vocab_size": 2}, shards, 1)
    work = ScoringWork(Path("none.arrow"), store, WINDOW, 60.0, ahead=replicas)
    held: list[list[int]] = [[] for _ in range(replicas)]
    started = time.perf_counter()
    while work.waits or any(held):
        for mine in held:
            if mine:
                work.scored(mine.pop(0), SCORED)
            while len(mine) < WINDOW and (shard := work.next(mine, proven=True, others_proven=True)) is not None:
                mine.append(shard)
        work.keep_up()
    work.close()
    seconds = time.perf_counter() - started
    open_folder(place).remove_folder(name)
    return shards / seconds


def main(words: list[str] | None = None) -> int:
    """Measure, print and compare with what so many replicas would score."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("place", help="address or path of a folder")
    parser.add_argument("--shards", type=int, default=400)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 16, 64])
    options = parser.parse_args(words)
    place = resolved(options.place)
    rates = {replicas: handed_out(place, options.shards, replicas) for replicas in options.replicas}
    wanted = {replicas: replicas * REPLICA_TOKENS_PER_SECOND / SHARD_TOKENS for replicas in rates}
    print_table(
        ["replicas", "shards/s", f"wanted, of {SHARD_TOKENS:,} tokens"],
        [[str(replicas), f"{rate:.1f}", f"{wanted[replicas]:.2f}"] for replicas, rate in rates.items()],
    )
    bars = [Bar(f"shards/s, {replicas} replicas", rate, wanted[replicas], at_least=True) for replicas, rate in rates.items()]
    return report(bars)


if __name__ == "__main__":
    raise SystemExit(main())
