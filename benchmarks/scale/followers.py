"""What those who follow a growing store ask of the file system."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from actors.dataloader.sampler import StepSampler
from actors.dataloader.scored_rows import FileRows
from actors.examples import ExampleFile, write_examples
from actors.score_store.store import MOST_SHARDS, ScoreStore
from actors.storage.folder import DiskFolder
from benchmarks.scale.world import IDENTITY, Case, World, write_info
from benchmarks.store_scale_world import rows_of


@dataclass(frozen=True)
class Followed:
    """What one worker asked the file system for while a store grew."""

    shard_rows: int
    seconds: float
    """On paper."""
    looks: int
    """Questions whether a file is there."""
    listings: int

    def line(self, workers: int) -> list[str]:
        """Return the cells of a table."""
        each = self.looks / self.seconds
        return [f"{self.shard_rows:,}", f"{each:.1f}", f"{workers * each:,.0f}", f"{workers * self.listings / self.seconds:.1f}"]


def follow(case: Case, batch_rows: int, folder: Path) -> Followed:
    """Take the steps of the first epoch as fast as their scores come; learning takes no time."""
    world = World(case)
    shards = min(case.shards, MOST_SHARDS)
    rows = shards * case.shard_rows
    write_examples(folder / "followed.arrow", rows_of(1, 2))
    examples, counts = ExampleFile(folder / "followed.arrow"), {"looks": 0, "listings": 0}

    with world.entered(), counted(counts):
        store = ScoreStore.open_or_create(folder / "followed", IDENTITY, rows, case.shard_rows)
        for shard in range(shards):
            world.at((shard + 1) / case.pace, lambda shard=shard: None if write_info(Path(store.place), shard, 1, 1) else None)  # type: ignore[misc]
        sampler = StepSampler(rows, batch_rows, seed=0, store_order_first=True)
        for key in counts:
            counts[key] = 0
        for step in range(1, math.ceil(rows / batch_rows) + 1):
            FileRows(examples, store, 2, sampler.positions(step)).wait(timeout_seconds=1e9)
        seconds = world.now
    shutil.rmtree(folder / "followed")
    return Followed(case.shard_rows, seconds, **counts)


@contextmanager
def counted(counts: dict[str, int]) -> Iterator[None]:
    """Count what is asked of the file system meanwhile."""

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return function(*given, **named)

        return call

    looks, listings = counting("looks", DiskFolder.size), counting("listings", DiskFolder.names)
    with patch.object(DiskFolder, "size", looks), patch.object(DiskFolder, "names", listings):
        yield
