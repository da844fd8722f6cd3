"""Passes over rows of which the student wrote some, made ahead while later steps are still written."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config.models import TrainConfig
from actors.dataloader.collator import collate
from actors.dataloader.rollout_rows import MixedRows, RolloutRows
from actors.dataloader.row_sources import RowSources
from actors.dataloader.sampler import layout_of
from actors.dataloader.scored_rows import FileRows
from actors.dataloader.step_loader import StepLoader
from actors.score_store.rollout_log import RolloutLog
from tests.actors.dataloader.test_rollout_rows import BATCH, SHARE, STEPS, World, assert_equal, world_in
from tests.worlds import VOCAB


class NotedBatch(MixedRows):
    """Rows that note whether they are cut before they are there."""

    def __init__(self, data: FileRows, sources: RowSources, log: RolloutLog, step: int, too_early: list[int]) -> None:
        super().__init__(data, sources, log, step)
        self._too_early = too_early

    @property
    def lengths(self) -> np.ndarray:
        if not self.are_scored():
            self._too_early.append(self._step)
        return super().lengths


class NotedRows(RolloutRows):
    """Where such rows come from."""

    def __init__(self, world: World) -> None:
        super().__init__(world.data, world.log, world.sources)
        self.too_early: list[int] = []

    def batch(self, step: int) -> MixedRows:
        return NotedBatch(self._data.batch(step), self._sources, self._log, step, self.too_early)


@pytest.mark.parametrize(
    "cut", [{"micro_batch_rows": 2}, {"micro_batch_tokens": 40}, {"micro_batch_tokens": 40, "packing": True}]
)
@pytest.mark.parametrize("share", [SHARE, 1.0])
def test_passes_are_those_made_one_by_one_while_steps_are_still_written(
    tmp_path: Path, cut: dict[str, int], share: float
) -> None:
    world, train = world_in(tmp_path, share), TrainConfig.model_validate({"batch_rows": BATCH, **cut})
    rows = NotedRows(world)
    rank, world_size = 1, 2
    with StepLoader(rows, train, rank, world_size, torch.device("cpu"), VOCAB, STEPS) as loader:
        for step in range(1, STEPS + 1):
            batch = loader.batch(step)
            writer = threading.Thread(target=world.write, args=(step,))
            if step % 2:  # written in the middle of the step before, or only now
                writer.start()
            batch.wait(60)
            found = []
            for number, one in enumerate(loader.passes(step)):
                found.append(one)
                if number == 0 and step % 2 and step < STEPS:
                    world.write(step + 1)
            if step % 2:
                writer.join()
            wanted = world.joined(step)
            assert [one.rows for one in found] == layout_of(wanted.lengths, world_size, train)[rank]
            for one in found:
                assert_equal(one.micro_batch, collate(wanted, one.rows or [0], VOCAB, packed=train.packing))
    assert not rows.too_early
