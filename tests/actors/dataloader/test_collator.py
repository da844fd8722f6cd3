"""The one shift, and weights that do not depend on how a step is cut."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

from actors.config.models import TrainConfig
from actors.dataloader.collator import collate
from actors.dataloader.sampler import layout_of
from actors.dataloader.scored_rows import FileRows, all_rows
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile, write_examples
from actors.score_store.store import ScoreStore
from losses.config import AtkdLoss, CoupledLoss, HardLabelLoss, LossConfig
from losses.loss_state import LossState
from losses.topk_teacher import TopkTeacher
from losses.weighing_config import TeacherLossSamples, UncertainStudentTokens
from tests.worlds import VOCAB, random_examples, scored_world

ATKD = AtkdLoss(kind="atkd")


def scored(folder: Path, loss: LossConfig, *positions: int, top_k: int = 8) -> tuple[FileRows, StepWeights]:
    """Some of ten rows with their scores, and what weighs them."""
    path, store = scored_world(folder, rows=10)
    rows = all_rows(ExampleFile(path), store if loss.kind != "hard_label" else None, top_k)
    return some_of(rows, *positions), StepWeights(loss, seed=0, store=rows.store)


def some_of(rows: FileRows, *positions: int) -> FileRows:
    return replace(rows, positions=np.array(positions))


def layout(rows: int, world_size: int, micro_batch_rows: int) -> list[list]:
    return layout_of(np.full(rows, 7), world_size, TrainConfig(micro_batch_rows=micro_batch_rows))


def test_predictions_stand_one_before_their_targets(tmp_path: Path) -> None:
    batch, weigher = scored(tmp_path, ATKD, 3, 1)
    found = collate(batch, [0, 1], VOCAB, weigher.of_step(batch, layout(2, 1, 2), step=1, state=LossState()))
    index = 0
    for row, position in enumerate(batch.positions):
        example = batch.examples[int(position)]
        for place in range(len(example.token_ids)):
            assert found.token_ids[row, place] == example.token_ids[place]
            if example.loss_mask[place]:
                flat = int(found.predicting[index])
                assert divmod(flat, found.token_ids.shape[1]) == (row, place - 1)
                assert found.targets[index] == example.token_ids[place]
                index += 1
    assert index == len(found.targets) == len(found.weights)
    assert found.attention_mask.sum(dim=1).tolist() == [len(batch.examples[3].token_ids), len(batch.examples[1].token_ids)]


def test_scores_stand_beside_their_targets(tmp_path: Path) -> None:
    batch, weigher = scored(tmp_path, ATKD, 7, 2, top_k=5)
    teacher = collate(batch, [1], VOCAB, weigher.of_step(batch, layout(2, 1, 2), step=1, state=LossState())).teacher
    assert teacher is not None and batch.store is not None
    expected = batch.store.scores_at(2, top_k=5)
    assert np.array_equal(teacher.target_logprob.numpy(), expected.target_logprob)
    assert np.array_equal(teacher.topk_ids.numpy(), expected.topk_ids)
    assert teacher.topk_ids.shape[1] == 5


def test_a_store_that_keeps_a_share_gives_what_the_whole_one_gives_cut_to_that_share(tmp_path: Path) -> None:
    path, whole = scored_world(tmp_path / "whole", rows=10)
    _, share = scored_world(tmp_path / "share", rows=10, top_mass=0.5)

    def teacher_of(store: ScoreStore) -> TopkTeacher:
        teacher = collate(FileRows(ExampleFile(path), store, 8, np.arange(6)), range(6), VOCAB).teacher
        assert teacher is not None
        return teacher

    wanted, found = teacher_of(whole).keep_mass(0.5), teacher_of(share)
    kept = found.topk_ids.shape[1]
    assert kept == wanted.named.sum(dim=1).max() < 8  # columns that no row of the pass uses cost nothing
    assert torch.equal(found.topk_ids, wanted.topk_ids[:, :kept])
    torch.testing.assert_close(found.topk_logprobs, wanted.topk_logprobs[:, :kept], atol=5e-4, rtol=0)
    torch.testing.assert_close(found.tail_logmass, wanted.tail_logmass, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "loss", [ATKD, CoupledLoss(kind="coupled"), HardLabelLoss(kind="hard_label")], ids=lambda loss: loss.kind
)
def test_weights_of_a_step_do_not_depend_on_how_it_is_cut(tmp_path: Path, loss: LossConfig) -> None:
    batch, weigher = scored(tmp_path, loss, 0, 1, 2, 3, 4, 5)
    whole = weigher.of_step(batch, layout(6, 1, 6), step=1, state=LossState())
    parted = weigher.of_step(batch, layout(6, 3, 1), step=1, state=LossState())
    for one, other in zip(whole, parted, strict=True):
        for name in ("target", "diversity", "cross_entropy", "easy"):
            assert torch.equal(getattr(one, name), getattr(other, name))


def test_atkd_ranks_over_the_whole_step(tmp_path: Path) -> None:
    batch, weigher = scored(tmp_path, ATKD, 0, 1, 2, 3)
    assert batch.store is not None
    easy = torch.cat([weights.easy for weights in weigher.of_step(batch, layout(4, 2, 1), step=1, state=LossState())]).numpy()
    uncertainty = np.concatenate([batch.store.uncertainty_at(position) for position in range(4)])
    assert easy.sum() == round(0.5 * len(easy))
    assert uncertainty[easy].max() <= uncertainty[~easy].min()


def test_scope_microbatch_ranks_each_pass_and_takes_the_mean_over_passes(tmp_path: Path) -> None:
    batch, weigher = scored(tmp_path, AtkdLoss(kind="atkd", scope="microbatch"), 0, 1, 2)
    assert batch.store is not None
    for row, weights in enumerate(weigher.of_step(batch, layout(3, 3, 1), step=1, state=LossState())):
        uncertainty = batch.store.uncertainty_at(row)
        lower_median = np.sort(uncertainty)[(len(uncertainty) - 1) // 2]
        hard = uncertainty >= lower_median
        assert np.array_equal(~weights.easy.numpy(), hard)
        assert weights.target[torch.from_numpy(hard)].sum().item() == pytest.approx(0.8 / 3, rel=1e-5)


def test_scope_dataset_ranks_over_the_store(tmp_path: Path) -> None:
    batch, weigher = scored(tmp_path, AtkdLoss(kind="atkd", scope="dataset", easy_ratio=0.25), *range(10))
    assert batch.store is not None
    batches = [some_of(batch, *range(5)), some_of(batch, *range(5, 10))]
    easy = np.concatenate(
        [w.easy.numpy() for half in batches for w in weigher.of_step(half, layout(5, 1, 5), step=1, state=LossState())]
    )
    uncertainty = np.concatenate([batch.store.uncertainty_at(position) for position in range(10)])
    assert easy.sum() == round(0.25 * len(easy))
    assert uncertainty[easy].max() <= uncertainty[~easy].min()


@pytest.mark.parametrize("scope", ["batch", "dataset"])
def test_the_border_is_the_highest_uncertainty_that_is_easy(tmp_path: Path, scope: Literal["batch", "dataset"]) -> None:
    batch, weigher = scored(tmp_path, AtkdLoss(kind="atkd", scope=scope, easy_ratio=0.25), 0, 1, 2, 3)
    assert batch.store is not None
    ranked = batch.positions if scope == "batch" else range(10)
    of_all = np.sort(np.concatenate([batch.store.uncertainty_at(int(position)) for position in ranked]))
    limit = of_all[round(0.25 * len(of_all)) - 1]
    in_step = np.concatenate([batch.store.uncertainty_at(int(position)) for position in batch.positions])
    assert weigher.easy_border(batch) == {"easy_border": pytest.approx(in_step[in_step <= limit].max())}


@pytest.mark.parametrize(
    "loss",
    [
        AtkdLoss(kind="atkd", scope="microbatch"), AtkdLoss(kind="atkd", split="random"),
        AtkdLoss(kind="atkd", split="inverted"), AtkdLoss(kind="atkd", easy_ratio=0), CoupledLoss(kind="coupled"),
    ],
)  # fmt: skip
def test_where_no_uncertainty_parts_the_step_there_is_no_border(tmp_path: Path, loss: LossConfig) -> None:
    batch, weigher = scored(tmp_path, loss, 0, 1, 2, 3)
    assert weigher.easy_border(batch) == {}


def test_a_random_split_differs_from_step_to_step_and_comes_again(tmp_path: Path) -> None:
    batch, weigher = scored(tmp_path, AtkdLoss(kind="atkd", split="random"), *range(10))
    first, second, again = (
        torch.cat([weights.easy for weights in weigher.of_step(batch, layout(10, 1, 10), step=step, state=LossState())])
        for step in (1, 2, 1)
    )
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


def test_a_pass_without_weight_adds_nothing(tmp_path: Path) -> None:
    batch, _ = scored(tmp_path, ATKD, 4, 5)
    found = collate(batch, [0], VOCAB).weighed([])
    assert found.weights is not None
    assert len(found.targets) == len(found.weights) > 0
    assert not found.weights.target.any() and not found.weights.diversity.any()


def test_scores_of_other_rows_are_refused(tmp_path: Path) -> None:
    _, store = scored_world(tmp_path, rows=10)
    write_examples(tmp_path / "other.arrow", random_examples(10, seed=5))
    examples = ExampleFile(tmp_path / "other.arrow")
    with pytest.raises(ValueError, match="row 2 has key .* but the store holds scores of .* the store belongs to other data"):
        collate(FileRows(examples, store, 8, np.arange(3)), [2], VOCAB)


def test_waiting_covers_the_shards_of_the_batch_alone(tmp_path: Path) -> None:
    batch, weigher = scored(tmp_path, ATKD, 0, 7)
    assert batch.store is not None
    batch.store.discard_shard(1)
    assert weigher.wait_for_scores(batch, timeout_seconds=0.1) < 0.1
    with pytest.raises(TimeoutError, match="shard 1 .* did not come within"):
        weigher.wait_for_scores(some_of(batch, 7, 8), timeout_seconds=0.1)
    of_all = StepWeights(AtkdLoss(kind="atkd", scope="dataset"), seed=0, store=batch.store)
    with pytest.raises(TimeoutError, match="shard 1 "):
        of_all.wait_for_scores(batch, timeout_seconds=0.1)


def test_rows_weigh_by_the_teachers_own_loss_and_what_they_lose_goes_to_cross_entropy(tmp_path: Path) -> None:
    samples = TeacherLossSamples(kind="teacher_loss", steepness=0.7, threshold_start=4.0, threshold_end=6.0)
    loss = CoupledLoss(kind="coupled", samples=samples, cross_entropy_weight=0.5)
    batch, weigher = scored(tmp_path, loss, 0, 1, 2)
    assert batch.store is not None
    _, plain = scored(tmp_path, CoupledLoss(kind="coupled", cross_entropy_weight=0.5))
    state = LossState(progress=0.25)  # the threshold stands at 4.5
    rows = weigher.of_step(batch, layout(3, 1, 3), step=1, state=state)
    for position, (row, unweighed) in enumerate(
        zip(rows, plain.of_step(batch, layout(3, 1, 3), step=1, state=state), strict=True)
    ):
        teacher_loss = -batch.store.scores_at(position).target_logprob.astype(float).mean()
        share = math.exp(-1 / math.sqrt(math.exp(-0.7 * (teacher_loss - 4.5))))
        torch.testing.assert_close(row.divergence, unweighed.divergence * share)
        torch.testing.assert_close(row.cross_entropy, unweighed.cross_entropy * (1 - share))


def test_taught_tokens_weigh_more_by_what_the_others_do_not_weigh(tmp_path: Path) -> None:
    loss = CoupledLoss(kind="coupled", tokens=UncertainStudentTokens(fraction=0.4))
    batch, weigher = scored(tmp_path, loss, 0, 1, 2)
    rows = weigher.of_step(batch, layout(3, 1, 3), step=1, state=LossState.first(loss))
    counts = [len(row) for row in rows]
    taught = sum(max(1, round(0.4 * count)) for count in counts)
    assert torch.cat([row.divergence for row in rows]).tolist() == pytest.approx([1 / taught] * sum(counts))


def test_scores_of_another_vocabulary_are_refused_before_they_reach_a_device(tmp_path: Path) -> None:
    batch, _ = scored(tmp_path, ATKD, 0, 1)
    with pytest.raises(ValueError, match="targets holds .*; ids of a vocabulary of 20 tokens are 0 to 19"):
        collate(batch, [0, 1], 20)
