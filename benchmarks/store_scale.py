"""Example files and score stores at the size of 10^9 tokens: what a worker takes to open, to rank and to split them.

    python -m benchmarks.store_scale [--rows 1000000] [--targets 1000000000] [--shards 10000] [--folder .]

Writer, worker, driver and split have a process each. Its own memory is what belongs to no file: pages of mapped files, which the
processes of a node share and which the system takes back, do not count. First an example file of as many tokens as ``--targets``
is written and opened; then, when it is gone, a store is made: each shard has a real index, with uncertainties drawn for it, while
the bytes of rows are those of the first shard (K = 2) under many names, and the example file beside it has rows of two tokens.
Ranking and splitting must not read scores, and fail here if they do.
"""

import argparse
import resource
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow as pa

from actors.dataloader.sampler import StepSampler
from actors.dataloader.scored_rows import StoredRows
from actors.dataloader.step_weights import StepWeights
from actors.dataloader.store_split import RankedSplit, split_store
from actors.examples import ExampleFile, write_examples
from actors.format import MIB
from actors.score_store.store import ScoreStore
from actors.storage.folder import DiskFolder
from benchmarks.bars import Bar, print_table, report
from benchmarks.store_scale_world import TOP_K, Size, rows_of, write_store
from losses.config import AtkdLoss
from losses.loss_state import LossState
from losses.token_weights import easy_count

T = TypeVar("T")
LOOKED_AT = 1000
OPEN_SECONDS, OWN_MIB = 2.0, 200.0
IN_STEP, IN_STORE = AtkdLoss(kind="atkd"), AtkdLoss(kind="atkd", scope="dataset")


@dataclass(frozen=True)
class Cost:
    """What something took."""

    what: str
    seconds: float
    own_mib: float
    """The most that the process's own memory grew by since it began to measure."""
    resident_mib: float
    """The most that the process had in memory so far, mapped files included."""

    def line(self) -> list[str]:
        """Return the cells of a table."""
        return [self.what, f"{self.seconds:.2f}", f"{self.own_mib:,.0f}", f"{self.resident_mib:,.0f}"]


class Watch:
    """Measures one thing after the other in this process, and looks at its memory from a thread."""

    def __init__(self) -> None:
        self.costs: list[Cost] = []
        np.asarray(pa.array([0]))  # has Arrow import pandas, which a worker's libraries have imported before
        self._before = self._most = own_bytes()
        threading.Thread(target=self._look, daemon=True).start()

    def take(self, what: str, task: Callable[[], object]) -> None:
        """Run a task, and note what it took."""
        self._most, started = own_bytes(), time.perf_counter()
        task()
        seconds = time.perf_counter() - started
        most = max(self._most, own_bytes())
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.costs.append(Cost(what, seconds, (most - self._before) / MIB, resident))

    def _look(self) -> None:
        while True:
            time.sleep(0.01)
            self._most = max(self._most, own_bytes())


def own_bytes() -> int:
    """Return how much memory this process has that is no file's."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


# ---- what is measured, each in a process of its own


def write_rows(path: Path, size: Size) -> list[Cost]:
    """Write an example file from an iterator."""
    watch = Watch()
    watch.take("write the example file", lambda: write_examples(path, rows_of(size.rows, size.row_targets)))
    return watch.costs


def open_rows(path: Path, size: Size) -> list[Cost]:
    """Open the example file as a worker does, and look at some rows."""
    watch = Watch()
    files: list[ExampleFile] = []

    def look() -> None:
        wanted = list(rows_of(LOOKED_AT, size.row_targets))
        for position in np.linspace(0, size.rows - 1, LOOKED_AT).astype(int):
            example, same = files[0][int(position)], wanted[position % 997]
            assert example.row == position and np.array_equal(example.token_ids, same.token_ids)

    watch.take("open the example file", lambda: files.append(ExampleFile(path)))
    watch.take("its name, and the lengths of all rows", lambda: (files[0].hash, files[0].lengths))
    watch.take(f"read {LOOKED_AT} rows", look)
    return watch.costs


def open_store(folder: Path, size: Size) -> list[Cost]:
    """Open the store as a worker does, and meet the indexes of all shards, as it does in its first epoch."""
    watch = Watch()
    stores: list[ScoreStore] = []
    watch.take("open the store and its example file", lambda: stores.append(opened(folder, size)[1]))
    watch.take("meet the indexes of all shards", lambda: [stores[0].uncertainties(shard) for shard in range(size.shards)])
    return watch.costs


def rank_store(folder: Path, size: Size) -> list[Cost]:
    """Rank steps of permuted rows, and read the scores of some."""
    rows, store = opened(folder, size)
    watch, weights = Watch(), StepWeights(IN_STEP, 0, store)

    def rank(step: int) -> None:
        batch = rows.batch(step)
        assert batch.are_scored()
        weights.of_step(batch, [[list(range(len(batch)))]], step, LossState.first(IN_STEP))

    with patch.object(DiskFolder, "read_range", side_effect=AssertionError("ranking reads no scores")):
        watch.take(f"rank the first step, {size.batch_rows:,} rows", lambda: rank(1))
        watch.take("rank the second step", lambda: rank(2))
    own = range(0, size.rows, max(1, size.rows // LOOKED_AT))
    watch.take(f"read the scores of {len(own):,} rows", lambda: [store.scores_at(row) for row in own])
    return watch.costs


def opened(folder: Path, size: Size) -> tuple[StoredRows, ScoreStore]:
    """Return the rows of each step, and the store, opened as the student's loop does."""
    examples, store = ExampleFile(folder / "rows.arrow"), ScoreStore(folder / "store")
    assert store.complete and len(examples) == len(examples.lengths) == store.rows
    sampler = StepSampler(len(examples), size.batch_rows, seed=0, store_order_first=False)
    assert len(sampler.positions(1)) == size.batch_rows
    return StoredRows(examples, store, TOP_K, sampler), store


