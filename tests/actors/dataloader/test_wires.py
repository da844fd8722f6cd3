"""How far the losses of the student's own text are from the whole teacher's, by what the teacher says of each token."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.dataloader.collator import MicroBatch, collate
from actors.dataloader.rollout_rows import RolloutRows
from actors.dataloader.row_sources import RowPolicy, RowSources
from actors.dataloader.sampler import StepSampler
from actors.dataloader.scored_rows import StoredRows
from actors.examples import ExampleFile, write_examples
from actors.records import NO_TOKEN, Example, TeacherScores, with_candidates
from actors.score_store.identity import StoreMismatch
from actors.score_store.rollout_log import RolloutLog, Sampled
from losses.config import CoupledLoss, TeacherLoss
from losses.distillation import distillation_loss
from losses.divergence_config import ForwardKL, JensenShannon, ReverseKL, SkewReverseKL
from losses.teachers import DenseTeacher, Teacher
from losses.token_weights import token_weights
from tests.worlds import VOCAB, random_examples, scores_from_logits

ROWS, TOP_K = 6, 4
LOSSES = [
    CoupledLoss(kind="coupled", divergence=divergence) for divergence in (ReverseKL(), JensenShannon(), SkewReverseKL())
]
NAMES = ["reverse_kl", "jensen_shannon", "skew_reverse_kl"]


@dataclass(frozen=True)
class Pair:
    """Rows, and what teacher and student predict at each of their positions."""

    examples: list[Example]
    teacher: list[np.ndarray]
    """Logits [T, V] of each row."""
    student: list[np.ndarray]
    """Logits [T, V] of each row."""

    def scores(self, top_k: int, candidates: int | None = None) -> list[TeacherScores]:
        """What the teacher says, and of the student's likeliest tokens too if so many are given."""
        found = []
        for example, teacher, student in zip(self.examples, self.teacher, self.student, strict=True):
            own = scores_from_logits(example, teacher, top_k)
            if candidates is not None:
                at = example.target_positions - 1
                logprobs = torch.from_numpy(teacher[at]).double().log_softmax(dim=1).numpy()
                ids = np.argsort(-student[at], axis=1)[:, :candidates].astype(np.int32)
                own = with_candidates(replace(example, candidates=ids), own, np.take_along_axis(logprobs, ids, axis=1))
            found.append(own)
        return found

    def at_targets(self, logits: list[np.ndarray]) -> Tensor:
        """[N, V], rows one after the other."""
        places = [example.target_positions - 1 for example in self.examples]
        return torch.from_numpy(np.concatenate([one[at] for one, at in zip(logits, places, strict=True)]))


def pair_that_differs(seed: int = 0) -> Pair:
    """A student that holds other tokens likely than its teacher does."""
    generator, examples = np.random.default_rng(seed), random_examples(ROWS, seed=1)
    teacher = [3 * generator.normal(size=(len(example.token_ids), VOCAB)) for example in examples]
    return Pair(examples, teacher, [3 * generator.normal(size=one.shape) + 0.2 * one for one in teacher])


def pair_of_two_halves() -> Pair:
    """A teacher whose likely half of the tokens is the student's unlikely one."""
    generator, examples = np.random.default_rng(3), random_examples(ROWS, seed=1)
    teacher = [np.stack([generator.permutation(VOCAB) * 0.1 for _ in one.token_ids]) for one in examples]
    return Pair(examples, teacher, [-one for one in teacher])


def log_in(folder: Path, top_k: int, wire: str) -> RolloutLog:
    identity = {"rollouts": True, "top_k": top_k, "vocab_size": VOCAB, "wire": wire}
    return RolloutLog.open_or_create(folder, identity, steps=1, batch_rows=ROWS)


def through_the_log(folder: Path, pair: Pair, scores: list[TeacherScores], top_k: int, wire: str) -> MicroBatch:
    """What a worker gets of them: written to a log, and read by who follows it."""
    write_examples(folder / "data.arrow", pair.examples)
    sampled = [Sampled(np.zeros(len(one.targets), np.float32), True, 0) for one in pair.examples]
    log_in(folder / wire, top_k, wire).write(1, pair.examples, scores, sampled)
    data = StoredRows(ExampleFile(folder / "data.arrow"), None, top_k, StepSampler(ROWS, ROWS, 0, store_order_first=True))
    sources = RowSources(RowPolicy(1.0), 0, lambda step: ROWS, 1)
    return collate(RolloutRows(data, RolloutLog(folder / wire), sources).batch(1), range(ROWS), VOCAB)


