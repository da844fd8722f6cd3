"""Passes made ahead are those that are made in their turn."""

import threading
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.config.models import TrainConfig
from actors.dataloader import step_loader
from actors.dataloader.collator import MicroBatch, collate
from actors.dataloader.sampler import StepSampler, layout_of
from actors.dataloader.scored_rows import RowBatch, StoredRows
from actors.dataloader.step_loader import StepLoader
from actors.examples import ExampleFile
from actors.score_store.store import ScoreStore
from tests.worlds import VOCAB, scored_world

ROWS, BATCH, STEPS = 20, 7, 6
CPU = torch.device("cpu")
CUTS = [
    {"micro_batch_rows": 2}, {"micro_batch_tokens": 40}, {"micro_batch_rows": 64}, {"micro_batch_tokens": 40, "packing": True},
]  # fmt: skip


def rows_in(folder: Path) -> StoredRows:
    path, store = scored_world(folder, rows=ROWS)
    return StoredRows(ExampleFile(path), store, 8, StepSampler(ROWS, BATCH, seed=0, store_order_first=True))


def loader_of(rows: StoredRows, train: TrainConfig, rank: int = 0, world_size: int = 1) -> StepLoader:
    return StepLoader(rows, train, rank, world_size, CPU, VOCAB, STEPS)


def tensors(micro_batch: MicroBatch) -> list[torch.Tensor]:
    plain = [getattr(micro_batch, field.name) for field in fields(micro_batch)]
    assert micro_batch.teacher is not None
    return [value for value in plain if isinstance(value, torch.Tensor)] + list(micro_batch.teacher.tensors())


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2), (7, 8)])
def test_the_passes_of_all_steps_are_those_made_one_by_one(tmp_path: Path, cut: Any, rank: int, world_size: int) -> None:
    rows, train = rows_in(tmp_path), TrainConfig(batch_rows=BATCH, **cut)
    without_rows = 0
    with loader_of(rows, train, rank, world_size) as loader:
        for step in range(1, STEPS + 1):
            batch = rows.batch(step)
            expected = layout_of(batch.lengths, world_size, train)[rank]
            found = list(loader.passes(step))
            assert [one.rows for one in found] == expected
            for one in found:
                wanted = collate(batch, one.rows or [0], VOCAB, packed=train.packing)
                for mine, theirs in zip(tensors(one.micro_batch), tensors(wanted), strict=True):
                    assert torch.equal(mine, theirs)
                without_rows += not one.rows
    assert without_rows or world_size < 8, "they do not go round"


def test_the_next_pass_is_made_while_one_is_learned_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    ahead = threading.Event()

    def noted(batch: RowBatch, rows: Sequence[int], vocab_size: int, packed: bool) -> MicroBatch:
        made.append(threading.current_thread().name)
        if len(made) == 2:
            ahead.set()
        return collate(batch, rows, vocab_size, packed=packed)

    monkeypatch.setattr(step_loader, "collate", noted)
    with loader_of(rows_in(tmp_path), TrainConfig(batch_rows=BATCH, micro_batch_rows=64)) as loader:
        for _ in loader.passes(1):  # its only pass, so what is made ahead is the next step's
            assert ahead.wait(30)
        assert len(list(loader.passes(STEPS))) == 1
    assert all(name.startswith("step-loader") for name in made)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("step-loader")]


def test_nothing_is_made_ahead_of_scores_that_are_not_there(tmp_path: Path) -> None:
    rows = rows_in(tmp_path)
    store = ScoreStore(tmp_path / "store")
    store.discard_shard(1)  # rows 8 to 15; the second step has rows 7 to 13
    late = StoredRows(ExampleFile(tmp_path / "train.arrow"), store, 8, StepSampler(ROWS, BATCH, 0, store_order_first=True))
    assert rows.batch(1).are_scored() and not late.batch(2).are_scored()
    with loader_of(late, TrainConfig(batch_rows=BATCH)) as loader:
        assert len(list(loader.passes(1))) == 1
        with pytest.raises(ValueError, match="shard-00001"):  # as the loop would not, which waits for the scores first
            list(loader.passes(2))


def test_an_error_comes_with_the_pass_it_belongs_to(tmp_path: Path) -> None:
    rows = rows_in(tmp_path)
    path = tmp_path / "store" / "shard-00001.rows"
    path.write_bytes(bytes(len(path.read_bytes())))
    seen = []
    with loader_of(rows, TrainConfig(batch_rows=BATCH, micro_batch_rows=2)) as loader:
        for one in loader.passes(1):
            seen.append(one.rows)
        with pytest.raises(ValueError, match="shard-00001.rows is damaged"):
            list(loader.passes(2))
    assert sorted(np.concatenate(seen)) == list(range(BATCH))