def drive_store(folder: Path, size: Size) -> list[Cost]:
    """Do what the driver does before anything starts."""
    watch, store = Watch(), ScoreStore(folder / "store")
    watch.take("driver: range of the scores so far", store.known_range)
    watch.take("driver: compare all indexes and sizes", lambda: store.verify(most_bytes=1))
    return watch.costs


def split_whole_store(folder: Path, size: Size) -> tuple[list[Cost], int]:
    """Split the store for ``scope: dataset``; also return by how many targets the easy ones are off, each counted plainly."""
    watch, store = Watch(), ScoreStore(folder / "store")
    found: list[RankedSplit] = []

    def split() -> None:
        one = split_store(store, IN_STORE, seed=0)
        assert isinstance(one, RankedSplit), "ranked by uncertainty"
        found.append(one)

    with patch.object(DiskFolder, "read_range", side_effect=AssertionError("splitting reads no scores")):
        watch.take("split the store for scope dataset", split)
    last = found[0]
    border = np.array([last.border], np.uint32).view(np.float32)[0]
    easy = 0
    for shard in range(store.shard_count):
        values = store.uncertainties(shard)
        until = last.place + 1 if shard == last.shard else len(values) * (shard < last.shard)
        easy += int((values < border).sum() + (values[:until] == border).sum())
    return watch.costs, abs(easy - easy_count(size.targets, IN_STORE))


def alone(task: Callable[..., T], *arguments: object) -> T:
    """Run a task in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(task, *arguments).result()


def main() -> int:
    """Measure, print and compare with the bars."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=10**6)
    parser.add_argument("--targets", type=int, default=10**9)
    parser.add_argument("--shards", type=int, default=10**4)
    parser.add_argument("--batch-rows", type=int, default=2048)
    parser.add_argument("--folder", type=Path, help="where it is written, for a while; 5 bytes a target")
    options = parser.parse_args()
    if options.rows % options.shards or options.targets % options.rows:
        parser.error("--rows must be a multiple of --shards, and --targets of --rows")
    size = Size(options.rows, options.targets, options.shards, options.batch_rows)
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for of_file in (write_rows, open_rows):
            costs += alone(of_file, folder / "train.arrow", size)
        (folder / "train.arrow").unlink()
        started = time.perf_counter()
        alone(write_store, folder, size)
        made = time.perf_counter() - started
        for of_store in (open_store, rank_store, drive_store):
            costs += alone(of_store, folder, size)
        splitting, off = alone(split_whole_store, folder, size)
        costs += splitting
    print(f"\n{size.rows:,} rows of {size.row_targets:,} targets, {size.shards:,} shards; the store was made in {made:.0f} s\n")
    print_table(["what", "seconds", "own MiB", "resident MiB"], [cost.line() for cost in costs])
    by_name = {cost.what: cost for cost in costs}
    opening, met = by_name["open the store and its example file"], by_name["meet the indexes of all shards"]
    ranking = by_name[f"rank the first step, {size.batch_rows:,} rows"]
    bars = [
        Bar("seconds to open the store and its example file", opening.seconds, OPEN_SECONDS),
        Bar("own MiB to open them", opening.own_mib, OWN_MIB),
        Bar("own MiB once all indexes were met", met.own_mib, OWN_MIB),
        Bar("own MiB to rank a step", ranking.own_mib, OWN_MIB),
        Bar("own MiB to split the store", splitting[0].own_mib, OWN_MIB),
        Bar("easy targets of the split, off by", off, 0),
        Bar("seconds to open the example file", by_name["open the example file"].seconds, OPEN_SECONDS),
        Bar("own MiB to write the example file", by_name["write the example file"].own_mib, OWN_MIB),
    ]
    return report(bars)


if __name__ == "__main__":
    raise SystemExit(main())