def value_and_gradient(pair: Pair, teacher: Teacher, targets: Tensor, loss: TeacherLoss) -> tuple[float, Tensor]:
    student = pair.at_targets(pair.student).requires_grad_()
    weights = token_weights(torch.zeros(len(targets)), loss)
    sums = distillation_loss(student, targets, teacher, weights, loss)
    return sums.loss.item(), torch.autograd.grad(sums.loss, student)[0]


def off_by(pair: Pair, batch: MicroBatch, loss: TeacherLoss) -> tuple[float, float]:
    """How far value and gradient are off those of the whole teacher, as shares of these."""
    assert batch.teacher is not None
    dense = DenseTeacher(pair.at_targets(pair.teacher), batch.targets)
    value, gradient = value_and_gradient(pair, batch.teacher, batch.targets, loss)
    wanted, wanted_gradient = value_and_gradient(pair, dense, batch.targets, loss)
    return abs(value - wanted) / wanted, float((gradient - wanted_gradient).norm() / wanted_gradient.norm())


@pytest.mark.parametrize("loss", LOSSES, ids=NAMES)
def test_candidates_are_nearer_to_the_whole_teacher_where_the_supports_differ(tmp_path: Path, loss: TeacherLoss) -> None:
    pair = pair_that_differs()
    plain = off_by(pair, through_the_log(tmp_path, pair, pair.scores(16), 16, "top_k"), loss)
    union = off_by(pair, through_the_log(tmp_path, pair, pair.scores(16, 16), 16, "candidates"), loss)
    assert union[0] < plain[0] / 2 and union[1] < plain[1]


@pytest.mark.parametrize("loss", [*LOSSES, CoupledLoss(kind="coupled", divergence=ForwardKL())], ids=[*NAMES, "forward_kl"])
def test_candidates_that_complete_the_vocabulary_say_what_the_whole_teacher_says(tmp_path: Path, loss: TeacherLoss) -> None:
    pair, half = pair_of_two_halves(), VOCAB // 2
    union = through_the_log(tmp_path, pair, pair.scores(half, half), half, "candidates")
    assert max(off_by(pair, union, loss)) < 1e-3, "the log keeps steps of 1/2048 nat"
    plain = through_the_log(tmp_path, pair, pair.scores(half), half, "top_k")
    assert max(off_by(pair, plain, loss)) > 5e-3


def test_a_union_is_read_whole_and_with_as_many_columns_as_a_target_has(tmp_path: Path) -> None:
    pair = pair_that_differs()
    scores = pair.scores(TOP_K, TOP_K)
    batch = through_the_log(tmp_path, pair, scores, TOP_K, "candidates")
    assert batch.teacher is not None
    ids = np.concatenate([one.topk_ids for one in scores])
    counts = (ids != NO_TOKEN).sum(axis=1)
    assert counts.min() < counts.max() <= 2 * TOP_K and batch.teacher.topk_ids.shape[1] == counts.max()
    np.testing.assert_array_equal(batch.teacher.topk_ids.numpy(), ids[:, : counts.max()])
    log = RolloutLog(tmp_path / "candidates")
    for row, mine in enumerate(scores):
        np.testing.assert_array_equal(log.scores(1, row).topk_ids, mine.topk_ids)
        np.testing.assert_array_equal(log.scores(1, row, TOP_K).topk_ids, mine.topk_ids)


def test_a_teacher_that_does_not_read_its_input_is_found_whatever_the_candidates(tmp_path: Path) -> None:
    pair = pair_that_differs()
    always = pair.teacher[0][:1]
    numb = replace(pair, teacher=[np.repeat(always, len(one), axis=0) for one in pair.teacher])
    with pytest.raises(ValueError, match="the teacher does not read its input"):
        through_the_log(tmp_path, numb, numb.scores(TOP_K, TOP_K), TOP_K, "candidates")


@pytest.mark.parametrize(("first", "second"), [("top_k", "candidates"), ("candidates", "top_k"), ("top_k", "hidden")])
def test_a_log_of_another_wire_is_refused(tmp_path: Path, first: str, second: str) -> None:
    log_in(tmp_path / "log", TOP_K, first)
    with pytest.raises(StoreMismatch, match=f"wire: wanted '{second}', the store has '{first}'"):
        log_in(tmp_path / "log", TOP_K, second)
