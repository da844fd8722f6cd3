"""Steps of which the student wrote some rows: the same as if all had stood in one file and one store from the start."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config.models import TrainConfig
from actors.dataloader.collator import MicroBatch, collate
from actors.dataloader.rollout_rows import MixedRows, RolloutRows
from actors.dataloader.row_sources import RowPolicy, RowSources, written_by_student
from actors.dataloader.sampler import StepSampler, layout_of
from actors.dataloader.scored_rows import FileRows, StoredRows
from actors.dataloader.step_weights import StepWeights
from actors.examples import ExampleFile, write_examples
from actors.records import Example, TeacherScores
from actors.score_store.rollout_log import RolloutLog, Sampled
from actors.score_store.store import ScoreStore, ScoringFailed
from losses.config import AtkdLoss, CoupledLoss, LossConfig
from losses.loss_state import LossState
from losses.weighing_config import TeacherLossSamples
from tests.worlds import VOCAB, random_examples, scores_from_logits

ROWS, BATCH, STEPS, TOP_K, ROWS_PER_SHARD = 20, 7, 6, 8, 8
SHARE, SEED = 0.5, 3
SAMPLES = TeacherLossSamples(kind="teacher_loss", steepness=0.7, threshold_start=4.0, threshold_end=6.0)
IDENTITY = {"top_k": TOP_K, "vocab_size": VOCAB}


def score(example: Example, seed: int) -> TeacherScores:
    logits = 3 * np.random.default_rng([seed, example.row]).normal(size=(len(example.token_ids), VOCAB))
    return scores_from_logits(example, logits, TOP_K)


def fill(folder: Path, examples: Sequence[Example], scores: Sequence[TeacherScores]) -> tuple[ExampleFile, ScoreStore]:
    folder.mkdir(parents=True)
    write_examples(folder / "rows.arrow", examples)
    store = ScoreStore.open_or_create(folder / "store", IDENTITY, len(examples), ROWS_PER_SHARD)
    for shard in range(store.shard_count):
        here = store.positions(shard)
        store.write_shard(shard, examples[here.start : here.stop], scores[here.start : here.stop])
    return ExampleFile(folder / "rows.arrow"), store


@dataclass
class World:
    """Rows of a file that are dealt into steps, and what the student answers to some of their prompts."""

    data: StoredRows
    store: ScoreStore
    log: RolloutLog
    folder: Path
    share: float = SHARE

    @property
    def rows(self) -> RolloutRows:
        return RolloutRows(self.data, self.log, self.sources)

    @property
    def sources(self) -> RowSources:
        return RowSources(RowPolicy(self.share), SEED, lambda step: len(self.data.batch(step)), STEPS)

    def mask(self, step: int) -> np.ndarray:
        return written_by_student(SEED, step, len(self.data.batch(step)), self.share)

    def written(self, step: int) -> tuple[list[Example], list[TeacherScores]]:
        """What the student writes for a step, of other lengths than the data's rows, and what the teacher says of it."""
        examples = random_examples(int(self.mask(step).sum()), seed=100 + step)
        return examples, [score(example, 100 + step) for example in examples]

    def write(self, step: int) -> None:
        examples, scores = self.written(step)
        if examples:
            sampled = [Sampled(np.zeros(len(one.targets), np.float32), True, 0) for one in examples]
            self.log.write(step, examples, scores, sampled)

    def joined(self, step: int) -> FileRows:
        """The rows of a step out of one file and store that hold exactly them, in their order."""
        batch, (examples, scores) = self.data.batch(step), self.written(step)
        of_student = iter(zip(examples, scores, strict=True))
        rows = [
            next(of_student) if written else (batch.example(row), batch.scores(row))
            for row, written in enumerate(self.mask(step))
        ]
        file, store = fill(self.folder / f"joined-{step}", [one for one, _ in rows], [one for _, one in rows])
        return FileRows(file, store, TOP_K, np.arange(len(rows)))


def world_in(folder: Path, share: float = SHARE) -> World:
    examples = random_examples(ROWS, seed=0)
    file, store = fill(folder / "data", examples, [score(example, 0) for example in examples])
    data = StoredRows(file, store, TOP_K, StepSampler(ROWS, BATCH, SEED, store_order_first=True))
    return World(data, store, RolloutLog.open_or_create(folder / "log", IDENTITY, STEPS, BATCH), folder, share)


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = world_in(tmp_path)
    for step in range(1, STEPS + 1):
        world.write(step)
    return world


