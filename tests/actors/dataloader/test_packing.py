"""Rows laid into one: which of them, in what order, and what of each stands where."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actors.config.models import TrainConfig
from actors.dataloader.collator import collate, every_token
from actors.dataloader.sampler import layout_of
from actors.dataloader.scored_rows import FileRows, all_rows
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile
from losses.config import AtkdLoss
from losses.loss_state import LossState
from tests.worlds import VOCAB, scored_world

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def packing(tokens: int) -> TrainConfig:
    return TrainConfig(micro_batch_tokens=tokens, packing=True)


def first_fit_slowly(lengths: list[int], tokens: int) -> list[list[int]]:
    """For each row, the longest first, look through all passes from the first on, and count anew what each holds."""
    passes: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        for one in passes:
            if sum(lengths[other] for other in one) + lengths[row] <= tokens:
                one.append(row)
                break
        else:
            passes.append([row])
    return passes


@given(lengths=LENGTHS, tokens=st.integers(1, 120))
def test_each_row_goes_into_the_first_pass_with_room(lengths: list[int], tokens: int) -> None:
    (found,) = layout_of(np.array(lengths), 1, packing(tokens))
    assert found == first_fit_slowly(lengths, tokens)


@given(lengths=LENGTHS, world_size=st.integers(1, 5), tokens=st.integers(1, 120))
def test_a_layout_has_each_row_once_and_equally_many_passes(lengths: list[int], world_size: int, tokens: int) -> None:
    layout = layout_of(np.array(lengths), world_size, packing(tokens))
    assert sorted(row for worker in layout for part in worker for row in part) == list(range(len(lengths)))
    assert len({len(worker) for worker in layout}) == 1
    for part in (part for worker in layout for part in worker if part):
        assert len(part) == 1 or sum(lengths[row] for row in part) <= tokens
    held = [sum(lengths[row] for part in worker for row in part) for worker in layout]
    assert max(held) - min(held) <= max(lengths), "no worker has more than the longest row more"


@given(lengths=LENGTHS, tokens=st.integers(50, 120))
def test_passes_are_hardly_more_than_the_tokens_need(lengths: list[int], tokens: int) -> None:
    (passes,) = layout_of(np.array(lengths), 1, packing(tokens))
    assert len(passes) <= 2 * sum(lengths) / tokens + 1  # of two passes neither would have fitted into the other


def test_a_row_over_the_budget_goes_alone() -> None:
    lengths = np.array([3, 40, 4, 20, 21])
    assert layout_of(lengths, 1, packing(20)) == [[[1], [4], [3], [2, 0]]]


def test_packing_without_a_size_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"packing true needs micro_batch_tokens, which is null: .* micro_batch_tokens 2048"
    ):
        TrainConfig(packing=True)
    assert not TrainConfig(micro_batch_tokens=64).packing


def scored(folder: Path, *positions: int) -> FileRows:
    path, store = scored_world(folder, rows=10)
    return replace(all_rows(ExampleFile(path), store, 8), positions=np.array(positions))


def test_rows_stand_one_after_the_other_each_counted_from_its_own_beginning(tmp_path: Path) -> None:
    batch, rows = scored(tmp_path, 3, 1, 7, 2), [2, 0, 3]
    found = collate(batch, rows, VOCAB, packed=True)
    token_ids, places, predicting, targets = [], [], [], []
    for row in rows:
        example = batch.example(row)
        for place, (token, is_target) in enumerate(zip(example.token_ids.tolist(), example.loss_mask.tolist(), strict=True)):
            if is_target:
                assert place > 0, "what predicts it stands in the same row"
                predicting.append(len(token_ids) - 1)
                targets.append(token)
            token_ids.append(token)
            places.append(place)
    assert found.attention_mask is None and found.position_ids is not None
    assert found.token_ids.tolist() == [token_ids] and found.position_ids.tolist() == [places]
    assert found.predicting.tolist() == predicting and found.targets.tolist() == targets
    assert found.row_counts == tuple(len(batch.example(row).targets) for row in rows)


def test_targets_scores_and_weights_are_those_of_the_padded_rows(tmp_path: Path) -> None:
    batch, loss = scored(tmp_path, 3, 1, 7, 2), AtkdLoss(kind="atkd")
    by_rows, by_packs = (layout_of(batch.lengths, 1, train) for train in (TrainConfig(micro_batch_rows=1), packing(64)))
    weigher = StepWeights(loss, seed=0, store=batch.store)
    weights = [weigher.of_step(batch, layout, 1, LossState.first(loss)) for layout in (by_rows, by_packs)]
    padded, packed = (collate(batch, [2, 0, 3], VOCAB, of_step, packed=bool(way)) for way, of_step in enumerate(weights))
    assert packed.teacher is not None and padded.teacher is not None and packed.weights is not None and padded.weights is not None
    assert torch.equal(packed.targets, padded.targets)
    for mine, theirs in zip(packed.teacher.tensors(), padded.teacher.tensors(), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(packed.weights.tensors(), padded.weights.tensors(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("position_ids", [None, torch.tensor([[0, 1, 0, 1, 2]])])
def test_every_token_is_asked_for(position_ids: Any) -> None:
    found = every_token(torch.tensor([[4, 5, 6, 7, 8]]), position_ids).to(torch.device("cpu"))
    assert found.predicting.tolist() == [0, 1, 2, 3, 4] and found.row_counts == (5,)
    assert (found.attention_mask is None) == (found.position_ids is not None) == (position_ids is not None)