def tensors(micro_batch: MicroBatch) -> list[torch.Tensor]:
    plain = [getattr(micro_batch, field.name) for field in fields(micro_batch)]
    weights = list(micro_batch.weights.tensors()) if micro_batch.weights else []
    assert micro_batch.teacher is not None
    return [one for one in plain if isinstance(one, torch.Tensor)] + weights + list(micro_batch.teacher.tensors())


def assert_equal(found: MicroBatch, wanted: MicroBatch) -> None:
    assert found.row_counts == wanted.row_counts
    for mine, theirs in zip(tensors(found), tensors(wanted), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


# ---- who writes what


def test_who_writes_a_row_follows_from_numbers_alone() -> None:
    tosses = written_by_student(5, 9, 64, 0.5)
    assert tosses.dtype == bool and tosses.shape == (64,)
    assert np.array_equal(tosses, written_by_student(5, 9, 64, 0.5))
    assert not np.array_equal(tosses, written_by_student(5, 10, 64, 0.5))
    assert not np.array_equal(tosses, written_by_student(6, 9, 64, 0.5))
    assert not (tosses & ~written_by_student(5, 9, 64, 0.7)).any(), "a larger share takes more rows, and keeps those"


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_the_student_writes_about_its_share(share: float) -> None:
    draws = np.concatenate([written_by_student(0, step, 50, share) for step in range(1, 401)])
    assert abs(draws.mean() - share) < 5 * math.sqrt(share * (1 - share) / len(draws))


def test_at_a_share_of_one_the_student_writes_all() -> None:
    assert all(written_by_student(seed, step, 32, 1.0).all() for seed in range(5) for step in range(1, 200))


# ---- the same as one file


def test_a_step_is_mixed_of_both(world: World) -> None:
    masks = [world.mask(step) for step in range(1, STEPS + 1)]
    assert any(0 < mask.sum() < len(mask) for mask in masks)
    assert {len(mask) for mask in masks} == {BATCH, ROWS % BATCH}


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_a_mixed_step_is_that_of_one_file(world: World, step: int) -> None:
    found, wanted = world.rows.batch(step), world.joined(step)
    assert len(found) == len(wanted)
    assert found.lengths.dtype == wanted.lengths.dtype and np.array_equal(found.lengths, wanted.lengths)
    for row in range(len(wanted)):
        mine, theirs = found.example(row), wanted.example(row)
        assert (mine.key, mine.row) == (theirs.key, theirs.row)
        assert np.array_equal(mine.token_ids, theirs.token_ids) and np.array_equal(mine.loss_mask, theirs.loss_mask)
        assert torch.equal(found.uncertainty(row), wanted.uncertainty(row))
    assert torch.equal(found.teacher_losses(), wanted.teacher_losses())
    every = [list(range(len(wanted))), [len(wanted) - 1, 0], [2]]
    for rows in every:
        wanted_teacher = wanted.teacher(rows)
        assert wanted_teacher is not None
        for ours, reference in zip(found.teacher(rows).tensors(), wanted_teacher.tensors(), strict=True):
            assert ours.dtype == reference.dtype and torch.equal(ours, reference)
        assert_equal(collate(found, rows, VOCAB), collate(wanted, rows, VOCAB))


@pytest.mark.parametrize(
    "loss",
    [
        AtkdLoss(kind="atkd"), AtkdLoss(kind="atkd", scope="microbatch"),
        CoupledLoss(kind="coupled", cross_entropy_weight=0.5, samples=SAMPLES),
    ],
    ids=["batch", "microbatch", "samples"],
)  # fmt: skip
def test_the_weights_of_a_mixed_step_are_those_of_one_file(world: World, loss: LossConfig) -> None:
    for step in (1, 3):
        found, wanted = world.rows.batch(step), world.joined(step)
        weigher = StepWeights(loss, SEED, store=wanted.store)
        layout = layout_of(wanted.lengths, 2, TrainConfig(micro_batch_rows=2))
        state = LossState.first(loss)
        mine, theirs = (weigher.of_step(batch, layout, step, state) for batch in (found, wanted))
        assert_equal(collate(found, range(len(found)), VOCAB, mine), collate(wanted, range(len(wanted)), VOCAB, theirs))
        assert weigher.easy_border(found) == weigher.easy_border(wanted)


def test_epochs_are_those_of_the_prompts(world: World) -> None:
    assert [world.rows.epochs_after(step) for step in range(1, STEPS + 1)] == [
        world.data.epochs_after(step) for step in range(1, STEPS + 1)
    ]


# ---- what is waited for


def test_both_halves_are_waited_for(tmp_path: Path) -> None:
    world = world_in(tmp_path)
    batch = world.rows.batch(1)
    assert 0 < world.mask(1).sum() < BATCH
    assert not batch.are_scored()
    with pytest.raises(TimeoutError, match="shard 0 of .*log did not come within"):
        batch.wait(0.02)
    world.write(1)
    assert batch.are_scored()
    assert batch.wait(30) < 30
    world.store.discard_shard(0)  # its rows that stay as they are
    assert not batch.are_scored()
    with pytest.raises(TimeoutError, match="shard 0 of .*store did not come within"):
        batch.wait(0.02)


def test_scores_of_rows_that_the_student_answers_instead_are_not_waited_for(tmp_path: Path) -> None:
    world = world_in(tmp_path, share=1.0)
    for shard in range(world.store.shard_count):
        world.store.discard_shard(shard)
    world.write(1)
    assert not world.data.batch(1).are_scored()
    assert world.rows.batch(1).are_scored() and world.rows.batch(1).wait(0) < 30


def test_a_step_without_a_row_of_the_students_does_not_wait_for_one(tmp_path: Path) -> None:
    world = world_in(tmp_path, share=1e-9)
    batch = world.rows.batch(2)
    assert not world.mask(2).any() and not world.log.is_there(2)
    assert batch.are_scored() and batch.wait(0) < 30
    assert np.array_equal(batch.lengths, world.data.batch(2).lengths)
    assert_equal(collate(batch, range(BATCH), VOCAB), collate(world.data.batch(2), range(BATCH), VOCAB))


def test_who_waits_hears_why_nothing_comes(tmp_path: Path) -> None:
    world = world_in(tmp_path)
    world.log.declare_failed("a sampler died 4 times")
    with pytest.raises(ScoringFailed, match="^a sampler died 4 times$"):
        world.rows.batch(1).wait(30)


def test_scores_of_another_row_in_the_log_are_refused(world: World) -> None:
    step = next(step for step in range(1, STEPS) if 0 < world.mask(step).sum() < BATCH)
    examples, _ = world.written(step)
    others = random_examples(len(examples), seed=999)
    write_examples(world.folder / "log" / f"written-{step - 1:05d}.arrow", others)
    batch, mine = world.rows.batch(step), int(np.flatnonzero(world.mask(step))[0])
    with pytest.raises(
        ValueError,
        match=f"^row {others[0].row} has key {others[0].key[:12]}, but the store holds scores of {examples[0].key[:12]} at its "
        "place; the store belongs to other data: score again$",
    ):
        batch.teacher([mine])
    kept = int(np.flatnonzero(~world.mask(step))[0])
    assert len(batch.teacher([kept]).target_logprob) == len(batch.example(kept).targets)


# ---- a student that answers all prompts


def test_a_student_that_answers_all_prompts_needs_no_store(tmp_path: Path) -> None:
    world = world_in(tmp_path, share=1.0)
    file = ExampleFile(tmp_path / "data" / "rows.arrow")
    data = StoredRows(file, None, TOP_K, StepSampler(ROWS, BATCH, SEED, store_order_first=True))
    rows = RolloutRows(data, world.log, world.sources)
    assert not rows.batch(2).are_scored()
    with pytest.raises(TimeoutError, match="shard 1 of .* did not come within"):
        rows.batch(2).wait(0.02)
    world.write(2)
    found, wanted = rows.batch(2), world.joined(2)
    assert isinstance(found, MixedRows)
    assert found.are_scored() and found.wait(30) < 30
    assert [found.example(row).key for row in range(BATCH)] == [example.key for example in world.written(2)[0]]
    assert np.array_equal(found.lengths, wanted.lengths)
    assert torch.equal(found.teacher_losses(), wanted.teacher_losses())
    assert_equal(collate(found, range(BATCH), VOCAB), collate(wanted, range(BATCH), VOCAB))
